"""How a model lies on a device mesh: one table from logical axes to mesh axes.

The mesh has two axes. `data` shares out batch rows; `model` shares out attention heads, the hidden
width of every expert, and the vocabulary. Each layer then needs two all-reduces over `model` and no
weight ever moves.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.config import ModelConfig
from grok1.keywords import as_python, is_whole, shown
from grok1.machine.startup import start_jax
from grok1.nn.transformer import LayerParams, Params
from grok1.ops.attention import KVCache
from grok1.ops.experts import ExpertWeights
from grok1.ops.formats import format_of, is_quantized

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or one without, which serves to compute shapes."""

_SIZES = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)

DATA_AXIS = "data"
MODEL_AXIS = "model"

MESH_AXIS = {
    "batch": DATA_AXIS,
    "vocab": MODEL_AXIS,
    "heads": MODEL_AXIS,
    "kv_heads": MODEL_AXIS,
    "ffn": MODEL_AXIS,
    "embed": None,
    "experts": None,
    "layers": None,
    "positions": None,
    "head_dim": None,
}
"""The mesh axis that shares out each logical axis; None for an axis every device holds whole."""

PARAM_AXES = Params(
    embedding=("vocab", "embed"),
    layers=LayerParams(
        attention_pre_norm=("layers", "embed"),
        query=("layers", "embed", "heads"),
        key=("layers", "embed", "kv_heads"),
        value=("layers", "embed", "kv_heads"),
        attention_out=("layers", "heads", "embed"),
        attention_post_norm=("layers", "embed"),
        moe_pre_norm=("layers", "embed"),
        router=("layers", "embed", "experts"),
        experts=ExpertWeights(
            gate=("layers", "experts", "embed", "ffn"),
            up=("layers", "experts", "embed", "ffn"),
            down=("layers", "experts", "ffn", "embed"),
        ),
        moe_post_norm=("layers", "embed"),
    ),
    final_norm=("embed",),
)
"""Logical axes of every parameter, layers stacked."""

CACHE_AXES = ("layers", "batch", "heads", "positions", "head_dim")
"""Logical axes of the keys and of the values in a `KVCache`; the scales have all but the last."""


