"""The child process that holds a model, driven line by line.

The process that measures holds no model and no device, so that children with different numbers of
threads, and other programs, can take turns with nothing running beside them.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


class BenchmarkError(Exception):
    """What cannot be measured, and what to do about it."""


def available_threads() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def on_cpus(threads: int | None) -> Iterator[None]:
    """Lets the processes started inside run on this many of the CPUs; None for all.

    Where a system has no affinity they may run anywhere, and must limit their threads themselves.
    """
    if threads is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Worker:
    """A child process that runs the commands of `worker.Session`, one after the other.

    Args:
      threads: CPUs it may use, which bounds XLA's threads and the kernels'; None for all.
      environment: Variables to set in it, or, where the value is None, to take away.
    """

    def __init__(
        self, threads: int | None = None, environment: Mapping[str, str | None] | None = None
    ):
        variables: dict[str, str | None] = {**os.environ, **(environment or {})}
        if threads is not None:
            variables["GROK1_NUM_THREADS"] = str(threads)
        with on_cpus(threads):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env={name: value for name, value in variables.items() if value is not None},
                text=True,
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def call(self, command: str, **arguments: Any) -> Any:
        """Runs one command and returns what it returned, as JSON carries it.

        Raises:
          BenchmarkError: If the command refuses, or the process ends.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(f"the process that runs the model {self._end()} in {command!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise BenchmarkError(reply["error"])
        return reply["result"]

    def _end(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "was killed, most likely for want of memory,"
        return f"ended with status {status}"
