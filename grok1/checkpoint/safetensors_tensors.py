"""The tensors of a safetensors checkpoint against the model: what is missing, foreign or unlike.

A weight may be stored in any format, float32 or bfloat16, as long as all of its kind are alike.
"""

import collections
import pathlib
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from grok1.checkpoint.safetensors_layout import (
    INDEX_NAME,
    LAYER,
    NamedMatrix,
    is_transposed,
    shards,
)
from grok1.checkpoint.storage import StoredArray, StoredTensor, text_of
from grok1.checkpoint.tensor_file import ArraySpan
from grok1.files import CheckpointError
from grok1.nn.manifest import TensorSpec, is_of_experts
from grok1.ops.formats import INT4, INT8, OF_VALUES, Part
from grok1.ops.int4 import is_block

CONVERSION = "is it a conversion by grok1?"
DAMAGED = "the file is damaged: copy it again"
MIXED = "these files are of different checkpoints"


class ShardHeader(NamedTuple):
    """What one safetensors file holds.

    Attributes:
      path: The file.
      file_size: Its length in bytes when it was read.
      modified: When it had been written to last, in nanoseconds.
      spans: Its arrays by name.
    """

    path: pathlib.Path
    file_size: int
    modified: int
    spans: dict[str, ArraySpan]


Found = dict[str, tuple[ShardHeader, ArraySpan]]
"""The tensors of all shards by name, with the shard that each is in."""


def _wanted(manifest: list[TensorSpec]) -> dict[str, NamedMatrix]:
    """The matrices that the model needs, whatever types and scales they have."""
    plain = [spec._replace(scales_shape=None) for spec in manifest]
    return {tensor.name: tensor for shard in shards(plain) for tensor in shard}


def left_over(
    directory: pathlib.Path, manifest: list[TensorSpec], found: Found, absent: Set[str]
) -> Iterator[CheckpointError]:
    """Yields what names of the model are nowhere, and what other names there are.

    Args:
      directory: Where the index is.
      manifest: The tensors of the model.
      found: Those of the files.
      absent: Names that the index promises and no file has.
    """
    wanted = _wanted(manifest)
    allowed = {
        f"{name}{part.suffix}"
        for name, t in wanted.items()
        for part in _possible_parts(manifest[t.tensor])
    }
    missing = wanted.keys() - found.keys() - absent
    names = {directory / INDEX_NAME: ("lacks", sorted(missing))} if missing else {}
    for name in sorted(found.keys() - wanted.keys() - allowed):
        names.setdefault(found[name][0].path, ("has the unexpected", []))[1].append(name)
    for path, (what, tensors) in names.items():
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        yield CheckpointError(
            path,
            f"{what} {tensors[0]}{more}",
            "is its config.json the one it was converted with, and is it a conversion by grok1?",
            "foreign",
        )


def fill_in(
    manifest: list[TensorSpec],
    found: Found,
    absent: Set[str],
    tensors: list[StoredTensor | None],
) -> Iterator[CheckpointError]:
    """Fills in the tensors that are whole and yields what is wrong with the others."""
    matrices: list[list[dict[str, Any]]] = [[] for _ in manifest]
    broken = set()
    for name, tensor in _wanted(manifest).items():
        spec = manifest[tensor.tensor]
        problem = _problem(name, tensor, spec, found, absent)
        parts = _parts_of(name, found)
        if problem is not None or name not in found or any(f not in found for f in parts.values()):
            broken.add(tensor.tensor)
            if problem is not None:
                yield problem
            continue
        matrices[tensor.tensor].append({part: found[full] for part, full in parts.items()})
    for number, spec in enumerate(manifest):
        # Matrices of different formats are a fault of `unlike`, which needs them side by side.
        if number not in broken:
            tensors[number] = _stored(spec, matrices[number])


def _possible_parts(spec: TensorSpec) -> tuple[Part, ...]:
    """What a file may hold of a weight: of experts the parts of every format."""
    if spec.scales_shape is None:
        return ()
    return (*INT8.parts, *INT4.parts) if is_of_experts(spec) else INT8.parts


def _parts_of(name: str, found: Found) -> dict[str, str]:
    """The names of a stored weight's arrays by the part that each is."""
    if name not in found or found[name][1].dtype not in OF_VALUES:
        return {"values": name}
    stored_as = OF_VALUES[found[name][1].dtype]
    return {part.name: f"{name}{part.suffix}" for part in stored_as.parts}


