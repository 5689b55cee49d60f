"""What an engine is compiled for: its model, shapes and programs, before anything is run.

An engine has forms: what is captured, and what intervenes, is a part of every program. Forms of the
same weights share the programs of one kind.

Dimension key: R row of a call, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grok1.config import ModelConfig
from grok1.engine import compilation, shapes
from grok1.engine.adjustment import Adjustment
from grok1.engine.head_copies import HeadCopies
from grok1.engine.programs import ROWS, Key, Kind, Programs, Setup, StepSpec, Weights
from grok1.engine.sampling import SamplingState
from grok1.engine.shapes import CHUNK_LENGTHS, CHUNK_TOKENS, LONG_CHUNK_TOKENS, Chunk
from grok1.engine.steps import (
    NUM_ENDS,
    DecodeState,
    Draw,
    Ends,
    Head,
    LogitsProcessor,
    Rows,
    Step,
    greedy_head,
    logits_head,
    measured_head,
    no_head,
    one_step,
    sampling_head,
    scoring_head,
    screened_head,
)
from grok1.engine.wording import in_words
from grok1.nn.capture import NOTHING, Capture, as_capture
from grok1.nn.decoder import Captures
from grok1.nn.precision import default_cache_dtype
from grok1.nn.sharding import DATA_AXIS, MODEL_AXIS, AnyMesh, specs_of
from grok1.nn.transformer import Params
from grok1.nn.unembedding import TokenStatistics
from grok1.ops.screening import ScreeningTable

_MOST_STEPS = 8  # of a call that decodes: what the host costs is an eighth then
_SAMPLING = SamplingState(*(ROWS,) * len(SamplingState._fields))
_ADJUSTMENT = (Adjustment(*(ROWS,) * len(Adjustment._fields)),)
_CAPTURED_BYTES = 1 << 28  # most that the captures of one chunk of an observed engine take

Observer = Callable[[np.ndarray, Captures], None]
"""Takes what a step captured: (tokens it ran in each row, int32 `[R]`; values on the devices)."""


class Runner(Protocol):
    """How the steps of an engine are run.

    Attributes:
      runs_ahead: Whether a step may be started before the tokens of the one before are read, and
        several be one call.
      has_room: Whether there is memory for copies that make steps faster.
    """

    runs_ahead: bool
    has_room: bool

    def make_room(self, engine: "EngineBase", batch: int, capacity: int) -> None:
        """Sees to memory for a state that is about to be made.

        Raises:
          ValueError: If there is none.
        """
        ...

    def step(self, programs: Programs, spec: StepSpec) -> Any:
        """Returns what runs a step: what `Programs.step` returns, or does the same.

        It is made once; `programs` keeps it under the step's key.
        """
        ...


class Resident:
    """Runs a step as one program, with all weights on the devices."""

    runs_ahead = has_room = True

    def make_room(self, engine: "EngineBase", batch: int, capacity: int) -> None:
        """Does nothing: a state takes what is free."""

    def step(self, programs: Programs, spec: StepSpec) -> Any:
        """Returns the program."""
        return programs.get(spec.key, lambda: programs.step(spec))


@dataclasses.dataclass(frozen=True)
class View:
    """What sets an engine apart from others of the same weights.

    Attributes:
      interventions: Those of `study.intervention`.
      hooks: What they are on the devices, of `nn.hooks`.
      capture: What prefill and decode steps capture.
      observer: Takes it.
      captured_bytes_per_token: What it takes on the devices.
    """

    interventions: tuple[Any, ...] = ()
    hooks: tuple[Any, ...] = ()
    capture: Capture = NOTHING
    observer: Observer | None = None
    captured_bytes_per_token: int = 0


class EngineBase:
    """An engine without its steps.

    Attributes:
      weights: The first argument of every step: the model as it lies on the devices (or abstractly,
        to compile without weights), and what intervenes.
      setup: What its programs are compiled for.
      runner: How its steps are run.
      interventions: What changes the forward pass, in this order; see `intervened`.
      capture: What prefill and decode steps capture; see `observed`.
      head_copies: What decoding reads instead of the output head; one for all views of the weights.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        mesh: AnyMesh,
        dtype: Any,
        cache_dtype: Any = None,
        *,
        runner: Runner | None = None,
    ):
        """Compiles nothing yet.

        Args:
          params: The model.
          config: Its architecture.
          mesh: Axes (data, model).
          dtype: Type of the products with weights, float32 or bfloat16.
          cache_dtype: Type of the keys and values, float32, float16 or int8; by default that of
            `precision.default_cache_dtype`.
          runner: How steps are run; by default `Resident`.
        """
        dtype = jnp.dtype(dtype)
        cache_dtype = default_cache_dtype(dtype) if cache_dtype is None else cache_dtype
        # Without devices there are shapes, but no programs.
        self.setup = Setup(config, cast(Mesh, mesh), dtype, jnp.dtype(cache_dtype))
        self.weights, self.runner = Weights(params), runner or Resident()
        self._begin(self, View())

    def _begin(self, other: "EngineBase", view: View) -> None:
        """Becomes an engine like another one, which may be itself, in a view of its own."""
        self.setup, self.runner = other.setup, other.runner
        self.weights = Weights(other.weights.params, view.hooks)
        is_root, self._view = other is self, view
        # What else a program is compiled for beside its key; not the arrays that intervene.
        structure = jax.tree.structure(view.hooks) if view.hooks else None
        named_view = f"{view.capture} {structure}" if view.capture or view.hooks else ""
        held = compilation.Programs() if is_root else other._root_programs.held.of_view(named_view)
        named = functools.partial(in_words, view.interventions)
        self._programs = Programs(self.setup, self.weights, named_view, held, named)
        # Not the root itself: referring to itself, it would outlive its last user for a while.
        self._root_programs = self._programs if is_root else other._root_programs
        made = HeadCopies(self._programs, self.weights, self.runner.has_room) if is_root else None
        self.head_copies = made or other.head_copies

    @property
    def params(self) -> Params:
        """The model."""
        return self.weights.params

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.setup.config

    @property
    def mesh(self) -> Mesh:
        """Axes (data, model)."""
        return self.setup.mesh

    @property
    def dtype(self) -> Any:
        """Type of the products with weights, float32 or bfloat16."""
        return self.setup.dtype

    @property
    def cache_dtype(self) -> Any:
        """Type of the keys and values, float32, float16 or int8."""
        return self.setup.cache_dtype

    @property
    def interventions(self) -> tuple[Any, ...]:
        """What changes the forward pass, in this order; see `intervened`."""
        return self._view.interventions

    @property
    def capture(self) -> Capture:
        """What prefill and decode steps capture; see `observed`."""
        return self._view.capture

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be started before the tokens of the one before are read."""
        return self.runner.runs_ahead

    @property
    def most_steps(self) -> int:
        """Most decode steps of one call.

        On a CPU starting a step, and reading its tokens, takes a core from the step that runs. An
        accelerator loses nothing by it, and would by a loop whose length it has to ask for. What
        is captured is asked for after every step, and several processes would first have to agree
        on a number.
        """
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        collects = on_cpu and self.setup.is_alone and self.runs_ahead and not self.capture
        return _MOST_STEPS if collects else 1

    def check_length(self, num_tokens: int, is_whole: bool = True, num_new: int = 0) -> None:
        """Checks that the interventions fit a text of this many tokens.

        Args:
          num_tokens: T.
          is_whole: False for a text that is cut into pieces, or loses its beginning.
          num_new: Most tokens that may be run behind them.

        Raises:
          ValueError: If one holds the values of a text of another length, names a position that no
            token can take, or tells the positions of a text that is cut apart.
        """
        for intervention in self.interventions:
            intervention.check_length(num_tokens, is_whole)
            intervention.check_positions(num_tokens, num_new)

    def capacity_for(self, num_tokens: int) -> int:
        """Cache capacity for rows of up to `num_tokens` tokens: a power of two or the context."""
        return shapes.capacity_for(num_tokens, self.config.sequence_len)

    def batch_for(self, num_rows: int) -> int:
        """Rows of a batch that holds `num_rows`: a power of two that the data axis divides."""
        return shapes.batch_for(num_rows, self.mesh.shape[DATA_AXIS])

    def chunk_for(
        self, batch: int, remaining: int, most_tokens: int = CHUNK_TOKENS, lengths=CHUNK_LENGTHS
    ) -> int:
        """As `shapes.chunk_for`, with room for what is captured."""
        most_tokens = min(most_tokens, self._most_chunk_tokens)
        return shapes.chunk_for(batch, remaining, most_tokens, lengths)

    def scoring_chunk_for(self, batch: int, remaining: int) -> int:
        """As `chunk_for`, with the logits of every position in mind."""
        return shapes.scoring_chunk_for(
            batch, remaining, self.config.vocab_size, min(CHUNK_TOKENS, self._most_chunk_tokens)
        )

    def chunks(
        self,
        batch: int,
        end: int,
        start: int = 0,
        *,
        with_logits: bool = False,
        most_tokens: int = CHUNK_TOKENS,
    ) -> Iterator[Chunk]:
        """Yields the chunks in which the longest row of a batch is run from `start` to `end`.

        Args:
          batch: Rows.
          end: Position after the last token.
          start: Position of the first.
          with_logits: Whether the logits of every position are wanted.
          most_tokens: As for `shapes.chunk_for`.
        """

        def length_for(remaining):
            if with_logits:
                return self.scoring_chunk_for(batch, remaining)
            return self.chunk_for(batch, remaining, most_tokens)

        return shapes.chunks(start, end, length_for)

    @property
    def _most_chunk_tokens(self) -> int:
        per_token = self._view.captured_bytes_per_token
        return _CAPTURED_BYTES // per_token if per_token else LONG_CHUNK_TOKENS

    def abstract_state(self, batch: int, capacity: int) -> DecodeState:
        """Returns the shapes, types and shardings of a `DecodeState`."""
        return self.setup.abstract_state(batch, capacity)

    @property
    def screening_table(self) -> ScreeningTable | None:
        """The copy that greedy decoding reads; None where there is none."""
        return self.head_copies.table

    def is_screened(self, draw: Draw) -> bool:
        """Whether `decode` draws, or measures, by way of the `head_copies`."""
        other = draw if draw.num_top is None else draw._replace(adjustment=None)
        if self.mesh.shape[MODEL_AXIS] > 1 or not other.takes_logits_as_they_are:
            return False
        has_room = draw.num_top is None or self.runner.has_room
        return has_room and self.head_copies.draws

    def abstract_rows(self, num_rows: int) -> Rows:
        """Returns the shapes and types of the `Rows` that programs take."""
        of_rows = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
        return Rows(of_rows, of_rows)

    def abstract_decode_arguments(self, num_rows: int) -> tuple[Rows, Ends, Any, SamplingState]:
        """Returns the shapes and types of what `decode_program` takes beside weights and state.

        Args:
          num_rows: R.
        """

        def rows(dtype, *shape):
            return jax.ShapeDtypeStruct((num_rows, *shape), dtype)

        of_tokens = jax.ShapeDtypeStruct((self.config.vocab_size,), bool)
        sampling = SamplingState(
            temperature=rows(jnp.float32),
            top_p=rows(jnp.float32),
            top_k=rows(jnp.int32),
            min_p=rows(jnp.float32),
            keys=rows(jnp.uint32, 2),
        )
        ends = Ends(rows(jnp.int32, NUM_ENDS), rows(jnp.int32))
        return self.abstract_rows(num_rows), ends, of_tokens, sampling

    def prefill_program(self, chunk: int):
        """The program behind `prefill`."""
        key = Key(kind=Kind.PREFILL, length=chunk, capture=self.capture)
        return self._step(StepSpec(key, no_head, (), ()))

    def score_program(self, chunk: int, capture: Capture | Collection[str]):
        """The program behind `score`."""
        key = Key(kind=Kind.SCORE, length=chunk, capture=as_capture(capture))
        return self._step(StepSpec(key, logits_head, (), ROWS))

    def token_score_program(self, chunk: int, num_top: int):
        """The program behind `score_tokens`."""
        key = Key(kind=Kind.SCORE_TOKENS, length=chunk, num_top=num_top)
        statistics = TokenStatistics(*(ROWS,) * len(TokenStatistics._fields))
        return self._step(StepSpec(key, scoring_head(num_top), (ROWS,), statistics))

    def decode_program(
        self,
        num_top: int | None,
        processor: LogitsProcessor | None,
        masks_differ: bool = False,
        adjusts: bool = False,
    ):
        """The program behind `decode`; `masks_differ` where each row has tokens of its own."""
        key = Key(
            kind=Kind.DECODE,
            length=1,
            capture=self.capture,
            num_top=num_top,
            processor=processor,
            masks_differ=masks_differ,
            adjusts=adjusts,
        )
        specs = (ROWS if masks_differ else P(), _SAMPLING, *(_ADJUSTMENT if adjusts else ()))
        return self._decode_step(key, sampling_head(num_top, processor), specs)

    def screened_program(self, num_top: int | None = None, masks_differ=False, adjusts=False):
        """As `decode_program` where a draw `is_screened`.

        Before the allowed tokens it takes the `screening_table`, for log-probabilities a pair of
        that and the remainders.
        """
        key = Key(
            kind=Kind.DECODE,
            length=1,
            capture=self.capture,
            num_top=num_top,
            masks_differ=masks_differ,
            adjusts=adjusts,
            is_screened=True,
        )
        table, masks = self.head_copies.table_specs, ROWS if masks_differ else P()
        if num_top is None:
            return self._decode_step(key, screened_head, (table, masks, _SAMPLING))
        tables = table, specs_of(self.head_copies.remainders)
        specs = (tables, masks, _SAMPLING, *(_ADJUSTMENT if adjusts else ()))
        return self._decode_step(key, measured_head(num_top), specs)

    def greedy_program(self, masks_differ: bool = False):
        """The program behind `decode_greedily`; `masks_differ` as for `decode_program`."""
        key = Key(
            kind=Kind.DECODE_GREEDILY, length=1, capture=self.capture, masks_differ=masks_differ
        )
        table = self.head_copies.table_specs
        return self._decode_step(key, greedy_head, (table, ROWS if masks_differ else P()))

    def _decode_step(self, key: Key, head: Head, argument_specs: tuple[Any, ...]) -> Any:
        """The program (weights, state, rows, ends, *arguments) -> (state, draws, captured)."""
        most = self.most_steps
        output_specs = Step(*(P(None, DATA_AXIS),) * len(Step._fields))
        spec = StepSpec(key, head, (Ends(ROWS, ROWS), *argument_specs), output_specs)
        if most == 1:
            return self._step(spec._replace(head=one_step(head)))
        return self._programs.get(key, lambda: self._programs.steps(spec, most))

    def _step(self, spec: StepSpec) -> Any:
        return self.runner.step(self._programs, spec)
