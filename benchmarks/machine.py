"""The machine: its CPUs, the child process that holds a model, and the disk.

The child is driven line by line. The process that measures holds no model and no device, so that
children with different numbers of threads, and other programs, can take turns with nothing running
beside them.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from grok1.machine.host_memory import host_bytes_available

ROOT = pathlib.Path(__file__).parent.parent

_BUFFER_BYTES = 1 << 23
_SHARE = 0.9  # of the memory available, so that nothing else is driven out


class BenchmarkError(Exception):
    """What cannot be measured, and what to do about it."""


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


def forget_files(directory: pathlib.Path) -> None:
    """Drops a directory's files from the page cache.

    Raises:
      BenchmarkError: If the system cannot.
    """
    if not hasattr(os, "posix_fadvise"):
        raise BenchmarkError("this system cannot drop files from its cache; leave out `load`")
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on disk yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def use_memory(directory: pathlib.Path) -> None:
    """Takes and gives back memory for two copies of a directory's files, as loading them needs.

    The host of a virtual machine takes back memory that has been free for some seconds, and
    touching it again can take several times as long as reading a file into it. Without this,
    whoever reads first after a pause would be measured slower.

    Raises:
      BenchmarkError: If the system does not give that much.
    """
    num_bytes = 2 * sum(path.stat().st_size for path in directory.iterdir())
    available = host_bytes_available()
    if available is not None:
        num_bytes = min(num_bytes, int(_SHARE * available))
    # In another process, whose memory is not measured, and is given back for certain.
    done = subprocess.run(
        [sys.executable, "-c", f"b'.' * {num_bytes}"], stderr=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise BenchmarkError(
            f"a process could not use {num_bytes / 1e9:.1f} GB of memory (status "
            f"{done.returncode}); end other programs, or leave out `load`"
        )


def read_rate(directory: pathlib.Path) -> float:
    """Reads a directory's files one after the other, as `cat` does; bytes per second."""
    forget_files(directory)
    use_memory(directory)
    buffer = bytearray(_BUFFER_BYTES)
    num_bytes = 0
    start = time.perf_counter()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes / (time.perf_counter() - start)
