"""Slices of arrays on disk, read by several threads into memory that the caller gives.

Blocks of some megabytes are read side by side, as fast as the disk gives them. What is wanted in
the order and type that the file has goes straight to its place; what is not - the columns of
several devices, transposed matrices, other types - through a block of staging memory a thread. Only
what is wanted is read, and once, however many devices want it.
"""

import collections
import contextlib
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from grok1.checkpoint.storage import StoredArray, transpose_into
from grok1.checkpoint.tensor_file import DTYPES, DataFile, open_unchanged, read_at
from grok1.files import CheckpointError
from grok1.machine.processor import available_cores

_MOST_THREADS = 8
_BLOCK_BYTES = 1 << 25  # that go through staging memory
# The kernel begins anew to read ahead at every block: of four times the size they come a fifth
# faster, of half the size a fifth slower.
_DIRECT_BYTES = 1 << 27
_MAX_QUEUED = 64  # blocks; so that what is left to do takes no memory to speak of
_LARGE_FILE = 1 << 26  # bytes; smaller ones may stay in the page cache

Bounds = tuple[int, int]
"""First index, and the one behind the last."""


class Target(NamedTuple):
    """A slice of an array and where it goes.

    Attributes:
      bounds: Its bounds along each axis.
      out: Array of the slice's shape, of any type that the elements convert to.
    """

    bounds: tuple[Bounds, ...]
    out: np.ndarray


class _Piece(NamedTuple):
    """What one target wants of a matrix, in the order of the file's axes."""

    rows: Bounds
    columns: Bounds
    out: np.ndarray  # [rows, columns], transposed if the file is


class _Block(NamedTuple):
    """Rows of the same columns of a matrix in a file."""

    file: DataFile
    offset: int
    num_rows: int
    row_bytes: int
    row_stride: int
    dtype: np.dtype
    transposed: bool
    is_direct: bool
    pieces: list[tuple[int, np.ndarray]]  # first column in the block; [num_rows, some columns]


class _Rest:
    """Blocks that are still to be read until something can be done with all of them."""

    def __init__(self, num_blocks: int, then: Callable[[], Any]):
        self._num_blocks, self._then = num_blocks, then
        self._lock = threading.Lock()

    def count(self) -> None:
        """Counts one that has been read."""
        with self._lock:
            self._num_blocks -= 1
            is_last = self._num_blocks == 0
        if is_last:
            self._then()


class Reader:
    """Reads slices in the background; a context, which at its end drops what is not yet read.

    Attributes:
      bytes_read: Bytes read from files so far.
    """

    def __init__(self, on_bytes: Callable[[int], Any], keep_pages: bool = False):
        """Starts no thread yet.

        Args:
          on_bytes: Called in the caller's thread with the bytes that have come to their place.
          keep_pages: Leave what was read in the system's page cache, for other processes.
        """
        self.bytes_read = 0
        self._on_bytes, self._keep_pages = on_bytes, keep_pages
        self._pool = ThreadPoolExecutor(_num_threads(), "grok1-reader")
        self._staging = threading.local()
        self._queue: collections.deque[Future[tuple[int, int]]] = collections.deque()
        self._num_submitted = self._num_collected = 0
        self._to_drop: dict[pathlib.Path, DataFile] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        # A file that has changed or gone has had its error, if it was still to be read.
        for file in self._to_drop.values():
            with contextlib.suppress(CheckpointError), open_unchanged(file) as descriptor:
                _drop_pages(descriptor, 0, file.file_size)

    def submit(
        self,
        array: StoredArray,
        targets: Sequence[Target],
        then: Callable[[], Any] = lambda: None,
    ) -> int:
        """Asks for slices of an array; waits while too much is asked for.

        Args:
          array: The array.
          targets: The slices, equal ones or ones without a common element.
          then: Called in the thread that has read the last of it, before `wait` returns; what it
            raises is raised as a file's error is.

        Returns:
          A number for `wait`.

        Raises:
          CheckpointError: If something asked for earlier could not be read.
        """
        blocks = list(_blocks(array, targets))
        rest = _Rest(len(blocks), then)
        for block in blocks:
            if len(self._queue) == _MAX_QUEUED:
                self._collect()
            self._queue.append(self._pool.submit(self._read, block, rest))
            self._num_submitted += 1
        return self._num_submitted

    def wait(self, number: int | None = None) -> None:
        """Waits until what `submit` returned this number for is in its place; None: everything.

        Raises:
          CheckpointError: If a file cannot be read, or its length has changed since its header was
            read.
        """
        number = self._num_submitted if number is None else number
        while self._num_collected < number:
            self._collect()

    def _collect(self) -> None:
        num_read, num_placed = self._queue.popleft().result()
        self._num_collected += 1
        self.bytes_read += num_read
        self._on_bytes(num_placed)

    def _read(self, block: _Block, rest: "_Rest") -> tuple[int, int]:
        """Returns the bytes read, and the bytes that came to a place."""
        num_bytes = block.num_rows * block.row_bytes
        if block.is_direct:
            raw = block.pieces[0][1].reshape(-1).view(np.uint8)
        else:
            raw = self._staged(num_bytes)
        buffer = raw.data
        with open_unchanged(block.file) as descriptor:
            # Rows that follow one another are one.
            whole = block.row_stride == block.row_bytes
            size = num_bytes if whole else block.row_bytes
            for row, start in enumerate(range(0, num_bytes, size)):
                place = block.offset + row * block.row_stride
                read_at(block.file, descriptor, place, buffer[start : start + size])
            if block.file.file_size >= _LARGE_FILE and not self._keep_pages:
                self._to_drop[block.file.path] = block.file
                # At once: memory just used is cheap to use again.
                end = block.offset + block.num_rows * block.row_stride
                _drop_pages(descriptor, block.offset, end)
        if not block.is_direct:
            staged = raw.view(block.dtype).reshape(block.num_rows, -1)
            for first, out in block.pieces:
                if block.transposed:
                    columns = staged[:, first : first + out.shape[0]]
                    transpose_into(out, columns)
                else:
                    out[...] = staged[:, first : first + out.shape[1]]
        rest.count()
        return num_bytes, sum(out.nbytes for _, out in block.pieces)

    def _staged(self, num_bytes: int) -> np.ndarray:
        """This thread's staging memory."""
        memory = getattr(self._staging, "memory", None)
        if memory is None or len(memory) < num_bytes:
            memory = self._staging.memory = np.empty(max(num_bytes, _BLOCK_BYTES), np.uint8)
        return memory[:num_bytes]


