"""Memory of the host that a device reads by itself while the host goes on."""

import ctypes
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

_PINNED = "pinned_host"


def has_pinned_memory(device: Any) -> bool:
    """Whether there is such memory for a device."""
    return any(memory.kind == _PINNED for memory in device.addressable_memories())


def pinned(device: Any, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, jax.Array]:
    """Returns an array in such memory twice: to be written to, and as `jax.device_put` takes it.

    The first is good as long as the second is held, and may be written to while no transfer is
    under way.

    Args:
      device: The device.
      shape: Of the array.
      dtype: Of its elements.
    """
    sharding = SingleDeviceSharding(device, memory_kind=_PINNED)
    array = jax.block_until_ready(jax.device_put(np.zeros(shape, dtype), sharding))
    # JAX has no array that can be written to; this is the memory of one that only the caller knows.
    memory = (ctypes.c_int8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
    return np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape), array


def sent(source: Any, device: Any) -> jax.Array:
    """Sends an array to a device: when it is ready there, the source may be written to again.

    Args:
      source: A NumPy array, or the second of what `pinned` returned.
      device: The device.
    """
    if isinstance(source, np.ndarray) and device.platform == "cpu":
        source = source.copy()  # JAX takes one that is aligned as it is, whatever may_alias says
    return jax.device_put(source, SingleDeviceSharding(device), may_alias=False)
