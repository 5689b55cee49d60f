"""What a model takes of each device's memory, and what there is, before any of it is taken."""

import gc
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from grok1.config import GROK_1, ModelConfig
from grok1.engine.base import EngineBase
from grok1.engine.engine import Engine
from grok1.engine.head_copies import fits_beside, table_bytes
from grok1.machine import environment
from grok1.machine.device_memory import device_bytes_available
from grok1.machine.host_memory import gigabytes, gigabytes_apart, host_bytes_available
from grok1.nn.manifest import TensorSpec, arrange, manifest
from grok1.nn.sharding import (
    MODEL_AXIS,
    AnyMesh,
    abstract_mesh,
    abstract_stack,
    mesh_sizes,
    most_on_model,
)
from grok1.nn.transformer import NamedParams, Params
from grok1.ops import forms
from grok1.ops.cuda import shapes_of_screening
from grok1.ops.formats import FORMATS

PREALLOCATED = 0.75
"""Share of a GPU's memory that JAX takes, unless told otherwise; the rest it never uses.

https://docs.jax.dev/en/latest/201/gpu-memory.html
"""

MOST_PREALLOCATED = 0.95
"""Share that can be asked for: the driver, the libraries and collectives need some gigabytes."""

RAISE_FRACTION = f"set XLA_PYTHON_CLIENT_MEM_FRACTION={MOST_PREALLOCATED:.2g}".replace("0.", ".")

GPU_PLATFORMS = ("gpu", "cuda", "rocm")
"""JAX's names for GPUs, whose memory it takes in advance."""

WORKING_BYTES = 1_000_000_000
"""What Python, JAX and the working memory of the programs take, at the released model's sizes."""

_MOST_DEVICES = 64  # that are suggested


class DoesNotFitError(ValueError):
    """A model is too large for the memory that is there.

    Attributes:
      problem: What it takes, and what there is.
      remedy: What helps.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


def abstract_weights(tensors: list[TensorSpec], config: ModelConfig) -> Params:
    """Returns the shapes and types of a model's tensors, its layers as a list."""
    named: dict[str, dict[str, Any]] = {}
    for spec in tensors:
        module, _, parameter = spec.name.rpartition("/")
        if spec.scales_shape is None:
            leaf: Any = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        else:
            leaf = FORMATS[spec.dtype].abstract(spec.shape, spec.scales_shape[-2])
        named.setdefault(module, {})[parameter] = leaf
    stored: NamedParams = named
    return arrange(stored, config)


def released_weights(config: ModelConfig, tensors: list[TensorSpec] | None = None) -> Params:
    """Returns the `abstract_weights` of a checkpoint of a configuration.

    Args:
      config: The model.
      tensors: The tensors outside of layers and in the first layer, with their types; None for
        those of a release.
    """
    # Layers are alike, and naming 64 of them takes a second.
    weights = abstract_weights(tensors or one_layer(config), config.first_layers(1))
    return weights._replace(layers=list(weights.layers) * config.num_layers)


def one_layer(config: ModelConfig) -> list[TensorSpec]:
    """Returns the tensors of a release that lie outside of layers and in the first layer."""
    return manifest(config.first_layers(1))


def abstract_engine(
    weights: Params, config: ModelConfig, mesh: AnyMesh, dtype: Any, cache_dtype: Any = None
) -> Engine:
    """Returns the engine of a model of which only the shapes exist.

    Args:
      weights: The tensors as they will lie in memory, layers as a list.
      config: The model.
      mesh: A mesh, which may be abstract.
      dtype: Type of the products with weights.
      cache_dtype: Type of cached keys and values; None for that which goes with `dtype`.
    """
    return Engine(abstract_stack(weights, config, mesh), config, mesh, dtype, cache_dtype)


