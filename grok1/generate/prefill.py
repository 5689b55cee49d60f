"""How prompts are run: several side by side, or on a grid of positions.

Dimension key: R row of a call.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from grok1.engine.base import EngineBase
from grok1.engine.engine import Engine
from grok1.engine.shapes import prompt_chunks
from grok1.engine.slots import Slots
from grok1.engine.steps import DecodeState
from grok1.generate.prefix import PrefixStore
from grok1.generate.request import Running, ScoredPart
from grok1.nn.sharding import DATA_AXIS

_ROWS_TOGETHER = 4  # of each group, where prompts on a grid run side by side


class Prefill(Protocol):
    """How prompts are run.

    Attributes:
      num_top: Alternatives that a step reports where one of its requests asks for any, and that
        every step reports that fulfils wishes, so that there are few programs; None for as many as
        are asked for.
    """

    num_top: int | None

    def run(
        self, state: DecodeState, prefilling: Sequence[Running], slots: Slots, num_decoding: int
    ) -> tuple[DecodeState, list[Running]]:
        """Runs a chunk of one prompt or several, and counts down what is left of each.

        Args:
          state: Consumed: its memory goes to the result.
          prefilling: Requests of whose prompts something is left, in the order of their turns.
          slots: Those of the state.
          num_decoding: Requests that wait for their next token meanwhile.

        Returns:
          The state, and whose turn it was.
        """
        ...

    def forget(self) -> None:
        """Lets go of what belongs to a state that is lost."""
        ...


def row_counts(wanted: Sequence[int], num_slots: int, num_groups: int) -> list[int]:
    """Numbers of rows that there are programs for: of those wanted, and one for all slots."""
    fitting = {n for n in wanted if n < num_slots and n % num_groups == 0}
    return [*sorted(fitting), num_slots]


class SideBySide:
    """Prompts run together with those whose next chunks are as long, all of them in their turn."""

    num_top = None

    def __init__(self, engine: Engine, num_slots: int, chunk_tokens: int | None):
        """Takes the arguments of `Scheduler`."""
        self._engine, self._num_slots = engine, num_slots
        self._lengths, most = prompt_chunks(engine.mesh.devices.flat[0].platform)
        self._chunk_tokens = most if chunk_tokens is None else chunk_tokens
        self._num_groups = engine.mesh.shape[DATA_AXIS]
        self._row_counts = _counts_side_by_side(num_slots, self._num_groups)

    def run(
        self, state: DecodeState, prefilling: Sequence[Running], slots: Slots, num_decoding: int
    ) -> tuple[DecodeState, list[Running]]:
        """As `Prefill.run`, a chunk of as many prompts as `chunk_tokens` leaves room for."""
        left, ran, room = list(prefilling), [], self._chunk_tokens
        while left:
            chunk = self._chunk_of(left[0])
            counts = [rows for rows in self._row_counts if rows * chunk <= room]
            if not counts:
                if ran:
                    break
                counts = self._row_counts[:1]
            chosen = _as_many([one for one in left if self._chunk_of(one) == chunk], slots, counts)
            state, num_rows = _run_chunk(self._engine, state, chosen, chunk, slots, counts)
            room -= num_rows * chunk
            ran += chosen
            left = [one for one in left if one not in chosen]
        return state, ran

    def _chunk_of(self, running: Running) -> int:
        most, lengths = self._chunk_tokens, self._lengths
        return self._engine.chunk_for(self._num_groups, running.to_prefill, most, lengths)

    def forget(self) -> None:
        """Keeps nothing."""


def largest_call(
    engine: EngineBase, num_slots: int, num_tokens: int, platform: str
) -> tuple[int, int]:
    """Returns the rows and the chunk of the call of `SideBySide` that computes the most.

    Args:
      engine: The model, of which the shapes are enough.
      num_slots: Most prompts that run side by side.
      num_tokens: Tokens of the longest.
      platform: JAX's name of that whose chunks are run.
    """
    groups = engine.mesh.shape[DATA_AXIS]
    lengths, most = prompt_chunks(platform)
    left = {num_tokens, *(length for length in lengths if length < num_tokens)}
    chunks = {engine.chunk_for(groups, each, most, lengths) for each in left}
    counts = _counts_side_by_side(num_slots, groups)
    calls = [(rows, chunk) for rows in counts for chunk in chunks if rows * chunk <= most]
    return max(calls or [(counts[0], min(chunks))], key=lambda call: (call[0] * call[1], call))


def _counts_side_by_side(num_slots: int, num_groups: int) -> list[int]:
    return row_counts([num_groups * 4**n for n in range(6)], num_slots, num_groups)


def _as_many(candidates: Sequence[Running], slots: Slots, counts: Sequence[int]) -> list[Running]:
    """Returns the first of these requests, as many as there are rows for in each group."""
    room = [counts[-1] // slots.num_groups] * slots.num_groups
    chosen = []
    for running in candidates:
        group = slots.group(running.slot)
        if room[group]:
            room[group] -= 1
            chosen.append(running)
    return chosen


def _run_chunk(
    engine: Engine,
    state: DecodeState,
    chosen: Sequence[Running],
    chunk: int,
    slots: Slots,
    counts: Sequence[int],
) -> tuple[DecodeState, int]:
    """Runs the next chunk of some prompts in one call; returns the state and the call's rows."""
    layout = slots.layout([one.slot for one in chosen], counts)
    num_valid = np.zeros(len(layout.slots), np.int32)
    num_valid[layout.rows] = [min(chunk, one.to_prefill) for one in chosen]
    state = engine.prefill(state, num_valid, chunk, layout.slots)
    for running, row in zip(chosen, layout.rows, strict=True):
        running.to_prefill -= int(num_valid[row])
    return state, len(layout.slots)


