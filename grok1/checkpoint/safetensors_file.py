"""Checkpoints in safetensors, read against the model; names and layout: `safetensors_layout`."""

import collections
import itertools
import os
import pathlib
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

import numpy as np

from grok1.checkpoint.safetensors_layout import (
    EMBEDDING,
    HEAD,
    INDEX_NAME,
    LAYER,
    TYPES,
    NamedMatrix,
    is_transposed,
    shards,
)
from grok1.checkpoint.storage import StoredArray, StoredTensor
from grok1.checkpoint.tensor_file import ArraySpan, read_span
from grok1.files import (
    CheckpointError,
    is_lfs_pointer,
    json_object,
    lfs_pointer,
    open_file,
    read_bounded,
    unreadable,
)
from grok1.machine.safe_files import is_plain
from grok1.nn.manifest import TensorSpec

_MAX_HEADER = 100_000_000  # The format's own limit.
_HEAD_BYTES = 64  # that show a Git LFS pointer
_CONVERSION = "is it a conversion by grok1?"
_DAMAGED = "the file is damaged: copy it again"
_MIXED = "these files are of different checkpoints"


class ShardHeader(NamedTuple):
    """What one safetensors file holds.

    Attributes:
      path: The file.
      file_size: Its length in bytes when it was read.
      spans: Its arrays by name.
    """

    path: pathlib.Path
    file_size: int
    spans: dict[str, ArraySpan]


Found = dict[str, tuple[ShardHeader, ArraySpan]]
"""The tensors of all shards by name, with the shard that each is in."""


def read_shard_header(path: str | os.PathLike[str]) -> ShardHeader:
    """Finds the arrays in a safetensors file.

    Raises:
      CheckpointError: If the file cannot be read, or its header is not that of a safetensors file
        of float32, bfloat16 and int8 arrays that fill it.
    """
    path = pathlib.Path(path)
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD_BYTES)
            length = int.from_bytes(head[:8], "little")
            if is_lfs_pointer(head):
                raise lfs_pointer(path)
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    path,
                    f"is {size} bytes long and claims a header of {length}",
                    "the file is cut off or no safetensors file: copy it again",
                )
            file.seek(8)
            text = file.read(length)
        except OSError as error:
            raise unreadable(path, error) from error
    header = _json_object(path, text)
    header.pop("__metadata__", None)
    spans, end = {}, 8 + length
    try:
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not is_plain(name):
                raise ValueError(f"{name!r:.80} is no name of a tensor")
            if not all(type(n) is int and n > 0 for n in shape) or not shape:
                raise ValueError(f"{name} has the shape {shape!r:.80}")
            if type(begin) is not int or type(stop) is not int:
                raise ValueError(
                    f"{name} has the data_offsets {entry['data_offsets']!r:.80}, expected two "
                    "whole numbers"
                )
            spans[name] = span = ArraySpan(8 + length + begin, tuple(shape), TYPES[dtype])
            if span.offset != end or stop - begin != span.nbytes:
                raise ValueError(
                    f"{name} is said to be at {begin} to {stop}, expected {end - 8 - length} to "
                    f"{end - 8 - length + span.nbytes}"
                )
            end += span.nbytes
    except KeyError as error:
        raise CheckpointError(
            path,
            f"its header has {error} where a tensor's dtype (F32, BF16 or I8), shape and "
            "data_offsets are expected",
            _CONVERSION,
            "foreign",
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, f"its header is damaged: {error}", "copy it again") from None
    if end != size:
        raise CheckpointError(path, f"is {size} bytes long, expected {end} by its header", _DAMAGED)
    return ShardHeader(path, size, spans)


class Examination(NamedTuple):
    """What a safetensors checkpoint holds, and everything that is wrong with it.

    Attributes:
      shards: The files that could be read, of those that the index names.
      tensors: The tensors in manifest order; None for one that is not whole.
      faults: The error of each fault.
    """

    shards: list[ShardHeader]
    tensors: list[StoredTensor | None]
    faults: list[CheckpointError]


