"""Runs a model over a text, layer by layer, for the Gram matrices of its experts' inputs.

Memory holds a layer's attention, one expert, the layer's Gram matrices, and three streams of the
text; `peak_bytes` counts them. The stream before a layer goes to disk, so that what is interrupted
goes on from there.

Dimension key: W windows of the text, T positions of a window, D model dim, F hidden dim, E experts,
A selected experts a token, M rows of a chunk.
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grok1.checkpoint.storage import StoredModel, StoredTensor, read_matrix
from grok1.config import ModelConfig
from grok1.machine.progress import progress_bar
from grok1.nn.manifest import EMBEDDING
from grok1.nn.transformer import LayerParams, attend_and_route
from grok1.ops.experts import ExpertWeights
from grok1.ops.int4 import num_blocks
from grok1.ops.int4_feedback import feedback_factor
from grok1.ops.layers import rms_norm
from grok1.ops.quantized import matmul

GATE, UP, DOWN = "linear", "linear_v", "linear_1"
"""The experts' matrices by their names in files."""

_WINDOW = 1024  # positions that attend to each other
_CHUNK = 512  # rows that an expert computes with at a time
_PART_ROWS = 2048  # most rows that share a Gram matrix in `down`


class Measured(NamedTuple):
    """What an expert's inputs say of its matrices.

    Attributes:
      num_tokens: How many tokens came to it.
      factors: By matrix, as `round_with_feedback` takes them; empty where too few tokens came.
      energy: By matrix, the sum of the squares of its products.
    """

    num_tokens: int
    factors: dict[str, list[np.ndarray]]
    energy: dict[str, float]


