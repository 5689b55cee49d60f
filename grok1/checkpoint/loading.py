"""Tensors on disk to device memory, each device its own slice, at the speed of the disk.

A device's buffer of one parameter holds all layers and is filled layer by layer: on a CPU in place,
by the threads of `reading`; on an accelerator in pieces, of which some are read while others are in
transfer (`carrying`). Beyond the model itself the host needs those, the scales and small arrays.
"""

import math
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from grok1.checkpoint.blocks import Bounds, Check, Target
from grok1.checkpoint.carrying import AnyCarrier, Carrier, DirectCarrier, Load, Programs, Stack
from grok1.checkpoint.elements import FiniteCheck, check_scales
from grok1.checkpoint.reading import Reader
from grok1.checkpoint.storage import StoredArray, StoredModel
from grok1.checkpoint.tensor_file import DTYPES
from grok1.config import ModelConfig
from grok1.machine.cuda_driver import copier_of
from grok1.machine.processes import together
from grok1.machine.progress import progress_bar
from grok1.nn.manifest import arrange, is_large
from grok1.nn.sharding import abstract_stack
from grok1.nn.transformer import NamedParams, Params
from grok1.ops.experts import fetched_parts
from grok1.ops.formats import OF_VALUES, Part, is_quantized

_MOST_IN_HOST = 1 << 24  # bytes of an array that costs less to send than to compile what fills it
_ALIGNMENT = 64  # bytes; XLA's CPU client adopts host memory so aligned without copying it


class _Leaf(NamedTuple):
    """An array on disk, with the `shape` and `dtype` that it has in memory.

    Attributes:
      array: The array.
      dtype: Its type in memory.
      part: What it is of a quantised weight, where it follows the grouping of the scales.
      block_rows: Rows of the weight in a group of the files.
      name: Of the tensor, where its elements are to be checked; "" where they are not.
    """

    array: StoredArray
    dtype: np.dtype
    part: Part | None = None
    block_rows: int = 0
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def check(self) -> Check | None:
        """What looks at its elements."""
        return FiniteCheck(self.array.parts[0][0], self.name) if self.name else None


class _Shard(NamedTuple):
    """A local device's part of one parameter.

    Attributes:
      device: The device.
      bounds: The part of each layer that it holds.
      shape: Shape of its buffer, with a leading axis for the layers even if there is but one.
    """

    device: Any
    bounds: tuple[Bounds, ...]
    shape: tuple[int, ...]


def load_params(
    stored: StoredModel,
    config: ModelConfig,
    mesh: Mesh,
    progress: bool,
    select: Callable[[Params], Params] = lambda params: params,
) -> Params:
    """Reads a checked checkpoint onto a mesh.

    Args:
      stored: The tensors on disk, checked, with the types in memory of those without scales.
      config: The model.
      mesh: Where it goes.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.
      select: What to load of the parameters: maps a tree of them to a tree of some.

    Returns:
      The parameters selected, layers stacked, sharded as `sharding.abstract_stack` says.

    Raises:
      CheckpointError: If a file changes underneath, or a scale, a norm, a router's weight or an
        embedding is not finite; the message names the tensor and the place.
      OtherProcessError: If this is one of several processes and another one failed.
    """
    try:
        return _load_params(stored, config, mesh, progress, select)
    except BaseException as error:
        # A notebook keeps the traceback of the last error, and its frames would keep the buffers.
        failure: BaseException | None = error
        while failure is not None:
            traceback.clear_frames(failure.__traceback__)
            failure = failure.__context__
        raise


