"""Will it run: memory, loading time and a bound on the speed, on devices one need not have.

Nothing is loaded, and no device but those asked about is started.
"""

import contextlib
import dataclasses
import json
import math
import numbers
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from grok1.checkpoint.directory import is_safetensors, load_config, located, open_tensors
from grok1.checkpoint.loading import expert_arrays
from grok1.config import GROK_1, ModelConfig
from grok1.engine.engine import Engine
from grok1.files import CheckpointError
from grok1.generate.scheduler import MAX_ROWS
from grok1.keywords import as_python, is_whole, shown
from grok1.machine.announcement import hint
from grok1.nn import precision
from grok1.nn.manifest import TensorSpec, in_memory, with_int4_experts
from grok1.nn.sharding import DATA_AXIS, MODEL_AXIS, abstract_mesh, mesh_sizes, most_on_model
from grok1.nn.transformer import Params
from grok1.ops.cuda import shapes_of_screening
from grok1.ops.experts import fetched_parts
from grok1.ops.formats import FORMATS, INT4, is_quantized
from grok1.planning import compiled_memory, stored_figures
from grok1.planning import devices as device_table
from grok1.planning.bandwidth import file_bandwidth, memory_bandwidth
from grok1.planning.budget import SHARE, resident_bytes, without_experts
from grok1.planning.devices import DEVICE_KINDS, Devices
from grok1.planning.memory import (
    abstract_engine,
    fewest_devices,
    head_copies_bytes,
    one_layer,
    released_weights,
    screening_table_bytes,
    screening_table_bytes_on_gpu,
    shard_bytes,
    state_bytes,
)
from grok1.planning.report import Plan, Streaming