class OnGrid:
    """Prompts run in chunks that begin at multiples of a length, the whole ones one at a time.

    So what is kept of a chunk depends on nothing but the tokens up to its end, and can be used for
    every prompt that begins with these, to the bit. What is kept of none runs side by side: the
    ends of prompts, and all of them where there is no store.
    """

    def __init__(
        self,
        engine: Engine,
        length: int,
        num_top: int,
        store: PrefixStore | None = None,
        turn_tokens: int | None = None,
    ):
        """Compiles nothing.

        Args:
          engine: The model.
          length: That of a chunk, one of `CHUNK_LENGTHS`; less is left at the end of a prompt.
          num_top: Alternatives to report where a prompt is scored.
          store: Keeps whole chunks; its blocks have this length.
          turn_tokens: Most tokens to run side by side while requests decode; None for the length.
        """
        self._engine, self._length = engine, length
        self.num_top: int | None = num_top
        self._most = num_top
        self._store = store
        self._turn_tokens = length if turn_tokens is None else turn_tokens
        self._num_groups = engine.mesh.shape[DATA_AXIS]

    def run(
        self, state: DecodeState, prefilling: Sequence[Running], slots: Slots, num_decoding: int
    ) -> tuple[DecodeState, list[Running]]:
        """As `Prefill.run`, with what the store has before."""
        running = prefilling[0]
        if self._store is not None:
            state = self._store.reuse(state, running)
        if not running.to_prefill:
            return state, [running]
        if running.request.scores_prompt:
            return self._score(state, running, slots), [running]
        chunk = self._chunk_of(running)
        counts = [self._num_groups]
        if self._is_kept(running):
            start = running.num_prefilled
            state, _ = _run_chunk(self._engine, state, [running], chunk, slots, counts)
            assert self._store is not None
            self._store.keep(state, running, start, None)
            return state, [running]
        counts.append(min(_ROWS_TOGETHER * self._num_groups, slots.num_slots))
        chosen = _as_many(self._together(prefilling, chunk, num_decoding), slots, counts)
        state, _ = _run_chunk(self._engine, state, chosen, chunk, slots, counts)
        return state, chosen

    def _together(
        self, prefilling: Sequence[Running], chunk: int, num_decoding: int
    ) -> list[Running]:
        """Returns whose next chunks may run side by side with that of the first."""
        candidates, room = [], self._turn_tokens
        for running in prefilling:
            if self._is_alone(running) or self._chunk_of(running) != chunk:
                continue
            room -= min(chunk, running.to_prefill)
            if candidates and num_decoding and room < 0:
                break
            candidates.append(running)
        return candidates

    def _is_alone(self, running: Running) -> bool:
        return running.request.scores_prompt or self._is_kept(running)

    def _is_kept(self, running: Running) -> bool:
        return self._store is not None and running.to_prefill >= self._length

    def _chunk_of(self, running: Running) -> int:
        length = self._length
        return self._engine.chunk_for(1, min(length, running.to_prefill), length)

    def _score(self, state: DecodeState, running: Running, slots: Slots) -> DecodeState:
        """Runs the next chunk of a prompt, and finds how probable its tokens are."""
        start, chunk, request = running.num_prefilled, self._chunk_of(running), running.request
        count = min(chunk, running.to_prefill)
        layout = slots.layout([running.slot], [self._num_groups])
        num_valid = np.zeros(self._num_groups, np.int32)
        num_valid[layout.rows] = count
        following = np.zeros((self._num_groups, chunk), np.int32)
        following[layout.rows[0], :count] = request.tokens[start + 1 : start + 1 + count]
        state, found = self._engine.score_tokens(
            state, num_valid, following, self._most, layout.slots
        )
        scored = ScoredPart(found, int(layout.rows[0]), count)
        request.prompt_scores.append(scored)
        if self._store is not None and count == self._length:
            self._store.keep(state, running, start, scored)
        running.to_prefill -= count
        return state

    def forget(self) -> None:
        """Lets go of what is kept."""
        if self._store is not None:
            self._store.forget()