def _load_params(
    stored_model: StoredModel,
    config: ModelConfig,
    mesh: Mesh,
    progress: bool,
    select: Callable[[Params], Params],
) -> Params:
    named = arrange(_named_leaves(stored_model), config)
    target = abstract_stack(named, config, mesh)
    sources = Params(
        embedding=[named.embedding],
        layers=jax.tree.map(lambda *layers: list(layers), *named.layers, is_leaf=_is_leaf),
        final_norm=[named.final_norm],
    )
    leaves, structure = jax.tree.flatten(select(target))
    files = structure.flatten_up_to(select(sources))
    shards = [_shards(leaf, stored) for leaf, stored in zip(leaves, files, strict=True)]
    total = sum(
        leaf.dtype.itemsize * math.prod(shard.shape)
        for leaf, local in zip(leaves, shards, strict=True)
        for shard in local
    )
    with (
        progress_bar(total, "loading", progress and jax.process_index() == 0) as bar,
        together() as check_others,
    ):

        def advance(num_bytes):
            bar.update(num_bytes)
            check_others()

        # Other processes of this host may want the pages that this one has read.
        with (
            Programs() as programs,
            Reader(advance, keep_pages=jax.process_count() > 1) as reader,
        ):
            carrier = _carrier(files, shards, reader, programs)
            # Programs are compiled while the first pieces are read.
            stacks = [
                carrier.stacks(
                    leaf.sharding.shard_shape(leaf.shape), local[0].shape[1:], stored[0].dtype
                )
                if _is_carried(stored, local)
                else []
                for leaf, stored, local in zip(leaves, files, shards, strict=True)
            ]
            # What is made in the host's memory comes behind what keeps the readers busy meanwhile,
            # and goes on to its devices while the rest is read.
            carried = [i for i, there in enumerate(stacks) if there]
            made = [i for i, there in enumerate(stacks) if not there]
            number, buffers = 0, {}
            for i in (*carried[:1], *made, *carried[1:]):
                if stacks[i]:
                    _fill_devices(files[i], shards[i], stacks[i], carrier)
                    continue
                read = _read_scales if files[i][0].part is not None else _fill_host
                number, buffers[i] = read(leaves[i], files[i], shards[i], reader)
            reader.wait(number)
            arrays: list[Any] = [None] * len(leaves)
            for i, filled in buffers.items():
                leaf, stored, local = leaves[i], files[i], shards[i]
                if stored[0].part is not None:
                    filled = _refine(leaf, stored, local, filled, bar)
                arrays[i] = _placed(leaf, local, filled)
            carrier.finish()
            reader.wait()
        for i in carried:
            placed = jax.block_until_ready([stack.array for stack in stacks[i]])
            arrays[i] = _made(leaves[i], placed)
    return jax.tree.unflatten(structure, arrays)


def expert_arrays(stored: StoredModel, config: ModelConfig) -> list[list[StoredArray]]:
    """Returns where the experts' weights lie that `offload` fetches.

    Args:
      stored: The tensors on disk.
      config: The model.

    Returns:
      For each layer those of gate, up and down: int8 values, or the three parts of 4-bit weights.

    Raises:
      ValueError: If the experts are floats.
    """
    layers = []
    for layer in arrange(_named_leaves(stored), config).layers:
        arrays = []
        for weight in layer.experts:
            if not is_quantized(weight):
                raise ValueError(
                    f"{weight.array.parts[0][0].path}: the experts are {weight.array.dtype}, and "
                    "only quantised ones can be offloaded; load it with offload='none'"
                )
            arrays += [weight[place].array for place in fetched_parts(weight)]
        layers.append(arrays)
    return layers


def _shards(target: jax.ShapeDtypeStruct, stored: list[_Leaf]) -> list[_Shard]:
    stacked = len(target.shape) > len(stored[0].shape)
    shape = target.sharding.shard_shape(target.shape)
    shards = []
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        assert index is not None  # a device of the map holds a part
        bounds = [part.indices(size)[:2] for part, size in zip(index, target.shape, strict=True)]
        shards.append(
            _Shard(
                device,
                tuple(bounds[1:] if stacked else bounds),
                shape if stacked else (1, *shape),
            )
        )
    return shards


def _made(target: jax.ShapeDtypeStruct, placed: list[jax.Array]) -> jax.Array:
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, placed)


def _placed(
    target: jax.ShapeDtypeStruct, shards: list[_Shard], buffers: list[np.ndarray]
) -> jax.Array:
    """Sends what was made in the host's memory, which a CPU adopts."""
    shape = target.sharding.shard_shape(target.shape)
    pairs = zip(buffers, shards, strict=True)
    return _made(
        target, [jax.device_put(buffer.reshape(shape), shard.device) for buffer, shard in pairs]
    )


def _fill_host(
    target: jax.ShapeDtypeStruct, stored: list[_Leaf], shards: list[_Shard], reader: Reader
) -> tuple[int, list[np.ndarray]]:
    """Returns the shards' buffers before they are filled, and what to wait for."""
    del target  # which has the elements as the files have them
    number, buffers = 0, [_aligned(shard.shape, stored[0].dtype) for shard in shards]
    for i, leaf in enumerate(stored):
        number = reader.submit(
            leaf.array,
            [
                Target(shard.bounds, buffer[i])
                for shard, buffer in zip(shards, buffers, strict=True)
            ],
            leaf.check,
        )
    return number, buffers


def _is_carried(stored: list[_Leaf], shards: list[_Shard]) -> bool:
    """Whether a parameter goes to its devices in pieces; others are made in the host's memory."""
    if stored[0].part is not None or _adopts_memory(shards[0].device):
        return False
    return stored[0].dtype.itemsize * math.prod(shards[0].shape) > _MOST_IN_HOST


def _adopts_memory(device: Any) -> bool:
    return device.platform == "cpu"


