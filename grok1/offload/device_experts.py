"""Experts brought to a device's memory when they are chosen, and some of them kept there.

Where the threads that read can send what they read (`cuda_driver`), an expert comes to the device
as it is read, and the threads go on with the next one without a pause. Elsewhere it is read from
the disk into one of two pinned buffers while the one before is on its way to the device from the
other. What is kept in the host's memory is pinned as well: a transfer out of pinned memory is the
device's own work and goes on beside its computing.
"""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from grok1.checkpoint.carrying import compiled_empty
from grok1.checkpoint.pinned import pinned, sent
from grok1.machine.cuda_driver import Copier, place_of
from grok1.machine.jax_settings import own_settings
from grok1.offload.buffers import Buffer, PartOfExpert
from grok1.offload.expert_cache import ExpertCache, Key
from grok1.offload.expert_store import ExpertStore


def pinned_buffer(device: Any, parts: Sequence[PartOfExpert]) -> Buffer:
    """Returns memory of the host that a device reads without the host's help.

    Args:
      device: The device.
      parts: What an expert is fetched as.
    """
    pairs = [pinned(device, (1, *part.shape), part.dtype) for part in parts]
    return Buffer([matrix for matrix, _ in pairs], [array for _, array in pairs])


def device_buffer(device: Any, copier: Copier, parts: Sequence[PartOfExpert]) -> Buffer:
    """Returns memory of a device for an expert, which can be written to at once.

    Args:
      device: The device.
      copier: What copies to it.
      parts: What an expert is fetched as.
    """
    arrays = [_empty((1, *part.shape), part.dtype, device)() for part in parts]
    # The device fills them with zeros, and must not do so later than they are written to.
    places = [place_of(array) for array in jax.block_until_ready(arrays)]
    return Buffer(places, arrays, copier)


@functools.cache
def _empty(*arguments: Any) -> Any:
    with own_settings():
        return compiled_empty(*arguments)


class DeviceExperts:
    """The experts as a program of one device gets them.

    Attributes:
      store: Where those come from that are not on the device.
      cache: Those that are.
    """

    def __init__(self, store: ExpertStore, device: Any):
        """Keeps none on the device until `cache` is given a capacity.

        Args:
          store: With buffers that are not mapped.
          device: Where experts go.
        """
        self.store = store
        self.cache: ExpertCache[list[jax.Array]] = ExpertCache(0)
        self._device = device
        self._in_transfer: collections.deque[tuple[Key, list[jax.Array]]] = collections.deque()
        self._is_held = False  # by the host: the last of them

    def fetch(self, layer: int, chosen: Sequence[int]) -> Iterator[tuple[int, list[jax.Array]]]:
        """Yields (expert, what is fetched of it on the device) for some of a layer's experts.

        Transfers may still be under way. Those that the device has come first.

        Args:
          layer: Index of the layer.
          chosen: Which of its experts.

        Raises:
          CheckpointError: If one cannot be read.
          CancelledError: After the store's `cancel`.
        """
        missing = []
        for expert in chosen:
            held = self.cache.use((layer, expert))
            if held is None:
                missing.append(expert)
            else:
                self.store.count_held(layer)
                yield expert, held
        # The layer has been computed that they are of, or what computes it has failed.
        self._arrive(0)
        coming: list[jax.Array] | None = None
        for place, expert in enumerate(missing):
            arrays = coming or self._arrays(layer, missing, place)
            coming = None
            if place + 1 < len(missing) and self.store.holds(layer, missing[place + 1]):
                # XLA has a transfer wait for all that the device was asked to compute before.
                coming = self._arrays(layer, missing, place + 1)
            key = layer, expert
            # Those of this layer are in use until it has been computed.
            victim = self.cache.victim(key, [(layer, other) for other in chosen])
            if victim != key:
                if victim is not None:
                    self.cache.take(victim)
                self.cache.put(key, arrays)
            yield expert, arrays
            # The next is on its way, and the device has room for two.
            del arrays

    def _arrays(self, layer: int, missing: Sequence[int], place: int) -> list[jax.Array]:
        """An expert of the store's on the device; its transfer may be under way."""
        # One that is held may be on its way; of others the store uses the buffer again.
        self._arrive(1 if self._is_held else 0)
        in_use = [key for key, _ in self._in_transfer]
        expert, following = missing[place], next(iter(missing[place + 1 :]), None)
        buffer, self._is_held = self.store.take(layer, expert, following, in_use)
        if buffer.copier is not None:
            return list(buffer.arrays)
        # Not an alias: where the device's memory is the host's, the buffer is written again.
        arrays = [sent(array, self._device) for array in buffer.arrays]
        self._in_transfer.append(((layer, expert), arrays))
        return arrays

    def _arrive(self, most: int) -> None:
        """Waits until at most so many are on their way."""
        while len(self._in_transfer) > most:
            _, arrays = self._in_transfer.popleft()
            jax.block_until_ready(arrays)
