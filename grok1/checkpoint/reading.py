"""Slices of arrays on disk, read by several threads to where the caller wants them.

Blocks of some megabytes are read side by side, as fast as the disk or the page cache gives them.
What is wanted in the host's memory, in the order and type that the file has, goes straight to its
place; what is not - the columns of several devices, transposed matrices, other types - through a
block of staging memory a thread; what goes to a device's memory, through a thread's slots of pinned
memory (`sending`). Only what is wanted is read, and once, however many devices want it.
"""

import collections
import contextlib
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from grok1.checkpoint import native
from grok1.checkpoint.blocks import BLOCK_BYTES, Block, Check, Target, blocks
from grok1.checkpoint.sending import Sender
from grok1.checkpoint.storage import StoredArray, transpose_into
from grok1.checkpoint.tensor_file import DataFile, open_unchanged
from grok1.files import CheckpointError
from grok1.machine.processor import available_cores

_MOST_THREADS = 16
_MAX_QUEUED = 64  # blocks; so that what is left to do takes no memory to speak of
_LARGE_FILE = 1 << 26  # bytes; smaller ones may stay in the page cache


class Reader:
    """Reads slices in the background; a context, which at its end drops what is not yet read.

    There is a thread more than there are cores for this process, up to sixteen: one copies 5 to
    10 GB/s out of the page cache, and a device takes 50. Staging memory is 32 MiB a thread that
    needs any; pinned memory is as `sending.Sender` says.

    Attributes:
      bytes_read: Bytes read from files so far.
      num_threads: How many read.
    """

    def __init__(
        self, on_bytes: Callable[[int], Any], keep_pages: bool = False, name: str = "grok1-reader"
    ):
        """Starts no thread yet.

        Args:
          on_bytes: Called in the caller's thread with the bytes that have come to their place.
          keep_pages: Leave what was read in the system's page cache, for other processes.
          name: Of the threads.
        """
        self.bytes_read = 0
        self._on_bytes, self._keep_pages = on_bytes, keep_pages
        self.num_threads = _num_threads()
        self._pool = ThreadPoolExecutor(self.num_threads, name)
        self._staging, self._sender, self._stop = threading.local(), Sender(), native.Stop()
        self._queue: collections.deque[Future[tuple[int, int]]] = collections.deque()
        self._num_submitted = self._num_collected = 0
        self._to_drop: dict[pathlib.Path, DataFile] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def stop(self) -> None:
        """Ends what is being read: a thread that waits for it gets a CancelledError."""
        self._stop.set()

    def close(self) -> None:
        """Drops what is not yet read, and waits until nothing is being read or copied."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        # Until then the devices' arrays are written to.
        self._sender.wait()
        # A file that has changed or gone has had its error, if it was still to be read.
        for file in self._to_drop.values():
            with contextlib.suppress(CheckpointError), open_unchanged(file) as descriptor:
                _drop_pages(descriptor, 0, file.file_size)

    def submit(
        self,
        array: StoredArray,
        targets: Sequence[Target],
        check: Check | None = None,
        most_bytes: int | None = None,
    ) -> int:
        """Asks for slices of an array; waits while too much is asked for.

        Args:
          array: The array.
          targets: The slices, as for `blocks`.
          check: Called in the threads that read with all that they have read, in parts; what it
            raises is raised as a file's error is.
          most_bytes: Of a block that goes to devices; None for what is best for many.

        Returns:
          A number for `wait`.

        Raises:
          CheckpointError: If something asked for earlier could not be read.
          CancelledError: After `stop`.
        """
        for block in blocks(array, targets, check, self._stop, most_bytes):
            if len(self._queue) == _MAX_QUEUED:
                self._collect()
            self._queue.append(self._pool.submit(self._read, block))
            self._num_submitted += 1
        return self._num_submitted

    def wait(self, number: int | None = None) -> None:
        """Waits until what `submit` returned this number for is in its place; None: everything.

        Raises:
          CheckpointError: If a file cannot be read, or has changed since its header was read; what
            a check raised.
          CancelledError: After `stop`.
        """
        number = self._num_submitted if number is None else number
        while self._num_collected < number:
            self._collect()
        self._sender.wait()

    def _collect(self) -> None:
        num_read, num_placed = self._queue.popleft().result()
        self._num_collected += 1
        self.bytes_read += num_read
        self._on_bytes(num_placed)

    def _read(self, block: Block) -> tuple[int, int]:
        """Returns the bytes read, and the bytes that came to a place."""
        with open_unchanged(block.file) as descriptor:
            if block.is_sent:
                self._sender.send(block, descriptor)
            else:
                self._place(block, descriptor)
            if block.file.file_size >= _LARGE_FILE and not self._keep_pages:
                self._to_drop[block.file.path] = block.file
                # At once: memory just used is cheap to use again.
                end = block.offset + block.num_rows * block.row_stride
                _drop_pages(descriptor, block.offset, end)
        num_bytes = block.num_rows * block.row_bytes
        return num_bytes, sum(piece.out.nbytes for piece in block.pieces)

    def _place(self, block: Block, descriptor: int) -> None:
        if block.is_direct:
            raw = block.pieces[0].out.reshape(-1).view(np.uint8)
            block.read(descriptor, raw, 0, block.num_rows)
            return
        raw = self._staged(block.num_rows * block.row_bytes)
        staged = block.read(descriptor, raw, 0, block.num_rows)
        for piece in block.pieces:
            columns = piece.of(staged, block.transposed)
            if block.transposed:
                transpose_into(piece.out, columns)
            else:
                piece.out[...] = columns

    def _staged(self, num_bytes: int) -> np.ndarray:
        """This thread's staging memory."""
        memory = getattr(self._staging, "memory", None)
        if memory is None or len(memory) < num_bytes:
            memory = self._staging.memory = np.empty(max(num_bytes, BLOCK_BYTES), np.uint8)
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
