"""Tensors on disk to device memory, each device its own slice, straight from the mapped files.

A device's buffer of one parameter holds all layers; it is filled layer by layer from the files, so
that beyond the model itself the host needs the slice that is on its way.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from grok1.checkpoint import check_scales
from grok1.config import ModelConfig
from grok1.manifest import TensorSpec
from grok1.quantization import QuantizedArray, refine_groups
from grok1.sharding import abstract_stack
from grok1.storage import StoredArray, StoredTensor, map_slice
from grok1.transformer import NamedParams, Params, naming

_ALIGNMENT = 64  # bytes; XLA's CPU client adopts host memory so aligned without copying it


class _Leaf(NamedTuple):
    """An array on disk, with the `shape` and `dtype` that it has in memory."""

    array: StoredArray
    dtype: np.dtype
    is_scales: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def load_params(
    tensors: list[StoredTensor],
    manifest: list[TensorSpec],
    config: ModelConfig,
    mesh: Mesh,
    progress: bool,
) -> Params:
    """Reads a checked checkpoint onto a mesh.

    Args:
      tensors: The tensors on disk, checked against the manifest.
      manifest: Their names, in the same order.
      config: The model.
      mesh: Where it goes.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Returns:
      The parameters, layers stacked, sharded as `sharding.abstract_stack` says.

    Raises:
      CheckpointError: If a file changes underneath, or a scale is not finite.
    """
    stored = naming(config).apply(_named_leaves(tensors, manifest), None)
    target = abstract_stack(stored, config, mesh)
    sources = Params(
        embedding=[stored.embedding],
        layers=jax.tree.map(lambda *layers: list(layers), *stored.layers, is_leaf=_is_leaf),
        final_norm=[stored.final_norm],
    )
    leaves, structure = jax.tree.flatten(target)
    files = structure.flatten_up_to(sources)
    total = sum(
        leaf.dtype.itemsize
        * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        * len(leaf.sharding.addressable_devices)
        for leaf in leaves
    )
    # disable=None is quiet when stderr is no terminal.
    with tqdm(
        total=total,
        desc="loading",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        arrays = [_load_leaf(leaf, stored, bar) for leaf, stored in zip(leaves, files, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def _load_leaf(target: jax.ShapeDtypeStruct, stored: list[_Leaf], bar: tqdm) -> jax.Array:
    """Fills every local device's shard of one parameter from its files, one a layer."""
    stacked = len(target.shape) > len(stored[0].shape)
    shards = []
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        assert index is not None  # a device of the map holds a part
        shape = target.sharding.shard_shape(target.shape)
        pieces = _pieces(stored, index[1:] if stacked else index, target, bar)
        fill = _fill_host if device.platform == "cpu" else _fill_device
        shards.append(fill(pieces, shape if stacked else (1, *shape), target.dtype, device, shape))
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def _pieces(
    stored: list[_Leaf], index: tuple[slice, ...], target: jax.ShapeDtypeStruct, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yields one device's slice of each array; a file is mapped only while its slice is copied."""
    for leaf in stored:
        if leaf.is_scales:
            scales = map_slice(leaf.array, (slice(None),) * len(leaf.shape))
            check_scales(leaf.array.parts[0][0], scales)
            piece = refine_groups(scales, target.shape[-2])[index]
        else:
            piece = map_slice(leaf.array, index)
        yield piece
        bar.update(piece.size * target.dtype.itemsize)


def _fill_host(pieces, stack_shape, dtype, device, shape) -> jax.Array:
    """On a CPU the shard is a host buffer that the device adopts."""
    num_bytes = int(np.prod(stack_shape)) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    stack = raw[start : start + num_bytes].view(dtype).reshape(stack_shape)
    for i, piece in enumerate(pieces):
        stack[i] = piece
    return jax.device_put(stack.reshape(shape), device)


def _fill_device(pieces, stack_shape, dtype, device, shape) -> jax.Array:
    """On an accelerator the shard is built there, one slice in transfer at a time."""
    with jax.default_device(device):
        stack = jnp.zeros(stack_shape, dtype)
    for i, piece in enumerate(pieces):
        stack = _put_layer(stack, jax.device_put(piece.astype(dtype, copy=False), device), i)
        stack.block_until_ready()
    return stack.reshape(shape)


def _set_layer(stack: jax.Array, piece: jax.Array, i: Any) -> jax.Array:
    return stack.at[i].set(piece)


_put_layer = jax.jit(_set_layer, donate_argnums=0)


def _named_leaves(tensors: list[StoredTensor], manifest: list[TensorSpec]) -> NamedParams:
    named: dict[str, dict[str, Any]] = {}
    for tensor, spec in zip(tensors, manifest, strict=True):
        module, _, parameter = spec.name.rpartition("/")
        leaf: Any
        if tensor.scales is None:
            # A weight kept in bfloat16 is computed with in float32, as any float weight.
            leaf = _Leaf(tensor.values, jnp.dtype("float32"))
        else:
            leaf = QuantizedArray(
                _Leaf(tensor.values, jnp.dtype("int8")),
                _Leaf(tensor.scales, jnp.dtype("bfloat16"), is_scales=True),
            )
        named.setdefault(module, {})[parameter] = leaf
    return named


def _is_leaf(node: Any) -> bool:
    return isinstance(node, _Leaf)
