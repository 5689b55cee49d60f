"""From a command line to an exit status: what is checked first, and how a program ends."""

import argparse
import contextlib
import importlib
import os
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from grok1.command import advice, streams
from grok1.command.parser import parse
from grok1.machine import background

INTERRUPTED = 128 + 2  # what a shell reports of a program that SIGINT ends
_BROKEN_PIPE = 128 + 13  # likewise of SIGPIPE

_MODULES = {"generate": "grok1.command.generate", "serve": "grok1.command.serve"}
_TOOLS = "grok1.command.tools"


def main(
    arguments: Sequence[str] | None = None,
    program: str = "grok1",
    command: str | None = None,
    checkpoints: pathlib.Path = pathlib.Path("checkpoints"),
) -> int:
    """Runs one command and returns the exit status.

    Args:
      arguments: What follows the program's name; None for this process's.
      program: The name that messages begin with.
      command: The command that the program is, where it is one alone, as `run.py` is `generate`.
      checkpoints: Where the model is looked for if no directory is given.
    """
    streams.prepare()
    with _warnings_of(program):
        return _run(sys.argv[1:] if arguments is None else arguments, program, command, checkpoints)


def _run(
    arguments: Sequence[str], program: str, command: str | None, checkpoints: pathlib.Path
) -> int:
    parsed = argparse.Namespace()
    try:
        parsed = _parsed(arguments, program, command)
        parsed.program, parsed.checkpoints = program, checkpoints
        _check_directories(parsed)
        with _interruptible_imports():
            module = importlib.import_module(_MODULES.get(parsed.command, _TOOLS))
        status = module.run(parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Nobody reads on, as behind `| head`.
        streams.hush()
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        after = (
            "; the same command continues it" if getattr(parsed, "command", "") == "convert" else ""
        )
        print(f"\n{program}: interrupted{after}", file=sys.stderr)
        background.do_not_wait(INTERRUPTED)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        message = str(error)
        if isinstance(error, MemoryError):
            message = f"out of memory{message and ': '}{message}; `grok1 plan` says what it takes"
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            message = f"{os.fsdecode(error.filename)}: {error.strerror}"
        if not isinstance(error, advice.FileError):
            message = advice.in_options(message, vars(parsed))
        print(f"{program}: {message}", file=sys.stderr)
        streams.hush()
        return 1


def _parsed(arguments: Sequence[str], program: str, command: str | None) -> argparse.Namespace:
    try:
        return parse(arguments, program, command)
    except SystemExit:
        # Of --help and --version: what they print may not have got through yet.
        sys.stdout.flush()
        raise


def _check_directories(parsed: argparse.Namespace) -> None:
    """Refuses a directory that is not there, before anything large is imported.

    Where there may be several processes, all have to hear of it: the command itself sees to that.
    """
    if any(name in os.environ for name in _LAUNCHERS) or getattr(parsed, "coordinator", None):
        return
    for name in ("checkpoint", "directory", "source", "a", "b"):
        path = getattr(parsed, name, None)
        # No shell has put a home into `--checkpoint=~/model`.
        if isinstance(path, pathlib.Path) and not pathlib.Path(os.path.expanduser(path)).exists():
            kind = "directory, nor file of logits" if name in ("a", "b") else "directory"
            raise FileNotFoundError(f"{path}: there is no such {kind}")


_LAUNCHERS = (
    "JAX_COORDINATOR_ADDRESS",
    "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_ID",
)


@contextlib.contextmanager
def _warnings_of(program: str) -> Iterator[None]:
    """Shows warnings in one line each, as what the program says, without the code behind them."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{program}: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Lets Ctrl-C end the program at once while it imports, where an exception may be lost."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
