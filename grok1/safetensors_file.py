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

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from grok1.manifest import TensorSpec
from grok1.storage import StoredArray, StoredTensor
from grok1.tensor_file import ArraySpan, CheckpointError

INDEX_NAME = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000  # The format's own limit.
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
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path}: is {size} bytes long and claims a header of {length}; the file is "
                    "cut off or no safetensors file: copy it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    header = _json_object(path, text)
    header.pop("__metadata__", None)
    spans, end = {}, 8 + length
    try:
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not all(type(n) is int and n > 0 for n in shape) or not shape:
                raise ValueError(f"{name} has the shape {shape!r:.80}")
            spans[name] = span = ArraySpan(8 + length + begin, tuple(shape), _TYPES[dtype])
            if span.offset != end or stop - begin != span.nbytes:
                raise ValueError(
                    f"{name} is said to be at {begin} to {stop}, expected {end - 8 - length} to "
                    f"{end - 8 - length + span.nbytes}"
                )
            end += span.nbytes
    except KeyError as error:
        raise CheckpointError(
            f"{path}: its header has {error} where a tensor's dtype (F32, BF16 or I8), shape and "
            "data_offsets are expected; is this a conversion by grok1?"
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header is damaged: {error}; copy it again") from None
    if end != size:
        raise CheckpointError(
            f"{path}: is {size} bytes long, expected {end} by its header; the file is damaged: "
            "copy it again"
        )
    return ShardHeader(path, size, spans)


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
    directory = pathlib.Path(directory)
    found = _indexed_spans(directory)
    wanted: dict[str, NamedMatrix] = {
        tensor.name: tensor
        for shard in shards([spec._replace(scales_shape=None) for spec in manifest])
        for tensor in shard
    }
    allowed = {f"{name}_scale" for name, t in wanted.items() if manifest[t.tensor].scales_shape}
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys() - allowed
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has the unexpected", extra)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(
            f"{directory / INDEX_NAME}: {what} {min(names)}{more}; is its config.json the one it "
            "was converted with, and is it a conversion by grok1?"
        )
    parts: list[list[Any]] = [[] for _ in manifest]
    scale_parts: list[list[Any]] = [[] for _ in manifest]
    for name, tensor in wanted.items():
        spec, (file, span) = manifest[tensor.tensor], found[name]
        types = {spec.dtype, "float32", "bfloat16"} if spec.scales_shape else {"float32"}
        if span.shape != tensor.shape or span.dtype not in types:
            raise CheckpointError(
                f"{file.path}: {name} is {_text(span)}, expected "
                f"{_text(ArraySpan(0, tensor.shape, spec.dtype))}; is it a conversion by grok1?"
            )
        parts[tensor.tensor].append((file, span))
        if span.dtype == "int8":
            scale_parts[tensor.tensor].append(_scales_of(name, file, span, found))
        elif f"{name}_scale" in found:
            raise CheckpointError(
                f"{file.path}: {name} is {span.dtype} and has scales, expected int8 for a weight "
                "with scales; is it a conversion by grok1?"
            )
    tensors = [
        _stored(spec, *both) for spec, *both in zip(manifest, parts, scale_parts, strict=True)
    ]
    _check_alike(manifest, tensors)
    return tensors


def _shape(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-3:-1] if is_transposed(spec) else shape


def _text(span: ArraySpan) -> str:
    return f"{span.dtype}[{','.join(map(str, span.shape))}]"


def _json_object(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    def unique(pairs):
        if len(pairs) != len(dict(pairs)):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=unique)
        if not isinstance(found, dict):
            raise ValueError(f"found {found!r:.80}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object: {error!s:.200}; the file is damaged: copy it again"
        ) from None
    return found


def _indexed_spans(directory: pathlib.Path) -> dict[str, tuple[ShardHeader, ArraySpan]]:
    """Returns every tensor of the shards that the index names, by name."""
    index_path = directory / INDEX_NAME
    try:
        text = index_path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{index_path}: cannot be read: {error.strerror}; the conversion or the copy is not "
            "complete"
        ) from error
    weight_map = _json_object(index_path, text).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == os.path.basename(name) for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{index_path}: expected a weight_map from tensors to files beside it; the file is "
            "damaged: copy it again"
        )
    names = sorted(set(weight_map.values()))
    headers = {name: read_shard_header(directory / name) for name in names}
    found = {
        tensor: (header, span)
        for header in headers.values()
        for tensor, span in header.spans.items()
    }
    for tensor, name in weight_map.items():
        if tensor not in headers[name].spans:
            raise CheckpointError(
                f"{directory / name}: lacks {tensor}, which {INDEX_NAME} says is there; these "
                "files are of different checkpoints"
            )
    return found


def _scales_of(name, file, span, found) -> tuple[ShardHeader, ArraySpan]:
    columns, rows = span.shape
    if f"{name}_scale" not in found:
        raise CheckpointError(f"{file.path}: {name} is int8 and has no {name}_scale; copy it again")
    scale_file, scales = found[f"{name}_scale"]
    if (
        scales.dtype != "bfloat16"
        or len(scales.shape) != 2
        or scales.shape[0] != columns
        or rows % scales.shape[1]
    ):
        raise CheckpointError(
            f"{scale_file.path}: {name}_scale is {_text(scales)}, expected bfloat16[{columns},G] "
            f"with a G that divides {rows}; is it a conversion by grok1?"
        )
    return scale_file, scales


def _stored(spec: TensorSpec, parts: list, scale_parts: list) -> StoredTensor:
    transposed = is_transposed(spec)
    values = StoredArray(spec.shape, parts[0][1].dtype, tuple(parts), transposed)
    if not scale_parts:
        return StoredTensor(values, None)
    groups = scale_parts[0][1].shape[1]
    shape = (*spec.shape[:-2], groups, spec.shape[-1])
    return StoredTensor(values, StoredArray(shape, "bfloat16", tuple(scale_parts), transposed))


def _check_alike(manifest: list[TensorSpec], tensors: list[StoredTensor]) -> None:
    """Every matrix of a kind, in all layers and experts, must be stored alike, to be stacked."""
    first: dict[str, tuple] = {}
    for spec, tensor in zip(manifest, tensors, strict=True):
        match = _LAYER.match(spec.name)
        kind = match[2] if match else spec.name
        for number, (file, span) in enumerate(tensor.values.parts):
            scales = tensor.scales and tensor.scales.parts[number : number + 1]
            storage = (span.dtype, scales and scales[0][1].shape)
            if storage != first.setdefault(kind, storage):
                raise CheckpointError(
                    f"{file.path}: {spec.name} is stored as {storage}, elsewhere as {first[kind]}; "
                    "these files are of different checkpoints"
                )