def open_safetensors(
    directory: str | os.PathLike[str], manifest: list[TensorSpec]
) -> list[StoredTensor]:
    """Checks a safetensors checkpoint against the model, before any element is read.

    Args:
      directory: The directory with `model.safetensors.index.json`.
      manifest: The tensors that the model expects, in manifest order. A weight may be int8 with
        scales of any grouping that divides its rows, and every tensor bfloat16 or float32.

    Returns:
      The tensors, in manifest order.

    Raises:
      CheckpointError: If a file or tensor is missing or left over, damaged, or of another type or
        shape than the manifest says; the message names it.
    """
    found = examine_safetensors(directory, manifest)
    for error in found.faults:
        raise error
    return [tensor for tensor in found.tensors if tensor is not None]


def examine_safetensors(
    directory: str | os.PathLike[str], manifest: list[TensorSpec]
) -> Examination:
    """Checks a safetensors checkpoint as `open_safetensors` does, and goes on after a fault.

    Args:
      directory: Where the shards and their index are.
      manifest: The tensors that a checkpoint of the model has.

    Raises:
      CheckpointError: If the index cannot be read.
    """
    directory = pathlib.Path(directory)
    weight_map = _read_index(directory / INDEX_NAME)
    headers: dict[str, ShardHeader] = {}
    faults: list[CheckpointError] = []
    for name in sorted(set(weight_map.values())):
        try:
            headers[name] = read_shard_header(directory / name)
        except CheckpointError as error:
            faults.append(error)
    found = {
        tensor: (headers[name], headers[name].spans[tensor])
        for tensor, name in weight_map.items()
        if name in headers and tensor in headers[name].spans
    }
    # What the index promises and no file has is a fault of the file, said once.
    absent = weight_map.keys() - found.keys()
    tensors: list[StoredTensor | None] = [None] * len(manifest)
    faults += itertools.chain(
        _misplaced(directory, weight_map, headers),
        _untied(found),
        _left_over(directory, manifest, found, absent),
        _stored_tensors(manifest, found, absent, tensors),
        _unlike(manifest, tensors),
    )
    return Examination(list(headers.values()), tensors, faults)


def _misplaced(directory, weight_map, headers) -> Iterator[CheckpointError]:
    for tensor, name in weight_map.items():
        if name in headers and tensor not in headers[name].spans:
            yield CheckpointError(
                directory / name, f"lacks {tensor}, which {INDEX_NAME} says is there", _MIXED
            )
    for header in headers.values():
        extra = sorted(t for t in header.spans if weight_map.get(t) != header.path.name)
        extra = [t for t in extra if t not in weight_map or t in _spans(headers, weight_map[t])]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            place = weight_map.get(extra[0])
            says = f"says is in {place}" if place else "does not name"
            yield CheckpointError(
                header.path, f"holds {extra[0]}{more}, which {INDEX_NAME} {says}", _MIXED, "foreign"
            )


def _spans(headers: dict[str, ShardHeader], name: str) -> dict[str, ArraySpan]:
    return headers[name].spans if name in headers else {}


