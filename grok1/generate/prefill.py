"""How prompts are run: several side by side, or one after the other on a grid of positions.

Dimension key: R row of a call.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from grok1.engine.engine import Engine
from grok1.engine.slots import Slots
from grok1.engine.steps import DecodeState
from grok1.generate.prefix import PrefixStore
from grok1.generate.request import Running, ScoredPart
from grok1.nn.sharding import DATA_AXIS


class Prefill(Protocol):
    """How prompts are run.

    Attributes:
      num_top: Alternatives that a step reports where one of its requests asks for any, and that
        every step reports that fulfils wishes, so that there are few programs; None for as many as
        are asked for.
    """

    num_top: int | None

    def run(
        self, state: DecodeState, prefilling: Sequence[Running], slots: Slots
    ) -> tuple[DecodeState, list[Running]]:
        """Runs a chunk of one prompt or several, and counts down what is left of each.

        Args:
          state: Consumed: its memory goes to the result.
          prefilling: Requests of whose prompts something is left, in the order of their turns.
          slots: Those of the state.

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
    """The prompt whose turn it is runs together with others whose next chunk is as long."""

    num_top = None

    def __init__(self, engine: Engine, num_slots: int, chunk_tokens: int):
        """Takes the arguments of `Scheduler`."""
        self._engine, self._num_slots, self._chunk_tokens = engine, num_slots, chunk_tokens
        self._num_groups = engine.mesh.shape[DATA_AXIS]
        wanted = [self._num_groups * 4**n for n in range(6)]
        self._row_counts = row_counts(wanted, num_slots, self._num_groups)

    def run(
        self, state: DecodeState, prefilling: Sequence[Running], slots: Slots
    ) -> tuple[DecodeState, list[Running]]:
        """As `Prefill.run`."""
        groups = self._num_groups

        def chunk_of(running):
            return self._engine.chunk_for(groups, running.to_prefill, self._chunk_tokens)

        chunk = chunk_of(prefilling[0])
        counts = [rows for rows in self._row_counts if rows * chunk <= self._chunk_tokens]
        counts = counts or self._row_counts[:1]
        chosen: list[Running] = []
        room = [counts[-1] // groups] * groups
        for running in prefilling:
            group = running.slot * groups // self._num_slots
            if room[group] and chunk_of(running) == chunk:
                room[group] -= 1
                chosen.append(running)
        layout = slots.layout([one.slot for one in chosen], counts)
        num_valid = np.zeros(len(layout.slots), np.int32)
        num_valid[layout.rows] = [min(chunk, one.to_prefill) for one in chosen]
        state = self._engine.prefill(state, num_valid, chunk, layout.slots)
        for running, row in zip(chosen, layout.rows, strict=True):
            running.to_prefill -= int(num_valid[row])
        return state, chosen

    def forget(self) -> None:
        """Keeps nothing."""


class OnGrid:
    """One prompt at a time, in chunks that begin at multiples of a length.

    So what is computed for a chunk depends on nothing but the tokens up to its end, and can be
    used for every prompt that begins with these, to the bit.
    """

    def __init__(self, engine: Engine, length: int, num_top: int, store: PrefixStore | None = None):
        """Compiles nothing.

        Args:
          engine: The model.
          length: That of a chunk, one of `CHUNK_LENGTHS`; less is left at the end of a prompt.
          num_top: Alternatives to report where a prompt is scored.
          store: Keeps whole chunks; its blocks have this length.
        """
        self._engine, self._length = engine, length
        self.num_top: int | None = num_top
        self._most = num_top
        self._store = store
        self._num_groups = engine.mesh.shape[DATA_AXIS]

    def run(
        self, state: DecodeState, prefilling: Sequence[Running], slots: Slots
    ) -> tuple[DecodeState, list[Running]]:
        """As `Prefill.run`, with what the store has before."""
        running = prefilling[0]
        if self._store is not None:
            state = self._store.reuse(state, running)
        if not running.to_prefill:
            return state, [running]
        start, length = running.num_prefilled, self._length
        chunk = self._engine.chunk_for(1, min(length, running.to_prefill), length)
        count = min(chunk, running.to_prefill)
        layout = slots.layout([running.slot], [self._num_groups])
        num_valid = np.zeros(self._num_groups, np.int32)
        num_valid[layout.rows] = count
        request, scored = running.request, None
        if request.scores_prompt:
            following = np.zeros((self._num_groups, chunk), np.int32)
            following[layout.rows[0], :count] = request.tokens[start + 1 : start + 1 + count]
            state, found = self._engine.score_tokens(
                state, num_valid, following, self._most, layout.slots
            )
            scored = ScoredPart(found, int(layout.rows[0]), count)
            request.prompt_scores.append(scored)
        else:
            state = self._engine.prefill(state, num_valid, chunk, layout.slots)
        if self._store is not None and count == length:
            self._store.keep(state, running, start, scored)
        running.to_prefill -= count
        return state, [running]

    def forget(self) -> None:
        """Lets go of what is kept."""
        if self._store is not None:
            self._store.forget()
