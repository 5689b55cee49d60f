"""Grok-1 as one GGUF file for llama.cpp.

Int8 weights go unchanged into Q8_0: blocks of 32 values along the contracting axis, each behind a
float16 scale. bfloat16 scales have 8 significant bits and float16 has 11, so the file is exact as
long as every scale lies in float16's range; `scale_report` counts those that do not. 4-bit experts
go unchanged into IQ4_XS: blocks of 256 values behind their scales. A scale group that is no
multiple of 32 rows, or a 4-bit block that is not of 256, cannot be written so, and its weight
becomes float32, which is exact.

Format and names: the `gguf` package. Dimension key as in `storage`.
"""

import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from grok1.care.contents import in_blocks
from grok1.checkpoint.elements import check_scales
from grok1.checkpoint.storage import (
    StoredTensor,
    dequantize_matrix,
    dequantized_matrix,
    read_matrix,
    transpose,
)
from grok1.checkpoint.tensor_file import DTYPES
from grok1.config import ModelConfig
from grok1.files import CheckpointError
from grok1.nn.manifest import TensorSpec
from grok1.ops.attention import SOFT_CAP
from grok1.ops.formats import INT4
from grok1.ops.int4 import CODE_ROWS, Int4Array, unpack
from grok1.tokenizer import Tokenizer, is_control_spelling

EMBEDDING_TYPES = ("f32", "f16", "bf16", "q8_0")

_BLOCK = 32  # Values in a block of Q8_0, behind a float16 scale.
_BLOCK_BYTES = 2 + _BLOCK
# Values in a block, and its bytes.
_BLOCKS = {"q8_0": (_BLOCK, _BLOCK_BYTES), "iq4_xs": (256, 136)}
_ELSE = "convert with --to safetensors instead"
# Types of pieces, in llama.cpp as in SentencePiece.
_ORDINARY, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_EPSILON = 1e-5  # Of the norms, as trained.
_NAMES = {
    "language_model/in_out_embed/embeddings": "token_embd",
    "language_model/rms_norm/scale": "output_norm",
    "multi_head_attention/query/w": "attn_q",
    "multi_head_attention/key/w": "attn_k",
    "multi_head_attention/value/w": "attn_v",
    "multi_head_attention/linear/w": "attn_output",
    "router/w": "ffn_gate_inp",
    "moe/linear/w": "ffn_gate_exps",
    "moe/linear_v/w": "ffn_up_exps",
    "moe/linear_1/w": "ffn_down_exps",
    "rms_norm/scale": "attn_norm",
    "rms_norm_1/scale": "attn_output_norm",
    "rms_norm_2/scale": "ffn_norm",
    "rms_norm_3/scale": "layer_output_norm",
}


class GgufTensor(NamedTuple):
    """One tensor of a GGUF file.

    Attributes:
      name: Its name there.
      tensor: Number of the manifest's tensor.
      kind: "f32", "f16", "bf16", "q8_0" or "iq4_xs".
      shape: Its shape in the file, slowest axis first.
      nbytes: Its length.
    """

    name: str
    tensor: int
    kind: str
    shape: tuple[int, ...]
    nbytes: int


class ScaleReport(NamedTuple):
    """How exactly float16 holds a model's scales.

    Attributes:
      num_scales: Scales in all.
      num_inexact: Those that float16 rounds.
      largest_error: The largest relative error of one.
    """

    num_scales: int
    num_inexact: int
    largest_error: float


def check_model(config: ModelConfig) -> None:
    """Checks that llama.cpp can run a model of this shape.

    Raises:
      CheckpointError: If it cannot; the message says why.
    """
    heads = config.num_q_heads * config.key_size
    if heads != config.emb_size:
        raise CheckpointError(
            None,
            "llama.cpp runs Grok-1 only where num_q_heads x key_size is emb_size, found "
            f"{config.num_q_heads} x {config.key_size} = {heads} and {config.emb_size}",
            _ELSE,
            "foreign",
        )
    if config.emb_size % _BLOCK or config.ffn_size % _BLOCK:
        raise CheckpointError(
            None,
            f"GGUF's Q8_0 needs widths that {_BLOCK} divides, found emb_size {config.emb_size} and "
            f"an expert width of {config.ffn_size}",
            _ELSE,
            "foreign",
        )
    if config.router_softcap is not None or config.renormalize_gates:
        raise CheckpointError(
            None,
            "GGUF has no field for router_softcap and renormalize_gates, found "
            f"{config.router_softcap} and {config.renormalize_gates}",
            _ELSE,
            "foreign",
        )


