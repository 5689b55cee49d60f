"""How fast this machine reads, measured in a second: from files as they lie, and from memory."""

import os
import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from grok1.checkpoint import mapping
from grok1.checkpoint.mapping import Window
from grok1.checkpoint.storage import StoredArray
from grok1.checkpoint.tensor_file import open_unchanged, read_at

_SECONDS = 0.7
_BLOCK_BYTES = 1 << 23
_MEMORY_BYTES = 1 << 28
_NUM_THREADS = 8


def file_bandwidth(arrays: Sequence[StoredArray]) -> float:
    """Returns the bytes a second at which parts of arrays can be had, by several threads.

    Parts are taken at random, so that those in the system's page cache count as they would later.

    Args:
      arrays: Arrays on disk.

    Raises:
      CheckpointError: If a file cannot be read.
    """
    places = [
        (file, span.offset + start, min(_BLOCK_BYTES, span.nbytes - start))
        for array in arrays
        for file, span in array.parts
        for start in range(0, span.nbytes, _BLOCK_BYTES)
    ]
    random.Random(0).shuffle(places)
    is_mapped = mapping.is_available() and not any(array.transposed for array in arrays)

    def read(number: int) -> int:
        file, offset, size = places[number % len(places)]
        if is_mapped:
            window = Window(file, offset, size)
            try:
                for _, place in window.blocks():
                    window.populate(place)
            finally:
                window.close()
        else:
            with open_unchanged(file) as descriptor:
                read_at(file, descriptor, offset, memoryview(bytearray(size)))
        return size

    return _rate(read, _NUM_THREADS)


def memory_bandwidth() -> float:
    """Returns the bytes a second that the processor's cores read from memory together."""
    numbers = np.ones(_MEMORY_BYTES // 8)
    parts = np.array_split(numbers, _MEMORY_BYTES // _BLOCK_BYTES)

    def read(number: int) -> int:
        part = parts[number % len(parts)]
        part.max()
        return part.nbytes

    return _rate(read, os.cpu_count() or 1)


def _rate(read: Callable[[int], int], num_threads: int) -> float:
    """The rate at which threads get through pieces of work, numbered from 0 on."""
    lock, number, done = threading.Lock(), 0, 0
    errors: list[BaseException] = []
    start = time.perf_counter()

    def work():
        nonlocal number, done
        try:
            while True:
                with lock:
                    mine, number = number, number + 1
                size = read(mine)
                with lock:
                    done += size
                # After a piece: where the machine is busy, the time may be over before the first.
                if errors or time.perf_counter() - start > _SECONDS:
                    break
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return done / (time.perf_counter() - start)
