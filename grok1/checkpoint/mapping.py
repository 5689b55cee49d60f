"""Parts of files where the system's page cache has them: read without a copy.

A mapped file that cannot be read ends the process when it is touched. Here every page of a window
is asked for first, by `MADV_POPULATE_READ`, which reports what fails; the window is then used at
once, looked at once more, and closed. What remains is a file cut off within that moment.
"""

import ctypes
import functools
import mmap
import os
import sys

import numpy as np

from grok1.checkpoint.tensor_file import (
    CHANGED,
    DataFile,
    check_unchanged,
    open_unchanged,
    read_at,
)
from grok1.files import CheckpointError, unreadable

# linux/mman.h; the second since Linux 5.14.
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22
# Of several huge pages, and aligned as they are. Where two threads ask for parts of one, or one
# reads ahead into what another reads, the page cache gets small pages, which take longer to map,
# every time: with blocks of 8 MiB for 14 to 17 % of a file, with these for 4 %. Larger ones would
# leave threads without work while the last ones of an expert come.
_BLOCK_BYTES = 1 << 24


class Window:
    """A part of a file in memory, until it is closed.

    Attributes:
      address: Of its first byte.
      nbytes: Its length.
    """

    def __init__(self, file: DataFile, offset: int, nbytes: int):
        """Maps a part of a file; nothing is read yet.

        Raises:
          CheckpointError: If the file cannot be mapped, or has changed since its header was
            read.
        """
        self.nbytes = nbytes
        self._file = file
        self._start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        self._size = offset + nbytes - self._start
        with open_unchanged(file) as descriptor:
            try:
                self._map = mmap.mmap(
                    descriptor, self._size, access=mmap.ACCESS_READ, offset=self._start
                )
            except ValueError as error:  # it has been cut off since it was opened
                raise CheckpointError(
                    file.path,
                    f"ends before byte {self._start + self._size}, expected the {file.file_size} "
                    "bytes it had when its header was read",
                    CHANGED,
                ) from error
            except OSError as error:
                raise CheckpointError(
                    file.path,
                    f"cannot be mapped: {error.strerror}",
                    "give less memory to other programs, or raise the limit on a process's mapped "
                    "memory",
                    "unreadable",
                ) from error
        # The address outlives the array, which would keep the map from being closed.
        self._base = np.frombuffer(self._map, np.uint8).ctypes.data
        # Where the file system has huge pages, they are read and mapped as one.
        _madvise(self._base, self._size, _MADV_HUGEPAGE)
        self.address = self._base + offset - self._start

    def close(self) -> None:
        """Gives the window up; its address is no longer valid."""
        self._map.close()

    def check(self) -> None:
        """Checks that what it shows has not been written to since the header was read.

        Raises:
          CheckpointError: If it has been, or nobody can say.
        """
        try:
            found = os.stat(self._file.path)
        except OSError as error:
            raise unreadable(self._file.path, error) from error
        check_unchanged(self._file, found)

    def bytes(self) -> np.ndarray:
        """Returns its bytes as int8, valid until it is closed."""
        return np.ctypeslib.as_array((ctypes.c_int8 * self.nbytes).from_address(self.address))

    def blocks(self) -> list[tuple["Window", int]]:
        """Returns what `populate` takes: all of the window, in pieces."""
        places = range(-(self._start % _BLOCK_BYTES), self._size, _BLOCK_BYTES)
        return [(self, max(0, place)) for place in places]

    def populate(self, place: int) -> None:
        """Has the pages of a block in memory, read from the disk where they are not yet.

        Args:
          place: Of the block; other threads may take other blocks meanwhile.

        Raises:
          CheckpointError: If the file cannot be read.
        """
        size = min(_BLOCK_BYTES - (self._start + place) % _BLOCK_BYTES, self._size - place)
        if _madvise(self._base + place, size, _MADV_POPULATE_READ):
            # Reading says what is wrong.
            with open_unchanged(self._file) as descriptor:
                buffer = memoryview(bytearray(size))
                read_at(self._file, descriptor, self._start + place, buffer)


@functools.cache
def is_available() -> bool:
    """Whether this system can ask for the pages of a mapped file: Linux 5.14 or later."""
    if sys.platform != "linux":
        return False
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = np.frombuffer(page, np.uint8).ctypes.data
    return _madvise(address, mmap.PAGESIZE, _MADV_POPULATE_READ) == 0


def _madvise(address: int, size: int, advice: int) -> int:
    """Returns 0, or the number of the error. Other threads run meanwhile."""
    return ctypes.get_errno() if _madvise_of_system()(address, size, advice) else 0


@functools.cache
def _madvise_of_system():
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
