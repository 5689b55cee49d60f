"""Work that a caller waits for and may leave: what cannot be interrupted runs in another thread.

The main thread hears of Ctrl-C between two steps of Python's, and a compiler written in C++ takes
none for seconds or minutes. In the middle of JAX an interruption is worse than late: raised in a
callback it is swallowed, and what goes on in C++ when Python ends is a fault.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

_LOOK_SECONDS = 0.5

_lock = threading.Lock()
_working: list[threading.Thread] = []
_endless: list[tuple[threading.Thread, Callable[[], float | None]]] = []
_status: int | None = None


def in_background(function: Callable[[], Any]) -> Future:
    """Starts a function in another thread.

    Args:
      function: What to call; it goes on when nobody waits for it any more.

    Returns:
      Its result, for which a wait can be interrupted.
    """
    future: Future = Future()

    def run():
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    # Python waits for a thread of another kind before anything else at its end, however long.
    thread = threading.Thread(target=run, name="grok1", daemon=True)
    with _lock:
        _working[:] = [*filter(threading.Thread.is_alive, _working), thread]
        thread.start()
    return future


def start_endless(
    function: Callable[[], Any], name: str, end: Callable[[], float | None]
) -> threading.Thread:
    """Starts a thread that goes on until it is told to end, at the latest at the end of Python.

    Args:
      function: What it runs.
      name: Its name.
      end: Tells it, and returns the seconds that it may take; None for any number.
    """
    thread = threading.Thread(target=function, name=name, daemon=True)
    with _lock:
        _endless[:] = [*(one for one in _endless if one[0].is_alive()), (thread, end)]
        thread.start()
    # Before what JAX and others, imported since, have to do at the end.
    atexit.unregister(_finish)
    atexit.register(_finish)
    return thread


_interruptions: list[int] = []


def _note(number, frame) -> None:
    _interruptions.append(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[Future], Any]]:
    """Lets no interruption be lost in a block, such as one that starts work and waits for it.

    Python raises it wherever the main thread is, and what is raised while garbage is collected, in
    a finaliser or a callback, is only printed. It is not printed here, since it is raised again.

    Yields:
      Takes what `in_background` returned and waits for its result; an interruption since the
      outermost block began is raised there, or at the end of the block, if it was not before.
    """
    handler, print_lost = signal.getsignal(signal.SIGINT), sys.unraisablehook
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or handler not in (signal.default_int_handler, _note):
        yield Future.result
        return
    if handler is not _note:
        _interruptions.clear()

    def raise_lost():
        if _interruptions:
            raise KeyboardInterrupt

    def print_others(lost):
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            print_lost(lost)

    def wait(future: Future) -> Any:
        while not _interruptions:
            with contextlib.suppress(TimeoutError):
                future.exception(_LOOK_SECONDS)
                break
        raise_lost()
        return future.result()

    try:
        sys.unraisablehook = print_others
        signal.signal(signal.SIGINT, _note)
        yield wait
        raise_lost()
    except Exception:
        # Raised in the midst of taking or giving back a lock, it comes out as that lock's error.
        raise_lost()
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = print_lost


def do_not_wait(status: int) -> None:
    """Lets the end of this process wait for no work, because its user has interrupted it.

    Args:
      status: What the caller of the program is told, if work is running then.
    """
    global _status
    _status = status


@atexit.register
def _finish() -> None:
    """Lets no thread be in the middle of C++ when Python ends."""
    endless = [(thread, end()) for thread, end in _endless if thread.is_alive()]
    working = [thread for thread in _working if thread.is_alive()]
    working += [thread for thread, seconds in endless if seconds is None]
    is_interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    if working and (is_interrupted or _status is not None):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        if _status is not None:
            os._exit(_status)
        # As Python ends a program that has not caught it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    for thread in working:
        thread.join()
    for thread, seconds in endless:
        thread.join(seconds)
