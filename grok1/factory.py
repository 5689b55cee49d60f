"""The ways a model comes to be, and back to disk."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import jax
from jax.sharding import Mesh

from grok1 import keywords
from grok1.checkpoint.directory import load_config, located, open_tensors, tokenizer_path
from grok1.checkpoint.fingerprint import fingerprint
from grok1.checkpoint.loading import load_params
from grok1.checkpoint.released import save_checkpoint
from grok1.checkpoint.stacking import random_params, unstack
from grok1.config import ModelConfig
from grok1.engine.compilation import source_hash
from grok1.engine.engine import Engine
from grok1.generate.options import check_seed
from grok1.keywords import as_python
from grok1.machine.agreement import agree, exchange
from grok1.machine.announcement import hint
from grok1.machine.jax_settings import own_settings
from grok1.machine.processes import together
from grok1.model import Model
from grok1.nn import precision
from grok1.nn.manifest import manifest
from grok1.nn.sharding import make_mesh
from grok1.offload.runner import Offload, is_offloaded, load_offloaded
from grok1.ops.cpu import bindings
from grok1.ops.cuda import presence
from grok1.ops.formats import INT4
from grok1.planning.memory import abstract_engine, abstract_weights
from grok1.tokenizer import Tokenizer
from grok1.version import __version__

MeshLike = Mesh | Sequence[int] | str | None
"""A mesh with axes (data, model), its two sizes as (1, 8) or "1x8", or None for every device."""


@keywords.suggesting()
@together()
@own_settings()
def load(
    path: str | pathlib.Path,
    *,
    mesh: MeshLike = None,
    dtype: Any = None,
    cache_dtype: Any = None,
    progress: bool = True,
    tokenizer: str | pathlib.Path | Tokenizer | None = None,
    layers: int | None = None,
    embedding_dtype: Any = "float32",
    offload: Offload = "auto",
    memory: float | str | None = None,
    router_softcap: float | None = None,
    renormalize_gates: bool | None = None,
) -> Model:
    """Loads a checkpoint in Grok-1's on-disk format or our safetensors, sharded over devices.

    Args:
      path: A directory with `ckpt-0/`, or with the files that `python -m grok1 convert` makes with
        `--to safetensors` or `--to int4`, and, where they differ from Grok-1's, `config.json` and
        `tokenizer.model`; or "toy", the toy that comes with the library.
      mesh: Sizes (data, model), as (1, 8) or "1x8", a `jax.sharding.Mesh` with these axes, or None
        for every device.
      dtype: "float32" or "bfloat16", the type of products with weights; None for float32 on a CPU
        and bfloat16 elsewhere.
      cache_dtype: "float32", "float16" or "int8", the type of cached keys and values; None for
        float32 where `dtype` is, float16 otherwise. int8 has a scale for each key and value.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.
      tokenizer: A tokenizer or its file, instead of `tokenizer.model` in `path`.
      layers: Load only this many layers, the first ones, to study them where the whole model does
        not fit; the embedding and the final norm are as they are. None for all.
      embedding_dtype: "float32", as it is in the files, or "bfloat16", half the memory: 1.6 GB
        less for Grok-1, whose logits then carry its rounding.
      offload: Where experts' weights are. "none": on the devices, with all else. "disk": in their
        files, read when the router chooses them; those used most fill the memory that is left.
        "host": as with "disk", and all that was read once stays in the host's memory. "auto":
        "disk" for a model that does not fit on its one device, or on a CPU in `memory`, otherwise
        "none".
      memory: GB (1e9 bytes), a number or as "16GB", that this process may take of the host's
        memory when experts are read from disk; None for most of what is available.
      router_softcap: Caps the router's logits to (-router_softcap, router_softcap), as some ports
        of Grok-1 do; None for what the configuration says, which as released is no cap.
      renormalize_gates: Whether the weights of a token's experts are divided by their sum, as some
        ports do; None for what the configuration says, as released not.

    Raises:
      CheckpointError: If a file is missing, damaged, foreign or of the wrong shape; nothing in a
        file is ever executed.
      TypeError: If the path or the tokenizer is of another type.
      ValueError: If the configuration is impossible, a type is none of those, the model does not
        divide over the mesh, cannot fit in its memory or has fewer layers, or the tokenizer is
        another model's; or if experts cannot be offloaded: on several devices, or with too small a
        budget.
      OtherProcessError: If this is one of several processes and another one failed, or loads
        something else; the message says what.
    """
    path = located(path)
    whole = load_config(path)
    departures = {"router_softcap": router_softcap, "renormalize_gates": renormalize_gates}
    given = {name: value for name, value in departures.items() if value is not None}
    config = dataclasses.replace(whole.first_layers(layers), **given)
    cache_dtype = precision.cache_dtype(cache_dtype)
    embedding_type = precision.embedding_dtype(embedding_dtype)
    if not isinstance(tokenizer, Tokenizer):
        if not isinstance(tokenizer, (str, os.PathLike, NoneType)):
            raise TypeError(
                "tokenizer must be a Tokenizer, or the path of its file, found "
                f"{type(tokenizer).__name__}"
            )
        file = tokenizer_path(path, config) if tokenizer is None else tokenizer
        tokenizer = None if file is None else Tokenizer.load(file)
    if tokenizer is not None:
        tokenizer.check_vocabulary(config.vocab_size)
    # What needs devices comes after what needs none: to start them takes a second or more.
    device_mesh = make_mesh(config, mesh)
    _agree_on_kernels()
    dtype = precision.product_dtype(dtype, device_mesh.devices.flat[0].platform)
    stored = open_tensors(path, whole).only(config).in_memory(embedding_type)
    tensors = stored.specs
    weights = abstract_weights(tensors, config)
    whole_engine = abstract_engine(weights, config, device_mesh, dtype, cache_dtype)
    streams = is_offloaded(whole_engine, offload, memory)
    _agree_on_model(
        whole_engine,
        "load",
        lambda: {
            "the checkpoint": fingerprint(path),
            "embedding_dtype": embedding_type.name,
            "the tokenizer": None if tokenizer is None else tokenizer.model_proto,
            "offload": streams,
        },
    )
    if not streams:
        params = load_params(stored, config, device_mesh, progress)
        return Model(params, config, device_mesh, dtype, tensors, tokenizer, cache_dtype)
    engine = load_offloaded(stored, whole_engine, offload == "host", memory, progress)
    return Model(engine.params, config, device_mesh, dtype, tensors, tokenizer, engine=engine)


@keywords.suggesting()
@together()
@own_settings()
def random_model(
    config: ModelConfig,
    *,
    mesh: MeshLike = None,
    dtype: Any = None,
    cache_dtype: Any = None,
    seed: int = 0,
) -> Model:
    """Makes a model with random int8 weights, without files or tokenizer.

    Args:
      config: The architecture.
      mesh: Sizes (data, model), as (1, 8) or "1x8", a `jax.sharding.Mesh` with these axes, or None
        for every device.
      dtype: "float32" or "bfloat16", the type of products with weights; None for float32 on a CPU
        and bfloat16 elsewhere.
      cache_dtype: "float32", "float16" or "int8", the type of cached keys and values; None for
        float32 where `dtype` is, float16 otherwise.
      seed: Seed of the weights, from 0 to 2**32 - 1; they are the same on every mesh.

    Raises:
      TypeError: If the architecture is no `ModelConfig`.
      ValueError: If a type is none of those, the seed is out of range, or the model does not divide
        over the mesh.
      OtherProcessError: If this is one of several processes and another one failed, or makes
        something else.
    """
    _agree_on_kernels()
    if not isinstance(config, ModelConfig):
        raise TypeError(
            f"config must be a ModelConfig, such as grok1.TOY, found {type(config).__name__}"
        )
    seed = as_python(seed)
    check_seed(seed)
    device_mesh = make_mesh(config, mesh)
    dtype = precision.product_dtype(dtype, device_mesh.devices.flat[0].platform)
    cache_dtype = precision.cache_dtype(cache_dtype)
    tensors = manifest(config)
    engine = abstract_engine(
        abstract_weights(tensors, config), config, device_mesh, dtype, cache_dtype
    )
    _agree_on_model(engine, "random_model", lambda: {"seed": seed})
    params = random_params(config, device_mesh, seed)
    return Model(params, config, device_mesh, dtype, tensors, cache_dtype=cache_dtype)


def _agree_on_model(engine: Engine, what: str, items: Callable[[], dict[str, Any]]) -> None:
    """Compares a model that is to be made, and `items`, with those of the other processes."""
    devices = engine.mesh.devices.flatten().tolist()
    is_of_one = {device.process_index for device in devices} == {jax.process_index()}

    def described() -> dict[str, Any]:
        # Other versions make other calls, and wait for each other, or round otherwise.
        versions = {"grok1": f"{__version__} {(source_hash() or '')[:12]}", "jax": jax.__version__}
        if is_of_one:
            return {**versions, "mesh": "of the process's own devices"}
        return {
            **versions,
            "mesh": list(engine.mesh.devices.shape),
            "devices": [device.id for device in devices],
            "dtype": engine.dtype.name,
            "cache_dtype": engine.cache_dtype.name,
            **items(),
            **dataclasses.asdict(engine.config),
        }

    agree(what, described)


def _agree_on_kernels() -> None:
    """Lets all processes run through XLA where one of them has no native kernels."""
    have = exchange(
        "load",
        lambda: {
            "kernels": str(bindings.is_available()),
            "cuda": " ".join(sorted(presence.kernels())),
        },
    )
    if len({words["cuda"] for words in have.values()}) > 1:
        presence.turn_off()
        fewest = min(have, key=lambda rank: len(have[rank]["cuda"]))
        hint(
            "running through XLA, several times slower than the CUDA kernels: process "
            f"{fewest} has fewer of them than others"
        )
    without = [rank for rank, words in have.items() if words["kernels"] == "False"]
    if without and len(without) < len(have):
        # Their sums are rounded otherwise, and a near tie in the router would part the processes.
        bindings.turn_off()
        if jax.process_index() == min(set(have) - set(without)):
            print(
                "grok1: running through XLA, several times slower than the native kernels: "
                f"process {without[0]} has none",
                file=sys.stderr,
            )


@own_settings()
def save(model: Model, path: str | pathlib.Path) -> None:
    """Writes a model in Grok-1's on-disk format, byte for byte as the released files are framed.

    Args:
      model: What to write.
      path: The directory; gets `ckpt-0/`, `config.json` and, if the model has one,
        `tokenizer.model`.

    Raises:
      CheckpointError: If the directory already holds a checkpoint, in this format or another, or
        a file of these names, or cannot be written; nothing is replaced or left half-written.
      ValueError: If the model lies on the devices of several processes, its experts on disk, or
        they are 4-bit, or something intervenes in it.
    """
    if model.offload_stats is not None:
        raise ValueError(
            "save needs the whole model in memory, and this one's experts are read from its files; "
            "copy those, or load it with offload='none'"
        )
    if model.engine.interventions:
        acting = ", ".join(map(repr, model.engine.interventions))
        raise ValueError(
            f"save writes weights, and what intervenes in this model is none: {acting}; save the "
            "model that it was made of"
        )
    if any(spec.dtype == INT4.name for spec in model.tensors):
        raise ValueError(
            "save writes Grok-1's own format, which has no 4-bit experts; copy the model's files"
        )
    if not model.params.embedding.is_fully_addressable:
        raise ValueError(
            f"save needs the whole model in one process, found it on {jax.process_count()}; load "
            "and save it in a process of its own, on a CPU if need be"
        )
    beside = {"config.json": model.config.to_json().encode()}
    if model.tokenizer is not None:
        beside["tokenizer.model"] = model.tokenizer.model_proto
    tensors = unstack(model.params, model.config, model.tensors)
    save_checkpoint(pathlib.Path(os.path.expanduser(path), "ckpt-0"), tensors, beside)
