"""Where the time of an offloaded step on a GPU goes, in the thread that runs it."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from grok1.engine.compilation import Program
from grok1.offload import device_experts, runner
from grok1.offload.device_experts import DeviceExperts
from grok1.offload.expert_store import ExpertStore

_CALLS = {
    "step": (runner._StreamedProgram, "__call__"),
    "readers begin": (ExpertStore, "begin"),
    "readers end": (ExpertStore, "end"),
    "asking for programs": (Program, "__call__"),
    "beginning transfers": (device_experts, "sent"),
    "making room": (device_experts, "device_buffer"),
    "taking from the host or files": (ExpertStore, "take"),
    "waiting for transfers": (DeviceExperts, "_arrive"),
}
_FIRST = ("beginning transfers", "taking from the host or files")


class StepPhases:
    """Seconds of some steps; one phase may hold another.

    Attributes:
      seconds: By phase.
      num_steps: How many.
      seconds_of_all: From the beginning of the first step to the end of the last.
    """

    def __init__(self) -> None:
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.seconds_of_all = 0.0
        self.num_steps = 0
        self._first = self._last = 0.0
        self._begun = self._asked = 0.0  # of this step; of a program by it
        self._is_first = True  # of what this step brings to the device

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Takes the time of the steps of the block."""
        with contextlib.ExitStack() as patches:
            for name, (owner, attribute) in _CALLS.items():
                function = self._timed(name, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, function))
            yield
        self.seconds_of_all = self._last - self._first

    def _timed(self, name: str, function: Callable) -> Callable:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            if name == "step":
                self._first = self._first or start
                self._begun, self._is_first = start, True
            elif name in _FIRST and self._is_first:
                self._is_first = False
                self.seconds["until the first expert is asked for"] += start - self._begun
                self.seconds["of that, waiting for the first router"] += start - self._asked
            try:
                return function(*arguments, **named)
            finally:
                end = time.perf_counter()
                self.seconds[name] += end - start
                if name == "asking for programs":
                    self._asked = end
                elif name == "readers end":
                    ended = start - self._asked
                    self.seconds["from the last program to the end of the step"] += ended
                elif name == "step":
                    self.num_steps += 1
                    self._last = end

        return timed

    def details(self) -> dict[str, str]:
        """Milliseconds a step, in words."""
        found = dict(self.seconds)
        found["between steps"] = self.seconds_of_all - self.seconds["step"]
        count = max(1, self.num_steps)
        return {f"{name}, ms": f"{1e3 * found[name] / count:.2f}" for name in sorted(found)}
