"""Parts of texts that were run, kept beside a state: keys and values, copied out and in again.

A block has no owner and no order: what it stands for is for the caller to know. With several groups
of devices all of them have all blocks, so that a block of one group's slot fits another's.

A block can also lie in the host's memory, alone: each process then has the parts of its own
devices, which read and write them by themselves while the host and the steps go on.

Dimension key: L layer, P block, C key/value head, T position in a block, H head dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.engine.programs import Key, Kind, Programs
from grok1.engine.steps import DecodeState
from grok1.nn.sharding import DATA_AXIS, specs_of
from grok1.ops.attention import KVCache


class Blocks(NamedTuple):
    """Keys and values as `KVCache` has them, without a length.

    Attributes:
      k: `[L, P, C, T, H]`.
      v: `[L, P, C, T, H]`.
      k_scales: float32 `[L, P, C, T]` for int8 keys; None for float ones.
      v_scales: float32 `[L, P, C, T]` for int8 values; None for float ones.
    """

    k: Any
    v: Any
    k_scales: Any = None
    v_scales: Any = None


_HOST_MEMORY = "pinned_host"


def of_cache(cache: KVCache) -> Blocks:
    """What of a cache goes into blocks."""
    return Blocks(cache.k, cache.v, cache.k_scales, cache.v_scales)


def empty(programs: Programs, num_blocks: int, length: int) -> Any:
    """Returns the program () -> `Blocks`."""
    cache = of_cache(programs.setup.abstract_state(1, length).cache)
    specs = _specs(programs)
    mesh = programs.setup.mesh

    def make():
        def zeros(leaf):
            return jnp.zeros((leaf.shape[0], num_blocks, *leaf.shape[2:]), leaf.dtype)

        return jax.tree.map(zeros, cache)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    key = Key(kind=Kind.EMPTY_BLOCKS, shape=(num_blocks, length))
    return programs.compiled(key, jax.jit(make, out_shardings=shardings))


def keep(programs: Programs) -> Any:
    """Returns the program (blocks, state, [number, slot, start]) -> blocks."""

    def function(blocks: Blocks, state: DecodeState, where):
        number, slot, start = where
        here, is_here = _slot_here(state, slot)

        def copy(block, cached):
            at = (0, here, 0, start, 0)[: cached.ndim]
            sizes = (cached.shape[0], 1, *block.shape[2:])
            found = jax.lax.dynamic_slice(cached, at, sizes)
            # One group of devices has the slot; the others add nothing.
            found = jax.lax.psum(jnp.where(is_here, found, jnp.zeros_like(found)), DATA_AXIS)
            return jax.lax.dynamic_update_slice(block, found, (0, number, 0, 0, 0)[: block.ndim])

        return jax.tree.map(copy, blocks, of_cache(state.cache))

    specs, of_state = _specs(programs), specs_of(programs.setup.smallest_state)
    per_device = programs.per_device(function, (specs, of_state, P()), specs)
    return programs.compiled(Key(kind=Kind.KEEP_BLOCK), jax.jit(per_device, donate_argnums=0))


def put(programs: Programs) -> Any:
    """Returns the program (state, blocks, [number, slot, start]) -> state."""

    def function(state: DecodeState, blocks: Blocks, where):
        number, slot, start = where
        here, is_here = _slot_here(state, slot)

        def copy(cached, block):
            sizes = (block.shape[0], 1, *block.shape[2:])
            at = (0, here, 0, start, 0)[: cached.ndim]
            found = jax.lax.dynamic_slice(block, (0, number, 0, 0, 0)[: block.ndim], sizes)
            found = jnp.where(is_here, found, jax.lax.dynamic_slice(cached, at, sizes))
            return jax.lax.dynamic_update_slice(cached, found, at)

        cache = state.cache
        new = jax.tree.map(copy, of_cache(cache), blocks)
        # Beyond the last slot, so that it is dropped, where another group has it.
        place = jnp.where(is_here, here, len(cache.length))
        length = cache.length.at[place].set(start + blocks.k.shape[3], mode="drop")
        return state._replace(cache=cache._replace(**new._asdict(), length=length))

    specs, of_state = _specs(programs), specs_of(programs.setup.smallest_state)
    per_device = programs.per_device(function, (of_state, specs, P()), of_state)
    return programs.compiled(Key(kind=Kind.PUT_BLOCK), jax.jit(per_device, donate_argnums=0))


def take(programs: Programs) -> Any:
    """Returns the program (blocks, [number]) -> that block, alone."""

    def function(blocks: Blocks, where):
        def copy(block):
            sizes = (block.shape[0], 1, *block.shape[2:])
            return jax.lax.dynamic_slice(block, (0, where[0], 0, 0, 0)[: block.ndim], sizes)

        return jax.tree.map(copy, blocks)

    specs = _specs(programs)
    per_device = programs.per_device(function, (specs, P()), specs)
    return programs.compiled(Key(kind=Kind.TAKE_BLOCK), jax.jit(per_device))


def place(programs: Programs) -> Any:
    """Returns the program (blocks, a block alone, [number]) -> blocks."""

    def function(blocks: Blocks, alone: Blocks, where):
        def copy(block, found):
            return jax.lax.dynamic_update_slice(block, found, (0, where[0], 0, 0, 0)[: block.ndim])

        return jax.tree.map(copy, blocks, alone)

    specs = _specs(programs)
    per_device = programs.per_device(function, (specs, specs, P()), specs)
    return programs.compiled(Key(kind=Kind.PLACE_BLOCK), jax.jit(per_device, donate_argnums=0))


def on_host(block: Blocks) -> Blocks:
    """Begins to copy a block to the host's memory, and does not wait."""
    return _moved(block, _HOST_MEMORY)


def on_devices(block: Blocks) -> Blocks:
    """Begins to copy a block back, and does not wait."""
    [device, *_] = block.k.sharding.addressable_devices
    return _moved(block, device.default_memory().kind)


def _moved(block: Blocks, memory: str) -> Blocks:
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(memory)), block
    )


def _slot_here(state: DecodeState, slot: Any) -> tuple[Any, Any]:
    """The slot's number on this device, in range, and whether it is on this device."""
    num_slots = len(state.cache.length)
    here = slot - jax.lax.axis_index(DATA_AXIS) * num_slots
    return jnp.clip(here, 0, num_slots - 1), (here >= 0) & (here < num_slots)


def _specs(programs: Programs) -> Blocks:
    """How blocks lie over the devices: heads as in a cache, and all blocks in every group."""
    of_cache_specs = of_cache(specs_of(programs.setup.smallest_state.cache))
    return jax.tree.map(
        lambda spec: P(*(None if axis == DATA_AXIS else axis for axis in spec)), of_cache_specs
    )
