"""What is measured of which model, and the child processes that hold it."""

import contextlib
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.figures import Result, Rounds, interleave, ratio
from benchmarks.machine import Worker
from benchmarks.models import BenchModel
from benchmarks.peers import LlamaCpp


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
      repeats: Rounds.
      prompts: Batch sizes of the decode measurements, each with the tokens that a row's prompt has.
      steps: Decode steps that a measurement times.
      prefills: Prompt lengths.
      dense_tokens: Tokens of the dense reference in a round.
      loads: Of a server: tokens of a prompt, tokens that it gets, and how many such requests.
      long_prompt: Tokens of a prompt that comes in while others run.
      offloaded: Tokens out of core: untimed, from the page cache, and from the disk.
    """

    repeats: int
    prompts: dict[int, int]
    steps: int
    prefills: tuple[int, ...]
    dense_tokens: int
    loads: tuple[tuple[int, int, int], ...]
    long_prompt: int
    offloaded: tuple[int, int, int]


# Prompts: one row from an empty context and 8 rows after 128 tokens are what llama.cpp's programs
# measure; 32 rows have short prompts because these would take most of the time.
FULL = Effort(5, {1: 1, 8: 128, 32: 16}, 64, (128, 512, 2048), 2,
              ((8, 32, 32), (128, 64, 16)), 8000, (2, 4, 1))  # fmt: skip
QUICK = Effort(1, {1: 1, 8: 16}, 16, (128,), 1, ((8, 16, 16),), 600, (1, 1, 1))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured, of one model.

    Attributes:
      model: The model.
      path: Its files; None to make it in memory.
      sections: Some of `SECTIONS`.
      effort: How much to measure.
      threads: CPUs to use; all is measured with the first number, decoding one row also with the
        others. None on an accelerator.
      llama_cpp: llama.cpp on the same model, if it is to be compared.
      say: Told what is going on.
      scratch: Where files are made of the model's, for "int4" and "offload".
    """

    model: BenchModel
    path: pathlib.Path | None
    sections: Sequence[str]
    effort: Effort
    threads: Sequence[int] | None
    llama_cpp: LlamaCpp | None
    say: Callable[[str], None]
    scratch: pathlib.Path | None = None

    @contextlib.contextmanager
    def worker(
        self,
        threads: int | None,
        path: pathlib.Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Worker]:
        """A child process with the model, or with that of other files."""
        with Worker(threads, environment) as worker:
            self.tell("loading" if self.path else "making the model")
            if self.path:
                worker.call("load", path=str(path or self.path))
            else:
                worker.call("random", config=self.model.config.to_json())
            yield worker

    def rate(
        self, worker: Worker, name: str, threads: int | None, rounds: Rounds, details: dict
    ) -> Result:
        """The figure of a rate of "grok1" in tokens a second, beside those of the others."""
        if threads is None:
            details["peak_bytes_so_far"] = worker.call("peak_memory")
        ratios = {other: ratio(rounds, "grok1", other) for other in rounds if other != "grok1"}
        value = statistics.median(rounds["grok1"])
        return Result(self.model.name, name, value, "tokens/s", threads, ratios, rounds, details)

    def in_turns(
        self,
        worker: Worker,
        name: str,
        threads: int | None,
        contestants: Mapping[str, Callable[[], float]],
        details: Mapping[str, Any] | None = None,
    ) -> Result:
        """The rate of the first that is no bound; each has been called once before."""
        for contestant in contestants.values():
            contestant()
        rounds = interleave(
            contestants, self.effort.repeats, lambda text: self.tell(f"{name}: {text}")
        )
        return self.rate(worker, name, threads, rounds, dict(details or {}))

    def tell(self, text: str) -> None:
        """Tells what is going on with this model."""
        self.say(f"{self.model.name}: {text}")