def layout(
    config: ModelConfig, manifest: list[TensorSpec], embedding: str, dtype: str | None
) -> list[GgufTensor]:
    """Returns the tensors of the file in their order.

    Args:
      config: The model.
      manifest: Its tensors, with the types and grouping that the source has.
      embedding: Type of the embedding, one of `EMBEDDING_TYPES`.
      dtype: "bfloat16" for dequantised weights, else None.
    """
    numbers = {spec.name: number for number, spec in enumerate(manifest)}
    outside = [name for name in _NAMES if name in numbers]
    names = {name: f"{_NAMES[name]}.weight" for name in outside}
    for layer in range(config.num_layers):
        for name, theirs in _NAMES.items():
            if name not in numbers:
                full_name = f"transformer/decoder_layer_{layer}/{name}"
                names[full_name] = f"blk.{layer}.{theirs}.weight"
    found = []
    for name, theirs in names.items():
        spec = manifest[numbers[name]]
        kind = embedding if theirs == "token_embd.weight" else _kind(spec, dtype)
        shape = spec.shape
        if name not in outside and len(shape) > 1:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if kind in _BLOCKS:
            values, block_bytes = _BLOCKS[kind]
            nbytes = math.prod(shape) // values * block_bytes
        else:
            nbytes = math.prod(shape) * {"f32": 4, "f16": 2, "bf16": 2}[kind]
        found.append(GgufTensor(theirs, numbers[name], kind, shape, nbytes))
    return found


