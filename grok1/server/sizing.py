"""How many slots a server has, and how long they are, where its caller does not say."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from grok1.engine.engine import Engine
from grok1.engine.shapes import CHUNK_LENGTHS
from grok1.machine.host_memory import host_bytes_available
from grok1.nn.sharding import DATA_AXIS
from grok1.server.replica import Sizes

_MOST_SLOTS = 16  # of each group of devices
_SHARE = 0.5  # of the memory that is free, for slots and kept prompts


def check(options: Mapping[str, Any], context: int) -> None:
    """Checks the arguments of `Server`, which takes no model.

    Args:
      options: By their names; those that are not there are not checked.
      context: That of the model, in tokens.

    Raises:
      ValueError: If one is out of range.
    """
    for name in ("max_stall", "step_timeout"):
        if not options.get(name, 1.0) > 0:
            raise ValueError(f"{name} must be above 0 seconds, found {options[name]}")
    for name in ("max_queue", "max_slots"):
        value = options.get(name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, found {value}")
    chunk, capacity = options.get("chunk"), options.get("capacity")
    if chunk is not None and chunk not in CHUNK_LENGTHS:
        raise ValueError(f"chunk must be one of 16, 64, 256 and 1024 tokens, found {chunk}")
    if capacity is not None and not 2 <= capacity <= context:
        raise ValueError(
            f"capacity must be from 2 to the context of {context} tokens, found {capacity}"
        )
    kept = options.get("prefix_tokens")
    if kept is not None and kept < 0:
        raise ValueError(f"prefix_tokens must be 0 (keep none) or more, found {kept}")


def sizes_for(
    engine: Engine,
    max_slots: int | None,
    capacity: int | None,
    prefix_tokens: int | None,
    row_counts: tuple[int, ...],
) -> Sizes:
    """Returns the sizes of a server, the chunk left open.

    Args:
      engine: The model.
      max_slots: Most requests that run side by side; None for as many as half of the free memory
        holds, at most 16 for each group of devices.
      capacity: Most tokens of a request; None for the context.
      prefix_tokens: Tokens of prompts to keep; None for half as many as the slots hold.
      row_counts: Numbers of rows that decode steps run.
    """
    context, groups = engine.config.sequence_len, engine.mesh.shape[DATA_AXIS]
    capacity = engine.capacity_for(context if capacity is None else capacity)
    num_slots = groups
    if max_slots is not None:
        num_slots *= -(-max_slots // groups)
    else:
        while num_slots < _MOST_SLOTS * groups and _fits(engine, 2 * num_slots, capacity):
            num_slots *= 2
    # Experts that are read from disk have been given what memory there is.
    usual = num_slots * capacity // 2 if engine.runs_ahead else 0
    kept = usual if prefix_tokens is None else prefix_tokens
    rows = tuple(sorted({n for n in row_counts if 0 < n < num_slots and n % groups == 0}))
    return Sizes(num_slots, capacity, rows, 0, kept)


def state_bytes(engine: Engine, num_slots: int, capacity: int) -> int:
    """Bytes that the keys and values of so many slots take, over all devices."""
    leaves = jax.tree.leaves(engine.abstract_state(num_slots, capacity).cache)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _fits(engine: Engine, num_slots: int, capacity: int) -> bool:
    devices = engine.mesh.local_devices
    needed = 1.5 * state_bytes(engine, num_slots, capacity) / engine.mesh.devices.size
    free = []
    for device in devices:
        stats = device.memory_stats() or {} if device.platform != "cpu" else {}
        if "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if not free:
        host = host_bytes_available()
        free = [math.inf if host is None else host / len(devices)]
    return needed <= _SHARE * min(free)
