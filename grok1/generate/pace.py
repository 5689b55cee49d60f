"""How fast steps come, and so how many of them are worth waiting for together."""

import contextlib
import time
from typing import NamedTuple

import jax
import numpy as np

from grok1.engine.steps import Step
from grok1.generate.request import Running
from grok1.machine.processor import waiting_politely

_DELIVERY = 0.1  # seconds; tokens that take longer to come are not collected

_LONG_WAIT = 0.002  # seconds; after shorter steps a model waits for this thread, not the reverse


class Call(NamedTuple):
    """Decode steps that were started.

    Attributes:
      running: Of which requests.
      rows: Which row each of these is.
      num_steps: int32 `[R]`, how many of each row.
      step: What they draw.
      num_top: Alternatives that it holds.
      is_timed: Whether nothing else is run before them, so that the time they take is their own.
    """

    running: list[Running]
    rows: np.ndarray
    num_steps: np.ndarray
    step: Step
    num_top: int | None
    is_timed: bool


class Pace:
    """How fast steps come, and how many of them are to come together."""

    def __init__(self):
        self._waited = 0.0  # for the last step
        self._delivered: float | None = None  # when it came
        self._num_collected = 1

    def num_steps(self, most: int) -> int:
        """Steps of the next call, that come in `_DELIVERY` seconds."""
        return min(most, self._num_collected)

    def read(self, call: Call) -> Step:
        """Waits for the draws of a call."""
        start = time.perf_counter()
        with waiting_politely() if self._waited > _LONG_WAIT else contextlib.nullcontext():
            if call.num_top is None:
                # Each array that is read takes time from the model.
                on_host = call.step._replace(tokens=jax.device_get(call.step.tokens))
            else:
                on_host = jax.device_get(call.step)
        end = time.perf_counter()
        self._waited = end - start
        if self._delivered is not None and call.is_timed:
            of_step = (end - self._delivered) / call.num_steps.max()
            self._num_collected = max(1, int(min(_DELIVERY / of_step, 1 << 20)))
        self._delivered = end
        return on_host