def header(
    name: str, config: ModelConfig, tensors: list[GgufTensor], tokenizer: Tokenizer | None
) -> tuple[bytes, int]:
    """Returns the bytes before the elements, and the alignment of each tensor's elements.

    Args:
      name: The model's name.
      config: The model.
      tensors: What follows.
      tokenizer: Its tokenizer, which goes into the file; None leaves llama.cpp without text.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(None, "grok")
    writer.add_name(name)
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.emb_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_q_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.key_size)
    writer.add_value_length(config.key_size)
    writer.add_rope_dimension_count(config.key_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(_EPSILON)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_selected_experts)
    writer.add_attn_logit_softcapping(SOFT_CAP)
    writer.add_attn_output_scale(config.attn_output_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier_scale)
    writer.add_logit_scale(config.output_multiplier_scale)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, config, tokenizer)
    for tensor in tensors:
        *lead, width = tensor.shape
        values, block_bytes = _BLOCKS.get(tensor.kind, (1, 0))
        writer.add_tensor_info(
            tensor.name,
            (*lead, width // values * block_bytes) if block_bytes else tensor.shape,
            np.dtype(np.uint8 if block_bytes else np.float32),
            tensor.nbytes,
            types[tensor.kind.upper()],
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "header")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    alignment = writer.data_alignment
    return data + bytes(-len(data) % alignment), alignment


def encode(
    tensor: StoredTensor, kind: str, number: int, start: int, stop: int | None, flip: bool
) -> np.ndarray:
    """Computes the bytes of one matrix, or of some rows of it.

    Args:
      tensor: The source.
      kind: Type in the file, as `GgufTensor.kind`.
      number: Which matrix.
      start: First row.
      stop: Behind the last row; None for all.
      flip: Whether the file has the matrix as `[N, K]`.
    """
    if kind == "iq4_xs":
        return pack_iq4_xs(Int4Array(*(read_matrix(part, number) for part in tensor.parts)))
    if tensor.subscales is not None:
        values = dequantized_matrix(tensor, number, "bfloat16" if kind == "bf16" else "float32")
        return transpose(values)
    values = read_matrix(tensor.values, number, start, stop)
    if tensor.scales is not None:
        scales = read_matrix(tensor.scales, number)
        if kind == "q8_0":
            return pack_q8_0(values, scales)
        values = dequantize_matrix(values, scales, "bfloat16" if kind == "bf16" else "float32")
    if flip and values.ndim > 1:
        values = transpose(values)
    if kind == "q8_0":
        import gguf

        return gguf.quants.quantize(
            np.ascontiguousarray(values, np.float32), gguf.GGMLQuantizationType.Q8_0
        )
    names = {"f32": "float32", "bf16": "bfloat16"}
    return values.astype(DTYPES[names[kind]] if kind in names else np.float16, copy=False)


def pack_q8_0(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Packs an int8 matrix into Q8_0 blocks; no value changes.

    Args:
      values: int8 `[K, N]`.
      scales: bfloat16 `[G, N]`; K/G is a multiple of 32.

    Returns:
      uint8 `[N, K/32, 34]`.
    """
    rows, columns = values.shape
    blocks = np.empty((columns, rows // _BLOCK, _BLOCK_BYTES), np.uint8)
    blocks[:, :, 2:] = transpose(values).view(np.uint8).reshape(columns, rows // _BLOCK, _BLOCK)
    halves = np.ascontiguousarray(_halves(scales).T)  # [N, G]
    repeated = halves.repeat(rows // _BLOCK // halves.shape[1], axis=1)
    blocks[:, :, :2] = repeated[:, :, None].view(np.uint8)
    return blocks


def pack_iq4_xs(weight: Int4Array) -> np.ndarray:
    """Packs a 4-bit matrix into IQ4_XS blocks; no bit of a code or scale changes.

    Args:
      weight: `[K, N]` in blocks of 256 rows, NumPy arrays.

    Returns:
      uint8 `[N, K/256, 136]`.
    """
    rows, columns = weight.shape
    num_blocks = rows // 256
    blocks = np.empty((num_blocks, columns, 136), np.uint8)
    blocks[..., :2] = np.ascontiguousarray(weight.scales)[..., None].view(np.uint8)
    scales = weight.subscales.reshape(num_blocks, CODE_ROWS, columns).swapaxes(1, 2)
    blocks[..., 2:4], blocks[..., 4:8] = scales[..., 4:], scales[..., :4]
    for block in range(num_blocks):
        of_block = weight.values[128 * block : 128 * (block + 1)]
        codes = unpack(np.ascontiguousarray(of_block)).reshape(8, 2, 16, columns)
        # Rows that are half a group apart share a byte there.
        packed = codes[:, 0] | codes[:, 1] << 4
        blocks[block, :, 8:] = transpose(packed.reshape(128, columns))
    return np.ascontiguousarray(blocks.swapaxes(0, 1))


def scale_report(tensors: list[StoredTensor], layout: list[GgufTensor]) -> ScaleReport:
    """Reads every scale that goes into a Q8_0 block and compares it with its float16.

    Raises:
      CheckpointError: If a scale is not finite, or too large for float16; the message names the
        file.
    """
    total, inexact, worst = 0, 0, 0.0
    for file, scales, origin in _q8_0_scales(tensors, layout):
        check_scales(file, scales, origin)
        exact = scales.astype(np.float32)
        rounded = _halves(scales).astype(np.float32)
        if not np.isfinite(rounded).all():
            raise CheckpointError(
                file.path,
                f"a scale of {exact[~np.isfinite(rounded)].flat[0]} does not fit the float16 of "
                "GGUF's Q8_0 blocks",
                "convert with --dtype bfloat16",
                "foreign",
            )
        differs = exact != rounded
        total, inexact = total + exact.size, inexact + int(differs.sum())
        if differs.any():
            error = np.abs(rounded[differs] / exact[differs] - 1).max()
            worst = max(worst, float(error))
    return ScaleReport(total, inexact, worst)


def check_file(path: pathlib.Path, tensors: list[GgufTensor]) -> None:
    """Reads a written file with the `gguf` package and compares its tensors.

    Raises:
      CheckpointError: If they differ.
    """
    import gguf

    found = [
        (t.name, t.tensor_type.name.lower(), tuple(reversed(t.shape.tolist())), t.n_bytes)
        for t in gguf.GGUFReader(path).tensors
    ]
    expected = [(t.name, t.kind, t.shape, t.nbytes) for t in tensors]
    if found != expected:
        differs = [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
        raise CheckpointError(
            path,
            f"the gguf package reads {len(found)} tensors, expected {len(expected)}, first "
            f"difference {differs[:1]}",
        )


def llama_cpp_vocabulary(tokenizer: Tokenizer) -> list[tuple[bytes, float, int]]:
    """Returns a vocabulary from which llama.cpp makes the ids that `Tokenizer.encode` makes.

    SentencePiece puts user-defined pieces together before it joins others, the longest first. In
    llama.cpp that type means that a piece is cut out of a text, and the rest encoded as texts of
    their own, each behind a space. Ordinary pieces whose scores, above all others, grow with their
    length are joined as SentencePiece does it. The pieces spelt `<|...|>`, which no plain text
    becomes, are of the type of [BOS].

    Returns:
      As `Tokenizer.vocabulary`.
    """

    def adapted(piece: bytes, score: float, kind: int) -> tuple[bytes, float, int]:
        if kind != _USER_DEFINED:
            return piece, score, kind
        if is_control_spelling(piece):
            return piece, score, _CONTROL
        return piece, float(len(piece.decode(errors="replace"))), _ORDINARY

    return [adapted(*entry) for entry in tokenizer.vocabulary]


def _kind(spec: TensorSpec, dtype: str | None) -> str:
    if spec.scales_shape is None:
        # llama.cpp takes norms and routers as float32 alone.
        is_weight = "/moe/" in spec.name or "/multi_head_attention/" in spec.name
        return "bf16" if is_weight and spec.dtype == "bfloat16" else "f32"
    if dtype == "bfloat16":
        return "bf16"
    if spec.dtype == INT4.name:
        return "iq4_xs" if spec.shape[-2] // spec.scales_shape[-2] == 256 else "f32"
    return "f32" if spec.shape[-2] // spec.scales_shape[-2] % _BLOCK else "q8_0"


def _halves(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return scales.astype(np.float32).astype(np.float16)


def _q8_0_scales(tensors, layout) -> Iterator[tuple[Any, np.ndarray, list[int]]]:
    for entry in layout:
        scales = tensors[entry.tensor].scales
        if entry.kind == "q8_0" and scales is not None:
            yield from in_blocks(scales)


def _add_tokenizer(writer: Any, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
        return
    vocabulary = llama_cpp_vocabulary(tokenizer)
    # Rows of the embedding without a piece: llama.cpp counts the vocabulary by its pieces.
    vocabulary += [
        (b"[UNUSED%d]" % i, 0.0, _UNUSED) for i in range(len(vocabulary), config.vocab_size)
    ]
    pieces, scores, kinds = zip(*vocabulary, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
