"""Will it run: memory, loading time and a bound on the speed, on devices one need not have.

Nothing is loaded, and no device but those asked about is started.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from grok1.checkpoint.directory import load_config, open_tensors
from grok1.checkpoint.loading import expert_arrays
from grok1.config import GROK_1, ModelConfig
from grok1.engine.engine import Engine
from grok1.files import CheckpointError
from grok1.generate.scheduler import MAX_ROWS
from grok1.machine.host_memory import gigabytes, host_bytes_available
from grok1.nn import precision
from grok1.nn.manifest import TensorSpec, in_memory
from grok1.nn.sharding import DATA_AXIS, MODEL_AXIS, abstract_mesh, mesh_sizes
from grok1.nn.transformer import Params
from grok1.ops.quantized import QuantizedArray
from grok1.planning.bandwidth import file_bandwidth, memory_bandwidth
from grok1.planning.budget import SHARE, resident_bytes, without_experts
from grok1.planning.memory import (
    GPU_PLATFORMS,
    MOST_PREALLOCATED,
    RAISE_FRACTION,
    abstract_engine,
    fewest_devices,
    one_layer,
    preallocated_share,
    released_weights,
    screening_table_bytes,
    shard_bytes,
    state_bytes,
)

_DISK = 2.0  # GB/s
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


class DeviceKind(NamedTuple):
    """A device as its vendor describes it.

    Attributes:
      name: For people.
      platform: "gpu", "tpu" or "cpu".
      memory: GB, of 1e9 bytes.
      bandwidth: Of that memory, GB/s.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float


DEVICE_KINDS = {
    "a100-80": DeviceKind("A100 80GB SXM", "gpu", 80, 2039),
    "h100": DeviceKind("H100 SXM", "gpu", 80, 3350),
    "h200": DeviceKind("H200 SXM", "gpu", 141, 4800),
    "b200": DeviceKind("B200", "gpu", 180, 8000),
    "mi300x": DeviceKind("MI300X", "gpu", 192, 5300),
    "tpu-v5p": DeviceKind("TPU v5p", "tpu", 95, 2765),
    "tpu-v6e": DeviceKind("TPU v6e", "tpu", 32, 1638),
}
"""Data sheets: NVIDIA A100, H100 and H200 Tensor Core GPU; NVIDIA DGX B200 (1,440 GB and 64 TB/s on
8 GPUs); AMD Instinct MI300X; docs.cloud.google.com/tpu/docs/v5p and .../v6e."""


class Estimate(NamedTuple):
    """What some devices could do at most, reading memory being all that takes time.

    Attributes:
      name: The devices.
      memory: GB of each.
      bandwidth: GB/s of each.
      fits: Whether weights, cache and working memory fit in what JAX takes there by default.
      needed_share: What XLA_PYTHON_CLIENT_MEM_FRACTION has to be for it to fit; None where it fits
        already or does not matter.
      tokens_per_second: Of all rows together, with every position of the cache filled.
    """

    name: str
    memory: float
    bandwidth: float
    fits: bool
    needed_share: float | None
    tokens_per_second: float