def _untied(found: Found) -> Iterator[CheckpointError]:
    """Takes the output head from what was found: in Grok-1 it is the embedding, and read as that.

    Ports may store it a second time, or under its own name alone.
    """
    head = found.pop(HEAD, None)
    if head is None:
        return
    file, span = head
    other, embedding = found.setdefault(EMBEDDING, head)
    if (span.shape, span.dtype) != (embedding.shape, embedding.dtype):
        problem = f"{HEAD} is {_text(span)}, and {EMBEDDING} {_text(embedding)}"
    elif any(
        not np.array_equal(
            read_span(file, span, row, row + 1), read_span(other, embedding, row, row + 1)
        )
        for row in (0, span.shape[0] // 2, span.shape[0] - 1)
    ):
        problem = f"{HEAD} has other elements than {EMBEDDING}"
    else:
        return
    yield CheckpointError(
        file.path,
        f"{problem}, expected the same: Grok-1's head is its embedding",
        _MIXED,
        "foreign",
    )


def _wanted(manifest: list[TensorSpec]) -> dict[str, NamedMatrix]:
    """The matrices that the model needs, whatever types and scales they have."""
    plain = [spec._replace(scales_shape=None) for spec in manifest]
    return {tensor.name: tensor for shard in shards(plain) for tensor in shard}


def _left_over(directory, manifest, found: Found, absent: Set[str]) -> Iterator[CheckpointError]:
    wanted = _wanted(manifest)
    allowed = {f"{name}_scale" for name, t in wanted.items() if manifest[t.tensor].scales_shape}
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


def _stored_tensors(
    manifest: list[TensorSpec],
    found: Found,
    absent: Set[str],
    tensors: list[StoredTensor | None],
) -> Iterator[CheckpointError]:
    """Fills in the tensors that are whole and yields what is wrong with the others."""
    parts: list[list[Any]] = [[] for _ in manifest]
    scale_parts: list[list[Any]] = [[] for _ in manifest]
    broken = set()
    for name, tensor in _wanted(manifest).items():
        problem = _problem(name, tensor, manifest[tensor.tensor], found, absent)
        if problem is not None or name not in found or _lacks_scales(name, found):
            broken.add(tensor.tensor)
            if problem is not None:
                yield problem
            continue
        parts[tensor.tensor].append(found[name])
        if found[name][1].dtype == "int8":
            scale_parts[tensor.tensor].append(found[f"{name}_scale"])
    for number, spec in enumerate(manifest):
        if number not in broken:
            tensors[number] = _stored(spec, parts[number], scale_parts[number])


def _lacks_scales(name: str, found: Found) -> bool:
    return found[name][1].dtype == "int8" and f"{name}_scale" not in found


def _problem(
    name: str, tensor: NamedMatrix, spec: TensorSpec, found: Found, absent: Set[str]
) -> CheckpointError | None:
    """What is wrong with one matrix and its scales; an absent one is no fault of its own."""
    if name not in found:
        return None
    file, span = found[name]
    scale_name = f"{name}_scale"
    types = {spec.dtype, "float32", "bfloat16"}
    if span.shape != tensor.shape or span.dtype not in types:
        expected = _text(ArraySpan(0, tensor.shape, spec.dtype))
        problem = f"{name} is {_text(span)}, expected {expected}"
        return CheckpointError(file.path, problem, _CONVERSION, "foreign")
    if span.dtype != "int8":
        if scale_name not in found:
            return None
        return CheckpointError(
            file.path,
            f"{name} is {span.dtype} and has scales, expected int8 for a weight with scales",
            _CONVERSION,
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
            f"{scale_name} is {_text(scales)}, expected bfloat16[{columns},G] with a G that "
            f"divides {rows}",
            _CONVERSION,
            "foreign",
        )
    return None


def _text(span: ArraySpan) -> str:
    return f"{span.dtype}[{','.join(map(str, span.shape))}]"


def _json_object(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise CheckpointError(path, f"expected a JSON object: {error!s:.200}", _DAMAGED) from None


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Returns which file holds which tensor."""
    weight_map = _json_object(path, read_bounded(path, _MAX_HEADER)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            path, "expected a weight_map from tensors to files beside it", _DAMAGED
        )
    for tensor, name in weight_map.items():
        if not (is_plain(tensor) and isinstance(name, str) and _is_beside(name)):
            raise CheckpointError(
                path,
                f"its weight_map has {tensor!r:.80} in {name!r:.80}, expected a weight_map from "
                "tensors to files beside it, by names without control characters",
                _DAMAGED,
            )
    return weight_map


def _is_beside(name: str) -> bool:
    return is_plain(name) and name not in ("", ".", "..") and name == os.path.basename(name)


def _stored(spec: TensorSpec, parts: list, scale_parts: list) -> StoredTensor:
    transposed = is_transposed(spec)
    values = StoredArray(spec.shape, parts[0][1].dtype, tuple(parts), transposed)
    if not scale_parts:
        return StoredTensor(values, None)
    groups = scale_parts[0][1].shape[1]
    shape = (*spec.shape[:-2], groups, spec.shape[-1])
    return StoredTensor(values, StoredArray(shape, "bfloat16", tuple(scale_parts), transposed))


def _unlike(
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
                groups = tensor.scales.parts[number][1].shape[1]
                storage += f" with {groups} scales a column"
            of_kind.append((spec.name, file.path, storage))
    for members in kinds.values():
        usual = collections.Counter(storage for *_, storage in members).most_common(1)[0][0]
        # A tensor's experts are stored alike as a rule; it is named once.
        for name, path, storage in dict.fromkeys(members):
            if storage != usual:
                yield CheckpointError(
                    path, f"{name} is stored as {storage}, elsewhere as {usual}", _MIXED, "foreign"
                )
