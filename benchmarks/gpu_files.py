"""What loading and offloading have to show on a GPU: `python -m benchmarks.gpu_files MODEL`.

In a process of its own, because a device tells how much of its memory was taken at most since the
process began. A figure is a line of JSON, written as soon as it is there.
"""

import dataclasses
import gc
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from benchmarks import workload
from benchmarks.figures import Figure
from benchmarks.gpu_check import attempted
from benchmarks.load_phases import Phases
from benchmarks.offload_phases import StepPhases
from grok1.checkpoint import native, reading, sending
from grok1.checkpoint.pinned import has_pinned_memory, pinned, sent
from grok1.machine.cuda_driver import copier_of
from grok1.offload import runner
from grok1.planning.memory import state_bytes

_NUM_LOADS = 3
_NUM_STEPS = 10
_PROMPT = 4
_COPIED_BYTES = 1 << 26  # at a time
_NUM_COPIES = 16
_OFFLOADED = {
    "host": "experts in the host's pinned memory",
    "disk": "experts read from the page cache",
}


class _Files:
    """A model in files, which are in the page cache."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self._device = jax.devices()[0]
        self._copied = math.nan  # bytes a second
        self._generated: dict[str, list[int]] = {}

    def load(self) -> Iterator[Figure]:
        """How fast, beside a copy to the device, and how much of the device's memory it takes."""
        jax.block_until_ready(jnp.zeros(8))  # the device has started
        first, num_weights = self._seconds_of_load()
        stats = self._device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            peak = stats["peak_bytes_in_use"]
            details = {"weights, GB": f"{num_weights / 1e9:.3f}", "peak, GB": f"{peak / 1e9:.3f}"}
            name = "load: peak of the device's memory over the weights"
            yield Figure(name, peak / num_weights, "x", 1.03, details=details)
        self._copied = self._copy_rate()
        yield Figure("copy from pinned memory to the device", self._copied / 1e9, "GB/s")
        loads = [self._phases() for _ in range(_NUM_LOADS)]
        best = min(loads, key=lambda phases: phases.seconds)
        details = {
            "GB": f"{self._num_bytes / 1e9:.2f}",
            "GB/s": f"{self._num_bytes / best.seconds / 1e9:.2f}",
            "seconds": ", ".join(f"{phases.seconds:.3f}" for phases in loads),
            "seconds of a process's first": f"{first:.2f}",
        }
        share = self._num_bytes / best.seconds / self._copied
        name = "load from the page cache: share of the copy"
        yield Figure(name, share, "", 0.8, at_least=True, details=details)
        outside = 1e3 * (best.seconds - best.reading)
        name = "load: time outside of reading and sending"
        yield Figure(name, outside, "ms", details=best.details())

    def ways(self) -> Iterator[Figure]:
        """What else the load might do, to see what bounds it."""
        if copier_of(self._device) is None:
            return
        patches: dict[str, tuple[Any, str, Any]] = {
            f"slots of {size} MiB": (sending, "_SLOT_BYTES", size << 20) for size in (1, 2, 8)
        }
        patches |= {
            f"{count} threads": (reading, "_num_threads", lambda count=count: count)
            for count in (8, 12, 24)
        }
        patches["three slots"] = (sending, "_NUM_SLOTS", 3)
        patches["the interpreter in place of C++"] = (native, "is_available", lambda: False)
        for name, (owner, attribute, value) in patches.items():
            with mock.patch.object(owner, attribute, value):
                self._phases()  # takes what memory it pins
                phases = self._phases()
            rate = self._num_bytes / phases.seconds / 1e9
            yield Figure(f"load with {name}", rate, "GB/s", details=phases.details())

    def _phases(self) -> Phases:
        gc.collect()  # the model before, which is not to take room beside this one
        phases = Phases()
        with phases.watched():
            model = self._loaded()
            jax.block_until_ready(model.params)
        return phases

    def offload(self, how: Any) -> Iterator[Figure]:
        """How fast experts come to the device if it keeps none."""
        gc.collect()
        with mock.patch.object(runner, "device_bytes_available", return_value=None):
            model = self._loaded(offload=how, layers=1)
            streamed = model.engine.runner
            assert isinstance(streamed, runner.Streamed)
            store = streamed.store
            if how == "disk":  # nor does the host keep any
                engine = model.engine
                capacity = engine.capacity_for(_PROMPT + _NUM_STEPS + 1)
                state = state_bytes(engine, engine.batch_for(1), capacity)
                streamed.budget_bytes = runner.fixed_bytes(engine, store) + state
            # The same tokens, so that whatever is kept is there afterwards.
            workload.decode(model, 1, _PROMPT, _NUM_STEPS)
            before = dataclasses.replace(streamed.stats.decode)
            timing = workload.decode(model, 1, _PROMPT, _NUM_STEPS)
            after = streamed.stats
            self._generated[how] = _generated(model)
        num_used = (after.decode.num_used - before.num_used) / (after.decode.steps - before.steps)
        rate = num_used * store.num_bytes * _NUM_STEPS / timing.steps
        details = {
            "GB/s": f"{rate / 1e9:.2f}",
            "tokens/s": f"{_NUM_STEPS / timing.steps:.2f}",
            "experts a step": f"{num_used:g}",
            "GB an expert": f"{store.num_bytes / 1e9:.3f}",
            "held by the device": after.num_on_device,
            "held by the host": after.num_held,
        }
        name = f"offloaded decode, {_OFFLOADED[how]}: share of the copy"
        yield Figure(name, rate / self._copied, "", 0.8, at_least=True, details=details)
        phases = StepPhases()  # in a run of their own, because to look takes time
        with (
            mock.patch.object(runner, "device_bytes_available", return_value=None),
            phases.watched(),
        ):
            workload.decode(model, 1, _PROMPT, _NUM_STEPS)
        details = phases.details()
        if how == "host":
            rate = self._copy_rate((store.num_bytes // 3,) * 6)  # gate, up and down
            details["two experts copied alone, GB/s"] = f"{rate / 1e9:.2f}"
        taken = 1e3 * phases.seconds["step"] / max(1, phases.num_steps)
        name = f"offloaded decode, {_OFFLOADED[how]}: a step"
        yield Figure(name, taken, "ms", details=details)

    def tokens(self) -> Iterator[Figure]:
        """Whether offloading changes what is generated."""
        gc.collect()
        expected = _generated(self._loaded(layers=1))
        for how, found in self._generated.items():
            differ = sum(a != b for a, b in zip(found, expected, strict=True))
            name = f"offloaded against resident, {_OFFLOADED[how]}, greedy tokens that differ"
            yield Figure(name, differ, "", 0)

    def _loaded(self, **options: Any) -> grok1.Model:
        return grok1.load(self._path, mesh=(1, 1), progress=False, **options)

    def _seconds_of_load(self) -> tuple[float, int]:
        """Seconds, and the bytes of the weights."""
        gc.collect()  # the model before, which is not to take room beside this one
        start = time.perf_counter()
        model = self._loaded()
        jax.block_until_ready(model.params)
        seconds = time.perf_counter() - start
        return seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))

    def _copy_rate(self, sizes: Sequence[int] = (_COPIED_BYTES,) * _NUM_COPIES) -> float:
        """Bytes a second, of arrays of these sizes at once."""
        arrays: list[Any] = [np.ones(size, np.int8) for size in sizes]
        if has_pinned_memory(self._device):
            pairs = [pinned(self._device, array.shape, array.dtype) for array in arrays]
            arrays = [array for _, array in pairs]
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready([sent(array, self._device) for array in arrays])
            seconds.append(time.perf_counter() - start)
        return sum(sizes) / min(seconds)


def _generated(model: grok1.Model) -> list[int]:
    return model.generate([5, 6, 7], max_new_tokens=8, temperature=0, ignore_eos=True).tokens


def main() -> None:
    """Writes the figures of the model whose path is the argument."""
    files = _Files(pathlib.Path(sys.argv[1]))
    parts = {
        "load": files.load,
        "ways to load": files.ways,
        "offload to the host": lambda: files.offload("host"),
        "offload to the disk": lambda: files.offload("disk"),
        "tokens of an offloaded model": files.tokens,
    }
    # A load lets go of the pages that it has read.
    with mock.patch.object(reading, "_drop_pages"):
        for name, measure in parts.items():
            for figure in attempted(name, measure):
                print(json.dumps(dataclasses.asdict(figure), default=float), flush=True)


if __name__ == "__main__":
    main()
