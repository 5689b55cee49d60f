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
from benchmarks import gpu_int4, gpu_probe
from benchmarks.figures import Figure
from benchmarks.gpu_timing import Timed, bandwidth, share_of_several
from benchmarks.machine import ROOT
from grok1.ops.check import comparison
from grok1.ops.cuda import presence

SECONDS = 360.0
"""What the whole may take; what has not begun by then is left out, and named."""

NANO = ROOT / "tests" / "golden" / "nano"
LAYERS = 8

_FILES_BYTES = 16 << 30  # room for the files of two layers and the embedding, 13.1 GB
_PROCESS_SECONDS = 100.0  # for a part in a process of its own; it takes half of that


def run(
    directory: pathlib.Path,
    config: grok1.ModelConfig | None = None,
    only: Collection[str] | None = None,
    probe: pathlib.Path | None = None,
) -> list[Figure]:
    """Measures everything, says it, and writes it to a file of JSON lines.

    Args:
      directory: For the file.
      config: Of the model that is timed; by default 8 layers of Grok-1.
      only: Names of the parts to measure; None for all.
      probe: A library of the kernels of `gpu_probe`, to be measured beside; None for none.

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

        for name, measure in _parts(config, probe).items():
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


def _parts(
    config: grok1.ModelConfig, probe: pathlib.Path | None
) -> dict[str, Callable[[], Iterator[Figure]]]:
    timed = Timed(config)
    beside = {} if probe is None else {"probe": lambda: gpu_probe.decode(timed.model, probe)}
    return {
        "device": _device,
        "kernels": _kernels,
        "nano in float32": _nano_float32,
        "nano in bfloat16": _nano_bfloat16,
        "programs": timed.programs,
        "decode": timed.decode,
        "sampling": timed.sampling,
        "long context": timed.long_context,
        "prefill": timed.prefill,
        "launches": timed.launches,
        "launches of a prompt": timed.prompt_launches,
        "four bits": lambda: gpu_int4.decode(timed.model, {1: 1.5, 8: None}, 64),
        **beside,
        "share of several": lambda: _share(timed),
        "load and offload": lambda: _files(timed),
    }


def _device() -> Iterator[Figure]:
    first = jax.devices()[0]
    client = first.client
    yield Figure(
        "devices",
        len(jax.devices()),
        details={"kind": first.device_kind, "jax": jax.__version__, "by": client.platform_version},
    )
    yield Figure("copy bandwidth", bandwidth() / 1e9, "GB/s, read and written")


def _kernels() -> Iterator[Figure]:
    runs = presence.kernels()
    for operation in presence.OPERATIONS:
        worst, where = 0.0, ""
        for name, difference in comparison.differences(operation):
            if not difference <= worst:
                worst, where = difference, name
        details = {"worst on": where, "chosen": operation in runs}
        yield Figure(
            f"kernel {operation}", worst, "relative", comparison.TOLERANCE, details=details
        )


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


def _share(timed: Timed) -> Iterator[Figure]:
    timed.forget()  # this one is as large
    return Timed(share_of_several(timed.config)).alone()


def _files(timed: Timed) -> Iterator[Figure]:
    config = dataclasses.replace(timed.config, num_layers=min(2, timed.config.num_layers))
    timed.forget()  # its memory is needed
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