class Streaming(NamedTuple):
    """How a CPU would run a model that does not fit, its experts read when they are needed.

    Attributes:
      budget_bytes: What the process takes of the memory.
      least_bytes: The least it can take.
      num_held: Experts that fit beside everything else.
      read_bytes: Read from files for a token, with experts chosen evenly.
      files: GB/s at which the files can be had: the disk's if it was given or there are no files,
        otherwise measured.
      memory: GB/s of memory: those given, otherwise measured.
      measured: Which of the two were measured here, "files" and "memory".
      seconds: For a token.
    """

    budget_bytes: int
    least_bytes: int
    num_held: int
    read_bytes: int
    files: float
    memory: float
    measured: tuple[str, ...]
    seconds: float

    def note(self, rate: str) -> str:
        """Returns where a rate is from, if it was found out here."""
        return " (measured here)" if rate in self.measured else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model lies on some devices. Bytes are those of one device.

    Attributes:
      num_weights: Weights of the model.
      num_devices: Devices in the mesh.
      mesh: Its sizes (data, model).
      platform: "gpu", "tpu" or "cpu".
      dtype: Type of the products with weights.
      cache_dtype: Type of cached keys and values.
      batch: Rows, those asked for rounded up as `generate` does.
      context: Positions in the cache, likewise.
      memory_bytes: Memory of a device.
      usable_share: Share of it that JAX uses; on GPUs what XLA_PYTHON_CLIENT_MEM_FRACTION says.
      usable_bytes: That share in bytes.
      weights_bytes: Weights, each scale and replica counted.
      cache_bytes: Cache and tokens of the batch.
      working_bytes: What decoding or the largest chunk of prefill takes besides, from XLA's
        `memory_analysis` of the programs compiled for CPU devices, without the native kernels;
        on CPUs also the output head's screening table.
      fits: Whether all three together fit in what is usable.
      needed_share: What XLA_PYTHON_CLIENT_MEM_FRACTION has to be for it to fit; None where it fits
        already or does not matter. The largest batch and context are then for this share.
      largest_batch: Most rows with caches of this context that fit, up to the 32 that run side by
        side; 0 for none.
      largest_context: Most positions that fit at this batch, up to the model's context; 0 for none.
      fewest_devices: Devices of this memory that hold the weights and the smallest cache; None for
        more than 64.
      checkpoint_bytes: The layers' share of the checkpoint on disk, embedding and norm included.
      disk: GB/s that the disk is taken to deliver.
      load_seconds: Time to read all of it once at that rate.
      decode_bytes: What a device reads for one token of every row: attention, the experts chosen,
        the output head and a full cache. Rows are taken to choose evenly among the experts.
      estimates: Bounds for devices known by name, and for these if their bandwidth is known.
      streaming: How it would run with its experts on disk; None where it fits, or is not for one
        CPU, or for more than one row.
    """

    num_weights: int
    num_devices: int
    mesh: tuple[int, int]
    platform: str
    dtype: str
    cache_dtype: str
    batch: int
    context: int
    memory_bytes: int
    usable_share: float
    usable_bytes: int
    weights_bytes: int
    cache_bytes: int
    working_bytes: int
    fits: bool
    needed_share: float | None
    largest_batch: int
    largest_context: int
    fewest_devices: int | None
    checkpoint_bytes: int
    disk: float
    load_seconds: float
    decode_bytes: int
    estimates: tuple[Estimate, ...]
    streaming: Streaming | None

    @property
    def needed_bytes(self) -> int:
        """Weights, cache and working memory of a device."""
        return self.weights_bytes + self.cache_bytes + self.working_bytes

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        estimates = [estimate._asdict() for estimate in self.estimates]
        found = {**dataclasses.asdict(self), "estimates": estimates}
        if self.streaming is not None:
            found["streaming"] = self.streaming._asdict()
        return {**found, "needed_bytes": self.needed_bytes}

    def lines(self) -> list[str]:
        """The same for people."""
        data, model = self.mesh
        usable = f"usable of {gigabytes(self.memory_bytes)}"
        if self.platform == "gpu":
            usable += f": JAX takes {self.usable_share:.0%}"
        table = [
            ("weights", self.weights_bytes),
            (f"cache of {self.context} positions, batch {self.batch}", self.cache_bytes),
            ("working memory", self.working_bytes),
            ("needed", self.needed_bytes),
            (usable, self.usable_bytes),
        ]
        return [
            f"{self.num_weights / 1e6:,.0f} million weights on {_count(self.num_devices)} "
            f"({self.platform.upper()}), mesh {data}x{model},",
            f"products in {self.dtype}, cache in {self.cache_dtype}",
            "",
            f"{'on each device':40}{'GB':>10}",
            *(f"  {what:38}{num_bytes / 1e9:10.2f}" for what, num_bytes in table),
            "",
            *self._verdict(),
            *self._streaming(),
            f"Loading takes {self.load_seconds:.3g} s if the disk delivers {self.disk:g} GB/s "
            f"({self.checkpoint_bytes / 1e9:.1f} GB).",
            "",
            *self._speed(),
            "Working memory is XLA's figure for the programs compiled for CPU devices.",
        ]

    def _verdict(self) -> list[str]:
        excess = gigabytes(abs(self.usable_bytes - self.needed_bytes))
        raised = ""
        if self.fits:
            lines = [f"It fits, with {excess} to spare on each device."]
        elif self.needed_share is not None:
            lines = [f"It fits only where JAX takes more: {RAISE_FRACTION}."]
        else:
            lines = [f"It does not fit: {excess} too much for each device.", self._advice()]
        if not self.fits and self.platform == "gpu":
            raised = f" with {MOST_PREALLOCATED:.0%} of the memory"
        if self.largest_batch or self.largest_context:
            lines.append(
                f"Largest batch at context {self.context}{raised}: {self.largest_batch or 'none'}; "
                f"largest context at batch {self.batch}: {self.largest_context or 'none'}."
            )
        return lines

    def _streaming(self) -> list[str]:
        if self.streaming is None:
            return []
        found = self.streaming
        if found.budget_bytes < found.least_bytes:
            return [f"With its experts on disk it takes {gigabytes(found.least_bytes)} at least."]
        return [
            f"With its experts on disk (--offload, --memory {found.budget_bytes / 1e9:.0f}GB) it "
            f"runs: {found.seconds:.3g} s a token,",
            f"with {gigabytes(found.read_bytes)} from files at {found.files:.3g} GB/s"
            f"{found.note('files')}, and memory at {found.memory:.3g} GB/s{found.note('memory')}.",
        ]

    def _advice(self) -> str:
        if self.largest_batch or self.largest_context:
            return "A smaller batch or context does, or perhaps --cache-dtype int8."
        if self.platform == "cpu":
            total = self.needed_bytes * self.num_devices
            return f"The machine needs {gigabytes(total)} of memory for this."
        if self.fewest_devices is None:
            return "Devices with more memory are needed."
        return f"{_count(self.fewest_devices)} of this memory would hold the weights."

    def _speed(self) -> list[str]:
        read = f"{gigabytes(self.decode_bytes)} on each device for a step of decoding"
        if not self.estimates:
            return [f"It reads {read}; --bandwidth GB/s gives a bound on the speed."]
        return [
            f"{'tokens/s, at most':24}{'GB':>6}{'GB/s':>8}{'fits':>8}{'tokens/s':>12}",
            *(self._estimate_line(estimate) for estimate in self.estimates),
            "",
            f"An upper bound: the time to read {read}.",
            *(
                ["Rows are taken to choose their experts evenly."]
                if self.batch > self.mesh[0]
                else []
            ),
        ]

    def _estimate_line(self, estimate: Estimate) -> str:
        fits = "yes" if estimate.fits else "no"
        if estimate.needed_share is not None:
            fits = f"at {estimate.needed_share:.0%}"
        return (
            f"  {f'{self.num_devices} x {estimate.name}':22}{estimate.memory:6.0f}"
            f"{estimate.bandwidth:8.0f}{fits:>8}{estimate.tokens_per_second:12.1f}"
        )


def _count(num_devices: int) -> str:
    return f"{num_devices} device" + ("s" if num_devices > 1 else "")


class _Devices(NamedTuple):
    number: int
    platform: str
    memory_bytes: float
    usable_share: float


def plan(
    config: ModelConfig | None = None,
    *,
    devices: int | Sequence[Any] | None = None,
    memory: float | None = None,
    device: str | None = None,
    mesh: Sequence[int] | str | None = None,
    batch: int = 1,
    context: int | None = None,
    dtype: Any = None,
    cache_dtype: Any = None,
    bandwidth: float | None = None,
    disk: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    layers: int | None = None,
    embedding_dtype: Any = "float32",
) -> Plan:
    """Says how a model would lie on some devices, what fits there and how fast it can be at most.

    Takes some seconds: the programs are compiled, in a child process with as many virtual devices.

    Args:
      config: The model; None for that of `checkpoint`, or Grok-1.
      devices: How many, or JAX's devices; None for those present, or, with `device`, for 8 of an
        accelerator and one CPU.
      memory: GB (1e9 bytes) of each device; on a CPU those of the machine. None for those of
        `device`, or for what is there.
      device: A name in `DEVICE_KINDS`, or "cpu"; None for the devices present, or, with a number in
        `devices`, for GPUs.
      mesh: Sizes (data, model), as (1, 8) or "1x8"; None for all devices, as `load`.
      batch: Prompts side by side, up to 32.
      context: Positions, prompt and generated tokens together; None for the model's context.
      dtype: As for `load`.
      cache_dtype: As for `load`.
      bandwidth: GB/s of a device's memory; on a CPU those of the machine. None for the names' own,
        or, for a model that a CPU reads from disk, for what is measured here.
      disk: GB/s that the disk delivers. None for 2, those of one NVMe drive in the cloud, or, for a
        model that is read from disk token by token, for what is measured of `checkpoint`.
      checkpoint: A directory with the weights, whose types then count: weights without scales are
        float32 in memory. Part of a download is taken for a release.
      layers: As for `load`.
      embedding_dtype: As for `load`.

    Raises:
      ValueError: If a number is out of range, the model does not divide over the mesh, or the
        memory of a device is unknown.
      RuntimeError: If the programs could not be compiled.
    """
    whole = config or (GROK_1 if checkpoint is None else load_config(checkpoint))
    _check(whole, devices, memory, device, batch, context, bandwidth, disk)
    config = whole.first_layers(layers)
    embedding_type = precision.embedding_dtype(embedding_dtype)
    found = _devices(devices, memory, device)
    sizes = mesh_sizes(config, mesh, found.number, found.platform)
    num_devices = sizes[0] * sizes[1]
    if found.platform == "cpu" and num_devices < found.number:
        # The devices of a CPU share one memory, however many of them are used.
        memory_bytes = found.memory_bytes * found.number / num_devices
        found = found._replace(memory_bytes=memory_bytes)
    product = precision.product_dtype(dtype, found.platform)
    stored = _stored_tensors(whole, checkpoint)
    tensors = in_memory(stored, embedding_type)
    weights = released_weights(config, tensors)
    engine = abstract_engine(
        weights, config, abstract_mesh(sizes), product, precision.cache_dtype(cache_dtype)
    )
    rows, capacity = engine.batch_for(batch), engine.capacity_for(context or config.sequence_len)
    weights_bytes = shard_bytes(engine.params)
    cache_bytes = state_bytes(engine, rows, capacity)
    table_bytes = screening_table_bytes(engine) if found.platform == "cpu" else 0
    usable = found.usable_share * found.memory_bytes
    most = (
        max(usable, MOST_PREALLOCATED * found.memory_bytes) if found.platform == "gpu" else usable
    )

    taken = weights_bytes + table_bytes
    rooms = [int(usable - taken), int(most - taken)]
    answer = _compile(engine, tensors, sizes, rows, capacity, rooms)
    needed = taken + cache_bytes + answer["working"]
    on_disk = jax.tree.leaves(released_weights(config, stored))
    checkpoint_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in on_disk)
    disk_rate = _DISK if disk is None else disk
    decode_bytes = _decode_bytes(engine, rows, capacity, found.platform)
    fits = needed <= usable
    streaming = None
    is_quantized = isinstance(weights.layers[0].experts[0], QuantizedArray)
    if not fits and is_quantized and found.platform == "cpu" and num_devices == rows == 1:
        streaming = _streaming(
            engine, weights, found, decode_bytes, disk, bandwidth, checkpoint, whole
        )
    return Plan(
        num_weights=_num_weights(weights),
        num_devices=num_devices,
        mesh=sizes,
        platform=found.platform,
        dtype=engine.dtype.name,
        cache_dtype=engine.cache_dtype.name,
        batch=rows,
        context=capacity,
        memory_bytes=int(found.memory_bytes),
        usable_share=found.usable_share,
        usable_bytes=int(usable),
        weights_bytes=weights_bytes,
        cache_bytes=cache_bytes,
        working_bytes=answer["working"] + table_bytes,
        fits=fits,
        needed_share=MOST_PREALLOCATED if usable < needed <= most else None,
        largest_batch=answer["largest_batch"],
        largest_context=answer["largest_context"],
        fewest_devices=fewest_devices(weights, engine, found.platform, most),
        checkpoint_bytes=checkpoint_bytes,
        disk=disk_rate,
        load_seconds=checkpoint_bytes / (disk_rate * 1e9),
        decode_bytes=decode_bytes,
        estimates=_estimates(found, num_devices, needed, rows, decode_bytes, bandwidth),
        streaming=streaming,
    )


def _stored_tensors(
    config: ModelConfig, checkpoint: str | os.PathLike[str] | None
) -> list[TensorSpec]:
    """The tensors of one layer and outside of layers, with the types that the files have."""
    expected = one_layer(config)
    if checkpoint is None:
        return expected
    # Of a directory with the configuration alone, or part of a download, the sizes are enough.
    with contextlib.suppress(CheckpointError):
        _, specs = open_tensors(checkpoint, config)
        found = {spec.name: spec for spec in specs}
        return [found[spec.name] for spec in expected]
    return expected


def _num_weights(weights: Params) -> int:
    leaves = jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, QuantizedArray))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _check(config, devices, memory, device, batch, context, bandwidth, disk) -> None:
    if device not in (None, "cpu", *DEVICE_KINDS):
        raise ValueError(
            f"device must be one of {', '.join([*DEVICE_KINDS, 'cpu'])}, found {device!r}"
        )
    if isinstance(devices, int) and devices < 1:
        raise ValueError(f"devices must be a whole number above 0, found {devices}")
    if isinstance(devices, Sequence) and not devices:
        raise ValueError("devices must be at least one of JAX's devices, found none")
    for name, value in (("memory", memory), ("bandwidth", bandwidth), ("disk", disk)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, found {value}")
    if not 1 <= batch <= MAX_ROWS:
        raise ValueError(
            f"batch must be between 1 and {MAX_ROWS}, the most prompts that run side by side, "
            f"found {batch}"
        )
    if context is not None and not 1 <= context <= config.sequence_len:
        raise ValueError(
            f"context must be between 1 and {config.sequence_len}, the model's, found {context}"
        )


def _devices(
    devices: int | Sequence[Any] | None, memory: float | None, device: str | None
) -> _Devices:
    if isinstance(devices, int) or device is not None:
        kind = DEVICE_KINDS.get(device or "")
        platform = kind.platform if kind else device or "gpu"
        present = None
        count = devices if isinstance(devices, int) else len(devices or ()) or None
        count = count or (1 if platform == "cpu" else 8)
        if memory is None and kind is not None:
            memory = kind.memory
    else:
        present = jax.devices() if devices is None else list(devices)
        platform = "gpu" if present[0].platform in GPU_PLATFORMS else present[0].platform
        count = len(present)
    share = preallocated_share() if platform == "gpu" else 1.0
    each = memory and memory * 1e9
    if platform == "cpu":
        each = (each or host_bytes_available() or 0) / count
    elif each is None and present is not None:
        # What it says is the share that JAX takes.
        local = next(d for d in present if d.process_index == jax.process_index())
        each = (local.memory_stats() or {}).get("bytes_limit", 0) / share
    if not each:
        raise ValueError(
            "the memory of a device is not known; give memory (GB), or device, one of "
            f"{', '.join(DEVICE_KINDS)}"
        )
    return _Devices(count, platform, each, share)


def _compile(
    engine: Engine,
    tensors: list[TensorSpec],
    mesh: tuple[int, int],
    batch: int,
    capacity: int,
    rooms: list[int],
) -> dict[str, int]:
    """Asks a child process with as many virtual devices; see `compiled_memory.answer`."""
    request = {
        "config": dataclasses.asdict(engine.config),
        "tensors": tensors,
        "mesh": mesh,
        "dtype": engine.dtype.name,
        "cache_dtype": engine.cache_dtype.name,
        "batch": batch,
        "capacity": capacity,
        "rooms": rooms,
    }
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(_DEVICE_COUNT_FLAG)]
    flags.append(f"{_DEVICE_COUNT_FLAG}={mesh[0] * mesh[1]}")
    # The machine code is thrown away; buffers are assigned before it is made.
    flags.append("--xla_backend_optimization_level=0")
    package = pathlib.Path(__file__).parent.parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        # The form of the products that is every platform's.
        "GROK1_NATIVE": "0",
        "PYTHONPATH": os.pathsep.join(
            [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    result = subprocess.run(
        [sys.executable, "-m", "grok1.planning.compiled_memory", json.dumps(request)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(
            f"compiling the model's programs ended with status {result.returncode}: {said[-1]}"
        )
    return json.loads(result.stdout.splitlines()[-1])


def _streaming(
    engine: Engine,
    weights: Params,
    found: _Devices,
    decode_bytes: int,
    disk: float | None,
    bandwidth: float | None,
    checkpoint: str | os.PathLike[str] | None,
    whole: ModelConfig,
) -> Streaming:
    """Predicts how the model would run as `offload.runner` does it."""
    config = engine.config
    params = without_experts(engine.params)
    lean = Engine(params, config, engine.mesh, engine.dtype, engine.cache_dtype)
    least = resident_bytes(lean) + state_bytes(lean, 1, lean.capacity_for(1))
    budget_bytes = int(SHARE * found.memory_bytes)
    all_bytes = sum(weight.values.size for weight in weights.layers[0].experts)
    num_bytes = all_bytes // config.num_experts
    num_all = config.num_layers * config.num_experts
    num_held = min(max(0, budget_bytes - least) // num_bytes, num_all)
    chosen = config.num_layers * config.num_selected_experts
    read_bytes = int(chosen * num_bytes * (1 - num_held / num_all))
    measured = []
    files = 1e9 * (_DISK if disk is None else disk)
    if checkpoint is not None and disk is None:
        with contextlib.suppress(CheckpointError):
            layers = expert_arrays(*open_tensors(checkpoint, whole), whole)[: config.num_layers]
            files = file_bandwidth([array for layer in layers for array in layer])
            measured.append("files")
    if bandwidth is None:
        memory = memory_bandwidth()
        measured.append("memory")
    else:
        memory = 1e9 * bandwidth
    return Streaming(
        budget_bytes=budget_bytes,
        least_bytes=least,
        num_held=num_held,
        read_bytes=read_bytes,
        files=files / 1e9,
        memory=memory / 1e9,
        measured=tuple(measured),
        seconds=read_bytes / files + decode_bytes / memory,
    )


def _decode_bytes(engine: Engine, batch: int, capacity: int, platform: str) -> int:
    """What a device reads for a step: `Plan.decode_bytes`."""
    config, layers = engine.config, engine.params.layers
    dense = shard_bytes(layers._replace(experts=()))
    if engine.mesh.shape[MODEL_AXIS] > config.num_kv_heads:
        # Held whole, and read for one head.
        whole = shard_bytes((layers.key, layers.value))
        dense -= whole - whole // config.num_kv_heads
    rows = batch // engine.mesh.shape[DATA_AXIS]
    # The expected share of experts that some row chooses.
    chosen = 1 - (1 - config.num_selected_experts / config.num_experts) ** rows
    head = shard_bytes(engine.params.embedding)
    if platform == "cpu":
        head = screening_table_bytes(engine) or head
    cache = engine.abstract_state(batch, capacity).cache
    return int(dense + chosen * shard_bytes(layers.experts) + head + shard_bytes(cache))


def _estimates(
    found: _Devices,
    num_devices: int,
    needed: int,
    batch: int,
    decode_bytes: int,
    bandwidth: float | None,
) -> tuple[Estimate, ...]:
    def estimate(name, memory_bytes, platform, gigabytes_per_second, share):
        usable = share * memory_bytes
        most = MOST_PREALLOCATED * memory_bytes if platform == "gpu" else usable
        return Estimate(
            name,
            memory_bytes / 1e9,
            gigabytes_per_second,
            needed <= usable,
            MOST_PREALLOCATED if usable < needed <= most else None,
            batch * gigabytes_per_second * 1e9 / decode_bytes,
        )

    estimates = []
    if bandwidth is not None:
        each = bandwidth / num_devices if found.platform == "cpu" else bandwidth
        estimates = [
            estimate("yours", found.memory_bytes, found.platform, each, found.usable_share)
        ]
    if found.platform != "cpu":
        share = preallocated_share()
        for kind in DEVICE_KINDS.values():
            usual = share if kind.platform == "gpu" else 1.0
            estimates.append(
                estimate(kind.name, kind.memory * 1e9, kind.platform, kind.bandwidth, usual)
            )
    return tuple(estimates)
