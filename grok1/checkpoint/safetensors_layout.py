"""Checkpoints in safetensors: the names and layout that Grok-1's ports for PyTorch use.

A file is eight bytes of header length, a JSON header, and the elements; it holds no code. One shard
a layer, after one for the embedding and the final norm, with `model.safetensors.index.json`.
Matrices are `[N, K]`, output before input, and every expert is a tensor of its own:

    model.embed_tokens.weight                            in_out_embed, [V, D]; also the head, which
                                                         may be stored as lm_head.weight as well
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

Experts may be 4-bit, see `ops.int4`, and then are as they are in memory, input before output: a
uint8 `weight` `[K/2, N]`, the codes of rows 2i in the low four bits and 2i + 1 in the high ones; a
uint8 `weight_subscale` `[6B, N]`; and a float16 `weight_scale` `[B, N]`, in B blocks.

Format: https://huggingface.co/docs/safetensors. Names: those of vLLM's Grok1ForCausalLM, which are
those of the conversions on Hugging Face.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from grok1.checkpoint.tensor_file import ArraySpan
from grok1.nn.manifest import TensorSpec
from grok1.ops.formats import FORMATS, INT4

INDEX_NAME = "model.safetensors.index.json"

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The embedding, and the name that ports give the head, which is the embedding."""

TYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "I8": "int8",
    "U8": "uint8",
    "F16": "float16",
}
"""The types of elements by what the format calls them."""

_TYPE_NAMES = {name: code for code, name in TYPES.items()}
LAYER = re.compile(r"transformer/decoder_layer_(\d+)/(.*)")
"""Finds the layer in a tensor's name of the manifest, and its name there."""

_OUTSIDE = {
    "language_model/in_out_embed/embeddings": EMBEDDING,
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


class NamedMatrix(NamedTuple):
    """One tensor of a safetensors checkpoint.

    Attributes:
      name: Its name.
      tensor: Number of the manifest's tensor that it belongs to.
      matrix: Which of its matrices.
      part: Which of a weight's arrays it holds: "values", "scales" or "subscales".
      shape: Its shape in the file.
      dtype: One of `TYPES`.
    """

    name: str
    tensor: int
    matrix: int
    part: str
    shape: tuple[int, ...]
    dtype: str


def is_transposed(spec: TensorSpec) -> bool:
    """Whether matrices are `[N, K]` here: all but the embedding, the norms and 4-bit experts."""
    return spec.name not in _OUTSIDE and len(spec.shape) > 1 and spec.dtype != INT4.name


def shards(manifest: list[TensorSpec]) -> list[list[NamedMatrix]]:
    """Returns what is in which shard: the embedding and final norm, then the layers in their order.

    Args:
      manifest: The tensors, with the types and grouping to store: a weight without `scales_shape`
        is one tensor, float32 or bfloat16.
    """
    num_layers = 1 + max(int(match[1]) for spec in manifest if (match := LAYER.match(spec.name)))
    found: list[list[NamedMatrix]] = [[] for _ in range(1 + num_layers)]
    for number, spec in enumerate(manifest):
        match = LAYER.match(spec.name)
        shard = found[int(match[1]) + 1 if match else 0]
        name = f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}" if match else _OUTSIDE[spec.name]
        for matrix in range(spec.shape[0] if len(spec.shape) > 2 else 1):
            shard.extend(_arrays(spec, name.format(matrix), number, matrix))
    return found


def _arrays(spec: TensorSpec, name: str, number: int, matrix: int) -> Iterator[NamedMatrix]:
    if spec.scales_shape is None:
        shape = _shape(spec, spec.shape)
        yield NamedMatrix(name, number, matrix, "values", shape, spec.dtype)
        return
    stored_as = FORMATS[spec.dtype]
    shapes = stored_as.part_shapes(spec.shape, spec.scales_shape[-2])
    for part, shape in zip(stored_as.parts, shapes, strict=True):
        full_name = f"{name}{part.suffix}"
        yield NamedMatrix(full_name, number, matrix, part.name, _shape(spec, shape), part.dtype)


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


def _shape(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-3:-1] if is_transposed(spec) else shape[-2:]
