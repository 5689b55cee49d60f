"""Checkpoint files to device memory, each device its own slice, straight from the mapped files.

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
from grok1.tensor_file import ArraySpan, TensorHeader, map_span
from grok1.transformer import NamedParams, Params, naming

_ALIGNMENT = 64  # bytes; XLA's CPU client adopts host memory so aligned without copying it


class _Span(NamedTuple):
    """Where one array lies on disk, with the `shape` and `dtype` that an array would have."""

    header: TensorHeader
    span: ArraySpan

    @property
    def shape(self) -> tuple[int, ...]:
        return self.span.shape

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.span.dtype)


def load_params(
    headers: list[TensorHeader],
    manifest: list[TensorSpec],
    config: ModelConfig,
    mesh: Mesh,
    progress: bool,
) -> Params:
    """Reads a checked checkpoint onto a mesh.

    Args:
      headers: The files, checked by `checkpoint.open_checkpoint`.
      manifest: The tensors' names, in the same order.
      config: The model.
      mesh: Where it goes.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Returns:
      The parameters, layers stacked, sharded as `sharding.abstract_stack` says.

    Raises:
      CheckpointError: If a file changes underneath, or a scale is not finite.
    """
    spans = naming(config).apply(_named_spans(headers, manifest), None)
    target = abstract_stack(spans, config, mesh)
    sources = Params(
        embedding=[spans.embedding],
        layers=jax.tree.map(lambda *layers: list(layers), *spans.layers, is_leaf=_is_span),
        final_norm=[spans.final_norm],
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
        arrays = [_load_leaf(leaf, spans, bar) for leaf, spans in zip(leaves, files, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def _load_leaf(target: jax.ShapeDtypeStruct, spans: list[_Span], bar: tqdm) -> jax.Array:
    """Fills every local device's shard of one parameter from its files, one a layer."""
    stacked = len(target.shape) > len(spans[0].shape)
    shards = []
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        assert index is not None  # a device of the map holds a part
        shape = target.sharding.shard_shape(target.shape)
        pieces = _pieces(spans, index[1:] if stacked else index, target, bar)
        fill = _fill_host if device.platform == "cpu" else _fill_device
        shards.append(fill(pieces, shape if stacked else (1, *shape), target.dtype, device, shape))
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def _pieces(
    spans: list[_Span], index: tuple[slice, ...], target: jax.ShapeDtypeStruct, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yields one device's slice of each file; a file is mapped only while its slice is copied."""
    for header, span in spans:
        array = map_span(header, span)
        if span == header.scales:
            check_scales(header, array)
            array = refine_groups(array, target.shape[-2])
        piece = array[index]
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


def _named_spans(headers: list[TensorHeader], manifest: list[TensorSpec]) -> NamedParams:
    named: dict[str, dict[str, Any]] = {}
    for header, spec in zip(headers, manifest, strict=True):
        module, _, parameter = spec.name.rpartition("/")
        leaf: Any = _Span(header, header.values)
        if header.scales is not None:
            leaf = QuantizedArray(leaf, _Span(header, header.scales))
        named.setdefault(module, {})[parameter] = leaf
    return named


def _is_span(node: Any) -> bool:
    return isinstance(node, _Span)
