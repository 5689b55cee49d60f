"""How fast the disk delivers files that the system does not hold in memory."""

import os
import pathlib
import time

from benchmarks.process import BenchmarkError

_BUFFER_BYTES = 1 << 23


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


def read_rate(directory: pathlib.Path) -> float:
    """Reads a directory's files one after the other, as `cat` does; bytes per second."""
    forget(directory)
    buffer = bytearray(_BUFFER_BYTES)
    num_bytes = 0
    start = time.perf_counter()
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes / (time.perf_counter() - start)
