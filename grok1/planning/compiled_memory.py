"""Working memory as XLA reports it: a child process that compiles a model's programs for real.

The number of virtual CPU devices is fixed before JAX starts, hence the process of its own. It reads
a request as JSON from its argument and prints the answer as JSON. Nothing is allocated: arguments
are abstract.
"""

import concurrent.futures
import json
import sys
from collections.abc import Callable
from typing import Any

from grok1.config import ModelConfig
from grok1.engine.engine import Engine
from grok1.generate.prefill import largest_call
from grok1.generate.scheduler import MAX_ROWS
from grok1.nn.manifest import TensorSpec
from grok1.nn.sharding import DATA_AXIS, make_mesh
from grok1.planning.memory import abstract_engine, released_weights, state_bytes
from grok1.planning.stored_figures import Figures


def working_bytes(engine: Engine, batch: int, capacity: int, platform: str = "cpu") -> int:
    """Returns what the programs of `generate` take on one device beside weights and state.

    Args:
      engine: The model, of which only the shapes exist, on a mesh of real devices.
      batch: Rows.
      capacity: Positions in the cache.
      platform: JAX's name of that whose chunks are run.
    """
    state = engine.abstract_state(batch, capacity)
    decode = engine.decode_program(None, None)
    rows, chunk = largest_call(engine, batch, capacity, platform)
    prefill = engine.prefill_program(chunk)
    lowered = (
        decode.lower(engine.weights, state, *engine.abstract_decode_arguments(batch)),
        prefill.lower(engine.weights, state, engine.abstract_rows(rows)),
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda program: program.compile(), lowered)
        analyses = [program.memory_analysis() for program in compiled]
    return max(
        # The state's memory goes to the result, so that only what is more counts.
        found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        for found in analyses
    )


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what a request asks for.

    Args:
      request: "config", the model's fields; "tensors", those of one layer and outside of layers, as
        they lie in memory; "mesh", sizes; "platform"; "dtype" and "cache_dtype"; "batch" and
        "capacity"; "rooms", the bytes on a device that weights leave, usually and at most.

    Returns:
      "working", bytes on a device for that batch and capacity; "largest_batch" of that capacity and
      "largest_context" at that batch that fit, 0 for none, in the usual room if the request does,
      otherwise in the most. "figures", everything that was compiled: [batch, capacity, bytes].
    """
    config = ModelConfig(**request["config"])
    mesh = make_mesh(config, request["mesh"])
    tensors = [
        TensorSpec(name, tuple(shape), dtype, scales_shape and tuple(scales_shape))
        for name, shape, dtype, scales_shape in request["tensors"]
    ]
    weights = released_weights(config, tensors)
    engine = abstract_engine(weights, config, mesh, request["dtype"], request["cache_dtype"])
    figures: Figures = {}

    def working(batch: int, capacity: int) -> int:
        if (batch, capacity) not in figures:
            found = working_bytes(engine, batch, capacity, platform=request["platform"])
            figures[batch, capacity] = found
        return figures[batch, capacity]

    found = largest(engine, request, working)
    return {**found, "figures": [[*shape, size] for shape, size in figures.items()]}


def largest(
    engine: Engine, request: dict[str, Any], working: Callable[[int, int], int]
) -> dict[str, int]:
    """Returns what `answer` does, but for the figures.

    Args:
      engine: The model, of which only the shapes exist.
      request: As for `answer`.
      working: Bytes on a device for a batch and a capacity.
    """
    batch, capacity = request["batch"], request["capacity"]

    def fits(batch: int, capacity: int, room: int) -> bool:
        state = state_bytes(engine, batch, capacity)
        return state <= room and state + working(batch, capacity) <= room

    usual, most = request["rooms"]
    room = usual if fits(batch, capacity, usual) else most
    batches = [engine.mesh.shape[DATA_AXIS]]
    while batches[-1] < MAX_ROWS:
        batches.append(2 * batches[-1])
    capacities = sorted(
        {engine.capacity_for(256 << i) for i in range(engine.config.sequence_len.bit_length())}
    )
    return {
        "working": working(batch, capacity),
        "largest_batch": next((n for n in reversed(batches) if fits(n, capacity, room)), 0),
        "largest_context": next((n for n in reversed(capacities) if fits(batch, n, room)), 0),
    }


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
