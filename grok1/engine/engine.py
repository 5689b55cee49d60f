"""The compiled steps of one model: prefill, decode, and scoring, over token ids only.

State goes in and comes out; nothing here knows text, requests or files. Each step is compiled once
for each set of shapes: chunk lengths and cache capacities come from short lists, so that requests
of any length share a few programs.

Dimension key: B slot of a state, R row of a call, T position in a chunk, S cache capacity,
V vocabulary.
"""

import copy
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, UInt32

from grok1.config import ModelConfig
from grok1.engine.compilation import Program, Programs
from grok1.engine.sampling import SamplingState
from grok1.engine.steps import (
    NUM_ENDS,
    DecodeState,
    Ends,
    Head,
    LogitsProcessor,
    Rows,
    Step,
    assigned,
    greedy_head,
    logits_head,
    next_tokens,
    no_head,
    one_step,
    rows_here,
    run_steps,
    sampling_head,
    scoring_head,
)
from grok1.engine.wording import in_words
from grok1.machine.jax_settings import own_settings
from grok1.machine.pages import use_huge_pages
from grok1.nn.capture import NOTHING, Capture, as_capture
from grok1.nn.decoder import Captures, Run, forward
from grok1.nn.precision import default_cache_dtype
from grok1.nn.sharding import DATA_AXIS, MODEL_AXIS, AnyMesh, abstract_cache, put, specs_of
from grok1.nn.transformer import Params
from grok1.nn.unembedding import ScreeningTable, TokenStatistics, screening_table
from grok1.ops import forms

CHUNK_LENGTHS = (16, 64, 256, 1024)
"""Prefill shapes. Each is four times the last: at most two chunks of a size, bar the largest."""

_CHUNK_TOKENS = 4096  # most tokens, over all rows, that one chunk computes at a time
_MOST_STEPS = 8  # of a call that decodes: what the host costs is an eighth then
_SMALLEST_CAPACITY = 256
_LOGITS_BYTES = 1 << 28  # most memory that the logits of one scored chunk take
_CAPTURED_BYTES = 1 << 28  # and the captures of one chunk of an observed engine
_ROWS = P(DATA_AXIS)
_ROW_SPECS = Rows(_ROWS, _ROWS)

Observer = Callable[[np.ndarray, Captures], None]
"""Takes what a step captured: (tokens it ran in each row, int32 `[R]`; values on the devices)."""


class Weights(NamedTuple):
    """What a program reads: a model, and what intervenes in it.

    Attributes:
      params: The model.
      interventions: Hooks of `nn.hooks`, on every device.
    """

    params: Params
    interventions: tuple[Any, ...] = ()


