"""`python -m benchmarks --check`: what a GPU has to show, within six minutes.

Exactness first, then speed; each figure is written as soon as it is there, so that a run that is
cut off was not for nothing. A figure without a bound says how it is on this device.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from benchmarks import device, workload
from benchmarks.machine import ROOT
from grok1.ops.cuda import check, presence

SECONDS = 360.0
"""What the whole may take; what has not begun by then is left out, and named."""

NANO = ROOT / "tests" / "golden" / "nano"
LAYERS = 8

_OF_HEAD = ("grok1_screen", "grok1_choose")  # kernels that run once a step, behind the layers
_FILES_BYTES = 16 << 30  # room for the files of two layers and the embedding, 13.1 GB
_PROCESS_SECONDS = 100.0  # for a part in a process of its own; it takes half of that


@dataclasses.dataclass(frozen=True)
class Figure:
    """One result.

    Attributes:
      name: Of what.
      value: The figure; None where it could not be had.
      unit: Its unit.
      bound: What it is held to; None where it is held to nothing.
      at_least: Whether more is better, so that the bound is the least.
      details: What else belongs to it.
    """

    name: str
    value: float | None
    unit: str = ""
    bound: float | None = None
    at_least: bool = False
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        if self.value is None:
            return False
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """It in words."""
        value = "-" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        bound = ""
        if self.bound is not None:
            bound = f" ({'>=' if self.at_least else '<='} {self.bound:g})"
        note = "" if self.holds else "  <-- NO"
        words = [f"{name} {value}" for name, value in self.details.items()]
        return f"{self.name}: {value}{bound}{note}" + (f"  [{', '.join(words)}]" if words else "")


def run(
    directory: pathlib.Path,
    config: grok1.ModelConfig | None = None,
    only: Collection[str] | None = None,
) -> list[Figure]:
    """Measures everything, says it, and writes it to a file of JSON lines.

    Args:
      directory: For the file.
      config: Of the model that is timed; by default 8 layers of Grok-1.
      only: Names of the parts to measure; None for all.

    Returns:
      The figures.
    """
    start = time.perf_counter()
    config = config or dataclasses.replace(grok1.GROK_1, num_layers=LAYERS)
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"check-{kind}-{datetime.datetime.now():%Y-%m-%dT%H%M%S}.jsonl"
    figures = []
    with path.open("w") as file:

        def note(figure: Figure) -> None:
            figures.append(figure)
            print(figure.line(), flush=True)
            # Some of what is counted are NumPy's numbers.
            file.write(json.dumps(dataclasses.asdict(figure), default=float) + "\n")
            file.flush()

        for name, measure in _parts(config).items():
            if only is not None and name not in only:
                continue
            spent = time.perf_counter() - start
            if spent > SECONDS:
                note(Figure(name, None, details={"left out after": f"{spent:.0f} s"}))
                continue
            for figure in attempted(name, measure):
                note(figure)
        note(Figure("whole check", time.perf_counter() - start, "s", SECONDS))
    print(f"written to {path}")
    return figures


def attempted(name: str, measure: Callable[[], Iterator[Figure]]) -> Iterator[Figure]:
    """Yields what is measured; what fails does not keep other parts from being measured.

    Args:
      name: Of the part, for the figure that says how it failed.
      measure: Measures.
    """
    try:
        yield from measure()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        yield Figure(name, None, details={type(error).__name__: lines[0][:300]})


def _parts(config: grok1.ModelConfig) -> dict[str, Callable[[], Iterator[Figure]]]:
    timed = _Timed(config)
    return {
        "device": _device,
        "kernels": _kernels,
        "nano in float32": _nano_float32,
        "nano in bfloat16": _nano_bfloat16,
        "decode": timed.decode,
        "sampling": timed.sampling,
        "long context": timed.long_context,
        "prefill": timed.prefill,
        "launches": timed.launches,
        "launches of a prompt": timed.prompt_launches,
        "share of several": _Timed(share_of_several(config)).alone,
        "load and offload": timed.files,
    }


def share_of_several(config: grok1.ModelConfig) -> grok1.ModelConfig:
    """What one device has to do of a model that is shared out over one for each key head."""
    count = config.num_kv_heads
    return dataclasses.replace(
        config,
        widening_factor=config.widening_factor / count,
        num_q_heads=config.num_q_heads // count,
        num_kv_heads=1,
        vocab_size=config.vocab_size // count,
    )


def of_step(kernels: device.Kernels, steps: int, layers: int) -> tuple[int, float]:
    """Kernels that a step runs, and the seconds that they take.

    Args:
      kernels: Of a profile of so many steps. Of a loop in a CUDA graph the profiler sees one turn;
        the kernels that are the library's own are those of the layers, but for the head's.
      steps: How many.
      layers: Of the model.
    """
    count, seconds = 0, 0.0
    for name, (times, duration) in kernels.items():
        is_of_layer = name.startswith("grok1_") and not name.startswith(_OF_HEAD)
        in_step = times // steps * (layers if is_of_layer else 1)
        count += in_step
        seconds += in_step * duration / times
    return count, seconds


def longest(kernels: device.Kernels) -> dict[str, str]:
    """The kernels that take the most time in all: how often each ran, and its mean time."""
    return {
        name[:40]: f"{times} x {1e6 * seconds / times:.1f} us"
        for name, (times, seconds) in [*kernels.items()][:10]
    }


def _is_on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _bandwidth() -> float:
    return (workload.HostBandwidth() if _is_on_cpu() else workload.DeviceBandwidth())()


def _device() -> Iterator[Figure]:
    first = jax.devices()[0]
    client = first.client
    yield Figure(
        "devices",
        len(jax.devices()),
        details={"kind": first.device_kind, "jax": jax.__version__, "by": client.platform_version},
    )
    yield Figure("copy bandwidth", _bandwidth() / 1e9, "GB/s, read and written")


def _kernels() -> Iterator[Figure]:
    runs = presence.kernels()
    for operation in presence.OPERATIONS:
        worst, where = 0.0, ""
        for name, difference in check.differences(operation):
            if not difference <= worst:
                worst, where = difference, name
        details = {"worst on": where, "chosen": operation in runs}
        yield Figure(f"kernel {operation}", worst, "relative", check.TOLERANCE, details=details)


def _error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _nano_float32() -> Iterator[Figure]:
    reference = np.load(NANO / "reference.npz")
    model = grok1.load(NANO, dtype="float32", progress=False)
    logits = model.logits(reference["tokens"])
    yield Figure("nano in float32, logits", _error(logits, reference["logits_f64"]), "", 2e-5)
    drawn = model.generate(
        reference["greedy_prompt"], max_new_tokens=32, temperature=0, ignore_eos=True
    )
    differ = sum(a != b for a, b in zip(drawn.tokens, reference["greedy_tokens"], strict=True))
    yield Figure("nano in float32, greedy tokens that differ of 32", differ, "", 0)
    toy = grok1.load(ROOT / "checkpoints" / "toy", dtype="float32", progress=False)
    assert toy.tokenizer is not None
    prompt = toy.tokenizer.encode("The first argument is the name of the file")
    exact = _error_of_steps(toy, prompt)
    yield Figure("toy in float32, decoding step by step against one pass", exact, "", 2e-5)


def _error_of_steps(model: grok1.Model, tokens: list[int]) -> float:
    """How far logits of single steps, which kernels for few rows make, are from one pass's."""
    whole = np.asarray(model.logits(tokens))[-1]
    engine = model.engine
    padded = np.zeros((engine.batch_for(1), engine.capacity_for(len(tokens))), np.int32)
    padded[0, : len(tokens)] = tokens
    state, logits = engine.new_state(padded), None
    for _ in tokens:
        count = np.zeros(len(padded), np.int32)
        count[0] = 1
        state, logits, _ = engine.score(state, count, 1)
    return _error(np.asarray(logits)[0, 0], whole)