def shard_bytes(tree: Any) -> int:
    """Returns what the arrays of a tree, abstract or not, take on one device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def state_bytes(engine: EngineBase, batch: int, capacity: int) -> int:
    """Returns what the cache and tokens of a batch take on one device."""
    return shard_bytes(engine.abstract_state(batch, capacity))


def screening_table_bytes(engine: EngineBase) -> int:
    """Returns what the int8 copy of the output head takes on a CPU; 0 where none is made."""
    is_read = forms.has_kernels("cpu") and engine.params.embedding.dtype == jnp.float32
    return _table_bytes(engine) if is_read else 0


def screening_table_bytes_on_gpu(engine: EngineBase, free: float) -> int:
    """Returns what the int8 copy of the output head takes on a GPU; 0 where none is made.

    Args:
      engine: The model, with its weights.
      free: Bytes of a device beside weights and cache. The GPU is taken for one of NVIDIA's.
    """
    is_read = (
        environment.is_on("GROK1_NATIVE")
        and engine.params.embedding.dtype == jnp.float32
        and shapes_of_screening.refusal_of(1, engine.config.emb_size) is None
    )
    needed = _table_bytes(engine)
    return needed if is_read and fits_beside(needed, free) else 0


def _table_bytes(engine: EngineBase) -> int:
    rows = engine.config.vocab_size // engine.mesh.shape[MODEL_AXIS]
    return table_bytes(rows, engine.config.emb_size)


def head_copies_bytes(engine: EngineBase) -> int:
    """Returns what decoding's copies of the output head take, those for log-probabilities too."""
    table = screening_table_bytes(engine)
    # Log-probabilities, and draws, are by way of the copies where one device has the whole head.
    if engine.mesh.shape[MODEL_AXIS] > 1:
        return table
    rows = table // (engine.config.emb_size + 8)
    codes = 32 * -(-engine.config.emb_size // 64)
    return table + rows * (codes + 4)


def working_bytes(engine: Engine) -> int:
    """Returns what a device needs at least beside weights and cache, without compiling anything.

    Programs need what the model's width asks for, and on a CPU there are copies of the head.
    """
    config, width = engine.config, GROK_1.emb_size * GROK_1.ffn_size
    share = min(1.0, config.emb_size * config.ffn_size / width)
    copies = head_copies_bytes(engine) if _is_on_cpu(engine) else 0
    return copies + int(share * WORKING_BYTES) // engine.mesh.shape[MODEL_AXIS]


def least_bytes(engine: Engine) -> int:
    """Returns the weights and the smallest cache on one device."""
    return shard_bytes(engine.params) + _least_state_bytes(engine)


def fewest_devices(weights: Params, engine: Engine, platform: str, bytes_each: float) -> int | None:
    """Returns how many devices hold the weights and the smallest cache; None for too many.

    Args:
      weights: What `abstract_weights` returns.
      engine: The model, on any mesh.
      platform: What the devices are.
      bytes_each: Memory of each that can be used.
    """
    config = engine.config
    for count in range(1, _MOST_DEVICES + 1):
        mesh = abstract_mesh(mesh_sizes(config, None, count, platform))
        candidate = abstract_engine(weights, config, mesh, engine.dtype, engine.cache_dtype)
        if least_bytes(candidate) <= bytes_each:
            return count
    return None


def require_memory(engine: Engine) -> None:
    """Checks that weights, smallest cache and working memory can fit, before weights are read.

    Args:
      engine: The model, of which only the shapes exist, on a mesh of real devices.

    Raises:
      DoesNotFitError: If they cannot; the message says what is needed, what there is, and what
        helps.
    """
    mesh = engine.mesh
    local = mesh.local_devices
    on_cpu = _is_on_cpu(engine)
    working = working_bytes(engine)
    needed = least_bytes(engine) + working
    # Devices of a CPU share one memory.
    needed_here = needed * len(local) if on_cpu else needed
    available = _bytes_available(local)
    if available is not None and available < needed_here:
        gc.collect()  # a model that nobody can reach any more may still hold memory
        available = _bytes_available(local)
    if available is None or needed_here <= available:
        return
    state = _least_state_bytes(engine)
    parts = (
        f"{gigabytes(needed - state - working)} of weights, {gigabytes(state)} of cache and "
        f"{gigabytes(working)} of working memory"
    )
    together, there_are = gigabytes_apart(needed_here, available)
    fewer_copies = _fewer_copies(engine, needed, available)
    if on_cpu:
        shares = ""
        if len(local) > 1:
            shares = f" on each of {len(local)} CPU devices"
        raise DoesNotFitError(
            f"the model does not fit: it takes {parts}{shares}, {together} together, and "
            f"{there_are} of memory are available",
            f"{fewer_copies}use a machine with more memory, or more machines. `python -m grok1 "
            "plan` says what fits",
        )
    helps = "use more devices or ones with more memory, or free what is in use"
    if local[0].platform in GPU_PLATFORMS:
        helps = (
            f"JAX takes {preallocated_share():.0%} of a GPU's memory: {RAISE_FRACTION} if that "
            f"is enough; otherwise {helps}"
        )
    raise DoesNotFitError(
        f"the model does not fit: it takes {parts}, {together} together, on each of {mesh.size} "
        f"devices, and {there_are} are available on {local[0].device_kind}",
        f"{fewer_copies}{helps}. `python -m grok1 plan` says what fits",
    )


def _fewer_copies(engine: Engine, needed: int, available: int) -> str:
    """Returns what helps where the devices hold several copies of a model, of which one would fit.

    Args:
      engine: The model, on a mesh.
      needed: Bytes that each device would hold.
      available: Bytes that it can, or on a CPU all of them together.
    """
    mesh = engine.mesh
    held, most = mesh.shape[MODEL_AXIS], most_on_model(engine.config, mesh.size)
    one_copy = needed * held if _is_on_cpu(engine) else needed * held / most
    if mesh.size == held or one_copy > available:
        return ""
    return (
        f"give mesh='1x{most}', which shares one copy of the model among {most} of these devices, "
        "or "
    )


def preallocated_share() -> float:
    """Returns the share of a GPU's memory that JAX will take in this environment.

    Raises:
      ValueError: If the environment asks for what is no share.
    """
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        text = os.environ.get(name)
        if not text:
            continue
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError(
                f"{name} must be a share of the memory above 0 and at most 1, as .95, found "
                f"{text!r}; change it in the environment"
            )
        return share
    return PREALLOCATED


def _is_on_cpu(engine: Engine) -> bool:
    return engine.mesh.local_devices[0].platform == "cpu"


def _bytes_available(devices: list[Any]) -> int | None:
    if devices[0].platform == "cpu":
        return host_bytes_available()
    known = [device_bytes_available(device) for device in devices]
    return min((num_bytes for num_bytes in known if num_bytes is not None), default=None)


def _least_state_bytes(engine: Engine) -> int:
    return state_bytes(engine, engine.batch_for(1), engine.capacity_for(1))
