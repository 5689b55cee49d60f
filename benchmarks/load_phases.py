"""Where the time of a load goes: what comes before, between and after the blocks that are read."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from grok1 import factory
from grok1.checkpoint import native, reading
from grok1.tokenizer import Tokenizer

_STEPS = {
    "tokenizer": (Tokenizer, "load"),
    "headers": (factory, "open_tensors"),
    "weights": (factory, "load_params"),
    "engine": (factory, "Model"),
}


class Phases:
    """Seconds of one load.

    Attributes:
      seconds: Of the whole.
      steps: Of some of its steps, in the thread that loads.
      blocks: When each block was begun and done, by whatever thread.
      threads: Of all threads together, what they did in C++.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = dict.fromkeys(_STEPS, 0.0)
        self.blocks: list[tuple[float, float]] = []
        self.threads: dict[str, float] = {}
        self._weights = 0.0, 0.0  # when they were begun and done

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Takes the time of the one load of the block."""
        before = native.spent()
        with contextlib.ExitStack() as patches:
            for name, (owner, attribute) in _STEPS.items():
                function = self._timed(name, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, function))
            read = reading.Reader._read

            def note(reader: reading.Reader, block: Any) -> Any:
                start = time.perf_counter()
                try:
                    return read(reader, block)
                finally:
                    self.blocks.append((start, time.perf_counter()))

            patches.enter_context(mock.patch.object(reading.Reader, "_read", note))
            start = time.perf_counter()
            yield
            self.seconds = time.perf_counter() - start
        after = native.spent()
        self.threads = {name: after[name] - before.get(name, 0.0) for name in after}

    def _timed(self, name: str, function: Callable) -> Callable:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                end = time.perf_counter()
                self.steps[name] += end - start
                if name == "weights":
                    self._weights = start, end

        return timed

    @property
    def reading(self) -> float:
        """Seconds from the beginning of the first block to the end of the last."""
        starts, ends = zip(*self.blocks, strict=True)
        return max(ends) - min(starts)

    def details(self) -> dict[str, str]:
        """The rest in words, in milliseconds, those of all threads together marked as such."""
        starts, ends = zip(*self.blocks, strict=True)
        begun, done = self._weights
        busy = sum(end - start for start, end in self.blocks)
        found = {name: self.steps[name] for name in _STEPS if name != "weights"}
        found["rest"] = self.seconds - sum(self.steps.values())
        found["until the first block"] = min(starts) - begun
        found["blocks"] = self.reading
        found["after the last block"] = done - max(ends)
        found |= {f"threads {name}": seconds for name, seconds in self.threads.items()}
        found["threads in Python"] = busy - sum(self.threads.values())
        details = {f"{name}, ms": f"{1e3 * seconds:.1f}" for name, seconds in found.items()}
        return {"number of blocks": str(len(self.blocks)), **details}