class Engine:
    """Runs one model on its mesh.

    Attributes:
      weights: The first argument of every program: the model as it lies on the devices (or
        abstractly, to compile without weights), and what intervenes.
      config: The model's architecture.
      mesh: Axes (data, model).
      dtype: Type of the products with weights, float32 or bfloat16.
      runs_ahead: Whether a step may be started before the tokens of the one before are read.
      cache_dtype: Type of the keys and values, float32, float16 or int8; by default that of
        `precision.default_cache_dtype`.
      capture: What prefill and decode steps capture; see `observed`.
      interventions: What changes the forward pass, in this order; see `intervened`.
    """

    runs_ahead = True

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        mesh: AnyMesh,
        dtype: Any,
        cache_dtype: Any = None,
    ):
        self.weights = Weights(params)
        self.config, self.dtype = config, jnp.dtype(dtype)
        # Without devices there are shapes, but no programs.
        self.mesh = cast(Mesh, mesh)
        if cache_dtype is None:
            cache_dtype = default_cache_dtype(self.dtype)
        self.cache_dtype = jnp.dtype(cache_dtype)
        self._weight_specs: Any = specs_of(self.weights)
        self._programs = Programs()
        self._stores_programs = True
        # Other forms of this engine keep programs of their own, which forms of one kind share.
        self._root = self
        self._form = ""
        self.capture = NOTHING
        self.interventions: tuple[Any, ...] = ()
        self._observer: Observer | None = None
        self._captured_bytes_per_token = 0

    @own_settings()
    def intervened(self, interventions: Sequence[Any], hooks: tuple[Any, ...]) -> "Engine":
        """Returns an engine of the same weights and programs in which these act, and no others.

        Args:
          interventions: Those of `study.intervention`; each can check the length of a text.
          hooks: What they are on the device, of `nn.hooks`, in numpy arrays.
        """
        view = copy.copy(self)
        view.interventions = tuple(interventions)
        everywhere = NamedSharding(self.mesh, P())
        on_device = jax.tree.map(lambda leaf: put(np.asarray(leaf), everywhere), hooks)
        view.weights = Weights(self.params, on_device)
        view._weight_specs = specs_of(view.weights)
        return view._in_form_of_its_own()

    @property
    def params(self) -> Params:
        """The model."""
        return self.weights.params

    @property
    def most_steps(self) -> int:
        """Most decode steps of one call.

        On a CPU starting a step, and reading its tokens, takes a core from the step that runs. An
        accelerator loses nothing by it, and would by a loop whose length it has to ask for. What
        is captured is asked for after every step, and several processes would first have to agree
        on a number.
        """
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        is_alone = self._rows_sharding.is_fully_addressable
        return _MOST_STEPS if on_cpu and is_alone and not self.capture else 1

    def observed(self, capture: Capture, capacity: int, observer: Observer) -> "Engine":
        """Returns an engine of the same weights and programs whose steps are captured.

        Args:
          capture: What each `prefill`, `decode` and `decode_greedily` captures.
          capacity: That of the states to come, which bounds the length of chunks.
          observer: Called after each of these steps.
        """
        view = copy.copy(self)
        view.capture, view._observer = capture, observer
        view._captured_bytes_per_token = capture.bytes_per_token(self.config, capacity)
        return view._in_form_of_its_own()

    def _in_form_of_its_own(self) -> "Engine":
        # What else a program is compiled for beside its key; not the arrays that intervene.
        hooks = self.weights.interventions
        structure = jax.tree.structure(hooks) if hooks else None
        self._form = f"{self.capture} {structure}" if self.capture or hooks else ""
        self._programs = self._root._programs.of_form(self._form)
        return self

    def check_length(self, num_tokens: int, is_whole: bool = True) -> None:
        """Checks that the interventions fit a text of this many tokens.

        Args:
          num_tokens: T.
          is_whole: False for a text that is cut into pieces, or loses its beginning.

        Raises:
          ValueError: If one holds the values of a text of another length, or tells the positions of
            a text that is cut apart.
        """
        for intervention in self.interventions:
            intervention.check_length(num_tokens, is_whole)

    def capacity_for(self, num_tokens: int) -> int:
        """Cache capacity for rows of up to `num_tokens` tokens: a power of two or the context."""
        capacity = _SMALLEST_CAPACITY
        while capacity < num_tokens:
            capacity *= 2
        return min(capacity, self.config.sequence_len)

    def batch_for(self, num_rows: int) -> int:
        """Rows of a batch that holds `num_rows`: a power of two that the data axis divides."""
        rows = self.mesh.shape[DATA_AXIS]
        while rows < num_rows:
            rows *= 2
        return rows

    def chunk_for(self, batch: int, remaining: int, most_tokens: int = _CHUNK_TOKENS) -> int:
        """Length of the next chunk when the longest row has `remaining` tokens to run.

        Args:
          batch: Rows of the chunk.
          remaining: Tokens of the longest.
          most_tokens: Most tokens over all rows, where so few can be run.
        """
        most = min(most_tokens, _CHUNK_TOKENS)
        if self._captured_bytes_per_token:
            most = min(most, _CAPTURED_BYTES // self._captured_bytes_per_token)
        lengths = [n for n in CHUNK_LENGTHS if n * batch <= most] or [CHUNK_LENGTHS[0]]
        fitting = [n for n in lengths if n >= remaining]
        if fitting and (remaining > fitting[0] // 2 or fitting[0] == lengths[0]):
            return fitting[0]
        return max(n for n in lengths if n <= remaining)

    def scoring_chunk_for(self, batch: int, remaining: int) -> int:
        """As `chunk_for`, with the logits of every position in mind."""
        chunk = self.chunk_for(batch, remaining)
        fitting = [
            n for n in CHUNK_LENGTHS if n * batch * self.config.vocab_size * 4 <= _LOGITS_BYTES
        ]
        return min(chunk, max(fitting, default=CHUNK_LENGTHS[0]))

    def abstract_state(self, batch: int, capacity: int) -> DecodeState:
        """Returns the shapes, types and shardings of a `DecodeState`."""
        cache = abstract_cache(self.config, self.mesh, batch, capacity, self.cache_dtype)
        rows = NamedSharding(self.mesh, _ROWS)
        tokens = jax.ShapeDtypeStruct((batch, capacity), jnp.int32, sharding=rows)
        return DecodeState(cache, tokens)

    def new_state(self, tokens: Int[np.ndarray, "B S"]) -> DecodeState:
        """Returns a state with these tokens, padded on the right, and nothing run."""
        abstract = self.abstract_state(*tokens.shape)
        cache = self._root._program(
            ("empty cache", tokens.shape),
            lambda: jax.jit(
                lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract.cache),
                out_shardings=jax.tree.map(lambda a: a.sharding, abstract.cache),
            ),
        )()
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
        program = self._root._program(
            ("request keys",),
            lambda: jax.jit(keys, in_shardings=everywhere, out_shardings=everywhere),
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
          slots: As for `prefill`.
          tokens: As for `new_state`.
        """
        program = self._root.assign_program()
        return program(state, self._rows(slots), self._rows(tokens.astype(np.int32)))

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
        program = self.prefill_program(chunk)
        state, _ = self._run(program, state, self._placed(num_valid, slots))
        return state

    @functools.cached_property
    def screening_table(self) -> ScreeningTable | None:
        """What `decode_greedily` reads instead of the whole embedding; None where it cannot."""
        if self._root is not self:
            return self._root.screening_table
        if not forms.has_kernels(self.mesh.devices.flat[0].platform):
            return None
        if self.params.embedding.dtype != jnp.float32:
            return None
        spec = self._weight_specs.params.embedding
        make = jax.shard_map(
            screening_table,
            mesh=self.mesh,
            in_specs=(spec,),
            out_specs=ScreeningTable(spec, P(spec[0]), P(spec[0])),
            check_vma=False,
        )
        table = self._program(("screening table",), lambda: jax.jit(make))(self.params.embedding)
        use_huge_pages(table)
        return table

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
          num_steps: As for `decode`.
          ends: As for `decode`.
          allowed: As for `decode`.
          slots: As for `prefill`.

        Raises:
          ValueError: As `decode`.
        """
        self._check_steps(num_steps)
        rows = self._placed(num_steps, slots)
        program = self.greedy_program(allowed.ndim > 1)
        return self._run(program, state, rows, ends, self.screening_table, allowed)

    def decode(
        self,
        state: DecodeState,
        num_steps: Int[np.ndarray, " R"],
        ends: Ends,
        allowed: Bool[Array, "*R V"],
        sampling: SamplingState,
        num_top: int | None = None,
        processor: LogitsProcessor | None = None,
        slots: Int[np.ndarray, " R"] | None = None,
    ) -> tuple[DecodeState, Step]:
        """Runs the last token of each row and draws the next one, once or several times.

        Args:
          state: Consumed: its memory goes to the result.
          num_steps: Tokens to draw for each row, up to `most_steps`; 0 leaves a row as it is.
          ends: What ends a row earlier. With `most_steps` 1 it may go unheeded.
          allowed: False for tokens that must not be drawn, `[V]` for all rows or `[R, V]`.
          sampling: Each row's parameters and key.
          num_top: Alternatives to report with log-probabilities; None for no log-probabilities.
          processor: Changes the logits before the draw. Each function compiles a program.
          slots: As for `prefill`.

        Returns:
          The state, and the draws with a leading axis of `most_steps`; those that a row did not
          run are meaningless.

        Raises:
          ValueError: If a row is given more steps than one call runs.
        """
        self._check_steps(num_steps)
        program = self.decode_program(num_top, processor, allowed.ndim > 1)
        return self._run(program, state, self._placed(num_steps, slots), ends, allowed, sampling)

    def _check_steps(self, num_steps: Int[np.ndarray, " R"]) -> None:
        if num_steps.max() > self.most_steps:
            raise ValueError(
                f"a call decodes at most {self.most_steps} steps of a row here, found "
                f"{num_steps.max()}; make several calls"
            )

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
          slots: As for `prefill`.
        """
        program = self.score_program(chunk, capture)
        placed = Rows(*map(self._rows, self._placed(num_valid, slots)))
        return program(self.weights, state, placed)

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
          slots: As for `prefill`.

        Returns:
          The state, and statistics `[R, chunk]`, meaningless past `num_valid`.
        """
        program = self.token_score_program(tokens.shape[1], num_top)
        rows = self._placed(num_valid, slots)
        return self._run(program, state, rows, self._rows(tokens))

    def _placed(self, count: np.ndarray, slots: np.ndarray | None) -> Rows:
        slots = np.arange(len(count)) if slots is None else slots
        return Rows(slots.astype(np.int32), count.astype(np.int32))

    def _run(
        self, program: Callable, state: DecodeState, rows: Rows, *arguments: Any
    ) -> tuple[DecodeState, Any]:
        placed = Rows(*map(self._rows, rows))
        state, outputs, captured = program(self.weights, state, placed, *arguments)
        if self._observer is not None:
            self._observer(rows.count, captured)
        return state, outputs

    def assign_program(self):
        """The program behind `assign`."""

        def assign(state, slots, tokens):
            rows = rows_here(state, Rows(slots, slots))
            return assigned(state, rows.slots, tokens)

        in_specs = (self._state_specs, _ROWS, _ROWS)
        return self._program(
            ("assign",),
            lambda: jax.jit(
                jax.shard_map(
                    assign,
                    mesh=self.mesh,
                    in_specs=in_specs,
                    out_specs=self._state_specs,
                    check_vma=False,
                ),
                donate_argnums=0,
            ),
        )

    def prefill_program(self, chunk: int):
        """The program behind `prefill`."""
        return self._step_program(("prefill", chunk), chunk, no_head, (), (), self.capture)

    def score_program(self, chunk: int, capture: Capture | Collection[str]):
        """The program behind `score`."""
        capture = as_capture(capture)
        key = ("score", chunk, capture)
        return self._step_program(key, chunk, logits_head, (), _ROWS, capture)

    def token_score_program(self, chunk: int, num_top: int):
        """The program behind `score_tokens`."""
        return self._step_program(
            ("score tokens", chunk, num_top),
            chunk,
            scoring_head(num_top),
            (_ROWS,),
            TokenStatistics(*(_ROWS,) * len(TokenStatistics._fields)),
        )

    def decode_program(
        self, num_top: int | None, processor: LogitsProcessor | None, masks_differ: bool = False
    ):
        """The program behind `decode`; `masks_differ` where each row has tokens of its own."""
        return self._decode_program(
            ("decode", num_top, processor, masks_differ),
            sampling_head(num_top, processor),
            (
                _ROWS if masks_differ else P(),
                SamplingState(*(_ROWS,) * len(SamplingState._fields)),
            ),
        )

    def greedy_program(self, masks_differ: bool = False):
        """The program behind `decode_greedily`; `masks_differ` as for `decode_program`."""
        return self._decode_program(
            ("decode greedily", masks_differ),
            greedy_head,
            (specs_of(self.screening_table), _ROWS if masks_differ else P()),
        )

    def _decode_program(self, key: tuple, head: Head, argument_specs: tuple) -> Any:
        """The program (weights, state, rows, ends, *arguments) -> (state, draws, captured)."""
        most = self.most_steps
        argument_specs = (Ends(_ROWS, _ROWS), *argument_specs)
        output_specs = Step(*(P(None, DATA_AXIS),) * len(Step._fields))
        if most == 1:
            return self._step_program(
                key, 1, one_step(head), argument_specs, output_specs, self.capture
            )
        step = self._step(1, head, NOTHING)

        def steps(weights, state, rows, ends, *arguments):
            def run(state, rows):
                state, drawn, _ = step(weights, state, rows, *arguments)
                return state, drawn

            return *run_steps(run, most, state, rows_here(state, rows), ends), {}

        return self._program(
            key,
            lambda: self._compile(
                key, steps, (_ROW_SPECS, *argument_specs), (self._state_specs, output_specs, {})
            ),
        )

    def _step_program(
        self,
        key: tuple,
        length: int,
        head: Head,
        argument_specs: tuple,
        output_specs: Any,
        capture: Capture = NOTHING,
    ) -> Program:
        """The program of `_step`."""
        step = self._step(length, head, capture)

        def step_here(weights, state, rows, *arguments):
            return step(weights, state, rows_here(state, rows), *arguments)

        captured_specs = {name: P(None, DATA_AXIS) for name in capture.names}
        if "attention_probs" in capture:
            captured_specs["attention_probs"] = P(None, DATA_AXIS, MODEL_AXIS)
        return self._program(
            key,
            lambda: self._compile(
                key,
                step_here,
                (_ROW_SPECS, *argument_specs),
                (self._state_specs, output_specs, captured_specs),
            ),
        )

    def _step(self, length: int, head: Head, capture: Capture) -> Callable:
        """The function (weights, state, rows, *arguments) -> (state, outputs, captured).

        It runs `rows.count` of the next `length` tokens of each row, on a device that knows its own
        slots alone (`steps.rows_here`).
        """
        # Programs outlive the views that they are built for; they must not hold what these hold.
        config, dtype = self.config, self.dtype

        def step(weights, state, rows, *arguments):
            params, interventions = weights
            run = Run(config, dtype, capture, interventions)
            tokens = next_tokens(state, rows.slots, length)
            hidden, cache, captured = forward(
                params, run, state.cache, rows.slots, tokens, rows.count
            )
            state = state._replace(cache=cache)
            state, outputs = head(params.embedding, config, state, hidden, rows, *arguments)
            return state, outputs, captured

        return step

    @functools.cached_property
    def _state_specs(self) -> DecodeState:
        return specs_of(self.abstract_state(self.mesh.shape[DATA_AXIS], _SMALLEST_CAPACITY))

    def _program(self, key: tuple, build: Callable[[], Any]) -> Program:
        # A function of the user's is not known by its name: what it does may have changed.
        stored = self._stores_programs and not any(callable(part) for part in key)
        # Not the engine itself: programs outlive the views that they are built for.
        capture, interventions = self.capture, self.interventions
        return self._programs.find(
            key,
            lambda: Program(
                build(),
                self.mesh.devices.flatten().tolist(),
                f"{key} {self._form} {self.config} {self.dtype} {self.cache_dtype} {self.mesh}"
                if stored
                else None,
                lambda *args: in_words(key, capture, interventions, *args),
            ),
        )

    def _compile(self, key: tuple, function: Callable, more_in_specs: tuple, out_specs):
        """Jits `function(weights, state, ...)` per device; the state's memory is the result's."""
        function.__name__ = key[0].replace(" ", "_")
        per_device = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(self._weight_specs, self._state_specs, *more_in_specs),
            out_specs=out_specs,
            # Loops with a data-dependent length cannot be checked for replication.
            check_vma=False,
        )
        if self._rows_sharding.is_fully_addressable:
            return jax.jit(per_device, donate_argnums=1)
        # The state stays where it is; what the host reads must be whole in every process.
        state_shardings = jax.tree.map(
            lambda leaf: leaf.sharding,
            self.abstract_state(self.mesh.shape[DATA_AXIS], _SMALLEST_CAPACITY),
        )
        everywhere = NamedSharding(self.mesh, P())
        return jax.jit(
            per_device, donate_argnums=1, out_shardings=(state_shardings, everywhere, everywhere)
        )

    @functools.cached_property
    def _rows_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, _ROWS)

    def _rows(self, array: np.ndarray) -> Any:
        """An argument with an entry for each row."""
        # Where this process has all devices, the compiled program places it faster.
        local = self._rows_sharding.is_fully_addressable
        return array if local else put(array, self._rows_sharding)
