"""Experts brought to a device's memory when they are chosen, and some of them kept there.

Where the threads that read can send what they read (`cuda_driver`), an expert comes to the device
as it is read, the next one while one is computed with. Elsewhere it is read from the disk into one
of two pinned buffers while the one before is on its way to the device from the other. What is kept
in the host's memory is pinned as well: a transfer out of pinned memory is the device's own work and
goes on beside its computing.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from grok1.checkpoint.carrying import compiled_empty
from grok1.checkpoint.pinned import pinned, sent
from grok1.machine.cuda_driver import Copier, place_of
from grok1.machine.jax_settings import own_settings
from grok1.offload.expert_cache import ExpertCache
from grok1.offload.expert_store import Buffer, ExpertStore, PartOfExpert


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
        self._in_transfer: list[jax.Array] = []

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
        for expert, following in itertools.zip_longest(missing, missing[1:]):
            arrays = self._arrays(layer, expert, following)
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

    def _arrays(self, layer: int, expert: int, following: int | None) -> list[jax.Array]:
        """An expert of the store's on the device; its transfer may be under way."""
        # The store uses the buffer again.
        jax.block_until_ready(self._in_transfer)
        self._in_transfer = []
        buffer = self.store.take(layer, expert, following)
        if buffer.copier is not None:
            return list(buffer.arrays)
        # Not an alias: where the device's memory is the host's, the buffer is written again.
        self._in_transfer = [sent(array, self._device) for array in buffer.arrays]
        return self._in_transfer
