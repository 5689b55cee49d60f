"""Which sections are measured of a model, in which processes, and what becomes of a failure."""

import functools
from collections.abc import Callable, Iterator, Sequence

from benchmarks.figures import Failure, Result
from benchmarks.machine import BenchmarkError, Worker
from benchmarks.sections import compiled, four_bits, processes, requests, steps
from benchmarks.setting import Setting

SECTIONS = ("start", "load", "context", "programs", "profile", "sampler", "decode", "prefill",
            "int4", "offload", "serve", "pauses")  # fmt: skip
CPU_SECTIONS = ("start", "load", "context", "sampler", "decode", "prefill")
ACCELERATOR_SECTIONS = ("programs", "profile", "decode", "prefill")
"""What is measured unless something else is asked; an accelerator's model then needs no files."""

_NEEDS_FILES = {"start", "load", "context", "int4", "offload"}

Measure = Callable[[Setting, int | None], Iterator[Result]]
"""Measures with so many threads, in processes of its own."""

WithModel = Callable[[Setting, Worker, int | None], Iterator[Result]]
"""The same, of the model that a process has loaded."""


class Suite(Setting):
    """The measurements of one model."""

    @staticmethod
    def needs_files(sections: Sequence[str]) -> bool:
        """Whether these sections load a model rather than only run one."""
        return not _NEEDS_FILES.isdisjoint(sections)

    def run(self) -> Iterator[Result | Failure]:
        """Yields the results as they come; one that fails does not keep others from being tried."""
        threads = self.threads[0] if self.threads else None
        alone = {"start": processes.start, "load": processes.load, "context": processes.context}
        for section, measure in alone.items():
            if section in self.sections:
                yield from self._attempt(section, measure, threads)
        if "programs" in self.sections:
            yield from self._attempt("programs", _with_model(compiled.programs), threads)
        if "profile" in self.sections:
            yield from self._attempt("profile", _with_model(compiled.profile), threads)
        if "sampler" in self.sections and self.model.bundled:
            yield from self._attempt("sampler", _with_model(steps.sampler), threads)
        if "decode" in self.sections:
            yield from self._with_one_model(
                threads,
                {
                    f"decode, batch {batch}": functools.partial(steps.decode, batch=batch)
                    for batch in self.effort.prompts
                },
            )
        if "prefill" in self.sections:
            lengths = self.effort.prefills
            yield from self._with_one_model(
                threads,
                {
                    f"prefill, {length} tokens": functools.partial(steps.prefill, length=length)
                    for length in lengths
                },
            )
        of_four_bits = {"int4": four_bits.in_memory, "offload": four_bits.out_of_core}
        for section, measure in of_four_bits.items():
            if section in self.sections:
                yield from self._attempt(section, measure, threads)
        for section, measure in {"serve": requests.serve, "pauses": requests.pauses}.items():
            if section in self.sections:
                yield from self._attempt(section, _with_model(measure), threads)
        if "decode" in self.sections:
            for other in self.threads[1:] if self.threads else ():
                yield from self._with_one_model(
                    other, {"decode, batch 1": functools.partial(steps.decode, batch=1)}
                )

    def _attempt(
        self, name: str, measure: Measure, threads: int | None
    ) -> Iterator[Result | Failure]:
        try:
            yield from measure(self, threads)
        except BenchmarkError as error:
            yield Failure(self.model.name, name, str(error))

    def _with_one_model(
        self,
        threads: int | None,
        measurements: dict[str, WithModel],
    ) -> Iterator[Result | Failure]:
        """Measurements in one child process, or after one that failed in another."""
        remaining = dict(measurements)
        while remaining:
            name = next(iter(remaining))
            try:
                with self.worker(threads) as worker:
                    while remaining:
                        name = next(iter(remaining))
                        yield from remaining[name](self, worker, threads)
                        del remaining[name]
            except BenchmarkError as error:
                yield Failure(self.model.name, name, str(error))
                del remaining[name]


def _with_model(measure: WithModel) -> Measure:
    """The measurement in a child process of its own."""

    def run(setting: Setting, threads: int | None) -> Iterator[Result]:
        with setting.worker(threads) as worker:
            yield from measure(setting, worker, threads)

    return run
