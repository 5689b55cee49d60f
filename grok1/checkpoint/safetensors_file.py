"""Checkpoints in safetensors, read against the model; names and layout: `safetensors_layout`."""

import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from grok1.checkpoint.safetensors_layout import (
    EMBEDDING,
    HEAD,
    INDEX_NAME,
    TYPES,
)
from grok1.checkpoint.safetensors_tensors import (
    CONVERSION,
    DAMAGED,
    MIXED,
    Found,
    ShardHeader,
    fill_in,
    left_over,
    unlike,
)
from grok1.checkpoint.storage import StoredTensor, text_of
from grok1.checkpoint.tensor_file import ArraySpan, read_span
from grok1.files import (
    LFS_HEAD_BYTES,
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
# A header has room for millions of axes, whose product would take hours, and for names that no
# message should repeat.
_MOST_AXES = 32
_MOST_SIZE = 2**63 - 1
_MOST_NAME = 1000


def read_shard_header(path: str | os.PathLike[str]) -> ShardHeader:
    """Finds the arrays in a safetensors file.

    Raises:
      CheckpointError: If the file cannot be read, or its header is not that of a safetensors file
        of arrays of the types in `TYPES` that fill it.
    """
    path = pathlib.Path(path)
    with open_file(path) as file:
        try:
            found = os.fstat(file.fileno())
            size = found.st_size
            head = file.read(LFS_HEAD_BYTES)
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
        places = {name: _checked_place(name, entry) for name, entry in header.items()}
        for name, (begin, stop) in sorted(places.items(), key=lambda item: item[1]):
            dtype, shape = header[name]["dtype"], header[name]["shape"]
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
            f"its header has {error!s:.80} where a tensor's dtype (F32, BF16, I8, U8 or F16), "
            "shape and data_offsets are expected",
            CONVERSION,
            "foreign",
        ) from None
    except ValueError as error:
        raise CheckpointError(path, f"its header is damaged: {error}", "copy it again") from None
    if end != size:
        raise CheckpointError(path, f"is {size} bytes long, expected {end} by its header", DAMAGED)
    return ShardHeader(path, size, found.st_mtime_ns, spans)


def _checked_place(name: str, entry: Any) -> tuple[int, int]:
    """The data_offsets of a tensor in a shard's header, of which each part has its type."""
    if not _is_name(name):
        raise ValueError(f"{name!r:.80} is no name of a tensor")
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {entry!r:.80}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has the dtype {dtype!r:.80}")
    if not (
        isinstance(shape, list)
        and 1 <= len(shape) <= _MOST_AXES
        and all(type(n) is int and 1 <= n <= _MOST_SIZE for n in shape)
    ):
        raise ValueError(f"{name} has the shape {shape!r:.80}")
    if not (isinstance(offsets, list) and [type(n) for n in offsets] == [int, int]):
        raise ValueError(f"{name} has the data_offsets {offsets!r:.80}, expected two whole numbers")
    return offsets[0], offsets[1]


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
        left_over(directory, manifest, found, absent),
        fill_in(manifest, found, absent, tensors),
        unlike(manifest, tensors),
    )
    return Examination(list(headers.values()), tensors, faults)


def _misplaced(directory, weight_map, headers) -> Iterator[CheckpointError]:
    for tensor, name in weight_map.items():
        if name in headers and tensor not in headers[name].spans:
            yield CheckpointError(
                directory / name, f"lacks {tensor}, which {INDEX_NAME} says is there", MIXED
            )
    for header in headers.values():
        extra = sorted(t for t in header.spans if weight_map.get(t) != header.path.name)
        extra = [t for t in extra if t not in weight_map or t in _spans(headers, weight_map[t])]
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            place = weight_map.get(extra[0])
            says = f"says is in {place}" if place else "does not name"
            yield CheckpointError(
                header.path, f"holds {extra[0]}{more}, which {INDEX_NAME} {says}", MIXED, "foreign"
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
        problem = f"{HEAD} is {text_of(span)}, and {EMBEDDING} {text_of(embedding)}"
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
        MIXED,
        "foreign",
    )


def _json_object(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise CheckpointError(path, f"expected a JSON object: {error!s:.200}", DAMAGED) from None


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Returns which file holds which tensor."""
    weight_map = _json_object(path, read_bounded(path, _MAX_HEADER)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            path, "expected a weight_map from tensors to files beside it", DAMAGED
        )
    for tensor, name in weight_map.items():
        if not (_is_name(tensor) and isinstance(name, str) and _is_beside(name)):
            raise CheckpointError(
                path,
                f"its weight_map has {tensor!r:.80} in {name!r:.80}, expected a weight_map from "
                "tensors to files beside it, by names without control characters",
                DAMAGED,
            )
    return weight_map


def _is_name(text: str) -> bool:
    return len(text) <= _MOST_NAME and is_plain(text)


def _is_beside(name: str) -> bool:
    return _is_name(name) and name not in ("", ".", "..") and name == os.path.basename(name)
