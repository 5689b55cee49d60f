"""Blocks of files to the memory of devices: each thread that reads sends what it has read.

A thread has two small slots of pinned memory. While it reads into one, the devices copy out of the
other by themselves, each to its place in an array that is there already. Small, because what was
read a moment ago is still in a cache of the processor when the device asks for it.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from grok1.checkpoint import native
from grok1.checkpoint.blocks import Block
from grok1.checkpoint.storage import transpose_into
from grok1.machine.cuda_driver import Copier

_SLOT_BYTES = 1 << 22
_NUM_SLOTS = 2  # of a thread


class _Slot:
    """Pinned memory, and what is being copied out of it."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}
        self._streams: dict[Copier, Any] = {}
        self._busy: set[Copier] = set()

    def wait(self) -> None:
        """Waits until it may be written to."""
        self.arrive()
        self._busy.clear()

    def arrive(self) -> None:
        """Waits for what is being copied, while another thread may have it."""
        for copier in tuple(self._busy):
            copier.wait(self._streams[copier])

    def memory(self, use: str, num_bytes: int, copier: Copier) -> np.ndarray:
        """Returns so many bytes, the same ones for the same use."""
        memory = self._memory.get(use)
        if memory is None or len(memory) < num_bytes:
            memory = self._memory[use] = copier.pinned(max(num_bytes, _SLOT_BYTES))
        return memory[:num_bytes]

    def begin(self, copiers: Sequence[Copier]) -> list[Any]:
        """Returns a stream for each, which may be given copies until the next `wait`.

        Waits for what is being copied to other devices.
        """
        for copier in self._busy.difference(copiers):
            copier.wait(self._streams[copier])
        self._busy = set(copiers)
        for copier in copiers:
            if copier not in self._streams:
                self._streams[copier] = copier.stream()
        return [self._streams[copier] for copier in copiers]

    def send(self, copier: Copier | None, source: np.ndarray, out: np.ndarray) -> None:
        """Begins to copy out of its memory."""
        assert copier is not None  # the block is sent
        if copier not in self._streams:
            self._streams[copier] = copier.stream()
        self._busy.add(copier)
        copier.copy(out, source, self._streams[copier])


# Pinning costs as much as some copies: what was pinned serves the next load, and each step of an
# offloaded model. Two slots for each thread that has read at one time.
_FREE: collections.deque[_Slot] = collections.deque()


class Sender:
    """Sends blocks in the threads of one reader.

    Beside the devices' arrays this takes two slots of 4 MiB a thread, 128 MiB for sixteen, twice
    that where elements are converted or transposed; they stay until the process ends.
    """

    def __init__(self) -> None:
        self._used: set[_Slot] = set()

    def send(self, block: Block, descriptor: int) -> None:
        """Reads a block and begins to copy it; returns when all of it has been read.

        Args:
          block: Of which `is_sent` is true.
          descriptor: Where its file is open.

        Raises:
          CheckpointError: As `Block.read`.
          DriverError: If the driver refuses a copy.
        """
        slots = [self._slot() for _ in range(_NUM_SLOTS)]
        step = min(block.num_rows, max(1, _SLOT_BYTES // block.row_bytes))
        try:
            if _is_sent_natively(slots, block, descriptor, step):
                return
            for turn, first in enumerate(range(0, block.num_rows, step)):
                slot = slots[turn % _NUM_SLOTS]
                slot.wait()
                _send_rows(slot, block, descriptor, first, min(step, block.num_rows - first))
        finally:
            _FREE.extend(slots)

    def wait(self) -> None:
        """Waits until all that was sent has arrived.

        Raises:
          DriverError: If a copy has failed.
        """
        for slot in tuple(self._used):
            slot.arrive()

    def _slot(self) -> _Slot:
        try:
            slot = _FREE.popleft()  # whose copy is the oldest
        except IndexError:
            slot = _Slot()
        self._used.add(slot)
        return slot


def _is_sent_natively(slots: Sequence[_Slot], block: Block, descriptor: int, step: int) -> bool:
    """Sends a block whose elements go as they are; False if there is something to do or to say."""
    rows = block.rows(descriptor, 0, block.num_rows)
    is_changed = block.transposed or block.pieces[0].out.dtype != block.dtype
    if rows is None or is_changed or not native.is_available():
        return False
    sent = []
    for piece in block.pieces:
        assert piece.copier is not None  # the block is sent
        sent.append(native.Sent(piece.copier, piece.out, piece.column * block.dtype.itemsize))
    copiers = [one.copier for one in sent]
    places = []
    for slot in slots:
        memory = slot.memory("reading", step * block.row_bytes, copiers[0])
        places.append((memory, slot.begin(copiers)))
    return native.send(rows, sent, places)


def _send_rows(slot: _Slot, block: Block, descriptor: int, first: int, count: int) -> None:
    copier = block.pieces[0].copier
    assert copier is not None  # the block is sent
    raw = slot.memory("reading", count * block.row_bytes, copier)
    rows, here = block.read(descriptor, raw, first, count), slice(first, first + count)
    sources = [piece.of(rows, block.transposed) for piece in block.pieces]
    outs = [piece.out[:, here] if block.transposed else piece.out[here] for piece in block.pieces]
    if block.transposed or outs[0].dtype != block.dtype:
        num_bytes = sum(out.nbytes for out in outs)
        sources = _converted(slot.memory("converting", num_bytes, copier), block, sources, outs)
    for piece, source, out in zip(block.pieces, sources, outs, strict=True):
        slot.send(piece.copier, source, out)


def _converted(
    memory: np.ndarray, block: Block, sources: list[np.ndarray], outs: list[np.ndarray]
) -> list[np.ndarray]:
    """Returns what the sources are in the type and order of where they go."""
    results, end = [], 0
    for source, out in zip(sources, outs, strict=True):
        start, end = end, end + out.nbytes
        result = memory[start:end].view(out.dtype).reshape(out.shape)
        if block.transposed:
            transpose_into(result, source)
        else:
            result[...] = source
        results.append(result)
    return results
