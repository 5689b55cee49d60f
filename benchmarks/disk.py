"""How fast the disk delivers files that the system does not hold in memory."""

import os
import pathlib
import subprocess
import sys
import time

from benchmarks.process import BenchmarkError
from grok1.machine.host_memory import host_bytes_available

_BUFFER_BYTES = 1 << 23
_SHARE = 0.9  # of the memory available, so that nothing else is driven out


def forget(directory: pathlib.Path) -> None:
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
    forget(directory)
    use_memory(directory)
    buffer = bytearray(_BUFFER_BYTES)
    num_bytes = 0
    start = time.perf_counter()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes / (time.perf_counter() - start)