def make_mesh(
    config: ModelConfig,
    mesh: Mesh | Sequence[int] | str | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh of axes (data, model) that the model divides over.

    Args:
      config: The model.
      mesh: Sizes (data, model), as (1, 8) or "1x8"; or a mesh that has these two axes; or None for
        every device, as many on `model` as the model divides by and the rest on `data`.
      devices: The devices to use, all of JAX's default platform when not given.

    Raises:
      ValueError: If there are too few devices, or the model does not divide over the mesh.
      RuntimeError: If JAX cannot start on the platform that is asked for, or was started before
        this process was forked.
    """
    start_jax()
    if isinstance(mesh, Mesh):
        if mesh.axis_names != (DATA_AXIS, MODEL_AXIS):
            raise ValueError(
                f"the mesh must have the axes ('data', 'model'), found {mesh.axis_names}"
            )
        grid = mesh.devices
        _check_division(config, grid.shape)
    else:
        devices = jax.devices() if devices is None else list(devices)
        sizes = mesh_sizes(config, mesh, len(devices), devices[0].platform)
        grid = np.array(devices[: sizes[0] * sizes[1]]).reshape(sizes)
    idle = set(range(jax.process_count())) - {device.process_index for device in grid.flat}
    if idle:
        raise ValueError(
            f"mesh {grid.shape[0]}x{grid.shape[1]} leaves process {min(idle)} of "
            f"{jax.process_count()} without a device; start fewer processes or give a larger mesh"
        )
    # Axis types are explicit because the default of `jax.make_mesh` changed with its version.
    return Mesh(grid, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)


def abstract_mesh(sizes: tuple[int, int]) -> AbstractMesh:
    """Returns a mesh of axes (data, model) without devices, to compute shapes with."""
    return AbstractMesh(sizes, (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)


def mesh_sizes(
    config: ModelConfig, sizes: Sequence[int] | str | None, num_devices: int, platform: str
) -> tuple[int, int]:
    """Returns the sizes (data, model) of a mesh that the model divides over.

    Args:
      config: The model.
      sizes: What is asked for, as (1, 8) or "1x8"; None for all devices, as many on `model` as the
        model divides by.
      num_devices: How many devices there are.
      platform: What they are, for the message.

    Raises:
      ValueError: If there are too few devices, or the model does not divide over the mesh.
    """
    if sizes is None:
        model_size = max(
            size
            for size in range(1, num_devices + 1)
            if num_devices % size == 0 and not _indivisible(config, size)
        )
        return num_devices // model_size, model_size
    sizes = as_python(sizes)
    found: tuple[Any, ...] = tuple(sizes) if isinstance(sizes, Sequence) else ()
    if isinstance(sizes, str):
        match = _SIZES.fullmatch(sizes)
        found = tuple(map(int, match.groups())) if match else ()
    if len(found) != 2 or any(not is_whole(n) or n < 1 for n in found):
        raise ValueError(
            f"mesh must be two sizes above 0, (data, model), as 1x8, found {shown(sizes)}"
        )
    if found[0] * found[1] > num_devices:
        raise ValueError(
            f"mesh {found[0]}x{found[1]} needs {found[0] * found[1]} devices, "
            f"found {num_devices} ({platform}); give a smaller mesh"
        )
    _check_division(config, found)
    return found


def most_on_model(config: ModelConfig, num_devices: int) -> int:
    """Returns among how many of some devices one copy of a model can be shared at most."""
    return max(size for size in range(1, num_devices + 1) if not _indivisible(config, size))


def num_cache_heads(config: ModelConfig, mesh: AnyMesh) -> int:
    """Key/value heads in the cache: with more devices than heads, several hold the same one."""
    return max(config.num_kv_heads, mesh.shape[MODEL_AXIS])


def spec(axes: Sequence[str], config: ModelConfig, mesh: AnyMesh) -> P:
    """Returns the partition spec of an array with these logical axes.

    Key and value weights are the one exception to the table: where devices outnumber key/value
    heads, every device holds all of them (and uses one head's columns).
    """
    replicated = {"kv_heads"} if mesh.shape[MODEL_AXIS] > config.num_kv_heads else set()
    return P(*(None if axis in replicated else MESH_AXIS[axis] for axis in axes))


def abstract_stack(params: Params, config: ModelConfig, mesh: AnyMesh) -> Params:
    """Returns the shapes, types and shardings of a model in memory, from those of its tensors.

    Args:
      params: Tensors as on disk, anything with `shape` and `dtype`; `layers` is a list.
      config: The model.
      mesh: Where it goes.

    Returns:
      `jax.ShapeDtypeStruct`s with shardings; layers are stacked on a leading axis, and scale groups
      are refined so that each device's rows are whole groups.
    """

    def place(axes, leaf, *lead):
        if not is_quantized(leaf):
            sharding = NamedSharding(mesh, spec(axes, config, mesh))
            return jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype, sharding=sharding)
        stored_as = format_of(leaf)
        rows_axis = spec(axes, config, mesh)[-2]
        groups = leaf.scales.shape[-2]
        if rows_axis is not None:
            groups = stored_as.num_refined(leaf.shape[-2], groups, mesh.shape[rows_axis])
        # One group's scales are every device's.
        scales_axes = axes if groups > 1 else (*axes[:-2], "embed", axes[-1])
        shapes = stored_as.part_shapes(leaf.shape, groups)
        return stored_as.weight(
            *(
                place(
                    axes if part.rows_of_group is None else scales_axes,
                    jax.ShapeDtypeStruct(shape, of_part.dtype),
                    *lead,
                )
                for part, of_part, shape in zip(stored_as.parts, leaf, shapes, strict=True)
            )
        )

    def is_axes(node):
        return isinstance(node, tuple) and all(isinstance(axis, str) for axis in node)

    num_layers = len(params.layers)
    return Params(
        embedding=place(PARAM_AXES.embedding, params.embedding),
        layers=jax.tree.map(
            lambda axes, leaf: place(axes, leaf, num_layers),
            PARAM_AXES.layers,
            params.layers[0],
            is_leaf=is_axes,
        ),
        final_norm=place(PARAM_AXES.final_norm, params.final_norm),
    )


def abstract_cache(
    config: ModelConfig, mesh: AnyMesh, batch: int, capacity: int, dtype: Any
) -> KVCache:
    """Returns the shapes, types and shardings of an empty cache of `batch` rows."""
    sizes = (config.num_layers, batch, num_cache_heads(config, mesh), capacity, config.key_size)

    def place(axes, sizes, dtype):
        sharding = NamedSharding(mesh, spec(axes, config, mesh))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    values = place(CACHE_AXES, sizes, dtype)
    scales = None
    if jnp.dtype(dtype) == jnp.int8:
        scales = place(CACHE_AXES[:-1], sizes[:-1], jnp.float32)
    length = place(("batch",), (batch,), jnp.int32)
    return KVCache(values, values, length, scales, scales)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places an array that every process has whole; each gives its own devices their parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def specs_of(tree: Any) -> Any:
    """Returns the partition specs of a tree of arrays or of abstract arrays with shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)


def _check_division(config: ModelConfig, sizes: tuple[int, ...]) -> None:
    problem = _indivisible(config, sizes[1])
    if problem:
        raise ValueError(f"mesh {sizes[0]}x{sizes[1]} does not divide the model: {problem}")


def _indivisible(config: ModelConfig, model_size: int) -> str:
    """Says why the model does not divide over `model_size` devices; empty if it does."""
    for what, size in (
        ("num_q_heads", config.num_q_heads),
        ("ffn_size", config.ffn_size),
        ("vocab_size", config.vocab_size),
    ):
        if size % model_size:
            return f"{what} {size} is no multiple of the model axis {model_size}"
    heads = config.num_kv_heads
    if heads % model_size and model_size % heads:
        return f"num_kv_heads {heads} is neither a multiple nor a divisor of {model_size}"
    return ""