_DISK = 2.0  # GB/s
_LEAST_GB, _MOST_GB = 1e-9, 1e9
_MOST_DEVICES = 2048  # XLA takes more devices of a CPU for those of several processes.
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


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
    weights: str | None = None,
) -> Plan:
    """Says how a model would lie on some devices, what fits there and how fast it can be at most.

    Takes some seconds where nobody has planned for this model and mesh before: the programs are
    compiled, in a child process with as many virtual devices.

    Args:
      config: The model; None for that of `checkpoint`, or Grok-1.
      devices: How many, or JAX's devices; None for those present, or, with `device`, for 8 of an
        accelerator and one CPU.
      memory: GB (1e9 bytes) of each device; on a CPU those of the machine. None for those of
        `device`, or for what is there.
      device: A name in `DEVICE_KINDS`, or "cpu"; None for the devices present, or, with a number in
        `devices`, for GPUs.
      mesh: Sizes (data, model), as (1, 8) or "1x8"; None for all devices, as many on `model` as the
        model divides by.
      batch: Prompts side by side, up to 32.
      context: Positions, prompt and generated tokens together; None for the model's context.
      dtype: "float32" or "bfloat16", the type of products with weights; None for float32 on a CPU
        and bfloat16 elsewhere.
      cache_dtype: "float32", "float16" or "int8", the type of cached keys and values; None for
        float32 where `dtype` is, float16 otherwise.
      bandwidth: GB/s of a device's memory; on a CPU those of the machine. None for the names' own,
        or, for a model that a CPU reads from disk, for what is measured here.
      disk: GB/s that the disk delivers. None for 2, those of one NVMe drive in the cloud, or, for a
        model that is read from disk token by token, for what is measured of `checkpoint`.
      checkpoint: A directory with the weights, whose types then count: weights without scales are
        float32 in memory. Part of a download is taken for a release.
      layers: Only so many layers, the first ones; None for all.
      embedding_dtype: "float32", or "bfloat16" for half of the embedding's memory.
      weights: "int4" for the experts that `convert --to int4` makes; "int8" for weights as
        released, whatever `checkpoint` has; None for those of `checkpoint`, or as released.

    Raises:
      CheckpointError: If `checkpoint` is no model's directory.
      ValueError: If a number is out of range, the model does not divide over the mesh, or the
        memory of a device is unknown.
      RuntimeError: If the programs could not be compiled.
    """
    if checkpoint is not None:
        checkpoint = located(checkpoint, weights=False)
    whole = config or (GROK_1 if checkpoint is None else load_config(checkpoint))
    devices, batch, context, layers = map(as_python, (devices, batch, context, layers))
    _check_devices(devices, device)
    _check_numbers(whole, batch, context, memory=memory, bandwidth=bandwidth, disk=disk)
    config = whole.first_layers(layers)
    embedding_type = precision.embedding_dtype(embedding_dtype)
    found = device_table.find(devices, memory, device)
    sizes = mesh_sizes(config, mesh, found.number, found.platform)
    num_devices = sizes[0] * sizes[1]
    if num_devices > _MOST_DEVICES:
        raise ValueError(
            f"mesh {sizes[0]}x{sizes[1]} has {num_devices} devices, and programs can be compiled "
            f"for {_MOST_DEVICES}; give a smaller mesh: copies of the model beside each other need "
            "no plan of their own"
        )
    if found.platform == "cpu" and num_devices < found.number:
        # The devices of a CPU share one memory, however many of them are used.
        memory_bytes = found.memory_bytes * found.number / num_devices
        found = found._replace(memory_bytes=memory_bytes)
    product = precision.product_dtype(dtype, found.platform)
    stored = _stored_tensors(whole, checkpoint, weights)
    tensors = in_memory(stored, embedding_type)
    abstract = released_weights(config, tensors)
    engine = abstract_engine(
        abstract, config, abstract_mesh(sizes), product, precision.cache_dtype(cache_dtype)
    )
    rows, capacity = engine.batch_for(batch), engine.capacity_for(context or config.sequence_len)
    weights_bytes = shard_bytes(engine.params)
    cache_bytes = state_bytes(engine, rows, capacity)
    usable, most = found.usable_bytes, found.most_bytes
    copies_bytes = table_bytes = 0
    if found.platform == "cpu":
        copies_bytes, table_bytes = head_copies_bytes(engine), screening_table_bytes(engine)
    elif found.platform == "gpu":
        free = usable - weights_bytes - cache_bytes
        copies_bytes = screening_table_bytes_on_gpu(engine, free)
        if rows // sizes[0] <= shapes_of_screening.MOST_ROWS:
            table_bytes = copies_bytes
    taken = weights_bytes + copies_bytes
    rooms = [int(usable - taken), int(most - taken)]
    answer = _compile(engine, tensors, sizes, (rows, capacity), rooms, found.platform)
    needed = taken + cache_bytes + answer["working"]
    on_disk = jax.tree.leaves(released_weights(config, stored))
    checkpoint_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in on_disk)
    disk_rate = _DISK if disk is None else disk
    stored_at = None if checkpoint is None or disk is not None else (checkpoint, whole)
    decode_bytes = _decode_bytes(engine, rows, capacity, table_bytes)
    fits = needed <= usable
    streaming = None
    can_stream = is_quantized(abstract.layers[0].experts[0])
    if not fits and can_stream and found.platform == "cpu" and num_devices == rows == 1:
        files, memory_rate, measured = _rates(stored_at, disk_rate, bandwidth, config.num_layers)
        streaming = _streaming(engine, found.memory_bytes, decode_bytes, files, memory_rate)
        streaming = streaming._replace(measured=measured)
    return Plan(
        num_weights=_num_weights(abstract),
        num_devices=num_devices,
        mesh=sizes,
        wider_mesh=None if mesh else _wider_mesh(config, found, sizes),
        platform=found.platform,
        dtype=engine.dtype.name,
        cache_dtype=engine.cache_dtype.name,
        batch=rows,
        context=capacity,
        model_context=config.sequence_len,
        memory_bytes=int(found.memory_bytes),
        usable_share=found.usable_share,
        usable_bytes=int(usable),
        weights_bytes=weights_bytes,
        cache_bytes=cache_bytes,
        working_bytes=answer["working"] + copies_bytes,
        fits=fits,
        needed_share=found.needed_share(needed),
        largest_batch=answer["largest_batch"],
        largest_context=answer["largest_context"],
        fewest_devices=fewest_devices(abstract, engine, found.platform, most),
        checkpoint_bytes=checkpoint_bytes,
        disk=disk_rate,
        load_seconds=checkpoint_bytes / (disk_rate * 1e9),
        decode_bytes=decode_bytes,
        estimates=device_table.estimates(found, num_devices, needed, rows, decode_bytes, bandwidth),
        streaming=streaming,
    )


