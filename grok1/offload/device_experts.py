"""Experts brought to a device's memory when they are chosen, and some of them kept there.

An expert is read from the disk into one of two pinned buffers while the one before is on its way to
the device from the other; what is kept in the host's memory is pinned as well. A transfer out of
pinned memory is the device's own work and goes on beside its computing.
"""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from grok1.offload.expert_cache import ExpertCache
from grok1.offload.expert_store import Buffer, ExpertStore, PartOfExpert

_PINNED = "pinned_host"


def pinned_buffer(device: Any, parts: Sequence[PartOfExpert]) -> Buffer:
    """Returns memory of the host that a device reads without the host's help.

    Args:
      device: The device.
      parts: What an expert is fetched as.
    """
    sharding = SingleDeviceSharding(device, memory_kind=_PINNED)
    arrays = [jax.device_put(np.zeros((1, *part.shape), part.dtype), sharding) for part in parts]
    matrices = []
    for array in arrays:
        jax.block_until_ready(array)
        # JAX has no array that can be written to; this is the memory of one that only `arrays`
        # knows, and that is written to when no transfer reads it.
        memory = (ctypes.c_int8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
        matrices.append(np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape))
    return Buffer(matrices, arrays)


def has_pinned_memory(device: Any) -> bool:
    """Whether there is such memory for a device."""
    return any(memory.kind == _PINNED for memory in device.addressable_memories())


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
        self._device = SingleDeviceSharding(device)
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
            sent = [jax.device_put(array, self._device, may_alias=False) for array in buffer.arrays]
            self._in_transfer = sent
            key = layer, expert
            # Those of this layer are in use until it has been computed.
            victim = self.cache.victim(key, [(layer, other) for other in chosen])
            if victim != key:
                if victim is not None:
                    self.cache.take(victim)
                self.cache.put(key, sent)
            yield expert, sent
