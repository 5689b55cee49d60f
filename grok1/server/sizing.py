"""How many slots a server has, and how long they are, where its caller does not say."""

import collections
import math
import socket
from collections.abc import Mapping
from typing import Any

import jax

from grok1.checkpoint.pinned import has_pinned_memory
from grok1.engine.engine import Engine
from grok1.engine.shapes import CHUNK_LENGTHS
from grok1.machine.agreement import exchange
from grok1.machine.device_memory import device_bytes_available
from grok1.machine.host_memory import gigabytes_apart, host_bytes_available
from grok1.nn.sharding import DATA_AXIS
from grok1.server.replica import Sizes

MAX_STALL = 0.5  # seconds, where nobody says

_MOST_SLOTS = 16  # of each group of devices
_SHARE = 0.5  # of the memory that is free, for slots and kept prompts
_HOST_SHARE = 0.25  # of the host's: XLA's allocator may take twice what it is asked for
_MOST_HOST_BYTES = 48_000_000_000  # of 64 GiB of such memory a process, which transfers take of too
_MOST_SHARE = 0.8  # of the host's, whatever is asked for
_TIMES_ON_DEVICES = 4  # as many tokens as there, at most, where nothing is asked for


def check(options: Mapping[str, Any], context: int) -> None:
    """Checks the arguments of `Server`, which takes no model.

    Args:
      options: By their names; those that are not there are not checked.
      context: That of the model, in tokens.

    Raises:
      ValueError: If one is out of range, or has no effect beside another.
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
    if chunk is not None and options.get("max_stall", MAX_STALL) != MAX_STALL:
        raise ValueError(
            f"found chunk={chunk} and max_stall={options['max_stall']}, but pauses are as long as "
            "the chunks make them; give one or the other"
        )
    if capacity is not None and not 2 <= capacity <= context:
        raise ValueError(
            f"capacity must be from 2 to the context of {context} tokens, found {capacity}"
        )
    kept, on_host = options.get("prefix_tokens"), options.get("host_prefix_tokens")
    if kept is not None and kept < 0:
        raise ValueError(f"prefix_tokens must be 0 (keep none) or more, found {kept}")
    if on_host is not None and on_host < 0:
        raise ValueError(f"host_prefix_tokens must be 0 (keep none) or more, found {on_host}")
    if on_host and kept == 0:
        raise ValueError(
            f"host_prefix_tokens is {on_host} and prefix_tokens 0, but the host's memory takes "
            "what the devices have kept; give some of both"
        )


def sizes_for(
    engine: Engine,
    max_slots: int | None,
    capacity: int | None,
    prefix_tokens: tuple[int | None, int | None],
    row_counts: tuple[int, ...],
) -> Sizes:
    """Returns the sizes of a server; the chunk is left open, and what is None of the host's memory.

    Args:
      engine: The model.
      max_slots: Most requests that run side by side; None for as many as half of the free memory
        holds, at most 16 for each group of devices.
      capacity: Most tokens of a request, which are rounded up; None for the context.
      prefix_tokens: Tokens of prompts to keep on the devices, None for half as many as the slots
        hold; and in the host's memory, None for as many as `host_prefix_tokens` finds.
      row_counts: Numbers of rows that decode steps run.

    Raises:
      ValueError: If the devices have no memory of the host's that they copy to, or not enough of
        their own for what is asked for.
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
    kept, on_host = prefix_tokens
    kept = usual if kept is None else kept
    if on_host and not has_pinned_memory(engine.mesh.local_devices[0]):
        raise ValueError(
            f"host_prefix_tokens is {on_host}, but these devices have no memory of the host's that "
            "they copy to by themselves; leave it out"
        )
    _check_memory(engine, num_slots, capacity, kept)
    rows = tuple(sorted({n for n in row_counts if 0 < n < num_slots and n % groups == 0}))
    return Sizes(num_slots, capacity, rows, 0, kept, host_prefix_tokens=on_host)


def host_prefix_tokens(engine: Engine, sizes: Sizes) -> int:
    """Returns how many tokens of prompts are kept in the host's memory; in all processes the same.

    Args:
      engine: The model.
      sizes: Of the server; None in them is for a share of the memory that is free, and on CPUs 0.
    """
    asked, mesh = sizes.host_prefix_tokens, engine.mesh
    if asked == 0 or not sizes.prefix_tokens:
        return 0
    device = mesh.local_devices[0]
    is_apart = device.platform != "cpu" and has_pinned_memory(device)
    if asked is None and not (is_apart and engine.runs_ahead):
        return 0
    # Every group of devices has all blocks.
    of_position = state_bytes(engine, mesh.shape[DATA_AXIS], sizes.capacity) // sizes.capacity
    own_bytes = of_position * len(mesh.local_devices) // mesh.devices.size
    free = host_bytes_available()
    own = {"free": repr(free), "bytes": repr(own_bytes), "machine": socket.gethostname()}
    said = exchange("memory for prompts", lambda: own, mesh) or {0: own}
    machines = collections.Counter(words["machine"] for words in said.values())
    room = math.inf
    for words in said.values():
        if words["free"] == "None":
            room = 0 if asked is None else room
            continue
        # What is free on a machine is for all of its processes.
        each = int(words["free"]) / machines[words["machine"]]
        most = min(_HOST_SHARE * each, _MOST_HOST_BYTES) if asked is None else _MOST_SHARE * each
        room = min(room, most // int(words["bytes"]))
    wanted = _TIMES_ON_DEVICES * sizes.prefix_tokens if asked is None else asked
    return int(min(wanted, room))


def state_bytes(engine: Engine, num_slots: int, capacity: int) -> int:
    """Bytes that the keys and values of so many slots take, over all devices."""
    leaves = jax.tree.leaves(engine.abstract_state(num_slots, capacity).cache)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _check_memory(engine: Engine, num_slots: int, capacity: int, kept: int) -> None:
    """Refuses what XLA would fail to take, once the model is loaded."""
    of_slots = state_bytes(engine, num_slots, capacity)
    of_position = state_bytes(engine, engine.mesh.shape[DATA_AXIS], capacity) / capacity
    needed = (of_slots + kept * of_position) / engine.mesh.devices.size
    free = _bytes_free(engine)
    if needed > free:
        in_words, left = gigabytes_apart(needed, free)
        raise ValueError(
            f"{num_slots} slots of {capacity} tokens and {kept} tokens of prompts take {in_words} "
            f"on each device, which has {left} left; give a smaller max_slots, capacity or "
            "prefix_tokens"
        )


def _fits(engine: Engine, num_slots: int, capacity: int) -> bool:
    needed = 1.5 * state_bytes(engine, num_slots, capacity) / engine.mesh.devices.size
    return needed <= _SHARE * _bytes_free(engine)


def _bytes_free(engine: Engine) -> float:
    """What the fullest of this process's devices has left; infinity where that is not known."""
    devices = engine.mesh.local_devices
    known = [device_bytes_available(device) for device in devices if device.platform != "cpu"]
    free = [num_bytes for num_bytes in known if num_bytes is not None]
    if free:
        return min(free)
    host = host_bytes_available()
    return math.inf if host is None else host / len(devices)