def peak_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Returns about how much memory `Calibration` takes."""
    depth, hidden = config.emb_size, config.ffn_size
    part = _part_rows(hidden)
    grams = 4 * config.num_experts * (depth**2 + hidden * part)
    of_factor = 3 * 8 * max(depth, part) ** 2  # in float64 while it is computed
    heads = config.num_q_heads * min(_WINDOW, config.sequence_len) ** 2
    attention = 4 * (2 * depth * config.num_q_heads * config.key_size + 3 * heads)
    expert = 3 * depth * hidden + 4 * _CHUNK * (3 * hidden + 3 * depth)
    # A matrix in float32, and what is rounded of it at a time.
    rounding = 4 * depth * hidden + 5 * 4 * 4096 * max(depth, part)
    streams = 3 * 4 * num_tokens * depth
    return streams + grams + max(of_factor, attention, expert, rounding)


class Calibration:
    """A model and a text; layers are asked for in their order."""

    def __init__(
        self, config: ModelConfig, stored: StoredModel, tokens: Int[np.ndarray, " n"], show: bool
    ):
        """Computes nothing yet.

        Args:
          config: The model.
          stored: Its tensors.
          tokens: The text.
          show: Show what is done on stderr, if that is a terminal.
        """
        self._config, self._show = config, show
        self._tensors = {
            spec.name: tensor for tensor, spec in zip(stored.tensors, stored.specs, strict=True)
        }
        length = min(_WINDOW, config.sequence_len)
        count = -(-len(tokens) // length)
        self._windows = np.zeros((count, length), np.int32)
        self._windows.reshape(-1)[: len(tokens)] = tokens
        self._num_tokens = len(tokens)
        self._directory: pathlib.Path | None = None
        self._layer, self._measured = -1, list[Measured]()

    def keep_in(self, directory: pathlib.Path) -> None:
        """Says where streams are kept while layers are asked for."""
        self._directory = directory

    def measured(self, layer: int, expert: int) -> Measured:
        """Returns what an expert's inputs say; runs the layer, if it was not the last one run."""
        if layer != self._layer:
            first, x = self._stream(layer)
            for number in range(first, layer + 1):
                x, self._measured = self._run(number, x)
                self._save(number + 1, x)
            self._layer = layer
        return self._measured[expert]

    def _stream(self, layer: int) -> tuple[int, Float[np.ndarray, "W T D"]]:
        """The last stream up to a layer that there is, and before which layer it is."""
        for number in range(layer, 0, -1):
            path = self._path(number)
            if path.is_file():
                return number, np.load(path)
        embedding = self._tensors[EMBEDDING].values
        x = np.empty((*self._windows.shape, self._config.emb_size), np.float32)
        for token in np.unique(self._windows).tolist():
            x[self._windows == token] = read_matrix(embedding, 0, token, token + 1)
        return 0, x * np.float32(self._config.embedding_multiplier_scale)

    def _save(self, number: int, x: np.ndarray) -> None:
        unfinished = self._path(number).with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            np.save(file, x)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._path(number))
        # The one before is the input of the layer that is being written.
        self._path(number - 2).unlink(missing_ok=True)

    def _path(self, number: int) -> pathlib.Path:
        assert self._directory is not None
        return self._directory / f"stream-{number}.npy"

    def _run(self, number: int, x: np.ndarray) -> tuple[np.ndarray, list[Measured]]:
        """Runs one layer: its stream, and what its experts measured."""
        config = self._config
        depth = config.emb_size
        layer = self._layer_params(number)
        x, normed = x.copy(), np.empty_like(x)
        shape = (x[..., 0].size, config.num_selected_experts)
        chosen, weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        length = x.shape[1]
        bar = progress_bar(
            len(x) + config.num_experts, f"layer {number}", self._show, unit="step", leave=False
        )
        with bar:
            for window, stream in enumerate(x):
                here = slice(window * length, (window + 1) * length)
                after, inputs, routing = _attended(layer, config, stream[None])
                x[window], normed[window] = after[0], inputs
                chosen[here] = routing.expert_indices
                weights[here] = routing.expert_weights
                bar.update()
            # What fills the last window up goes to none.
            chosen[self._num_tokens :] = config.num_experts
            flat, branch = normed.reshape(-1, depth), np.zeros_like(normed).reshape(-1, depth)
            measured = []
            for expert in range(config.num_experts):
                rows, choice = np.nonzero(chosen == expert)
                found, out = self._run_expert(number, expert, flat[rows])
                branch[rows] += weights[rows, choice][:, None] * out
                measured.append(found)
                bar.update()
        branch = branch.reshape(x.shape)
        for window in range(len(x)):
            x[window] += np.asarray(_normed(branch[window], layer.moe_post_norm))
        return x, measured

    def _run_expert(
        self, number: int, expert: int, inputs: Float[np.ndarray, "rows D"]
    ) -> tuple[Measured, np.ndarray]:
        config = self._config
        depth, hidden_size = config.emb_size, config.ffn_size
        weights = ExpertWeights(
            *(
                _weight(self._tensors[f"transformer/decoder_layer_{number}/moe/{name}/w"], expert)
                for name in (GATE, UP, DOWN)
            )
        )
        part = _part_rows(hidden_size)
        gram = np.zeros((depth, depth), np.float32)
        grams = np.zeros((hidden_size // part, part, part), np.float32)
        energy, out = np.zeros(3), np.empty_like(inputs)
        for start in range(0, len(inputs), _CHUNK):
            rows = inputs[start : start + _CHUNK]
            chunk = np.zeros((_CHUNK, depth), np.float32)
            chunk[: len(rows)] = rows
            hidden, result, squares = _computed(chunk, weights)
            out[start : start + _CHUNK] = np.asarray(result)[: len(rows)]
            energy += np.asarray(squares, np.float64)
            gram += rows.T @ rows
            hidden = np.asarray(hidden)[: len(rows)]
            for place, of_part in enumerate(grams):
                columns = hidden[:, place * part : (place + 1) * part]
                of_part += columns.T @ columns
        factors: dict[str, list[np.ndarray]] = {}
        # With fewer than a matrix has rows, some of its inputs were never seen.
        if len(inputs) >= depth:
            factors[GATE] = factors[UP] = [feedback_factor(gram)]
            factors[DOWN] = [feedback_factor(of_part) for of_part in grams]
        by_matrix = {name: float(energy[place]) for place, name in enumerate((GATE, UP, DOWN))}
        return Measured(len(inputs), factors, by_matrix), out

    def _layer_params(self, number: int) -> LayerParams:
        def of(name: str) -> Any:
            return _weight(self._tensors[f"transformer/decoder_layer_{number}/{name}"], 0)

        return LayerParams(
            attention_pre_norm=of("rms_norm/scale"),
            query=of("multi_head_attention/query/w"),
            key=of("multi_head_attention/key/w"),
            value=of("multi_head_attention/value/w"),
            attention_out=of("multi_head_attention/linear/w"),
            attention_post_norm=of("rms_norm_1/scale"),
            moe_pre_norm=of("rms_norm_2/scale"),
            router=of("router/w"),
            experts=ExpertWeights(None, None, None),
            moe_post_norm=of("rms_norm_3/scale"),
        )


def _part_rows(rows: int) -> int:
    """Most rows that share a Gram matrix: whole blocks, and a divisor of all rows."""
    block = rows // num_blocks(rows)
    return max(
        size for size in range(block, rows + 1, block) if rows % size == 0 and size <= _PART_ROWS
    )


def _weight(tensor: StoredTensor, number: int) -> Any:
    parts = [jnp.asarray(np.ascontiguousarray(read_matrix(part, number))) for part in tensor.parts]
    return parts[0].astype(jnp.float32) if tensor.format is None else tensor.format.weight(*parts)


@functools.partial(jax.jit, static_argnums=1)
def _attended(layer: LayerParams, config: ModelConfig, x: Float[Array, "1 T D"]):
    return attend_and_route(layer, config, x)


@jax.jit
def _computed(
    x: Float[Array, "M D"], weights: ExpertWeights
) -> tuple[Float[Array, "M F"], Float[Array, "M D"], Float[Array, "3"]]:
    """The input of `down`, its output, and the sums of squares of all three products."""
    gate, up = matmul(x, weights.gate), matmul(x, weights.up)
    hidden = jax.nn.gelu(gate, approximate=True) * up
    out = matmul(hidden, weights.down)
    return hidden, out, jnp.stack([(product**2).sum() for product in (gate, up, out)])


_normed: Callable[[Any, Any], Array] = jax.jit(rms_norm)