def _carrier(
    files: list[list[_Leaf]], shards: list[list[_Shard]], reader: Reader, programs: Programs
) -> AnyCarrier:
    devices = [shard.device for shard in shards[0]]
    copiers = {device: copier for device in devices if (copier := copier_of(device)) is not None}
    if len(copiers) == len(devices):
        return DirectCarrier(reader, copiers, programs)
    largest = max(
        stored[0].dtype.itemsize * math.prod(local[0].shape[1:])
        for stored, local in zip(files, shards, strict=True)
    )
    return Carrier(reader, devices, largest, programs)


def _fill_devices(
    stored: list[_Leaf], shards: list[_Shard], stacks: list[Stack], carrier: AnyCarrier
) -> None:
    """On an accelerator the shard is built there, in pieces; returns before it is filled."""
    parts = list(carrier.parts(stacks[0]))
    for layer, leaf in enumerate(stored):
        for part in parts:
            bounds = [_within(shard.bounds, part.bounds) for shard in shards]
            carrier.carry(Load(leaf.array, stacks, layer, part, bounds, leaf.check))


def _within(bounds: tuple[Bounds, ...], part: tuple[Bounds, ...]) -> tuple[Bounds, ...]:
    """Bounds of a part that is counted from where a shard begins."""
    return tuple(
        (first + start, first + stop)
        for (first, _), (start, stop) in zip(bounds, part, strict=True)
    )


def _read_scales(
    target: jax.ShapeDtypeStruct, stored: list[_Leaf], shards: list[_Shard], reader: Reader
) -> tuple[int, list[np.ndarray]]:
    """Reads the scales that each shard needs, in the grouping of the files, as `_fill_host`."""
    number, buffers = 0, []
    for shard in shards:
        bounds = _file_bounds(target, stored, shard)
        sizes = [stop - start for start, stop in bounds]
        buffers.append(np.empty((len(stored), *sizes), stored[0].dtype))
    for i, leaf in enumerate(stored):
        targets = [
            Target(_file_bounds(target, stored, shard), buffer[i])
            for shard, buffer in zip(shards, buffers, strict=True)
        ]
        number = reader.submit(leaf.array, targets)
    return number, buffers


def _refine(
    target: jax.ShapeDtypeStruct,
    stored: list[_Leaf],
    shards: list[_Shard],
    buffers: list[np.ndarray],
    bar: tqdm,
) -> list[np.ndarray]:
    """Checks scales and repeats them for the groups that the shards have in memory."""
    repeats = target.shape[-2] // stored[0].shape[-2]
    part, block_rows = stored[0].part, stored[0].block_rows
    assert part is not None  # others have no groups
    refined = []
    for shard, scales in zip(shards, buffers, strict=True):
        bounds = _file_bounds(target, stored, shard)
        origin = [start for start, _ in bounds]
        for leaf, of_layer in zip(stored, scales, strict=True):
            if part.name == "scales":
                check_scales(leaf.array.parts[0][0], of_layer, origin)
        start = shard.bounds[-2][0] - bounds[-2][0] * repeats
        repeated = part.refine(scales, repeats, block_rows)
        refined.append(repeated[..., start : start + shard.shape[-2], :])
        bar.update(refined[-1].nbytes - scales.nbytes)
    return refined


def _file_bounds(
    target: jax.ShapeDtypeStruct, stored: list[_Leaf], shard: _Shard
) -> tuple[Bounds, ...]:
    """Bounds of a shard's scales in the files, whose groups may be larger."""
    part = stored[0].part
    assert part is not None  # others have no groups
    assert part.rows_of_group is not None
    # Whole groups of the files.
    step = target.shape[-2] // stored[0].shape[-2] * part.rows_of_group
    *lead, (start, stop), columns = shard.bounds
    groups = start // step, -(-stop // step)
    return (*lead, (groups[0] * part.rows_of_group, groups[1] * part.rows_of_group), columns)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A buffer that XLA adopts; NumPy asks for huge pages."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _named_leaves(stored: StoredModel) -> NamedParams:
    named: dict[str, dict[str, Any]] = {}
    for tensor, spec in zip(stored.tensors, stored.specs, strict=True):
        module, _, parameter = spec.name.rpartition("/")
        leaf: Any
        if tensor.scales is None:
            # `verify --deep` looks at the large ones.
            name = "" if is_large(spec) else spec.name
            leaf = _Leaf(tensor.values, jnp.dtype(spec.dtype), name=name)
        else:
            stored_as = OF_VALUES[tensor.values.dtype]
            rows = tensor.shape[-2] // tensor.scales.shape[-2]
            leaf = stored_as.weight(
                *(
                    _Leaf(array, DTYPES[part.dtype])
                    if part.rows_of_group is None
                    else _Leaf(array, DTYPES[part.dtype], part, rows)
                    for part, array in zip(stored_as.parts, tensor.parts, strict=True)
                )
            )
        named.setdefault(module, {})[parameter] = leaf
    return named


def _is_leaf(node: Any) -> bool:
    return isinstance(node, _Leaf)
