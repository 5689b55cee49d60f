"""The steps of one model: prefill, decode, and scoring, over token ids only.

State goes in and comes out; nothing here knows text, requests or files.

Dimension key: B slot of a state, R row of a call, T position in a chunk, S cache capacity,
V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, UInt32

from grok1.engine import blocks
from grok1.engine.base import EngineBase, Observer
from grok1.engine.blocks import Blocks
from grok1.engine.programs import Key, Kind
from grok1.engine.steps import DecodeState, Draw, Ends, Rows, Step
from grok1.machine.jax_settings import own_settings
from grok1.nn.capture import Capture
from grok1.nn.decoder import Captures
from grok1.nn.sharding import put
from grok1.nn.unembedding import TokenStatistics


class Engine(EngineBase):
    """Runs one model on its mesh; attributes as of `EngineBase`."""

    @own_settings()
    def intervened(self, interventions: Sequence[Any], hooks: tuple[Any, ...]) -> "Engine":
        """Returns an engine of the same weights and programs in which these act, and no others.

        Args:
          interventions: Those of `study.intervention`; each can check the length of a text.
          hooks: What they are on the device, of `nn.hooks`, in numpy arrays, or on the devices.
        """
        everywhere = NamedSharding(self.mesh, P())

        def placed(leaf):
            return leaf if isinstance(leaf, jax.Array) else put(np.asarray(leaf), everywhere)

        on_device = jax.tree.map(placed, hooks)
        return self._seen(interventions=tuple(interventions), hooks=on_device)

    def observed(self, capture: Capture, capacity: int, observer: Observer) -> "Engine":
        """Returns an engine of the same weights and programs whose steps are captured.

        Args:
          capture: What each `prefill`, `decode` and `decode_greedily` captures.
          capacity: That of the states to come, which bounds the length of chunks.
          observer: Called after each of these steps.
        """
        return self._seen(
            capture=capture,
            observer=observer,
            captured_bytes_per_token=capture.bytes_per_token(self.config, capacity),
        )

    def _seen(self, **changes: Any) -> "Engine":
        seen = Engine.__new__(Engine)
        seen._begin(self, dataclasses.replace(self._view, **changes))
        return seen

    def new_state(self, tokens: Int[np.ndarray, "B S"]) -> DecodeState:
        """Returns a state with these tokens, padded on the right, and nothing run.

        Raises:
          ValueError: If the runner has no memory for it.
        """
        self.runner.make_room(self, *tokens.shape)
        abstract = self.abstract_state(*tokens.shape)
        programs, key = self._root_programs, Key(kind=Kind.EMPTY_CACHE, shape=tokens.shape)

        def make():
            function = jax.jit(
                lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract.cache),
                out_shardings=jax.tree.map(lambda a: a.sharding, abstract.cache),
            )
            return programs.compiled(key, function)

        cache = programs.get(key, make)()
        return DecodeState(cache, put(tokens.astype(np.int32), abstract.tokens.sharding))

    def request_keys(
        self, seeds: UInt32[np.ndarray, " B"], streams: UInt32[np.ndarray, " B"]
    ) -> UInt32[np.ndarray, "B 2"]:
        """Returns the random key of each request, that of its stream of its seed."""

        def keys(seeds, streams):
            # By name: a setting of JAX's chooses another generator otherwise.
            def key_of(seed, stream):
                return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)

            return jax.random.key_data(jax.vmap(key_of)(seeds, streams))

        everywhere = NamedSharding(self.mesh, P())
        programs, key = self._root_programs, Key(kind=Kind.REQUEST_KEYS)
        program = programs.get(
            key,
            lambda: programs.compiled(
                key, jax.jit(keys, in_shardings=everywhere, out_shardings=everywhere)
            ),
        )
        return np.asarray(program(seeds, streams))

    def assign(
        self,
        state: DecodeState,
        slots: Int[np.ndarray, " R"],
        tokens: Int[np.ndarray, "R S"],
    ) -> DecodeState:
        """Gives slots new tokens, padded on the right, of which nothing is run yet.

        Args:
          state: Consumed: its memory goes to the result.
          slots: int32 `[R]`, of the state.
          tokens: int32 `[R, S]`, S the state's capacity.
        """
        programs = self._root_programs
        program = programs.get(Key(kind=Kind.ASSIGN), programs.assign)
        return program(state, self._rows(slots), self._rows(tokens.astype(np.int32)))

    def empty_blocks(self, num_blocks: int, length: int) -> Blocks:
        """Returns memory for parts of texts.

        Args:
          num_blocks: How many parts.
          length: Positions of each.
        """
        programs = self._root_programs
        key = Key(kind=Kind.EMPTY_BLOCKS, shape=(num_blocks, length))
        return programs.get(key, lambda: blocks.empty(programs, num_blocks, length))()

    def keep_block(
        self, kept: Blocks, number: int, state: DecodeState, slot: int, start: int
    ) -> Blocks:
        """Copies a part of a slot's text into block `number`.

        Args:
          kept: Consumed: its memory goes to the result.
          number: Which block.
          state: Where the slot is; it stays.
          slot: Whose text.
          start: Position of the first; all of the block's positions are filled.
        """
        programs = self._root_programs
        program = programs.get(Key(kind=Kind.KEEP_BLOCK), lambda: blocks.keep(programs))
        return program(kept, state, self._everywhere(number, slot, start))

    def put_block(
        self, state: DecodeState, slot: int, start: int, kept: Blocks, number: int
    ) -> DecodeState:
        """Copies block `number` into a slot, whose text is then filled to the block's end.

        Args:
          state: Consumed: its memory goes to the result.
          slot: Where it goes.
          start: Position of the block's first token; all before it are filled.
          kept: Where the block is; it stays.
          number: Which block.
        """
        programs = self._root_programs
        program = programs.get(Key(kind=Kind.PUT_BLOCK), lambda: blocks.put(programs))
        return program(state, kept, self._everywhere(number, slot, start))

    def take_block(self, kept: Blocks, number: int) -> Blocks:
        """Returns a copy of block `number`, alone, in the host's memory; does not wait for it.

        Each process has the parts of its own devices.

        Args:
          kept: Where the block is; it stays.
          number: Which block.
        """
        programs = self._root_programs
        program = programs.get(Key(kind=Kind.TAKE_BLOCK), lambda: blocks.take(programs))
        return blocks.on_host(program(kept, self._everywhere(number)))

    def block_on_devices(self, alone: Blocks) -> Blocks:
        """Returns a copy, on the devices, of what `take_block` returned; does not wait for it.

        It is block 0 of what `put_block` takes.
        """
        return blocks.on_devices(alone)

    def place_block(self, kept: Blocks, number: int, alone: Blocks) -> Blocks:
        """Copies what `block_on_devices` returned into block `number`.

        Args:
          kept: Consumed: its memory goes to the result.
          number: Which block.
          alone: It stays.
        """
        programs = self._root_programs
        program = programs.get(Key(kind=Kind.PLACE_BLOCK), lambda: blocks.place(programs))
        return program(kept, alone, self._everywhere(number))

    def prefill(
        self,
        state: DecodeState,
        num_valid: Int[np.ndarray, " R"],
        chunk: int,
        slots: Int[np.ndarray, " R"] | None = None,
    ) -> DecodeState:
        """Runs up to `chunk` tokens of each row, `num_valid` of them, into the cache.

        Args:
          state: Consumed: its memory goes to the result.
          num_valid: Tokens to run in each row; 0 leaves a row as it is.
          chunk: One of `CHUNK_LENGTHS`.
          slots: The slot of each row, as `steps.Rows` says; None for all slots in their order.
        """
        state, _ = self._run(self.prefill_program(chunk), state, _rows_of(num_valid, slots))
        return state

    def decode_greedily(
        self,
        state: DecodeState,
        num_steps: Int[np.ndarray, " R"],
        ends: Ends,
        allowed: Bool[Array, "*R V"],
        slots: Int[np.ndarray, " R"] | None = None,
    ) -> tuple[DecodeState, Step]:
        """As `decode` at temperature 0, where there is a `screening_table`; no log-probabilities.

        Args:
          state: Consumed: its memory goes to the result.
          num_steps: Tokens to draw for each row, up to `most_steps`; 0 leaves a row as it is.
          ends: What ends a row earlier. With `most_steps` 1 it may go unheeded.
          allowed: False for tokens that must not be drawn, `[V]` for all rows or `[R, V]`.
          slots: int32, which slot of the state each row is; None for row r in slot r.

        Raises:
          ValueError: As `decode`.
        """
        rows = self._decoding_rows(num_steps, slots)
        program = self.greedy_program(allowed.ndim > 1)
        return self._run(program, state, rows, ends, self.screening_table, allowed)

    def decode(
        self,
        state: DecodeState,
        num_steps: Int[np.ndarray, " R"],
        ends: Ends,
        draw: Draw,
        slots: Int[np.ndarray, " R"] | None = None,
    ) -> tuple[DecodeState, Step]:
        """Runs the last token of each row and draws the next one, once or several times.

        Args:
          state: Consumed: its memory goes to the result.
          num_steps: Tokens to draw for each row, up to `most_steps`; 0 leaves a row as it is.
          ends: What ends a row earlier. With `most_steps` 1 it may go unheeded.
          draw: How tokens are drawn.
          slots: int32, which slot of the state each row is; None for row r in slot r.

        Returns:
          The state, and the draws with a leading axis of `most_steps`; those that a row did not
          run are meaningless.

        Raises:
          ValueError: If a row is given more steps than one call runs.
        """
        rows = self._decoding_rows(num_steps, slots)
        adjusts, masks_differ = draw.adjustment is not None, draw.allowed.ndim > 1
        more = (draw.adjustment,) if adjusts else ()
        if self.is_screened(draw):
            program = self.screened_program(draw.num_top, masks_differ, adjusts)
            copies = self.head_copies
            table = copies.table if draw.num_top is None else (copies.table, copies.remainders)
            return self._run(program, state, rows, ends, table, draw.allowed, draw.sampling, *more)
        program = self.decode_program(draw.num_top, draw.processor, masks_differ, adjusts)
        return self._run(program, state, rows, ends, draw.allowed, draw.sampling, *more)

    def _decoding_rows(self, num_steps: np.ndarray, slots: np.ndarray | None) -> Rows:
        if num_steps.max() > self.most_steps:
            raise ValueError(
                f"a call decodes at most {self.most_steps} steps of a row here, found "
                f"{num_steps.max()}; make several calls"
            )
        return _rows_of(num_steps, slots)

    def score(
        self,
        state: DecodeState,
        num_valid: Int[np.ndarray, " R"],
        chunk: int,
        capture: Capture | Collection[str] = (),
        slots: Int[np.ndarray, " R"] | None = None,
    ) -> tuple[DecodeState, Array, Captures]:
        """As `prefill`; also returns the chunk's float32 logits `[R, chunk, V]` and captures.

        Args:
          state: Consumed: its memory goes to the result.
          num_valid: Tokens to run in each row.
          chunk: One of `CHUNK_LENGTHS`.
          capture: As in `decoder.Run`.
          slots: int32, which slot of the state each row is; None for row r in slot r.
        """
        program = self.score_program(chunk, capture)
        return program(self.weights, state, self._placed(_rows_of(num_valid, slots)))

    def score_tokens(
        self,
        state: DecodeState,
        num_valid: Int[np.ndarray, " R"],
        tokens: Int[np.ndarray, "R chunk"],
        num_top: int,
        slots: Int[np.ndarray, " R"] | None = None,
    ) -> tuple[DecodeState, TokenStatistics]:
        """As `prefill`; also scores the token that follows each position, without its logits.

        Args:
          state: Consumed: its memory goes to the result.
          num_valid: Tokens to run in each row.
          tokens: int32, what follows each token that is run; its width is one of `CHUNK_LENGTHS`.
          num_top: How many of the most probable tokens to report.
          slots: int32, which slot of the state each row is; None for row r in slot r.

        Returns:
          The state, and statistics `[R, chunk]`, meaningless past `num_valid`.
        """
        program = self.token_score_program(tokens.shape[1], num_top)
        rows = _rows_of(num_valid, slots)
        return self._run(program, state, rows, self._rows(tokens))

    def _run(
        self, program: Callable, state: DecodeState, rows: Rows, *arguments: Any
    ) -> tuple[DecodeState, Any]:
        state, outputs, captured = program(self.weights, state, self._placed(rows), *arguments)
        if self._view.observer is not None:
            self._view.observer(rows.count, captured)
        return state, outputs

    def _placed(self, rows: Rows) -> Rows:
        return Rows(self._rows(rows.slots), self._rows(rows.count))

    def _everywhere(self, *numbers: int) -> Any:
        """Numbers that every device gets."""
        array = np.array(numbers, np.int32)
        return array if self.setup.is_alone else put(array, NamedSharding(self.mesh, P()))

    def _rows(self, array: np.ndarray) -> Any:
        """An argument with an entry for each row."""
        # Where this process has all devices, the compiled program places it faster.
        return array if self.setup.is_alone else put(array, self.setup.rows_sharding)


def _rows_of(count: np.ndarray, slots: np.ndarray | None) -> Rows:
    slots = np.arange(len(count)) if slots is None else slots
    return Rows(slots.astype(np.int32), count.astype(np.int32))
