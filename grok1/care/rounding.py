"""What becomes of a model's experts on the way to 4 bits, with a text or without."""

import functools
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from grok1.care import int4_card
from grok1.care.calibration import Calibration, peak_bytes
from grok1.care.staging import Piece
from grok1.checkpoint.elements import check_finite
from grok1.checkpoint.storage import StoredModel, StoredTensor, matrix_as_float32
from grok1.checkpoint.tensor_file import DTYPES
from grok1.config import ModelConfig
from grok1.machine.host_memory import gigabytes_apart, host_bytes_available
from grok1.nn.manifest import TensorSpec
from grok1.ops.formats import INT4
from grok1.ops.int4 import Int4Array, dequantize_int4
from grok1.ops.int4_feedback import round_with_feedback
from grok1.ops.int4_rounding import round_weight
from grok1.tokenizer import Tokenizer

_COLUMNS = 1024  # that are rounded at a time


class Calibrated(NamedTuple):
    """What `conversion.convert` makes: 4-bit experts, rounded for what comes to them of a text.

    The model is run over the text, layer by layer.

    Attributes:
      text: A text, or its token ids.
    """

    text: str | Sequence[int]


def calibration_tokens(
    config: ModelConfig, tokenizer_file: pathlib.Path | None, text: str | Sequence[int]
) -> np.ndarray:
    """Returns the token ids of a text that a model is calibrated with, int32.

    Raises:
      ValueError: If there is no tokenizer, no token, or one that the model has not.
    """
    if isinstance(text, str):
        if tokenizer_file is None:
            raise ValueError(
                "there is no tokenizer.model to read the text with; give its token ids, or put the "
                "tokenizer beside the weights"
            )
        text = Tokenizer.load(tokenizer_file).encode(text)
    tokens = np.asarray(text)
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
        raise ValueError("the text to calibrate with has no tokens; give some thousands")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"token ids must be from 0 to {config.vocab_size - 1}, found {tokens.min()} to "
            f"{tokens.max()} in the text to calibrate with"
        )
    return tokens.astype(np.int32)


class Rounding:
    """How the experts' matrices are rounded, one after the other.

    Attributes:
      calibration: What there is to say of the text; None without one.
      card: The piece of `quantization.json`.
    """

    def __init__(
        self,
        source: pathlib.Path,
        config: ModelConfig,
        stored: StoredModel,
        tokens: np.ndarray | None,
        progress: bool,
    ):
        """Rounds nothing yet.

        Args:
          source: Where the model is.
          config: Its architecture.
          stored: Its tensors.
          tokens: To calibrate with, if at all.
          progress: Show how far calibration is on stderr, if that is a terminal.

        Raises:
          ValueError: If calibration takes more memory than there is.
        """
        self._record = int4_card.Record()
        self._calibration, self.calibration = None, None
        if tokens is not None:
            needed, available = peak_bytes(config, len(tokens)), host_bytes_available()
            if available is not None and needed > available:
                takes, has = gigabytes_apart(needed, available)
                raise ValueError(
                    f"calibrating with {len(tokens):,} tokens takes {takes} of memory and {has} "
                    "are available; give a shorter text"
                )
            self._calibration = Calibration(config, stored, tokens, progress)
            digest = hashlib.sha256(tokens.tobytes()).hexdigest()
            self.calibration: dict[str, Any] | None = {
                "tokens": len(tokens),
                "sha256_of_int32_tokens": digest,
            }
        self.card = int4_card.describe(source, config, stored, self._record, self.calibration)

    def keep_in(self, directory: pathlib.Path) -> None:
        """Says where to keep what a run that is interrupted leaves to the next."""
        self._record.keep_in(directory)
        if self._calibration is not None:
            self._calibration.keep_in(directory)

    def notes(self) -> list[str]:
        """Returns what there is to know of the weights, a sentence each."""
        few = self._record.fallen_back()
        if not few:
            return []
        places = ", ".join(f"{layer}/{expert} ({tokens:,})" for layer, expert, tokens in few[:8])
        more = f" and {len(few) - 8} more" if len(few) > 8 else ""
        return [
            f"{len(few)} experts were rounded without the text, because fewer of its tokens came "
            f"to them than the model is wide; layer/expert (tokens): {places}{more}"
        ]

    def piece(self, tensor: StoredTensor, spec: TensorSpec, number: int) -> Piece:
        """Returns a matrix of an expert in 4 bits: values and scales, one behind the other.

        Args:
          tensor: The experts' matrices as they are.
          spec: As they are to be.
          number: Which expert.
        """
        assert spec.scales_shape is not None
        shapes = INT4.part_shapes(spec.shape[-2:], spec.scales_shape[-2])
        sizes = [DTYPES[part.dtype].itemsize for part in INT4.parts]
        nbytes = sum(math.prod(shape) * size for shape, size in zip(shapes, sizes, strict=True))
        return Piece(nbytes, functools.partial(self._make, tensor, spec, number))

    def _make(self, tensor: StoredTensor, spec: TensorSpec, number: int) -> np.ndarray:
        assert spec.scales_shape is not None
        _, of_layer, _, matrix, _ = spec.name.split("/")
        layer, num_blocks = int(of_layer.rpartition("_")[2]), spec.scales_shape[-2]
        measured = None
        if self._calibration is not None:
            measured = self._calibration.measured(layer, number)
        tokens = None if measured is None else measured.num_tokens
        weight = matrix_as_float32(tensor, number)
        if tensor.scales is None:  # where there are some, they have been looked at
            parts = tensor.values.parts
            file, _ = parts[number if len(parts) > 1 else 0]
            check_finite(file, spec.name, weight[None], (number, 0, 0))
        if measured is not None and measured.factors:
            rounded, lost = round_with_feedback(weight, num_blocks, measured.factors[matrix])
            energy = measured.energy[matrix]
        else:
            rounded, lost, energy = _rounded(weight, num_blocks)
        error = math.sqrt(lost / energy) if energy else 0.0
        by_inputs = measured is not None and bool(measured.factors)
        self._record.add(layer, matrix, number, error, tokens, by_inputs)
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in rounded])


def _rounded(weight: np.ndarray, num_blocks: int) -> tuple[Int4Array, float, float]:
    """Rounds without a text; returns the squares of the errors and of the weights beside it."""
    found, sums = [], np.zeros(2)
    for start in range(0, weight.shape[1], _COLUMNS):
        part = np.ascontiguousarray(weight[:, start : start + _COLUMNS])
        rounded = round_weight(part, num_blocks)
        sums += np.asarray(_squares(part, rounded), np.float64)
        found.append(rounded)
    arrays = (np.concatenate(of_part, axis=-1) for of_part in zip(*found, strict=True))
    return Int4Array(*arrays), float(sums[0]), float(sums[1])


@jax.jit
def _squares(weight: Array, rounded: Int4Array) -> Array:
    return jnp.stack([((dequantize_int4(rounded) - weight) ** 2).sum(), (weight**2).sum()])
