"""Compares the first layers of an offloaded checkpoint with a float64 evaluation of its files.

    python -m tools.check_offloaded /data/full --layers 2 --memory 16GB

The evaluation is the equations of docs/architecture.md in NumPy, a block of a weight at a time; it
shares with the library only the reading of files. At the released sizes two layers and three tokens
take a minute or two.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

import grok1
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.checkpoint.storage import StoredTensor, read_matrix
from grok1.config import ModelConfig

_ROWS = 512
_EPSILON = 1e-5


def logits_float64(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, tokens: list[int]
) -> np.ndarray:
    """Evaluates a model in float64.

    Args:
      tensors: The checkpoint's, by name.
      config: The model, with the number of layers to run.
      tokens: Token ids.

    Returns:
      float64 logits `[T, V]` after every token.
    """
    embedding = tensors["language_model/in_out_embed/embeddings"].values
    rows = [read_matrix(embedding, 0, token, token + 1) for token in tokens]
    x = np.concatenate(rows).astype(np.float64) * config.embedding_multiplier_scale
    for layer in range(config.num_layers):
        prefix = f"transformer/decoder_layer_{layer}/"
        of_layer = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        x = _layer(x, of_layer, config)
    x = _norm(x, tensors["language_model/rms_norm/scale"])
    parts = [
        x @ read_matrix(embedding, 0, start, min(start + _ROWS, embedding.num_rows)).T.astype(float)
        for start in range(0, embedding.num_rows, _ROWS)
    ]
    return np.concatenate(parts, axis=1) * config.output_multiplier_scale


def _layer(x: np.ndarray, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> np.ndarray:
    count, heads, kv_heads = len(x), config.num_q_heads, config.num_kv_heads
    normed = _norm(x, tensors["rms_norm/scale"])
    query, key, value = (
        _product(normed, tensors[f"multi_head_attention/{name}/w"]).reshape(
            count, -1, config.key_size
        )
        for name in ("query", "key", "value")
    )
    query, key = _rotate(query), _rotate(key)
    key, value = (np.repeat(array, heads // kv_heads, axis=1) for array in (key, value))
    scores = np.einsum("tnh,snh->nts", query, key) * config.attn_output_multiplier
    scores = 30 * np.tanh(scores / 30)
    scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
    weights = _softmax(scores)
    mixed = np.einsum("nts,snh->tnh", weights, value).reshape(count, -1)
    out = _product(mixed, tensors["multi_head_attention/linear/w"])
    x = x + _norm(out, tensors["rms_norm_1/scale"])

    normed = _norm(x, tensors["rms_norm_2/scale"])
    probs = _softmax(normed @ read_matrix(tensors["router/w"].values).astype(np.float64))
    chosen = np.argsort(-probs, axis=1, kind="stable")[:, : config.num_selected_experts]
    out = np.zeros_like(x)
    for expert in np.unique(chosen):
        places = np.flatnonzero((chosen == expert).any(axis=1))
        inputs = normed[places]
        gate = _product(inputs, tensors["moe/linear/w"], expert)
        cubic = gate + 0.044715 * gate**3
        hidden = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * cubic))
        hidden *= _product(inputs, tensors["moe/linear_v/w"], expert)
        result = _product(hidden, tensors["moe/linear_1/w"], expert)
        out[places] += probs[places, expert, None] * result
    return x + _norm(out, tensors["rms_norm_3/scale"])


def _product(x: np.ndarray, tensor: StoredTensor, number: int = 0) -> np.ndarray:
    values, scales = tensor.values, tensor.scales
    assert scales is not None
    all_scales = read_matrix(scales, number).astype(np.float64)
    rows = values.num_rows // len(all_scales)
    out = np.zeros((len(x), values.shape[-1]))
    for group, scale in enumerate(all_scales):
        for start in range(group * rows, (group + 1) * rows, _ROWS):
            stop = min(start + _ROWS, (group + 1) * rows)
            block = read_matrix(values, number, start, stop).astype(np.float64)
            out += x[:, start:stop] @ block * scale
    return out


def _norm(x: np.ndarray, scale: StoredTensor) -> np.ndarray:
    factors = read_matrix(scale.values).astype(np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + _EPSILON) * factors


def _rotate(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    phases = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(phases)[:, None], np.sin(phases)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def main() -> None:
    """Runs the tool with the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Check an offloaded checkpoint in float64.")
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[17, 4242, 99])
    parser.add_argument("--memory", help="as for run.py")
    arguments = parser.parse_args()
    config = load_config(arguments.checkpoint)
    stored, specs = open_tensors(arguments.checkpoint, config)
    tensors = {spec.name: tensor for spec, tensor in zip(specs, stored, strict=True)}
    model = grok1.load(
        arguments.checkpoint,
        mesh=(1, 1),
        dtype="float32",
        layers=arguments.layers,
        offload="disk",
        memory=arguments.memory,
    )
    found = model.logits(arguments.tokens)
    config = dataclasses.replace(config, num_layers=arguments.layers)
    expected = logits_float64(tensors, config, arguments.tokens)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{arguments.layers} layers, {len(arguments.tokens)} tokens: relative error {error:.2e}")
    print(model.offload_stats)


if __name__ == "__main__":
    main()
