"""What runs in the child process: commands in, results out, a line of JSON each."""

import dataclasses
import json
import os
import pathlib
import platform
import signal
import sys
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

import grok1
from benchmarks import deep, device, machine, serving, workload
from benchmarks.machine import BenchmarkError
from benchmarks.peers import DenseDecoder
from grok1.care.conversion import convert
from grok1.ops.cpu import bindings

_FIRST_PROMPT = 128


class Session:
    """The commands. A model has one device, the first."""

    def __init__(self):
        self._device = jax.devices()[0]
        self._on_cpu = self._device.platform == "cpu"
        self._model: grok1.Model | None = None
        self._bandwidth: Any = None
        self._matmul: Any = None
        self._dense: DenseDecoder | None = None
        self._sampler: workload.Sampler | None = None
        self._served: serving.Served | None = None
        self._sequences: dict[tuple[int, int, str], np.ndarray] = {}

    def describe(self) -> dict[str, Any]:
        """The device and the versions."""
        return {
            "platform": self._device.platform,
            "name": _processor() if self._on_cpu else self._device.device_kind,
            "memory_bytes": self._memory_bytes(),
            "versions": {
                "grok1": grok1.__version__,
                "jax": jax.__version__,
                "jaxlib": version("jaxlib"),
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    def make(self, config: str, path: str) -> None:
        """Writes a random model."""
        grok1.save(self._random(config), path)

    def convert(self, source: str, target: str, to: str) -> None:
        """Writes a model in another format."""
        convert(source, target, to=to)

    def build_kernels(self) -> dict[str, Any]:
        """Seconds to build and load the native kernels, where there are any."""
        start = time.perf_counter()
        available = bindings.is_available()
        return {"available": available, "seconds": time.perf_counter() - start}

    def load(self, path: str) -> dict[str, Any]:
        """Loads a model; says how long that took, the bytes in files and those it keeps."""
        start = time.perf_counter()
        self._model = grok1.load(path, mesh=(1, 1), progress=False)
        jax.block_until_ready(self._model.params)
        seconds = time.perf_counter() - start
        released = pathlib.Path(path, "ckpt-0")
        files = (released if released.exists() else pathlib.Path(path)).iterdir()
        return {
            "seconds": seconds,
            "file_bytes": sum(file.stat().st_size for file in files),
            "kept_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._model.params)),
        }

    def random(self, config: str) -> None:
        """Makes a random model in memory."""
        self._model = self._random(config)
        jax.block_until_ready(self._model.params)

    def first_tokens(self) -> dict[str, float]:
        """Seconds to the first token: of the first call, and of later ones.

        The last, "compiled", copies the output head as the first does, but compiles nothing. Of
        what is no first call, the shortest of three counts.
        """
        again = []
        cold = workload.time_to_first_token(self.model, _FIRST_PROMPT)
        warm = min(workload.time_to_first_token(self.model, _FIRST_PROMPT) for _ in range(3))
        for _ in range(3):
            del self.model.engine.head_copies.table
            again.append(workload.time_to_first_token(self.model, _FIRST_PROMPT))
        return {"prompt": _FIRST_PROMPT, "cold": cold, "warm": warm, "compiled": min(again)}

    def peak_memory(self) -> int:
        """Most bytes ever held: of the device's memory, on a CPU of this process."""
        if not self._on_cpu:
            return (self._device.memory_stats() or {})["peak_bytes_in_use"]
        return _peak_resident()

    def full_context(self) -> dict[str, float]:
        """Seconds to the first token of a prompt that fills the context, and the memory it took."""
        _forget_peak()
        length = self.model.config.sequence_len - 1
        seconds = workload.time_to_first_token(self.model, length)
        cache = self.model.engine.abstract_state(1, length + 1).cache
        held = sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.model.params, cache))
        )
        return {"prompt": length, "seconds": seconds, "bytes": self.peak_memory() - held}

    def decode(self, batch: int, prompt: int, steps: int, how: str = "greedy") -> float:
        """Tokens per second of all rows together."""
        timing = workload.decode(self.model, batch, prompt, steps, how)
        self._sequences[batch, prompt, how] = timing.sequences
        return batch * steps / timing.steps

    def spread(self, batch: int, prompt: int, steps: int, how: str) -> dict[str, float]:
        """How the probability was spread in the last such `decode`, along its first row."""
        return workload.spread(self.model, self._sequences[batch, prompt, how][0][-steps:])

    def sampler(self, shape: str, rows: int, num_filtered: int) -> float:
        """Seconds of a step's draws, as `workload.Sampler` says."""
        if self._sampler is None:
            text = (machine.ROOT / "README.md").read_text(encoding="utf-8")[:2000]
            self._sampler = workload.Sampler(self.model, text)
        return self._sampler(shape, rows, num_filtered)

    def decode_bytes(self, batch: int, prompt: int, steps: int) -> dict[str, Any]:
        """What a step of the last such `decode` had to read."""
        sequences = self._sequences[batch, prompt, "greedy"]
        experts = workload.experts_read(self.model, sequences, prompt)
        parts = workload.decode_bytes(self.model, batch, prompt, steps, experts)
        return {"experts_per_step": experts, "bytes": parts}

    def prefill(self, tokens: int) -> float:
        """Tokens per second of one prompt."""
        return tokens / workload.prefill(self.model, tokens)

    def prefill_operations(self, tokens: int) -> float:
        """Operations that a prompt of this length needs."""
        return workload.prefill_operations(self.model.config, tokens)

    def dense(self, tokens: int) -> float:
        """Tokens per second of the dense reference, compiled when first asked."""
        token = 0
        if self._dense is None:
            self._dense = DenseDecoder(self.model)
            token = self._dense.next_token(token)
        start = time.perf_counter()
        for _ in range(tokens):
            token = self._dense.next_token(token)
        return tokens / (time.perf_counter() - start)

    def bandwidth(self) -> float:
        """Bytes per second."""
        if self._bandwidth is None:
            kind = workload.HostBandwidth if self._on_cpu else workload.DeviceBandwidth
            self._bandwidth = kind()
        return self._bandwidth()

    def matmul(self) -> float:
        """Operations per second."""
        if self._matmul is None:
            self._matmul = workload.MatmulRate(self.model.dtype, self._on_cpu)
        return self._matmul()

    def load_deep(self, path: str, layers: int, memory: float) -> None:
        """Loads a model as one of so many layers, with its experts on disk; see `deep`."""
        self._model = deep.load(pathlib.Path(path), layers, memory)

    def decode_deep(self, untimed: int, timed: int, cached: bool) -> dict[str, Any]:
        """As `deep.decode`."""
        return deep.decode(self.model, untimed, timed, cached)

    def serve(self, slots: int, capacity: int, max_stall: float) -> dict[str, Any]:
        """Puts the model behind HTTP; says where, and for which sizes."""
        self._served = serving.Served(
            self.model, max_slots=slots, capacity=capacity, decode_rows=(1,), max_stall=max_stall
        )
        return {"port": self._served.port, "sizes": dataclasses.asdict(self._served.sizes)}

    def scheduler(self, prompts: list[list[int]], tokens: int) -> float:
        """Tokens per second of the scheduler of the last `serve` alone."""
        assert self._served
        return self._served.without(prompts, tokens)

    def pauses(self, length: int, max_stall: float) -> dict[str, Any]:
        """As `serving.pauses`."""
        return serving.pauses(self.model, length, max_stall)

    def profiles(self, batches: list[int], prefill: int) -> dict[str, Any]:
        """Kernels of two decode steps for each batch, and of a prompt with its first token."""
        found = {}
        for batch in batches:
            prompts = workload.random_prompts(self.model.config.vocab_size, batch, 1)
            found[f"two decode steps, batch {batch}"] = self._profile(prompts, 2)
        prompt = workload.random_prompts(self.model.config.vocab_size, 1, prefill)
        found[f"prefill of {prefill - 1} tokens and a decode step"] = self._profile(prompt, 1)
        return found

    def _profile(self, prompts: np.ndarray, num_tokens: int) -> device.Kernels:
        workload.run(self.model, prompts, num_tokens)
        return device.profile(lambda: workload.run(self.model, prompts, num_tokens).sequences)

    def programs(self, batches: list[int]) -> dict[str, Any]:
        """What the compiled steps hold in memory."""
        capacity = self.model.engine.capacity_for(2048)
        reports = {
            f"decode batch {batch}": device.decode_report(self.model, batch, capacity)
            for batch in batches
        }
        return {**reports, "prefill": device.prefill_report(self.model, capacity)}

    @property
    def model(self) -> grok1.Model:
        """The model, which must be there."""
        assert self._model is not None
        return self._model

    def _random(self, config: str) -> grok1.Model:
        return grok1.random_model(grok1.ModelConfig.from_json(config), mesh=(1, 1))

    def _memory_bytes(self) -> int | None:
        if not self._on_cpu:
            return (self._device.memory_stats() or {}).get("bytes_limit")
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _peak_resident() -> int:
    """Most memory that this process had resident."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not on Linux, where it would include the parent's memory at the time of the fork.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> None:
    """Lets `_peak_resident` begin anew, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def main() -> None:
    """Serves commands until the input ends."""
    # The parent decides when to stop; Ctrl-C reaches both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever else prints must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": getattr(session, request.pop("command"))(**request)}
        except (ValueError, OSError, RuntimeError, ImportError, BenchmarkError) as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
