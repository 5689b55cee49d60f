"""A model in words: for `repr`, and for notebooks."""

import math

import jax

from grok1 import reprs
from grok1.engine.engine import Engine
from grok1.nn import precision
from grok1.nn.manifest import TensorSpec
from grok1.offload.runner import stats_of
from grok1.tokenizer import Tokenizer


def particulars(engine: Engine) -> list[str]:
    """Says what sets a model apart from the released one as it is loaded by default."""
    parts = []
    if stats_of(engine) is not None:
        parts.append("experts on disk")
    if engine.cache_dtype != precision.default_cache_dtype(engine.dtype):
        parts.append(f"cache {engine.cache_dtype}")
    parts += _of_router(engine)
    if engine.interventions:
        parts.append(f"with {_interventions(engine)}")
    return parts


def _of_router(engine: Engine) -> list[str]:
    parts = []
    if engine.config.router_softcap is not None:
        parts.append(f"router soft cap {engine.config.router_softcap:g}")
    if engine.config.renormalize_gates:
        parts.append("gates renormalised")
    return parts


def _interventions(engine: Engine) -> str:
    return ", ".join(map(repr, engine.interventions))


def table(engine: Engine, tensors: list[TensorSpec], tokenizer: Tokenizer | None) -> str:
    """Returns a model's sizes as an HTML table, for notebooks.

    Args:
      engine: The model.
      tensors: Those of its checkpoint.
      tokenizer: Its tokenizer, if any.
    """
    leaves = jax.tree.leaves(engine.params)
    num_parameters = sum(math.prod(spec.shape) for spec in tensors)
    total = sum(leaf.nbytes for leaf in leaves)
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    data, model = engine.mesh.devices.shape
    config, device = engine.config, engine.mesh.devices.flat[0]
    devices = f"{data * model} {device.platform.upper()} device{'s' * (data * model > 1)}"
    if device.device_kind != device.platform:
        devices += f" ({device.device_kind})"
    weights = f"{_bytes(total)}, {_bytes(on_one)} on each device"
    stats, of_experts = stats_of(engine), []
    if stats is not None:
        weights += ", without the experts"
        slots = f"on disk, {stats.num_slots} slots in memory for {stats.num_experts} of them"
        of_experts.append(("experts' weights", slots))
    rows = [
        ("parameters", f"{num_parameters:,}"),
        ("weights", weights),
        ("mesh", f"{data}x{model} (data x model), {devices}"),
        ("products with weights", engine.dtype),
        ("key/value cache", engine.cache_dtype),
        ("layers", config.num_layers),
        ("experts", f"{config.num_experts}, {config.num_selected_experts} for a token"),
        *of_experts,
        (
            "attention heads",
            f"{config.num_q_heads} query, {config.num_kv_heads} key/value, {config.key_size} wide",
        ),
        ("residual stream", f"{config.emb_size:,} wide"),
        ("vocabulary", f"{config.vocab_size:,}" + ("" if tokenizer else ", no tokenizer")),
        ("context", f"{config.sequence_len:,} tokens"),
    ]
    # What two models of the same sizes differ in.
    if of_router := _of_router(engine):
        rows.append(("routing", ", ".join(of_router)))
    if engine.interventions:
        rows.append(("interventions", _interventions(engine)))
    return reprs.table("Grok-1 model", rows)


def _bytes(count: int) -> str:
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / scale:.2f} {unit}"
