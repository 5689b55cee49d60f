"""Before the first request: how long chunks take, and every program that requests can need.

Programs are compiled by being run, on requests of the server's own; nothing of these is kept.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.engine.engine import Engine
from grok1.engine.sampling import SamplingParams
from grok1.engine.shapes import CHUNK_LENGTHS
from grok1.generate.request import Request, Wishes
from grok1.machine.agreement import agree, exchange
from grok1.machine.announcement import hint
from grok1.nn.sharding import DATA_AXIS, put
from grok1.server import sizing
from grok1.server.replica import Plan, Replica, Sizes

_GREEDY = SamplingParams(temperature=0)
_SHARE = 0.6  # of the longest pause; the decode step of the same turn takes the rest


class GivenUpError(Exception):
    """The server was closed before its programs were compiled."""


def prepared(
    engine: Engine,
    sizes: Sizes,
    chunk: int | None,
    max_stall: float,
    goes_on: Callable[[], bool],
) -> tuple[Sizes, Replica]:
    """Returns the sizes with a chunk, and a replica of which every program is compiled.

    Args:
      engine: The model.
      sizes: Of the server, the chunk and the tokens of a turn left open.
      chunk: That of a turn; None to measure it.
      max_stall: The longest pause between two tokens of a request, in seconds.
      goes_on: Asked between two programs, whether the next is wanted.

    Raises:
      GivenUpError: If it is not.
    """
    agree("serve", lambda: {**dataclasses.asdict(sizes), "chunk": chunk}, engine.mesh)
    found, most = chunks_for(engine, sizes, max_stall) if chunk is None else (chunk, chunk)
    found = min(found, sizes.capacity // 2)
    sizes = dataclasses.replace(sizes, chunk=found, turn_tokens=max(found, most))
    on_host = sizing.host_prefix_tokens(engine, sizes)
    replica = Replica(engine, dataclasses.replace(sizes, host_prefix_tokens=on_host))
    on_host = reserve_on_host(engine, replica)
    if sizes.host_prefix_tokens and on_host + found <= sizes.host_prefix_tokens:
        hint(
            f"{on_host:,} tokens of prompts are kept in the host's memory instead of "
            f"{sizes.host_prefix_tokens:,}: it has no more to give"
        )
    sizes = dataclasses.replace(sizes, host_prefix_tokens=on_host)
    compile_all(replica, sizes, goes_on)
    return sizes, replica


def reserve_on_host(engine: Engine, replica: Replica) -> int:
    """Takes the host's memory for what is kept of prompts there, as far as there is any.

    Returns:
      How many tokens it holds; in all processes the same.
    """
    store = replica.store
    if store is None or not store.tiers["host"].num_blocks:
        return 0
    own = repr(store.reserve())
    said = exchange("blocks of prompts", lambda: {"reserved": own}, engine.mesh)
    num_blocks = min(int(words["reserved"]) for words in (said or {0: {"reserved": own}}).values())
    store.limit(num_blocks)
    return num_blocks * store.length


def chunks_for(engine: Engine, sizes: Sizes, max_stall: float) -> tuple[int, int]:
    """Returns the longest chunk that takes no more than its share of a pause, and how many tokens.

    It is measured where it takes longest, behind a text that fills a slot. That many tokens would
    take the share if there were a chunk of theirs.

    Args:
      engine: The model.
      sizes: Of the server; the chunk is not read.
      max_stall: The longest pause between two tokens of a request, in seconds.
    """
    groups = engine.mesh.shape[DATA_AXIS]
    state = engine.new_state(np.zeros((sizes.num_slots, sizes.capacity), np.int32))
    slots = np.full(groups, sizes.num_slots, np.int32)
    slots[0] = 0
    best = most = CHUNK_LENGTHS[0]
    time_of_best = 0.0
    for chunk in CHUNK_LENGTHS:
        if chunk > sizes.capacity // 2:
            break
        num_valid = np.zeros(groups, np.int32)
        num_valid[0] = chunk
        took = []
        for _ in range(3):
            filled = np.zeros(sizes.num_slots, np.int32)
            filled[0] = sizes.capacity - chunk
            length = put(filled, NamedSharding(engine.mesh, P(DATA_AXIS)))
            state = state._replace(cache=state.cache._replace(length=length))
            jax.block_until_ready(state)
            begin = time.perf_counter()
            state = engine.prefill(state, num_valid, chunk, slots)
            jax.block_until_ready(state)
            took.append(time.perf_counter() - begin)
        # The first compiles; of the others the one that nothing else on this machine has held up.
        own = repr(min(took[1:]))
        said = exchange("the time of a chunk", lambda own=own: {"took": own}, engine.mesh)
        longest = max(float(words["took"]) for words in (said or {0: {"took": own}}).values())
        if longest > _SHARE * max_stall:
            share = (_SHARE * max_stall - time_of_best) / (longest - time_of_best)
            most = best + int(max(0.0, share) * (chunk - best))
            break
        best = most = chunk
        time_of_best = longest
    return best, most


def compile_all(replica: Replica, sizes: Sizes, goes_on: Callable[[], bool]) -> None:
    """Runs every program that a server of these sizes can need, as long as they are wanted."""
    for requests in _requests(replica, sizes):
        if not goes_on():
            raise GivenUpError
        plan = Plan(dict(enumerate(requests, start=-len(requests))), [])
        replica.turn(plan)
        while not replica.scheduler.is_idle:
            replica.turn(Plan({}, []))
        replica.turn(Plan({}, list(plan.submitted)))
        for request in requests:
            if request.error is not None:
                raise request.error
    if replica.store is not None:
        replica.store.forget()
        replica.store.start_counting()


def _requests(replica: Replica, sizes: Sizes) -> Iterator[list[Request]]:
    fitting = [n for n in sizes.row_counts if n < sizes.num_slots]
    for num_rows in [*fitting, sizes.num_slots]:
        for sampling, num_top, wishes in (
            (_GREEDY, None, None),
            (SamplingParams(), None, None),
            (SamplingParams(), replica.num_top, None),
            (SamplingParams(), None, Wishes()),
        ):
            one: dict[str, Any] = {"sampling": sampling, "num_top": num_top, "wishes": wishes}
            yield [Request(tokens=[0], max_tokens=1, **one) for _ in range(num_rows)]
    lengths = [length for length in CHUNK_LENGTHS if length <= sizes.chunk]
    for scores in (False, True):
        for length in lengths:
            yield [_prompt(length, scores)]
    for length in lengths:
        # Two ends of prompts, that run side by side.
        yield [_prompt(length * 3 // 4, False) for _ in range(min(2, sizes.num_slots))]
    # Once more, so that what was kept is found; and again, where it has gone to the host.
    yield [_prompt(sizes.chunk, False)]
    if replica.store is not None and replica.store.tiers["host"].num_blocks:
        replica.store.spill()
        yield [_prompt(sizes.chunk, False)]


def _prompt(length: int, scores: bool) -> Request:
    return Request(tokens=[0] * (length + 1), max_tokens=0, scores_prompt=scores)