def _problem(
    name: str, tensor: NamedMatrix, spec: TensorSpec, found: Found, absent: Set[str]
) -> CheckpointError | None:
    """What is wrong with one matrix and its scales; an absent one is no fault of its own."""
    if name not in found:
        return None
    file, span = found[name]
    scale_name = f"{name}_scale"
    types = {spec.dtype, "float32", "bfloat16"}
    if span.dtype == INT4.parts[0].dtype and is_of_experts(spec):
        return _int4_problem(name, spec, found, absent)
    if span.shape != tensor.shape or span.dtype not in types:
        expected = text_of(ArraySpan(0, tensor.shape, spec.dtype))
        problem = f"{name} is {text_of(span)}, expected {expected}"
        return CheckpointError(file.path, problem, CONVERSION, "foreign")
    if span.dtype != "int8":
        if scale_name not in found:
            return None
        return CheckpointError(
            file.path,
            f"{name} is {span.dtype} and has scales, expected int8 for a weight with scales",
            CONVERSION,
            "foreign",
        )
    if scale_name not in found:
        if scale_name in absent:
            return None
        return CheckpointError(
            file.path, f"{name} is int8 and has no {scale_name}", "copy it again"
        )
    columns, rows = span.shape
    scale_file, scales = found[scale_name]
    if (
        scales.dtype != "bfloat16"
        or len(scales.shape) != 2
        or scales.shape[0] != columns
        or rows % scales.shape[1]
    ):
        return CheckpointError(
            scale_file.path,
            f"{scale_name} is {text_of(scales)}, expected bfloat16[{columns},G] with a G that "
            f"divides {rows}",
            CONVERSION,
            "foreign",
        )
    return None


def _int4_problem(
    name: str, spec: TensorSpec, found: Found, absent: Set[str]
) -> CheckpointError | None:
    """What is wrong with one matrix of 4 bits and its scales."""
    file, _ = found[name]
    *_, rows, columns = spec.shape
    missing = [full for full in _parts_of(name, found).values() if full not in found]
    if missing:
        if absent & set(missing):
            return None
        return CheckpointError(file.path, f"{name} is 4-bit and has no {missing[0]}", DAMAGED)
    blocks = found[f"{name}_scale"][1].shape[0]
    valid = rows % blocks == 0 and is_block(rows // blocks)
    shapes = zip(INT4.parts, INT4.part_shapes((rows, columns), blocks), strict=True)
    # The scales of blocks first: by their number the others are measured.
    for part, shape in sorted(shapes, key=lambda pair: pair[0].name != "scales"):
        file, span = found[f"{name}{part.suffix}"]
        if span.shape != shape or span.dtype != part.dtype or not valid:
            counts = "B" if part.name == "scales" else shape[0]
            return CheckpointError(
                file.path,
                f"{name}{part.suffix} is {text_of(span)}, expected {part.dtype}"
                f"[{counts},{columns}] for 4-bit weights of {rows} rows in B blocks of at most 256",
                CONVERSION,
                "foreign",
            )
    return None


def _stored(spec: TensorSpec, matrices: list[dict[str, Any]]) -> StoredTensor:
    """The tensor of some matrices, of the format of the first."""
    first = matrices[0]
    dtype = first["values"][1].dtype
    transposed = is_transposed(spec) and dtype != INT4.parts[0].dtype

    def array(part: str) -> StoredArray:
        shape = first[part][1].shape
        shape = shape[::-1] if transposed else shape
        parts = tuple(matrix.get(part, first[part]) for matrix in matrices)
        return StoredArray((*spec.shape[:-2], *shape), first[part][1].dtype, parts, transposed)

    parts = {part: array(part) for part in first}
    return StoredTensor(parts["values"], parts.get("scales"), parts.get("subscales"))


def unlike(
    manifest: list[TensorSpec], tensors: list[StoredTensor | None]
) -> Iterator[CheckpointError]:
    """Every matrix of a kind, in all layers and experts, must be stored alike, to be stacked."""
    kinds: dict[str, list[tuple[str, pathlib.Path, str]]] = {}
    for spec, tensor in zip(manifest, tensors, strict=True):
        if tensor is None:
            continue
        match = LAYER.match(spec.name)
        of_kind = kinds.setdefault(match[2] if match else spec.name, [])
        for number, (file, span) in enumerate(tensor.values.parts):
            storage = span.dtype
            if tensor.scales is not None:
                shape = tensor.scales.parts[number][1].shape
                groups = shape[1] if tensor.scales.transposed else shape[0]
                storage += f" with {groups} scales a column"
            of_kind.append((spec.name, file.path, storage))
    for members in kinds.values():
        usual = collections.Counter(storage for *_, storage in members).most_common(1)[0][0]
        # A tensor's experts are stored alike as a rule; it is named once.
        for name, path, storage in dict.fromkeys(members):
            if storage != usual:
                yield CheckpointError(
                    path, f"{name} is stored as {storage}, elsewhere as {usual}", MIXED, "foreign"
                )
