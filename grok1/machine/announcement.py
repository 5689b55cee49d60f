"""Says on stderr what takes long, while it does, and what a user should know."""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax._src import distributed as jax_distributed

PATIENCE = 2.0
"""Seconds that pass in silence."""


@contextlib.contextmanager
def announced(work: str) -> Iterator[None]:
    """Prints "grok1: {work} ..." if the block takes longer than `PATIENCE`, then how long it took.

    Only the first of several processes speaks.
    """
    lock = threading.Lock()
    spoken = finished = False
    start = time.perf_counter()

    def speak():
        nonlocal spoken
        with lock:
            if not finished and jax.process_index() == 0:
                say(f"grok1: {work} ...", end="")
                spoken = True

    timer = threading.Timer(PATIENCE, speak)
    timer.daemon = True
    timer.start()
    outcome = "stopped after"
    try:
        yield
        outcome = "done in"
    finally:
        timer.cancel()
        with lock:
            finished = True
        if spoken:
            seconds = time.perf_counter() - start
            say(f" {outcome} {seconds:.1f} s")


@functools.cache
def hint(words: str) -> None:
    """Prints "grok1: {words}", once; of several processes that say the same, one does."""
    client = jax_distributed.global_state.client
    if client is not None:
        try:
            # The first to note it speaks: what is noted cannot be noted again.
            client.key_value_set(f"grok1/hint/{words}", "")
        except Exception:
            return
    say(f"grok1: {words}")


def say(words: str, end: str = "\n") -> None:
    """Prints to stderr, if there is one and somebody reads it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(words, end=end, file=sys.stderr, flush=True)
