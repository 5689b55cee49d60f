"""Where what steps captured goes: arrays on the host, of the first row's tokens."""

import jax
import numpy as np

from grok1.config import ModelConfig
from grok1.nn.capture import AXES, Capture
from grok1.nn.decoder import Captures


class Recorder:
    """Collects what steps captured of the first row; an `engine.Observer`.

    Chunks are written where they belong: joined at the end, all of it would be there twice.
    """

    def __init__(self, config: ModelConfig, capture: Capture, num_tokens: int):
        """Takes memory when the first values come, for as many tokens as may come.

        Args:
          config: The model.
          capture: What comes.
          num_tokens: The most tokens.
        """
        self._config, self._capture, self._num_tokens = config, capture, num_tokens
        self._arrays: dict[str, np.ndarray] = {}
        self._done = 0
        self._in_flight: tuple[int, Captures] | None = None

    def __call__(self, count: np.ndarray, captured: Captures) -> None:
        """Takes a step's values: as many tokens of each row as `count` says."""
        # One step behind, so that the device works while the host copies.
        self._take()
        self._in_flight = int(count[0]), captured

    def _take(self) -> None:
        if self._in_flight is None:
            return
        count, captured = self._in_flight
        here = slice(self._done, min(self._done + count, self._num_tokens))
        for name, value in jax.device_get(captured).items():
            self._write(name, here, _of_first_row(name, value)[..., : here.stop - here.start, :])
        self._done, self._in_flight = here.stop, None

    def _write(self, name: str, here: slice, part: np.ndarray) -> None:
        """Puts `part`, whose last axes are the tokens `here` and another one, in its place."""
        is_map = name == "attention_probs"
        if name not in self._arrays:
            last = self._num_tokens if is_map else part.shape[-1]
            shape = (*part.shape[:-2], self._num_tokens, last)
            # What a chunk has no keys for is 0.
            self._arrays[name] = (np.zeros if is_map else np.empty)(shape, part.dtype)
        array = self._arrays[name]
        width = min(part.shape[-1], array.shape[-1])
        array[..., here, :width] = part[..., :width]

    def arrays(self, num_tokens: int) -> dict[str, np.ndarray]:
        """Returns the first `num_tokens` tokens' values, by name, in the order of `AXES`."""
        self._take()
        arrays = {}
        for name in AXES:
            if name in self._capture:
                array = self._arrays[name][..., :num_tokens, :]
                arrays[name] = array[..., :num_tokens] if name == "attention_probs" else array
        if "expert_indices" in arrays:
            indices = arrays["expert_indices"]
            indices[indices == self._config.num_experts] = -1
        return arrays


def _of_first_row(name: str, value: np.ndarray) -> np.ndarray:
    """The first row's values, without the axis of rows; the last axis but one is of tokens."""
    if name == "attention_probs" or AXES[name][-1] == "model_dim":
        return value[:, 0]
    # Tokens of all rows in one axis, the first row's first.
    return value
