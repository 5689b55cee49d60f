"""Experts brought to a device's memory when they are chosen, and some of them kept there.

An expert is read from the disk into one of two pinned buffers while the one before is on its way to
the device from the other; what is kept in the host's memory is pinned as well. A transfer out of
pinned memory is the device's own work and goes on beside its computing.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from grok1.checkpoint.pinned import pinned, sent
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
            # The store uses the buffer again.
            jax.block_until_ready(self._in_transfer)
            buffer = self.store.take(layer, expert, following)
            # Not an alias: where the device's memory is the host's, the buffer is written again.
            arrays = [sent(array, self._device) for array in buffer.arrays]
            self._in_transfer = arrays
            key = layer, expert
            # Those of this layer are in use until it has been computed.
            victim = self.cache.victim(key, [(layer, other) for other in chosen])
            if victim != key:
                if victim is not None:
                    self.cache.take(victim)
                self.cache.put(key, arrays)
            yield expert, arrays
