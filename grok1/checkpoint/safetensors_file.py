"""Checkpoints in safetensors: the names and layout that Grok-1's ports for PyTorch use.

A file is eight bytes of header length, a JSON header, and the elements; it holds no code. One shard
a layer, after one for the embedding and the final norm, with `model.safetensors.index.json`.
Matrices are `[N, K]`, output before input, and every expert is a tensor of its own:

    model.embed_tokens.weight                            in_out_embed, [V, D]; also the head
    model.layers.0.attn.q_proj.weight                    multi_head_attention/query
    model.layers.0.attn.k_proj.weight                    multi_head_attention/key
    model.layers.0.attn.v_proj.weight                    multi_head_attention/value
    model.layers.0.attn.o_proj.weight                    multi_head_attention/linear
    model.layers.0.moe_block.gate.weight                 router
    model.layers.0.moe_block.experts.0.linear.weight     moe/linear, expert 0
    model.layers.0.moe_block.experts.0.linear_v.weight   moe/linear_v
    model.layers.0.moe_block.experts.0.linear_1.weight   moe/linear_1
    model.layers.0.pre_attn_norm.scale                   rms_norm
    model.layers.0.post_attn_norm.scale                  rms_norm_1
    model.layers.0.pre_moe_norm.scale                    rms_norm_2
    model.layers.0.post_moe_norm.scale                   rms_norm_3
    model.norm.scale                                     final norm

An int8 `weight` has beside it a bfloat16 `weight_scale` `[N, G]`, one column a group of inputs.

Format: https://huggingface.co/docs/safetensors. Names: those of vLLM's Grok1ForCausalLM, which are
those of the conversions on Hugging Face.
"""

import collections
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from grok1.checkpoint.storage import StoredArray, StoredTensor
from grok1.checkpoint.tensor_file import ArraySpan
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

INDEX_NAME = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000  # The format's own limit.
_HEAD_BYTES = 64  # that show a Git LFS pointer
_CONVERSION = "is it a conversion by grok1?"
_DAMAGED = "the file is damaged: copy it again"
_MIXED = "these files are of different checkpoints"
_TYPES = {"F32": "float32", "BF16": "bfloat16", "I8": "int8"}
_TYPE_NAMES = {name: code for code, name in _TYPES.items()}
_LAYER = re.compile(r"transformer/decoder_layer_(\d+)/(.*)")
_OUTSIDE = {
    "language_model/in_out_embed/embeddings": "model.embed_tokens.weight",
    "language_model/rms_norm/scale": "model.norm.scale",
}
_IN_LAYER = {
    "multi_head_attention/query/w": "attn.q_proj.weight",
    "multi_head_attention/key/w": "attn.k_proj.weight",
    "multi_head_attention/value/w": "attn.v_proj.weight",
    "multi_head_attention/linear/w": "attn.o_proj.weight",
    "router/w": "moe_block.gate.weight",
    "moe/linear/w": "moe_block.experts.{}.linear.weight",
    "moe/linear_v/w": "moe_block.experts.{}.linear_v.weight",
    "moe/linear_1/w": "moe_block.experts.{}.linear_1.weight",
    "rms_norm/scale": "pre_attn_norm.scale",
    "rms_norm_1/scale": "post_attn_norm.scale",
    "rms_norm_2/scale": "pre_moe_norm.scale",
    "rms_norm_3/scale": "post_moe_norm.scale",
}


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


class NamedMatrix(NamedTuple):
    """One tensor of a safetensors checkpoint.

    Attributes:
      name: Its name.
      tensor: Number of the manifest's tensor that it belongs to.
      matrix: Which of its matrices.
      is_scales: Whether it holds scales rather than values.
      shape: Its shape in the file.
      dtype: "float32", "int8" or "bfloat16".
    """

    name: str
    tensor: int
    matrix: int
    is_scales: bool
    shape: tuple[int, ...]
    dtype: str


Found = dict[str, tuple[ShardHeader, ArraySpan]]
"""The tensors of all shards by name, with the shard that each is in."""


def is_transposed(spec: TensorSpec) -> bool:
    """Whether a tensor's matrices are `[N, K]` here: all but the embedding and the norms."""
    return spec.name not in _OUTSIDE and len(spec.shape) > 1


def shards(manifest: list[TensorSpec]) -> list[list[NamedMatrix]]:
    """Returns what is in which shard: the embedding and final norm, then the layers in their order.

    Args:
      manifest: The tensors, with the types and grouping to store: a weight without `scales_shape`
        is one tensor, float32 or bfloat16.
    """
    num_layers = 1 + max(int(match[1]) for spec in manifest if (match := _LAYER.match(spec.name)))
    found: list[list[NamedMatrix]] = [[] for _ in range(1 + num_layers)]
    for number, spec in enumerate(manifest):
        match = _LAYER.match(spec.name)
        shard = found[int(match[1]) + 1 if match else 0]
        name = f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}" if match else _OUTSIDE[spec.name]
        for matrix in range(spec.shape[0] if len(spec.shape) > 2 else 1):
            full_name = name.format(matrix)
            shard.append(
                NamedMatrix(full_name, number, matrix, False, _shape(spec, spec.shape), spec.dtype)
            )
            if spec.scales_shape is not None:
                shape = _shape(spec, spec.scales_shape)
                shard.append(
                    NamedMatrix(f"{full_name}_scale", number, matrix, True, shape, "bfloat16")
                )
    return found


def shard_name(shard: int, num_shards: int) -> str:
    """Returns the file name of a shard, counted from 0."""
    return f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def shard_header(tensors: list[NamedMatrix]) -> bytes:
    """Returns the bytes before the elements, which follow in the order of `tensors`, unpadded."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + ArraySpan(0, tensor.shape, tensor.dtype).nbytes
        header[tensor.name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The elements start aligned.
    return len(text).to_bytes(8, "little") + text


def index_json(found: list[list[NamedMatrix]]) -> bytes:
    """Returns the content of `model.safetensors.index.json`."""
    names = [shard_name(i, len(found)) for i in range(len(found))]
    sizes = (ArraySpan(0, t.shape, t.dtype).nbytes for shard in found for t in shard)
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {
            t.name: name for name, shard in zip(names, found, strict=True) for t in shard
        },
    }
    return (json.dumps(index, indent=2) + "\n").encode()


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
            spans[name] = span = ArraySpan(8 + length + begin, tuple(shape), _TYPES[dtype])
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
        scales of any grouping that divides its rows, or bfloat16, or float32.

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
        tensor: (header, span)
        for header in headers.values()
        for tensor, span in header.spans.items()
    }
    # What the index promises and no file has is a fault of the file, said once.
    absent = weight_map.keys() - found.keys()
    tensors: list[StoredTensor | None] = [None] * len(manifest)
    faults += itertools.chain(
        _misplaced(directory, weight_map, headers),
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
    types = {spec.dtype, "float32", "bfloat16"} if spec.scales_shape else {"float32"}
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


def _shape(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-3:-1] if is_transposed(spec) else shape


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
        match = _LAYER.match(spec.name)
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