def _stored_tensors(
    config: ModelConfig, checkpoint: str | os.PathLike[str] | None, weights: str | None
) -> list[TensorSpec]:
    """The tensors of one layer and outside of layers, with the types that the files have."""
    expected = one_layer(config)
    if weights not in (None, *FORMATS):
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, found {shown(weights)}")
    if weights == INT4.name:
        return with_int4_experts(expected)
    if checkpoint is None or weights is not None:
        return expected
    try:
        _, specs = open_tensors(checkpoint, config)
    except CheckpointError as error:
        # Of a directory with the configuration alone, or part of a download, the sizes are enough.
        if is_safetensors(checkpoint) or pathlib.Path(checkpoint, "ckpt-0").exists():
            hint(
                f"{error}; until the files are whole, the plan counts weights as released, in int8"
            )
        return expected
    found = {spec.name: spec for spec in specs}
    return [found[spec.name] for spec in expected]


def _num_weights(weights: Params) -> int:
    leaves = jax.tree.leaves(weights, is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _check_devices(devices: int | Sequence[Any] | None, device: str | None) -> None:
    if device not in (None, "cpu", *DEVICE_KINDS):
        raise ValueError(
            f"device must be one of {', '.join([*DEVICE_KINDS, 'cpu'])}, found {shown(device)}"
        )
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        if not devices:
            raise ValueError("devices must be at least one of JAX's devices, found none")
    elif devices is not None and (isinstance(devices, str) or not is_whole(devices) or devices < 1):
        raise ValueError(f"devices must be a whole number above 0, found {shown(devices)}")


def _check_numbers(
    config: ModelConfig, batch: int, context: int | None, **rates: float | None
) -> None:
    for name, value in rates.items():
        is_number = isinstance(value, numbers.Real) and 0 < value < math.inf
        if value is not None and not is_number:
            raise ValueError(f"{name} must be a number above 0, found {shown(value)}")
        if value is not None and not _LEAST_GB <= value <= _MOST_GB:
            raise ValueError(
                f"{name} must be in GB, from {_LEAST_GB:g} to {_MOST_GB:g}, found {shown(value)}"
            )
    if not is_whole(batch) or not 1 <= batch <= MAX_ROWS:
        raise ValueError(
            f"batch must be between 1 and {MAX_ROWS}, the most prompts that run side by side, "
            f"found {shown(batch)}"
        )
    if context is not None and not (is_whole(context) and 1 <= context <= config.sequence_len):
        raise ValueError(
            f"context must be between 1 and {config.sequence_len}, the model's, found "
            f"{shown(context)}"
        )


def _wider_mesh(
    config: ModelConfig, found: Devices, sizes: tuple[int, int]
) -> tuple[int, int] | None:
    """Returns a mesh that shares the model among more of the devices; None if there is none."""
    model = most_on_model(config, found.number)
    return (found.number // model, model) if model > sizes[1] else None


def _compile(
    engine: Engine,
    tensors: list[TensorSpec],
    mesh: tuple[int, int],
    shape: tuple[int, int],
    rooms: list[int],
    platform: str,
) -> dict[str, int]:
    """Asks a child process with as many virtual devices; see `compiled_memory.answer`."""
    request = {
        "config": dataclasses.asdict(engine.config),
        "tensors": tensors,
        "mesh": mesh,
        "dtype": engine.dtype.name,
        "cache_dtype": engine.cache_dtype.name,
        "batch": shape[0],
        "capacity": shape[1],
        "rooms": rooms,
        "platform": platform,
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
    places = ("batch", "capacity", "rooms")
    model = {key: value for key, value in request.items() if key not in places}
    name = stored_figures.name_of(model, environment)
    known = stored_figures.read(name)
    # Other rooms may ask for shapes that have not been compiled.
    with contextlib.suppress(KeyError):
        return compiled_memory.largest(engine, request, lambda *shape: known[shape])
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
    answer = json.loads(result.stdout.splitlines()[-1])
    new = {(batch, capacity): size for batch, capacity, size in answer.pop("figures")}
    stored_figures.keep(name, known | new)
    return answer


def _rates(
    stored_at: tuple[str | os.PathLike[str], ModelConfig] | None,
    disk: float,
    bandwidth: float | None,
    num_layers: int,
) -> tuple[float, float, tuple[str, ...]]:
    """Returns the bytes a second of files and of memory, and which of the two were measured here.

    Args:
      stored_at: A directory, whose files are measured, and what it holds; None to take `disk`.
      disk: GB/s of files that are not measured.
      bandwidth: GB/s of memory; None to measure it.
      num_layers: Layers whose files count.
    """
    files, measured = 1e9 * disk, []
    if stored_at is not None:
        checkpoint, config = stored_at
        with contextlib.suppress(CheckpointError):
            layers = expert_arrays(open_tensors(checkpoint, config), config)[:num_layers]
            files = file_bandwidth([array for layer in layers for array in layer])
            measured.append("files")
    if bandwidth is not None:
        return files, 1e9 * bandwidth, tuple(measured)
    return files, memory_bandwidth(), (*measured, "memory")


def _streaming(
    engine: Engine, memory_bytes: float, decode_bytes: int, files: float, memory: float
) -> Streaming:
    """Predicts how the model would run as `offload.runner` does it, at rates in bytes a second."""
    config = engine.config
    without = Engine(
        without_experts(engine.params), config, engine.mesh, engine.dtype, engine.cache_dtype
    )
    least = resident_bytes(without) + state_bytes(without, 1, without.capacity_for(1))
    budget_bytes = int(SHARE * memory_bytes)
    num_all = config.num_layers * config.num_experts
    fetched = [weight[i] for weight in engine.params.layers.experts for i in fetched_parts(weight)]
    num_bytes = sum(part.size * part.dtype.itemsize for part in fetched) // num_all
    num_held = min(max(0, budget_bytes - least) // num_bytes, num_all)
    chosen = config.num_layers * config.num_selected_experts
    read_bytes = int(chosen * num_bytes * (1 - num_held / num_all))
    return Streaming(
        budget_bytes=budget_bytes,
        least_bytes=least,
        num_held=num_held,
        read_bytes=read_bytes,
        files=files / 1e9,
        memory=memory / 1e9,
        measured=(),
        seconds=read_bytes / files + decode_bytes / memory,
    )


def _decode_bytes(engine: Engine, batch: int, capacity: int, table_bytes: int) -> int:
    """What a device reads for a step: `Plan.decode_bytes`.

    Args:
      engine: The model.
      batch: Rows.
      capacity: Positions in the cache.
      table_bytes: What is read instead of the output head; 0 for nothing.
    """
    config, layers = engine.config, engine.params.layers
    dense = shard_bytes(layers._replace(experts=()))
    if engine.mesh.shape[MODEL_AXIS] > config.num_kv_heads:
        # Held whole, and read for one head.
        whole = shard_bytes((layers.key, layers.value))
        dense -= whole - whole // config.num_kv_heads
    rows = batch // engine.mesh.shape[DATA_AXIS]
    # The expected share of experts that some row chooses.
    chosen = 1 - (1 - config.num_selected_experts / config.num_experts) ** rows
    head = table_bytes or shard_bytes(engine.params.embedding)
    cache = engine.abstract_state(batch, capacity).cache
    return int(dense + chosen * shard_bytes(layers.experts) + head + shard_bytes(cache))