def _num_threads() -> int:
    # More than the cores can serve fight in the kernel for its page cache: on two cores eight read
    # a third slower than three.
    return min(_MOST_THREADS, available_cores() + 1)


def _drop_pages(descriptor: int, start: int, end: int) -> None:
    """Lets the page cache forget the pages of a file that lie whole between two bytes."""
    # A wish: the file may lie where nothing is cached, and macOS has no such call.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def _blocks(array: StoredArray, targets: Sequence[Target]) -> Iterator[_Block]:
    """Splits slices into reads, each element once, in the order of the file."""
    dtype = DTYPES[array.dtype]
    matrices: dict[int, list[_Piece]] = {}
    for bounds, out in targets:
        if len(array.shape) == 1:  # a vector is a matrix of one column
            bounds, out = (*bounds, (0, 1)), out[:, None]
        *lead, rows, columns = bounds
        numbers = np.arange(array.num_matrices).reshape(array.shape[:-2])
        chosen = numbers[tuple(slice(*pair) for pair in lead)]
        if array.transposed:
            rows, columns = columns, rows
        for place, number in np.ndenumerate(chosen):
            matrices.setdefault(int(number), []).append(_Piece(rows, columns, out[place]))
    size = array.num_rows, math.prod(array.shape[-1:]) if len(array.shape) > 1 else 1
    num_columns = size[0] if array.transposed else size[1]
    for number, pieces in sorted(matrices.items()):
        file, span = array.parts[number if len(array.parts) > 1 else 0]
        start = span.offset
        if len(array.parts) == 1:
            start += number * (span.nbytes // array.num_matrices)
        for rows, columns, members in _merged(pieces):
            row_bytes = (columns[1] - columns[0]) * dtype.itemsize
            is_direct = not array.transposed and _is_direct(members, dtype)
            step = max(1, (_DIRECT_BYTES if is_direct else _BLOCK_BYTES) // row_bytes)
            for first in range(*rows, step):
                here = slice(first - rows[0], min(first + step, rows[1]) - rows[0])
                yield _Block(
                    file,
                    start + (first * num_columns + columns[0]) * dtype.itemsize,
                    here.stop - here.start,
                    row_bytes,
                    num_columns * dtype.itemsize,
                    dtype,
                    array.transposed,
                    is_direct,
                    [
                        (
                            piece.columns[0] - columns[0],
                            piece.out[:, here] if array.transposed else piece.out[here],
                        )
                        for piece in members
                    ],
                )


def _is_direct(pieces: list[_Piece], dtype: np.dtype) -> bool:
    """Whether rows of a file can be read to where they go."""
    out = pieces[0].out
    return len(pieces) == 1 and out.dtype == dtype and out.flags.c_contiguous


def _merged(pieces: list[_Piece]) -> Iterator[tuple[Bounds, Bounds, list[_Piece]]]:
    """Yields (rows, columns, pieces) of the pieces with the same rows and neighbouring columns."""
    run: list[_Piece] = []
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece[:2]):
        if run and (piece.rows != run[0].rows or piece.columns[0] > end):
            yield run[0].rows, (run[0].columns[0], end), run
            run = []
        end = max(end, piece.columns[1]) if run else piece.columns[1]
        run.append(piece)
    yield run[0].rows, (run[0].columns[0], end), run
