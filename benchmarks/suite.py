"""What is measured of a model, and against what."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import machine, models, serving
from benchmarks.machine import BenchmarkError, Worker
from benchmarks.models import BenchModel
from benchmarks.peers import LlamaCpp

SECTIONS = ("start", "load", "context", "programs", "profile", "sampler", "decode", "prefill",
            "int4", "serve", "pauses")  # fmt: skip
CPU_SECTIONS = ("start", "load", "context", "sampler", "decode", "prefill")
ACCELERATOR_SECTIONS = ("programs", "profile", "decode", "prefill")
"""What is measured unless something else is asked; an accelerator's model then needs no files."""

OTHER_WAYS = ("sampled", "greedy with 5 logprobs")
"""Of `workload.DECODING`, those that are measured beside greedy decoding."""

Rounds = dict[str, list[float]]
"""For each contestant its rate in every round."""

_NEEDS_FILES = {"start", "load", "context", "int4"}


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
    """

    repeats: int
    prompts: dict[int, int]
    steps: int
    prefills: tuple[int, ...]
    dense_tokens: int
    loads: tuple[tuple[int, int, int], ...]
    long_prompt: int


# Prompts: one row from an empty context and 8 rows after 128 tokens are what llama.cpp's programs
# measure; 32 rows have short prompts because these would take most of the time.
FULL = Effort(5, {1: 1, 8: 128, 32: 16}, 64, (128, 512, 2048), 2,
              ((8, 32, 32), (128, 64, 16)), 8000)  # fmt: skip
QUICK = Effort(1, {1: 1, 8: 16}, 16, (128,), 1, ((8, 16, 16),), 600)

CLIENTS = 16
MAX_STALL = 5.0
"""Seconds of `Server` where the rate is measured: long chunks, as for work that nobody watches."""


@dataclasses.dataclass
class Result:
    """One figure.

    Attributes:
      model: Name of the model.
      measurement: What was measured.
      value: The figure; a rate is the median of the rounds.
      unit: Its unit.
      threads: CPUs that were used; None on an accelerator.
      ratios: How many times faster than "roofline", "disk", "dense", "llama.cpp", "int8" or
        "greedy", the median of the ratios within the rounds; or how many times larger than "files".
      rounds: The rates in every round, those of the others in the same unit.
      details: What else belongs to it.
    """

    model: str
    measurement: str
    value: float
    unit: str
    threads: int | None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    rounds: Rounds = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


Measure = Callable[..., Iterator[Result]]


@dataclasses.dataclass(frozen=True)
class Failure:
    """What could not be measured.

    Attributes:
      model: Name of the model.
      measurement: What was to be measured.
      reason: Why it could not.
    """

    model: str
    measurement: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Suite:
    """The measurements of one model.

    Attributes:
      model: The model.
      path: Its files; None to make it in memory.
      sections: Some of `SECTIONS`.
      effort: How much to measure.
      threads: CPUs to use; all is measured with the first number, decoding one row also with the
        others. None on an accelerator.
      llama_cpp: llama.cpp on the same model, if it is to be compared.
      say: Told what is going on.
      scratch: Where files are made of the model's, for "int4".
    """

    model: BenchModel
    path: pathlib.Path | None
    sections: Sequence[str]
    effort: Effort
    threads: Sequence[int] | None
    llama_cpp: LlamaCpp | None
    say: Callable[[str], None]
    scratch: pathlib.Path | None = None

    @staticmethod
    def needs_files(sections: Sequence[str]) -> bool:
        """Whether these sections load a model rather than only run one."""
        return not _NEEDS_FILES.isdisjoint(sections)

    def run(self) -> Iterator[Result | Failure]:
        """Yields the results as they come; one that fails does not keep others from being tried."""
        threads = self.threads[0] if self.threads else None
        alone = {"start": self._start, "load": self._load, "context": self._context}
        for section, measure in alone.items():
            if section in self.sections:
                yield from self._attempt(section, measure, threads)
        if "programs" in self.sections:
            yield from self._attempt("programs", self._with_model(self._programs), threads)
        if "profile" in self.sections:
            yield from self._attempt("profile", self._with_model(self._profile), threads)
        if "sampler" in self.sections and self.model.bundled:
            yield from self._attempt("sampler", self._with_model(self._sampler), threads)
        if "decode" in self.sections:
            yield from self._with_one_model(
                threads,
                {
                    f"decode, batch {batch}": functools.partial(self._decode, batch=batch)
                    for batch in self.effort.prompts
                },
            )
        if "prefill" in self.sections:
            lengths = self.effort.prefills
            yield from self._with_one_model(
                threads,
                {
                    f"prefill, {length} tokens": functools.partial(self._prefill, length=length)
                    for length in lengths
                },
            )
        if "int4" in self.sections:
            yield from self._attempt("int4", self._int4, threads)
        for section, measure in {"serve": self._serve, "pauses": self._pauses}.items():
            if section in self.sections:
                yield from self._attempt(section, self._with_model(measure), threads)
        if "decode" in self.sections:
            for other in self.threads[1:] if self.threads else ():
                yield from self._with_one_model(
                    other, {"decode, batch 1": functools.partial(self._decode, batch=1)}
                )

    def _attempt(self, name: str, measure: Measure, *arguments: Any) -> Iterator[Result | Failure]:
        try:
            yield from measure(*arguments)
        except BenchmarkError as error:
            yield Failure(self.model.name, name, str(error))

    def _with_model(self, measure: Callable[[Worker, int | None], Iterator[Result]]) -> Measure:
        """The measurement in a child process of its own."""

        def run(threads: int | None) -> Iterator[Result]:
            with self._worker(threads) as worker:
                yield from measure(worker, threads)

        return run

    def _with_one_model(
        self,
        threads: int | None,
        measurements: dict[str, Callable[[Worker, int | None], Iterator[Result]]],
    ) -> Iterator[Result | Failure]:
        """Measurements in one child process, or after one that failed in another."""
        remaining = dict(measurements)
        while remaining:
            name = next(iter(remaining))
            try:
                with self._worker(threads) as worker:
                    while remaining:
                        name = next(iter(remaining))
                        yield from remaining[name](worker, threads)
                        del remaining[name]
            except BenchmarkError as error:
                yield Failure(self.model.name, name, str(error))
                del remaining[name]

    @contextlib.contextmanager
    def _worker(
        self,
        threads: int | None,
        path: pathlib.Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Iterator[Worker]:
        """A child process with the model, or with that of other files."""
        with Worker(threads, environment) as worker:
            self._say("loading" if self.path else "making the model")
            if self.path:
                worker.call("load", path=str(path or self.path))
            else:
                worker.call("random", config=self.model.config.to_json())
            yield worker

    def _start(self, threads: int | None) -> Iterator[Result]:
        """Load, first tokens and peak memory of two fresh processes, the first of them uncached."""
        assert self.path
        with tempfile.TemporaryDirectory(prefix="grok1-benchmark-cache-") as cache:
            # Everything that grok1 keeps between processes is below this directory; a cache of
            # JAX's own, wherever the user has one, would hide what there is to compile.
            environment = {"XDG_CACHE_HOME": cache, "JAX_COMPILATION_CACHE_DIR": None}
            found = []
            for which in ("first", "second"):
                self._say(f"{which} process")
                with Worker(threads, environment) as worker:
                    kernels = worker.call("build_kernels")
                    load = worker.call("load", path=str(self.path))
                    tokens = worker.call("first_tokens")
                    found.append((kernels, load, tokens, worker.call("peak_memory")))
        (built, load, first, peak), (_, _, second, _) = found

        def result(measurement, value, unit, **more):
            return Result(self.model.name, measurement, value, unit, threads, **more)

        size = load["file_bytes"]
        yield result("load", load["seconds"], "s", details={"file_bytes": size})
        if built["available"]:
            yield result("build of the kernels", built["seconds"], "s")
        # A difference of two times: where nothing was compiled it can come out below zero.
        compiles = [max(0, tokens["cold"] - tokens["compiled"]) for tokens in (first, second)]
        yield result("compile, first process", compiles[0], "s")
        of_first = {"first process": compiles[1] / compiles[0]} if compiles[0] else {}
        yield result("compile, second process", compiles[1], "s", ratios=of_first)
        prompt = {"prompt": first["prompt"], "of_a_first_call": first["cold"]}
        yield result("time to first token", first["warm"], "s", details=prompt)
        yield result("peak memory", peak / 1e9, "GB", ratios={"files": peak / size})

    def _load(self, threads: int | None) -> Iterator[Result]:
        """Loads by fresh processes, of files that are not in memory, beside plain reads of them."""
        assert self.path
        files = self.path / "ckpt-0"
        shares = []

        def load():
            with Worker(threads) as worker:
                worker.call("describe")  # it has started
                machine.forget_files(files)
                machine.use_memory(files)
                found = worker.call("load", path=str(self.path))
                shares.append(worker.call("peak_memory") / found["kept_bytes"])
            return found["file_bytes"] / found["seconds"]

        contestants = {"disk": lambda: machine.read_rate(files), "grok1": load}
        rounds = interleave(contestants, self.effort.repeats, self._say)
        rounds = {name: [rate / 1e9 for rate in rates] for name, rates in rounds.items()}
        yield Result(
            self.model.name,
            "load, files not in memory",
            statistics.median(rounds["grok1"]),
            "GB/s",
            threads,
            {"disk": ratio(rounds, "grok1", "disk")},
            rounds,
            {"peak_memory_over_kept": shares},
        )

    def _context(self, threads: int | None) -> Iterator[Result]:
        """A prompt that fills the context, in a process of its own for the sake of its memory."""
        with self._worker(threads) as worker:
            self._say("a prompt that fills the context")
            found = worker.call("full_context")
        details = {"prompt": found["prompt"], "seconds": found["seconds"]}
        yield Result(
            self.model.name,
            "full context, memory beside weights and cache",
            found["bytes"] / 1e9,
            "GB",
            threads,
            details=details,
        )

    def _decode(self, worker: Worker, threads: int | None, batch: int) -> Iterator[Result]:
        prompt, steps = self.effort.prompts[batch], self.effort.steps
        what = {"batch": batch, "prompt": prompt, "steps": steps}
        name = f"decode, batch {batch}"

        def say(text):
            self._say(f"{name}: {text}" + (f" (threads: {threads})" if threads else ""))

        say("compiling, counting experts")
        worker.call("decode", **what)
        ways = {
            way: functools.partial(worker.call, "decode", **what, how=way) for way in OTHER_WAYS
        }
        for way in ways.values():
            way()
        needed = worker.call("decode_bytes", **what)
        bytes_per_step = sum(needed["bytes"].values())
        contestants: dict[str, Callable[[], float]] = {
            "roofline": lambda: batch * worker.call("bandwidth") / bytes_per_step,
            "grok1": lambda: worker.call("decode", **what),
            **ways,
        }
        if batch == 1:
            say("compiling the dense reference")
            worker.call("dense", tokens=1)
            contestants["dense"] = lambda: worker.call("dense", tokens=self.effort.dense_tokens)
        peer = self.llama_cpp
        if peer and threads:
            contestants["llama.cpp"] = lambda: peer.decode(batch, prompt, steps, threads)
        rounds = interleave(contestants, self.effort.repeats, say)
        bandwidth = statistics.median(rounds["roofline"]) * bytes_per_step / batch
        details = {**what, **needed, "bytes_per_second": bandwidth}
        of_ways = {way: rounds.pop(way) for way in ways}
        yield self._rate(worker, name, threads, rounds, details)
        for way, rates in of_ways.items():
            pair = {"grok1": rates, "greedy": rounds["grok1"]}
            details = {**what, "spread": worker.call("spread", **what, how=way)}
            yield self._rate(worker, f"{way}, batch {batch}", threads, pair, details)

    def _sampler(self, worker: Worker, threads: int | None) -> Iterator[Result]:
        """Draws alone, of a vocabulary of Grok-1's size."""
        for shape in ("trained", "flat"):
            for batch, filtered in [(batch, batch) for batch in self.effort.prompts] + [(32, 1)]:
                self._say(f"sampler: {shape} logits, {filtered} of {batch} rows")
                call = functools.partial(
                    worker.call, "sampler", shape=shape, rows=batch, num_filtered=filtered
                )
                times = [1e3 * call() for _ in range(self.effort.repeats)]
                name = f"draws, {shape} logits, {filtered} of {batch} rows"
                rounds = {"grok1": times}
                value = statistics.median(times)
                yield Result(self.model.name, name, value, "ms", threads, {}, rounds)

    def _prefill(self, worker: Worker, threads: int | None, length: int) -> Iterator[Result]:
        name = f"prefill, {length} tokens"
        if length + 2 > self.model.config.sequence_len:
            self._say(f"{name}: left out, the context is {self.model.config.sequence_len}")
            return
        operations = worker.call("prefill_operations", tokens=length)
        self._say(f"{name}: compiling")
        worker.call("prefill", tokens=length)
        contestants: dict[str, Callable[[], float]] = {
            "roofline": lambda: length * worker.call("matmul") / operations,
            "grok1": lambda: worker.call("prefill", tokens=length),
        }
        peer = self.llama_cpp
        if peer and threads:
            contestants["llama.cpp"] = lambda: peer.prefill(length, threads)
        rounds = interleave(
            contestants, self.effort.repeats, lambda text: self._say(f"{name}: {text}")
        )
        rate = statistics.median(rounds["roofline"]) * operations / length
        details = {"tokens": length, "operations": operations, "operations_per_second": rate}
        yield self._rate(worker, name, threads, rounds, details)

    def _serve(self, worker: Worker, threads: int | None) -> Iterator[Result]:
        """Clients of a server side by side, one after the other, and what has no server."""
        self._say("starting a server")
        most = min(1024, self.model.config.sequence_len)  # chunks are half as long at most
        started = worker.call("serve", slots=CLIENTS, capacity=most, max_stall=MAX_STALL)
        with contextlib.ExitStack() as stack:
            other = None
            if self.llama_cpp and threads:
                other = stack.enter_context(self.llama_cpp.serving(CLIENTS, most, threads))
            vocab_size, seeds = self.model.config.vocab_size, itertools.count()
            for prompt, tokens, number in self.effort.loads:

                def prompts(count, prompt=prompt):
                    # Others each time: a server finds again what it was asked before.
                    one = np.random.default_rng(next(seeds))
                    return one.integers(vocab_size, size=(count, prompt)).tolist()

                def ask(port, clients, count, prompts=prompts, tokens=tokens):
                    return serving.tokens_per_second(port, prompts(count), tokens, clients)

                def without(prompts=prompts, tokens=tokens, number=number):
                    return worker.call("scheduler", prompts=prompts(number), tokens=tokens)

                contestants: dict[str, Callable[[], float]] = {
                    "grok1": functools.partial(ask, started["port"], CLIENTS, number),
                    "one by one": functools.partial(ask, started["port"], 1, 2),
                    "scheduler": without,
                }
                if other is not None:
                    contestants["llama.cpp server"] = functools.partial(ask, other, CLIENTS, number)
                name = f"served, {prompt} in {tokens} out, {CLIENTS} clients"
                rounds = interleave(
                    contestants, self.effort.repeats, lambda text, n=name: self._say(f"{n}: {text}")
                )
                details = {"requests": number, "max_stall": MAX_STALL, **started["sizes"]}
                yield self._rate(worker, name, threads, rounds, details)

    def _int4(self, threads: int | None) -> Iterator[Result]:
        """Experts in 4 bits against the model as it is, both in memory, in turns."""
        assert self.path
        assert self.scratch
        self._say("converting to 4 bits, if that is to be done")
        path = models.in_four_bits(self.model, self.path, self.scratch)
        # The first would take most of an accelerator's memory.
        sharing = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with (
            self._worker(threads, self.path, sharing) as int8,
            self._worker(threads, path, sharing) as int4,
        ):
            for batch, prompt in self.effort.prompts.items():
                yield self._int4_decode(int4, int8, threads, batch, prompt)
            length = self.effort.prefills[:2][-1]
            contestants = {
                "grok1": functools.partial(int4.call, "prefill", tokens=length),
                "int8": functools.partial(int8.call, "prefill", tokens=length),
            }
            yield self._in_turns(int4, f"int4, prefill, {length} tokens", threads, contestants)

    def _int4_decode(
        self, int4: Worker, int8: Worker, threads: int | None, batch: int, prompt: int
    ) -> Result:
        what = {"batch": batch, "prompt": prompt, "steps": self.effort.steps}
        int4.call("decode", **what)
        needed = int4.call("decode_bytes", **what)
        size = sum(needed["bytes"].values())
        contestants: dict[str, Callable[[], float]] = {
            "roofline": lambda: batch * int4.call("bandwidth") / size,
            "grok1": functools.partial(int4.call, "decode", **what),
            "int8": functools.partial(int8.call, "decode", **what),
        }
        peer = self.llama_cpp
        if peer and threads:
            contestants["llama.cpp"] = lambda: peer.decode(batch, prompt, what["steps"], threads)
        name = f"int4, decode, batch {batch}"
        return self._in_turns(int4, name, threads, contestants, {**what, **needed})

    def _in_turns(
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
            contestants, self.effort.repeats, lambda text: self._say(f"{name}: {text}")
        )
        return self._rate(worker, name, threads, rounds, dict(details or {}))

    def _pauses(self, worker: Worker, threads: int | None) -> Iterator[Result]:
        """A long prompt beside requests that run, and a short one behind three long ones."""
        longest = self.model.config.sequence_len - 192
        length, max_stall = min(self.effort.long_prompt, longest), 0.5
        self._say(f"a prompt of {length:,} tokens beside two that run")
        found = worker.call("pauses", length=length, max_stall=max_stall)
        name = f"longest pause, {length} tokens come in"
        of_stall = {"max_stall": found["longest"] / max_stall}
        yield Result(self.model.name, name, found["longest"], "s", threads, of_stall, details=found)
        name = f"first token behind three prompts of {length}"
        yield Result(self.model.name, name, found["first"], "s", threads, details=found)

    def _programs(self, worker: Worker, threads: int | None) -> Iterator[Result]:
        self._say("compiling for XLA's account of memory")
        reports = worker.call("programs", batches=list(self.effort.prompts))
        for name, report in reports.items():
            yield Result(
                self.model.name,
                f"temporaries of {name}",
                report["temporary_bytes"] / 1e9,
                "GB",
                threads,
                details=report,
            )

    def _profile(self, worker: Worker, threads: int | None) -> Iterator[Result]:
        self._say("profiling")
        prefill = min(self.effort.prefills[-1], self.model.config.sequence_len - 2)
        profiles = worker.call("profiles", batches=list(self.effort.prompts), prefill=prefill)
        for name, kernels in profiles.items():
            total = sum(seconds for _, seconds in kernels.values())
            details = {
                "kernels": {
                    kernel: {"times": times, "seconds": seconds, "share": seconds / total}
                    for kernel, (times, seconds) in kernels.items()
                }
            }
            yield Result(
                self.model.name, f"device in {name}", 1e3 * total, "ms", threads, details=details
            )

    def _rate(
        self, worker: Worker, name: str, threads: int | None, rounds: Rounds, details: dict
    ) -> Result:
        if threads is None:
            details["peak_bytes_so_far"] = worker.call("peak_memory")
        ratios = {other: ratio(rounds, "grok1", other) for other in rounds if other != "grok1"}
        value = statistics.median(rounds["grok1"])
        return Result(self.model.name, name, value, "tokens/s", threads, ratios, rounds, details)

    def _say(self, text: str) -> None:
        self.say(f"{self.model.name}: {text}")


def interleave(
    contestants: Mapping[str, Callable[[], float]], repeats: int, say: Callable[[str], None]
) -> Rounds:
    """Measures every contestant once a round, in turn; the roofline also after the last round.

    A bound is what the machine can do, and that changes from one moment to the next: of a round the
    larger of the two figures counts between which the others were measured.

    Args:
      contestants: By name, a function that measures once and returns a rate.
      repeats: Number of rounds.
      say: Told which round it is.
    """
    rounds: Rounds = {name: [] for name in contestants}
    for i in range(repeats):
        say(f"round {i + 1} of {repeats}")
        for name, measure in contestants.items():
            rounds[name].append(measure())
    if "roofline" in contestants:
        after = [*rounds["roofline"][1:], contestants["roofline"]()]
        rounds["roofline"] = [*map(max, rounds["roofline"], after)]
    return rounds


def ratio(rounds: Rounds, name: str, other: str) -> float:
    """Returns the median over the rounds of how many times faster `name` was than `other`."""
    return statistics.median(
        mine / theirs for mine, theirs in zip(rounds[name], rounds[other], strict=True)
    )
