"""Requests that come and go, and the steps of the model that they share.

A `Scheduler` has one state with a slot for each request that runs. A request enters as soon as a
slot is free, its prompt is run in chunks between the steps of those that decode, and it leaves with
its last token. Its tokens do not depend on which others come and go beside it: draws are keyed by
request and position, and a prompt is cut into chunks by its own length alone.

Token ids only; what a token means is for the caller to say.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.engine.adjustment import Adjustment
from grok1.engine.engine import Engine
from grok1.engine.sampling import SamplingParams, sampling_state
from grok1.engine.slots import Layout, Slots
from grok1.engine.steps import NUM_ENDS, DecodeState, Draw, Ends, LogitsProcessor
from grok1.generate.pace import Call, Pace
from grok1.generate.prefill import Prefill, SideBySide, row_counts
from grok1.generate.request import Request, Running, Sampled, adjustment, no_token, sampled
from grok1.nn.sharding import DATA_AXIS, put

MAX_ROWS = 32
"""Most requests of one call that run side by side; more wait until one of them is over."""

_DECODE_ROWS = (8, 32, 128)  # so few that they are soon compiled, so many that few run for nothing
_GREEDY = SamplingParams(temperature=0)


class _Arguments(NamedTuple):
    """What the decode steps of the same rows share, on the devices."""

    layout: Layout
    ends: Ends
    allowed: Any
    sampling: Any
    num_top: int | None
    processor: LogitsProcessor | None
    greedily: bool
    wished: Adjustment | None


class Scheduler:
    """Runs requests side by side in the slots of one state.

    One thread makes the steps; `submit` and `cancel` may be called from others.

    Attributes:
      num_slots: Most requests that run side by side.
      capacity: Most tokens of a request, its prompt included.
      prefilled: The requests whose prompts ended in the last step.
      num_prompt_tokens: How many tokens of prompts the last step ran.
    """

    def __init__(
        self,
        engine: Engine,
        num_slots: int,
        capacity: int,
        decode_rows: Sequence[int] = _DECODE_ROWS,
        chunk_tokens: int | None = None,
        *,
        prefill: Prefill | None = None,
    ):
        """Takes no memory on the devices before the first step.

        Args:
          engine: The model.
          num_slots: One of the numbers of `engine.batch_for`.
          capacity: One of the numbers of `engine.capacity_for`.
          decode_rows: Numbers of rows that decode steps run, beside `num_slots`, each a program of
            its own: the least that has room for the requests that decode.
          chunk_tokens: Most tokens of prompts that a step runs, over all rows; None for as many as
            one chunk computes at most.
          prefill: How prompts are run; None for side by side.
        """
        self.num_slots, self.capacity = num_slots, capacity
        self._engine = engine
        self._num_groups = engine.mesh.shape[DATA_AXIS]
        self._decode_rows = row_counts(decode_rows, num_slots, self._num_groups)
        self._prefill = prefill or SideBySide(engine, num_slots, chunk_tokens)
        self._num_top = self._prefill.num_top
        self._waiting: deque[Request] = deque()
        self.prefilled: list[Request] = []
        self.num_prompt_tokens = 0
        self._forget()

    def _forget(self) -> None:
        self._state: DecodeState | None = None
        self._slots = Slots(self.num_slots, self._num_groups)
        self._prefilling: deque[Running] = deque()
        self._decoding: list[Running] = []
        self._in_flight: list[Call] = []
        self._arguments: dict[tuple[Running, ...], _Arguments] = {}
        self._pace = Pace()
        self._prefill.forget()

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests that have no slot yet, in their order."""
        return tuple(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return self.num_slots - self._slots.num_free

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do and nothing to hand over."""
        return not (self._waiting or self._prefilling or self._decoding or self._in_flight)

    def submit(self, request: Request) -> None:
        """Lets a request wait for a slot, after those that wait already.

        Raises:
          ValueError: If it has no prompt, or does not fit.
        """
        needed = len(request.tokens) + request.max_tokens
        if not request.tokens or needed > self.capacity:
            raise ValueError(
                f"a request takes from 1 token to the {self.capacity} of a slot, found a prompt of "
                f"{len(request.tokens)} and up to {request.max_tokens} new ones; shorten it"
            )
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request, wherever it is: the next step frees its slot and draws nothing for it."""
        request.cancelled = True
        with contextlib.suppress(ValueError):
            self._waiting.remove(request)

    def step(self) -> list[tuple[Request, Sampled]]:
        """Runs a chunk of prompts and a decode step, and hands over tokens that were drawn.

        The devices work on a step while the host reads the one before, so that tokens come one
        call later; on a CPU a step may be several (`Engine.most_steps`).

        Returns:
          Tokens in the order in which they were drawn; none of a request that was cancelled before.

        Raises:
          Exception: Whatever a step of the model raises. All requests that had a slot are lost
            then; those that wait can go on.
        """
        self.prefilled, self.num_prompt_tokens = [], 0
        try:
            self._let_go()
            self._admit()
            calls = self._decode(is_timed=not self._run_prompts())
            ready, self._in_flight = self._in_flight, calls
            if not self._engine.runs_ahead:
                ready, self._in_flight = [*ready, *calls], []
            return [drawn for call in ready for drawn in self._take(call)]
        except BaseException:
            self._forget()
            raise

    def _let_go(self) -> None:
        """Frees the slots of which nothing more will be started."""
        for running in [*self._prefilling, *self._decoding]:
            if running.is_done:
                self._slots.give_back(running.slot)
        self._prefilling = deque(one for one in self._prefilling if not one.is_done)
        self._decoding = [one for one in self._decoding if not one.is_done]

    def _admit(self) -> None:
        admitted: list[Running] = []
        while self._waiting and self._slots.num_free:
            request = self._waiting.popleft()
            if not request.cancelled:
                # The last prompt token is left for the first decode step, so that prefill needs
                # no logits.
                left = len(request.tokens) - 1
                admitted.append(Running(request, self._slots.take(), np.zeros(2), left))
        if not admitted:
            return
        seeds, streams = np.zeros((2, self.num_slots), np.uint32)
        tokens = np.zeros((self.num_slots, self.capacity), np.int32)
        for running in admitted:
            request, slot = running.request, running.slot
            seeds[slot], streams[slot] = request.seed, request.stream
            tokens[slot, : len(request.tokens)] = request.tokens
        keys = self._engine.request_keys(seeds, streams)
        for running in admitted:
            running.key = keys[running.slot]
            self._sort(running)
        if self._state is None:
            self._state = self._engine.new_state(tokens)
            return
        for running in admitted:
            layout = self._slots.layout([running.slot], [self._num_groups])
            own = np.where(layout.slots[:, None] == running.slot, tokens[running.slot], 0)
            self._state = self._engine.assign(self._state, layout.slots, own)

    def _sort(self, running: Running) -> None:
        if running.to_prefill:
            self._prefilling.append(running)
        else:
            self._decoding.append(running)
            self.prefilled.append(running.request)

    def _run_prompts(self) -> bool:
        """Runs the next chunk of the prompt whose turn it is, perhaps with others.

        Returns:
          Whether there was one.
        """
        if not self._prefilling:
            return False
        assert self._state is not None
        before = self._num_to_run()
        self._state, ran = self._prefill.run(
            self._state, self._prefilling, self._slots, len(self._decoding)
        )
        self.num_prompt_tokens = before - self._num_to_run()
        for running in ran:
            self._prefilling.remove(running)
            self._sort(running)
        return True

    def _num_to_run(self) -> int:
        # What is found need not be run.
        return sum(one.to_prefill + one.request.num_reused for one in self._prefilling)

    def _decode(self, is_timed: bool) -> list[Call]:
        """Starts a step of every request that decodes; those of one processor share a call."""
        by_processor: dict[LogitsProcessor | None, list[Running]] = {}
        for running in sorted(self._decoding, key=lambda one: one.slot):
            if not running.is_done:
                by_processor.setdefault(running.request.processor, []).append(running)
        groups = list(by_processor.values())
        # What was placed for rows that have changed is let go.
        keys = {tuple(group) for group in groups}
        self._arguments = {key: held for key, held in self._arguments.items() if key in keys}
        return [self._decode_group(group, is_timed and len(groups) == 1) for group in groups]

    def _decode_group(self, group: list[Running], is_timed: bool) -> Call:
        key = tuple(group)
        if key not in self._arguments:
            self._arguments[key] = self._placed(group)
        layout, ends, allowed, sampling, num_top, processor, greedily, wished = self._arguments[key]
        most = 1
        if not self._prefilling and not any(one.request.is_asked_after_each for one in group):
            most = self._pace.num_steps(self._engine.most_steps)
            if self._waiting:
                # A slot becomes free as soon as the first of these is over.
                most = min(most, min(one.num_left for one in group))
        num_steps = np.zeros(len(layout.slots), np.int32)
        num_steps[layout.rows] = [min(most, one.num_left) for one in group]
        engine, state = self._engine, self._state
        assert state is not None
        if greedily:
            state, step = engine.decode_greedily(
                state, num_steps, ends, allowed, slots=layout.slots
            )
        else:
            state, step = engine.decode(
                state,
                num_steps,
                ends,
                Draw(allowed, sampling, num_top, processor, wished),
                slots=layout.slots,
            )
        self._state = state
        for running, row in zip(group, layout.rows, strict=True):
            running.num_started += int(num_steps[row])
        return Call(group, layout.rows, num_steps, step, num_top, is_timed)

    def _placed(self, group: list[Running]) -> _Arguments:
        engine, requests = self._engine, [one.request for one in group]
        layout = self._slots.layout([one.slot for one in group], self._decode_rows)
        num_rows = len(layout.slots)
        ending = np.full((num_rows, NUM_ENDS), -1, np.int32)
        begin = np.zeros(num_rows, np.int32)
        # A row that belongs to none is greedy: it must not make the others wait for a draw.
        sampled = [sampling_state(_GREEDY, np.zeros((1, 2), np.uint32))] * num_rows
        for one, row in zip(group, layout.rows, strict=True):
            begin[row] = len(one.request.tokens)
            if not one.request.is_asked_after_each:
                ending[row, : len(one.request.ends)] = one.request.ends
            sampled[row] = sampling_state(one.request.sampling, one.key[None])
        rows = NamedSharding(engine.mesh, P(DATA_AXIS))
        sampling = jax.tree.map(lambda *leaves: put(np.concatenate(leaves), rows), *sampled)
        tops = [request.num_top for request in requests if request.num_top is not None]
        processor = requests[0].processor
        wished = None
        if any(request.wishes is not None for request in requests):
            made = adjustment(requests, layout.rows, num_rows)
            wished = jax.tree.map(lambda leaf: put(leaf, rows), made)
        if self._num_top is not None and (tops or wished is not None):
            tops = [self._num_top]
        needs_logits = bool(tops) or any(request.sampling.temperature > 0 for request in requests)
        return _Arguments(
            layout,
            Ends(put(ending, rows), put(begin, rows)),
            self._allowed(requests, layout, self._num_top is not None and wished is not None),
            sampling,
            max(tops, default=None),
            processor,
            not needs_logits
            and processor is None
            and wished is None
            and engine.screening_table is not None,
            wished,
        )

    def _allowed(self, requests: list[Request], layout: Layout, for_each: bool) -> Any:
        """The tokens that may be drawn: one mask if all rows have the same, unless `for_each`."""
        engine = self._engine
        everything = np.ones(engine.config.vocab_size, bool)
        masks = [everything if one.allowed is None else one.allowed for one in requests]
        if not for_each and all(
            mask is masks[0] or np.array_equal(mask, masks[0]) for mask in masks
        ):
            return put(masks[0], NamedSharding(engine.mesh, P()))
        of_rows = np.ones((len(layout.slots), len(everything)), bool)
        of_rows[layout.rows] = masks
        return put(of_rows, NamedSharding(engine.mesh, P(DATA_AXIS)))

    def _take(self, call: Call) -> Iterator[tuple[Request, Sampled]]:
        """Reads what was drawn, and yields what is wanted of it."""
        on_host = self._pace.read(call)
        for number in range(call.num_steps.max()):
            for running, row in zip(call.running, call.rows, strict=True):
                request = running.request
                if number >= call.num_steps[row] or running.is_over or request.cancelled:
                    continue
                code = int(on_host.tokens[number, row])
                if code < 0:
                    running.is_over, request.error = True, no_token(code, request)
                    continue
                found = sampled(on_host, number, row, request.num_top)
                running.num_delivered += 1
                running.is_over = (
                    running.num_delivered == request.max_tokens or found.token in request.ends
                )
                yield request, found


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Sampled]]:
    """Yields (index of the request, token) as the tokens come.

    A request that the caller cancels between two tokens yields no more.

    Args:
      engine: The model.
      requests: What to continue; more than `MAX_ROWS` take turns.

    Raises:
      ValueError: If a request has no token that can be drawn; the message says why.
    """
    scheduler = Scheduler(
        engine,
        engine.batch_for(min(len(requests), MAX_ROWS)),
        engine.capacity_for(max(len(one.tokens) + one.max_tokens for one in requests)),
    )
    numbers = {}
    for number, request in enumerate(requests):
        numbers[request] = number
        scheduler.submit(request)
    while not scheduler.is_idle:
        for request, found in scheduler.step():
            if not request.cancelled:
                yield numbers[request], found
        for request in requests:
            if request.error is not None:
                raise request.error
