"""What the check of a GPU times: `gpu_check`."""

import concurrent.futures
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from benchmarks import device, workload
from benchmarks.figures import Figure
from grok1.machine import environment
from grok1.machine.processor import available_cores

_BATCHES = {1: 0.80, 8: 0.75, 32: 0.70}
"""Rows side by side, and the share of the copy bandwidth that is asked of them."""

_OF_HEAD = ("grok1_screen", "grok1_choose")  # kernels that run once a step, behind the layers


def share_of_several(config: grok1.ModelConfig) -> grok1.ModelConfig:
    """What one device has to do of a model that is shared out over one for each key head.

    Its layers are as many times more, as large a model in all: for 8 layers of Grok-1 the 64 that
    such a device has, so that what a step takes beside its layers has the share that it has there.
    """
    count = config.num_kv_heads
    return dataclasses.replace(
        config,
        widening_factor=config.widening_factor / count,
        num_q_heads=config.num_q_heads // count,
        num_kv_heads=1,
        vocab_size=config.vocab_size // count,
        num_layers=config.num_layers * count,
    )


def of_step(kernels: device.Kernels, steps: int, layers: int) -> tuple[int, float]:
    """Kernels that a step runs, and the seconds that they take.

    Args:
      kernels: Of a profile of so many steps. The kernels that are the library's own are those of
        the layers, but for the head's.
      steps: How many.
      layers: Of the model, where the profiler sees one turn of their loop, as in a CUDA graph; 1
        where it sees all.
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


def _long_prompt(config: grok1.ModelConfig) -> int:
    return min(8000, config.sequence_len - 40)


def _prompt_lengths(config: grok1.ModelConfig) -> list[int]:
    # One token more is run, and one must stay free for a new one.
    most = config.sequence_len - 2
    return [min(length, most) for length in (128, 512, 2048, 8191) if length - 1 <= most]


def is_on_cpu() -> bool:
    """Whether there is no GPU, so that figures are those of a rehearsal."""
    return jax.default_backend() == "cpu"


def bandwidth() -> float:
    """Bytes a second, read and written."""
    return (workload.HostBandwidth() if is_on_cpu() else workload.DeviceBandwidth())()


class Timed:
    """What is timed, of a random model that is made once."""

    def __init__(self, config: grok1.ModelConfig):
        self.config = config
        self._model: grok1.Model | None = None
        self._bandwidth = 0.0

    @property
    def model(self) -> grok1.Model:
        """The model, with programs of its own."""
        if self._model is None:
            self._model = grok1.random_model(self.config)
            self._bandwidth = bandwidth()
        return self._model

    def forget(self) -> None:
        """Gives the model's memory back."""
        self._model = None

    def _rate(self, batch: int, prompt: int, steps: int) -> tuple[float, dict[str, Any]]:
        """Steps a second, and the share of the copy bandwidth that the bytes of one are."""
        model = self.model
        workload.decode(model, batch, prompt, 4)
        with workload.waits() as waits:
            timing = workload.decode(model, batch, prompt, steps)
        experts = workload.experts_read(model, timing.sequences, prompt)
        parts = workload.decode_bytes(model, batch, prompt, steps, experts)
        rate = steps / timing.steps
        share = sum(parts.values()) * rate / self._bandwidth
        return share, {
            "tokens/s": f"{batch * rate:.1f}",
            "GB a step": f"{sum(parts.values()) / 1e9:.3f}",
            "ms a step": f"{1e3 / rate:.3f}",
            # Where it is none the device waits for the host.
            "ms that the host waits": f"{1e3 * statistics.median(waits):.3f}",
        }

    def programs(self) -> Iterator[Figure]:
        """Compiles most of what is timed, side by side: one by one it would take minutes."""
        model, start = self.model, time.perf_counter()
        long = _long_prompt(self.config)
        pool = concurrent.futures.ThreadPoolExecutor(available_cores())
        try:
            runs = [
                *(pool.submit(workload.prefill, model, n) for n in _prompt_lengths(self.config)),
                *(pool.submit(self._rate, batch, 16, 64) for batch in _BATCHES),
                *(pool.submit(self._rate, 1, *of) for of in ((100, 32), (long, 24))),
            ]
            for run in runs:
                run.result()
        finally:
            # After Ctrl-C nothing more is begun; what a compiler has begun cannot be interrupted.
            pool.shutdown(cancel_futures=True)
        seconds = time.perf_counter() - start
        yield Figure("programs of what follows, compiled side by side", seconds, "s")

    def decode(self) -> Iterator[Figure]:
        """Decoding 1, 8 and 32 prompts side by side."""
        for batch, bound in _BATCHES.items():
            share, details = self._rate(batch, 16, 64)
            name = f"decode, {batch} rows: share of the copy bandwidth"
            yield Figure(name, share, "", bound, at_least=True, details=details)

    def alone(self) -> Iterator[Figure]:
        """Of one device's share: layers in a loop of the graph, and one after the other."""
        name = "decode of one device's share of eight, without the others, 1 row"
        share, details = self._rate(1, 16, 64)
        details["layers"] = self.config.num_layers
        yield Figure(f"{name}: share of the copy", share, "", 0.65, at_least=True, details=details)
        expected = workload.decode(self.model, 1, 16, 64).sequences
        self.forget()
        with mock.patch.dict(os.environ, GROK1_CUDA_GRAPHS="unrolled"):
            unrolled = Timed(self.config)
            share, details = unrolled._rate(1, 16, 64)
            found = workload.decode(unrolled.model, 1, 16, 64).sequences
        yield Figure(
            f"{name}, layers unrolled in the graph: share of the copy", share, "", details=details
        )
        differ = int(np.sum(found != expected))
        yield Figure("layers unrolled in the graph: tokens that differ of 64", differ, "", 0)

    def sampling(self) -> Iterator[Figure]:
        """What a draw, and the head's copy, add to a step."""
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
        """A step behind many positions, beside one behind few."""
        long = _long_prompt(self.config)
        _, short_details = self._rate(1, 100, 32)
        share, details = self._rate(1, long, 24)
        ratio = float(details["ms a step"]) / float(short_details["ms a step"])
        details |= {"ms a step at 100": short_details["ms a step"], "share": f"{share:.3f}"}
        yield Figure(f"decode at {long} positions against 100", ratio, "x", 1.3, details=details)

    def prefill(self) -> Iterator[Figure]:
        """Prompts, beside a plain product."""
        rate = workload.MatmulRate(jnp.bfloat16, is_on_cpu())()
        yield Figure("plain product of bfloat16", rate / 1e12, "TFLOP/s")
        for length in _prompt_lengths(self.config):
            workload.prefill(self.model, length)
            seconds = workload.prefill(self.model, length)
            done = workload.prefill_operations(self.config, length) / seconds
            bound = 0.6 if length >= 2048 else None
            details = {"TFLOP/s": f"{done / 1e12:.1f}", "seconds": f"{seconds:.3f}"}
            name = f"prefill of {length}: share of the plain product"
            yield Figure(name, done / rate, "", bound, at_least=True, details=details)

    def launches(self) -> Iterator[Figure]:
        """What a step runs on the device, and how much of its time."""
        steps, model = 8, self.model
        for batch in (1, 8, 32):
            prompts = workload.random_prompts(model.config.vocab_size, batch, 16)
            workload.run(model, prompts, steps)
            wall = workload.run(model, prompts, steps).steps / (steps - 1)
            kernels = device.profile(lambda of=prompts: workload.run(model, of, steps).sequences)
            is_loop = environment.choice("GROK1_CUDA_GRAPHS") != "unrolled"
            count, busy = of_step(kernels, steps, model.config.num_layers if is_loop else 1)
            yield Figure(f"kernels of a step, {batch} rows", count, "", details=longest(kernels))
            name = f"share of a step in which the device works, {batch} rows"
            yield Figure(name, busy / wall)

    def prompt_launches(self) -> Iterator[Figure]:
        """What a prompt runs on the device."""
        length = min(2048, self.config.sequence_len - 2)
        workload.prefill(self.model, length)
        kernels = device.profile(lambda: workload.prefill(self.model, length))
        busy = sum(seconds for _, seconds in kernels.values())
        yield Figure(f"kernels of a prompt of {length}", busy, "s", details=longest(kernels))
