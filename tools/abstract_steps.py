"""Steps of a model of which only the shapes exist, for devices that are described, not here."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.nn.manifest import with_int4_experts
from grok1.ops.screening import ScreeningTable
from grok1.planning.memory import abstract_engine, one_layer, released_weights

_STEPS = "decode, greedy, or the length of a prompt's chunk"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what a step is, as `lowered` takes it."""
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", nargs="+", type=_step, default=["decode"], help=_STEPS)
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--cache-dtype", default="float16")
    parser.add_argument("--experts", default="int8", choices=("int8", "int4"))


def _step(text: str) -> str:
    if text not in ("decode", "greedy") and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be {_STEPS}, not {text!r}")
    return text


def lowered(config: ModelConfig, mesh: Mesh, step: str, rows: int, capacity: int, **types) -> Any:
    """Lowers a step of a model of which only the shapes exist.

    Args:
      config: The model.
      mesh: Of devices that are described.
      step: "decode", "greedy" for a decode step by way of the output head's copy, or the length of
        a chunk of a prompt.
      rows: Of the batch.
      capacity: Of the cache.
      **types: `dtype`, by default bfloat16, `cache_dtype`, and "int4" for the `experts`.

    Returns:
      The lowered program, and the engine.
    """
    dtype = types.pop("dtype", jnp.bfloat16)
    tensors = one_layer(config)
    if types.pop("experts", "int8") == "int4":
        tensors = with_int4_experts(tensors)
    engine = abstract_engine(released_weights(config, tensors), config, mesh, dtype, **types)
    state = engine.abstract_state(rows, capacity)
    if step == "decode":
        arguments = engine.abstract_decode_arguments(rows)
        program = engine.decode_program(None, None)
    elif step == "greedy":
        of_rows, ends, allowed, _ = engine.abstract_decode_arguments(rows)
        arguments = (of_rows, ends, _abstract_table(engine), allowed)
        program = engine.greedy_program()
    else:
        arguments = (engine.abstract_rows(rows),)
        program = engine.prefill_program(int(step))
    return program.lower(engine.weights, state, *arguments), engine


def _abstract_table(engine: Engine) -> ScreeningTable:
    rows, width = engine.params.embedding.shape
    shapes = ((rows, width), jnp.int8), ((rows,), jnp.float32), ((rows,), jnp.float32)
    specs = engine.head_copies.table_specs
    return ScreeningTable(
        *(
            jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(engine.mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        )
    )
