"""The requests of a server in one process: a scheduler, turned by plans.

A plan says what is submitted and what is cancelled before the next turn. Everything else follows
from the requests and the tokens, so that processes that are given the same plans do the same.
"""

import dataclasses
from typing import NamedTuple

from grok1.engine.engine import Engine
from grok1.generate.prefill import OnGrid
from grok1.generate.prefix import PrefixStore
from grok1.generate.request import Request, Sampled
from grok1.generate.scheduler import Scheduler

MOST_TOP = 20
"""Most alternatives that a request can ask for; a step reports as many where any are wanted."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a server's programs are compiled for.

    Attributes:
      num_slots: Most requests that run side by side.
      capacity: Most tokens of a request.
      row_counts: Numbers of rows that decode steps run, beside `num_slots`.
      chunk: Tokens of a prompt that a turn runs, unless it is at its end.
      turn_tokens: Most tokens of several prompts that a turn runs while others decode.
      prefix_tokens: Tokens of prompts that are kept on the devices.
      host_prefix_tokens: Those that are kept in the host's memory behind them; None until it is
        known how many.
    """

    num_slots: int
    capacity: int
    row_counts: tuple[int, ...]
    chunk: int
    prefix_tokens: int
    turn_tokens: int = 0
    host_prefix_tokens: int | None = None


class Plan(NamedTuple):
    """What changes before a turn.

    Attributes:
      submitted: Requests by number.
      over: Numbers of requests that are over, whether the scheduler knows it or not.
    """

    submitted: dict[int, Request]
    over: list[int]


class Replica:
    """The scheduler of one process.

    Attributes:
      store: Beginnings of prompts; None where none are kept.
      scheduler: The scheduler.
    """

    def __init__(self, engine: Engine, sizes: Sizes):
        """Takes no memory on the devices before the first turn."""
        num_blocks = -(-sizes.prefix_tokens // sizes.chunk)
        num_on_host = (sizes.host_prefix_tokens or 0) // sizes.chunk
        self.store = None
        if num_blocks:
            self.store = PrefixStore(engine, num_blocks, sizes.chunk, num_on_host)
        self.num_top = min(MOST_TOP, engine.config.vocab_size)
        self.scheduler = Scheduler(
            engine,
            sizes.num_slots,
            sizes.capacity,
            sizes.row_counts,
            prefill=OnGrid(engine, sizes.chunk, self.num_top, self.store, sizes.turn_tokens),
        )
        self._requests: dict[int, Request] = {}

    def turn(self, plan: Plan) -> list[tuple[Request, Sampled]]:
        """Carries out a plan and makes a step, as `Scheduler.step`."""
        for number, request in plan.submitted.items():
            self._requests[number] = request
            self.scheduler.submit(request)
        for number in plan.over:
            self.scheduler.cancel(self._requests.pop(number))
        return self.scheduler.step()