def _nano_bfloat16() -> Iterator[Figure]:
    reference = np.load(NANO / "reference.npz")
    expected = jax.nn.log_softmax(reference["logits_f64"].astype(np.float32))
    choices = grok1.ForceExperts(reference["selected_experts"])
    for cache_dtype, bound in (("float16", 4e-4), ("float32", 4e-4), ("int8", 5e-3)):
        model = grok1.load(NANO, dtype="bfloat16", cache_dtype=cache_dtype, progress=False)
        with model.intervene(choices) as forced:
            logits = jax.nn.log_softmax(forced.logits(reference["tokens"]))
        divergence = jnp.sum(jnp.exp(expected) * (expected - logits), axis=-1).mean()
        name = f"nano in bfloat16 with the experts of float64, {cache_dtype} cache, divergence"
        yield Figure(name, float(divergence), "", bound)


class _Timed:
    """What is timed, of a random model that is made once."""

    def __init__(self, config: grok1.ModelConfig):
        self._config = config
        self._model: grok1.Model | None = None
        self._bandwidth = 0.0

    @property
    def model(self) -> grok1.Model:
        if self._model is None:
            self._model = grok1.random_model(self._config)
            self._bandwidth = _bandwidth()
        return self._model

    def _rate(self, batch: int, prompt: int, steps: int) -> tuple[float, dict[str, Any]]:
        """Steps a second, and the share of the copy bandwidth that the bytes of one are."""
        model = self.model
        workload.decode(model, batch, prompt, 4)
        timing = workload.decode(model, batch, prompt, steps)
        experts = workload.experts_read(model, timing.sequences, prompt)
        parts = workload.decode_bytes(model, batch, prompt, steps, experts)
        rate = steps / timing.steps
        share = sum(parts.values()) * rate / self._bandwidth
        return share, {
            "tokens/s": f"{batch * rate:.1f}",
            "GB a step": f"{sum(parts.values()) / 1e9:.3f}",
            "ms a step": f"{1e3 / rate:.3f}",
        }

    def decode(self) -> Iterator[Figure]:
        for batch, bound in ((1, 0.80), (8, 0.75), (32, 0.70)):
            share, details = self._rate(batch, 16, 64)
            name = f"decode, {batch} rows: share of the copy bandwidth"
            yield Figure(name, share, "", bound, at_least=True, details=details)

    def alone(self) -> Iterator[Figure]:
        share, details = self._rate(1, 16, 64)
        name = "decode of one device's share of eight, without the others, 1 row: share of the copy"
        yield Figure(name, share, "", 0.65, at_least=True, details=details)

    def sampling(self) -> Iterator[Figure]:
        by_copy = self._seconds_of_draws(temperature=0)
        # A draw reads all of the head on a GPU: it is held to a greedy step that does.
        with workload.without_head_copy(self.model):
            greedy = self._seconds_of_draws(temperature=0)
            ways = ("top-p 0.95", {"top_p": 0.95}), ("temperature alone", {"top_p": 1})
            for name, options in ways:
                drawn = self._seconds_of_draws(temperature=0.7, **options)
                more = 1e3 * (drawn - greedy)
                yield Figure(f"a step more with {name}, 1 row", more, "ms", 0.3)
        details = {"ms by it": f"{1e3 * by_copy:.3f}", "ms without": f"{1e3 * greedy:.3f}"}
        saved = 1e3 * (greedy - by_copy)
        yield Figure("a greedy step less by the head's copy, 1 row", saved, "ms", details=details)

    def _seconds_of_draws(self, **options: Any) -> float:
        """Seconds of a step."""
        model, steps = self.model, 48
        prompt = workload.random_prompts(model.config.vocab_size, 1, 16)
        runs = [workload.run(model, prompt, steps + 1, seed=1, **options) for _ in range(3)]
        return min(run.steps for run in runs) / steps

    def long_context(self) -> Iterator[Figure]:
        most = self._config.sequence_len
        long = min(8000, most - 40)
        _, short_details = self._rate(1, 100, 32)
        share, details = self._rate(1, long, 24)
        ratio = float(details["ms a step"]) / float(short_details["ms a step"])
        details |= {"ms a step at 100": short_details["ms a step"], "share": f"{share:.3f}"}
        yield Figure(f"decode at {long} positions against 100", ratio, "x", 1.3, details=details)

    def prefill(self) -> Iterator[Figure]:
        rate = workload.MatmulRate(jnp.bfloat16, _is_on_cpu())()
        yield Figure("plain product of bfloat16", rate / 1e12, "TFLOP/s")
        for wanted in (128, 512, 2048, 8191):
            # One token more is run, and one must stay free for a new one.
            length = min(wanted, self._config.sequence_len - 2)
            if length < wanted - 1:
                continue
            workload.prefill(self.model, length)
            seconds = workload.prefill(self.model, length)
            done = workload.prefill_operations(self._config, length) / seconds
            bound = 0.6 if length >= 2048 else None
            details = {"TFLOP/s": f"{done / 1e12:.1f}", "seconds": f"{seconds:.3f}"}
            name = f"prefill of {length}: share of the plain product"
            yield Figure(name, done / rate, "", bound, at_least=True, details=details)

    def launches(self) -> Iterator[Figure]:
        steps, model = 8, self.model
        for batch in (1, 8, 32):
            prompts = workload.random_prompts(model.config.vocab_size, batch, 16)
            workload.run(model, prompts, steps)
            wall = workload.run(model, prompts, steps).steps / (steps - 1)
            kernels = device.profile(lambda of=prompts: workload.run(model, of, steps).sequences)
            count, busy = of_step(kernels, steps, model.config.num_layers)
            yield Figure(f"kernels of a step, {batch} rows", count, "", details=longest(kernels))
            name = f"share of a step in which the device works, {batch} rows"
            yield Figure(name, busy / wall)

    def prompt_launches(self) -> Iterator[Figure]:
        length = min(2048, self._config.sequence_len - 2)
        workload.prefill(self.model, length)
        kernels = device.profile(lambda: workload.prefill(self.model, length))
        busy = sum(seconds for _, seconds in kernels.values())
        yield Figure(f"kernels of a prompt of {length}", busy, "s", details=longest(kernels))

    def files(self) -> Iterator[Figure]:
        config = dataclasses.replace(self._config, num_layers=min(2, self._config.num_layers))
        self._model = None  # its memory is needed
        with tempfile.TemporaryDirectory(prefix="grok1-check-", dir=_memory_files()) as name:
            grok1.save(grok1.random_model(config), pathlib.Path(name, "model"))
            yield from _figures_of_process("benchmarks.gpu_files", str(pathlib.Path(name, "model")))


def _memory_files() -> str | None:
    """A directory whose files are in memory, if one has room; None for the system's own."""
    memory = pathlib.Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > _FILES_BYTES:
        return str(memory)
    return None


def _figures_of_process(module: str, *arguments: str) -> Iterator[Figure]:
    """Yields what a module writes as lines of JSON; it is ended if it takes too long."""
    # This process has most of the device's memory, and does not give it back.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(_PROCESS_SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield Figure(**json.loads(line))
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if status != 0:
        raise RuntimeError(
            f"python -m {module} ended with status {status}; it has {_PROCESS_SECONDS:.0f} s"
        )
