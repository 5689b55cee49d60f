"""The compiled steps of one model: prefill, decode, and scoring, over token ids only.

State goes in and comes out; nothing here knows text, requests or files. Each step is compiled once
for each set of shapes: chunk lengths and cache capacities come from short lists, so that requests
of any length share a few programs.

Dimension key: B batch row, T position in a chunk, S cache capacity, V vocabulary.
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
from grok1.engine.compilation import Program
from grok1.engine.sampling import SamplingState
from grok1.engine.steps import (
    DecodeState,
    Ends,
    Head,
    LogitsProcessor,
    Step,
    greedy_head,
    logits_head,
    next_tokens,
    no_head,
    one_step,
    run_steps,
    sampling_head,
    scoring_head,
)
from grok1.machine.pages import use_huge_pages
from grok1.nn.capture import NOTHING, Capture, as_capture
from grok1.nn.decoder import Captures, forward
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

Observer = Callable[[np.ndarray, Captures], None]
"""Takes what a step captured: (tokens it ran in each row, int32 `[B]`; values on the devices)."""


class Intervened(NamedTuple):
    """A model and what intervenes in it.

    Attributes:
      params: The model.
      interventions: Hooks of `nn.hooks`, on every device.
    """

    params: Params
    interventions: Any


class Engine:
    """Runs one model on its mesh.

    Attributes:
      params: The model as it lies on the devices (or abstractly, to compile without weights); with
        interventions, the first argument of every step: `Intervened`.
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
        self.params: Any = params
        self.config, self.dtype = config, jnp.dtype(dtype)
        # Without devices there are shapes, but no programs.
        self.mesh = cast(Mesh, mesh)
        if cache_dtype is None:
            cache_dtype = default_cache_dtype(self.dtype)
        self.cache_dtype = jnp.dtype(cache_dtype)
        self._param_specs: Any = specs_of(params)
        self._programs: dict[tuple, Program] = {}
        self._stores_programs = True
        # Other forms of this engine keep programs of their own, which forms of one kind share.
        self._root = self
        self._form = ""
        self._programs_of_form = {self._form: self._programs}
        self.capture = NOTHING
        self.interventions: tuple[Any, ...] = ()
        self._observer: Observer | None = None
        self._captured_bytes_per_token = 0

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
        if on_device:
            root = self._root
            view.params = Intervened(root.params, on_device)
            view._param_specs = Intervened(root._param_specs, P())
        return view._in_form_of_its_own()

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
        structure = jax.tree.structure(self.params[1]) if self._is_intervened else None
        self._form = f"{self.capture} {structure}" if self.capture or structure else ""
        self._programs = self._programs_of_form.setdefault(self._form, {})
        return self

    @property
    def _is_intervened(self) -> bool:
        return isinstance(self.params, Intervened)

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

    def chunk_for(self, batch: int, remaining: int) -> int:
        """Length of the next chunk when the longest row has `remaining` tokens to run."""
        most = _CHUNK_TOKENS
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
            fold = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))
            return jax.random.key_data(fold(seeds, streams))

        everywhere = NamedSharding(self.mesh, P())
        program = self._root._program(
            ("request keys",),
            lambda: jax.jit(keys, in_shardings=everywhere, out_shardings=everywhere),
        )
        return np.asarray(program(seeds, streams))

    def prefill(
        self, state: DecodeState, num_valid: Int[np.ndarray, " B"], chunk: int
    ) -> DecodeState:
        """Runs up to `chunk` tokens of every row, `num_valid` of them, into the cache.

        Args:
          state: Consumed: its memory goes to the result.
          num_valid: Tokens to run in each row; 0 leaves a row as it is.
          chunk: One of `CHUNK_LENGTHS`.
        """
        state, _ = self._run(self.prefill_program(chunk), state, num_valid)
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
        spec = self._param_specs.embedding
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
        num_steps: Int[np.ndarray, " B"],
        ends: Ends,
        allowed: Bool[Array, " V"],
    ) -> tuple[DecodeState, Step]:
        """As `decode` at temperature 0, where there is a `screening_table`; no log-probabilities.

        Args:
          state: Consumed: its memory goes to the result.
          num_steps: As for `decode`.
          ends: Likewise.
          allowed: Likewise.

        Raises:
          ValueError: As `decode`.
        """
        self._check_steps(num_steps)
        return self._run(
            self.greedy_program(), state, num_steps, ends, self.screening_table, allowed
        )

    def decode(
        self,
        state: DecodeState,
        num_steps: Int[np.ndarray, " B"],
        ends: Ends,
        allowed: Bool[Array, " V"],
        sampling: SamplingState,
        num_top: int | None = None,
        processor: LogitsProcessor | None = None,
    ) -> tuple[DecodeState, Step]:
        """Runs the last token of each row and draws the next one, once or several times.

        Args:
          state: Consumed: its memory goes to the result.
          num_steps: Tokens to draw for each row, up to `most_steps`; 0 leaves a row as it is.
          ends: What ends a row earlier. With `most_steps` 1 it may go unheeded.
          allowed: False for tokens that must not be drawn.
          sampling: Each row's parameters and key.
          num_top: Alternatives to report with log-probabilities; None for no log-probabilities.
          processor: Changes the logits before the draw. Each function compiles a program.

        Returns:
          The state, and the draws with a leading axis of `most_steps`; those that a row did not
          run are meaningless.

        Raises:
          ValueError: If a row is given more steps than one call runs.
        """
        self._check_steps(num_steps)
        program = self.decode_program(num_top, processor)
        return self._run(program, state, num_steps, ends, allowed, sampling)

    def _check_steps(self, num_steps: Int[np.ndarray, " B"]) -> None:
        if num_steps.max() > self.most_steps:
            raise ValueError(
                f"a call decodes at most {self.most_steps} steps of a row here, found "
                f"{num_steps.max()}; make several calls"
            )

    def abstract_decode_arguments(self, batch: int) -> tuple[Any, Ends, Any, SamplingState]:
        """Returns the shapes and types of what `decode_program` takes beside parameters and state.

        Args:
          batch: Rows.
        """

        def rows(dtype, *shape):
            return jax.ShapeDtypeStruct((batch, *shape), dtype)

        of_tokens = jax.ShapeDtypeStruct((self.config.vocab_size,), bool)
        sampling = SamplingState(
            temperature=rows(jnp.float32),
            top_p=rows(jnp.float32),
            top_k=rows(jnp.int32),
            min_p=rows(jnp.float32),
            keys=rows(jnp.uint32, 2),
        )
        return rows(jnp.int32), Ends(of_tokens, rows(jnp.int32)), of_tokens, sampling

    def score(
        self,
        state: DecodeState,
        num_valid: Int[np.ndarray, " B"],
        chunk: int,
        capture: Capture | Collection[str] = (),
    ) -> tuple[DecodeState, Array, Captures]:
        """As `prefill`; also returns the chunk's float32 logits `[B, chunk, V]` and captures.

        Args:
          state: Consumed: its memory goes to the result.
          num_valid: Tokens to run in each row.
          chunk: One of `CHUNK_LENGTHS`.
          capture: As in `decoder.forward`.
        """
        program = self.score_program(chunk, capture)
        return program(self.params, state, self._rows(num_valid))

    def score_tokens(
        self,
        state: DecodeState,
        num_valid: Int[np.ndarray, " B"],
        tokens: Int[np.ndarray, "B chunk"],
        num_top: int,
    ) -> tuple[DecodeState, TokenStatistics]:
        """As `prefill`; also scores the token that follows each position, without its logits.

        Args:
          state: Consumed: its memory goes to the result.
          num_valid: Tokens to run in each row.
          tokens: int32, what follows each token that is run; its width is one of `CHUNK_LENGTHS`.
          num_top: How many of the most probable tokens to report.

        Returns:
          The state, and statistics `[B, chunk]`, meaningless past `num_valid`.
        """
        program = self.token_score_program(tokens.shape[1], num_top)
        return self._run(program, state, num_valid, self._rows(tokens))

    def _run(
        self, program: Callable, state: DecodeState, count: np.ndarray, *arguments: Any
    ) -> tuple[DecodeState, Any]:
        state, outputs, captured = program(self.params, state, self._rows(count), *arguments)
        if self._observer is not None:
            self._observer(count.astype(np.int32), captured)
        return state, outputs

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

    def decode_program(self, num_top: int | None, processor: LogitsProcessor | None):
        """The program behind `decode`."""
        return self._decode_program(
            ("decode", num_top, processor),
            sampling_head(num_top, processor),
            (P(), SamplingState(*(_ROWS,) * len(SamplingState._fields))),
        )

    def greedy_program(self):
        """The program behind `decode_greedily`."""
        return self._decode_program(
            ("decode greedily",), greedy_head, (specs_of(self.screening_table), P())
        )

    def _decode_program(self, key: tuple, head: Head, argument_specs: tuple) -> Any:
        """The program (params, state, num_steps, ends, *arguments) -> (state, draws, captured)."""
        most = self.most_steps
        argument_specs = (Ends(P(), _ROWS), *argument_specs)
        output_specs = Step(*(P(None, DATA_AXIS),) * len(Step._fields))
        if most == 1:
            return self._step_program(
                key, 1, one_step(head), argument_specs, output_specs, self.capture
            )
        step = self._step(1, head, NOTHING)

        def steps(params, state, num_steps, ends, *arguments):
            def run(state, active):
                state, drawn, _ = step(params, state, active, *arguments)
                return state, drawn

            return *run_steps(run, most, state, num_steps, ends), {}

        return self._program(
            key,
            lambda: self._compile(
                key, steps, (_ROWS, *argument_specs), (self._state_specs, output_specs, {})
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
        captured_specs = {name: P(None, DATA_AXIS) for name in capture.names}
        if "attention_probs" in capture:
            captured_specs["attention_probs"] = P(None, DATA_AXIS, MODEL_AXIS)
        return self._program(
            key,
            lambda: self._compile(
                key,
                step,
                (_ROWS, *argument_specs),
                (self._state_specs, output_specs, captured_specs),
            ),
        )

    def _step(self, length: int, head: Head, capture: Capture) -> Callable:
        """The function (params, state, count, *arguments) -> (state, outputs, captured).

        `count` says how many of the next `length` tokens each row runs.
        """
        # Programs outlive the views that they are built for; they must not hold what these hold.
        config, dtype, is_intervened = self.config, self.dtype, self._is_intervened

        def step(params, state, count, *arguments):
            params, interventions = params if is_intervened else (params, ())
            tokens = next_tokens(state, length)
            num_valid = count.astype(jnp.int32)
            hidden, cache, captured = forward(
                params,
                config,
                tokens,
                num_valid,
                state.cache,
                dtype,
                capture,
                interventions,
            )
            state = state._replace(cache=cache)
            state, outputs = head(params.embedding, config, state, hidden, count, *arguments)
            return state, outputs, captured

        return step

    @functools.cached_property
    def _state_specs(self) -> DecodeState:
        return specs_of(self.abstract_state(self.mesh.shape[DATA_AXIS], _SMALLEST_CAPACITY))

    def _program(self, key: tuple, build: Callable[[], Any]) -> Program:
        if key not in self._programs:
            # A function of the user's is not known by its name: what it does may have changed.
            stored = self._stores_programs and not any(callable(part) for part in key)
            self._programs[key] = Program(
                build(),
                self.mesh.devices.flatten().tolist(),
                f"{key} {self._form} {self.config} {self.dtype} {self.cache_dtype} {self.mesh}"
                if stored
                else None,
                lambda *args: _in_words(key, *args),
            )
        return self._programs[key]

    def _compile(self, key: tuple, function: Callable, more_in_specs: tuple, out_specs):
        """Jits `function(params, state, ...)` per device; the state's memory goes to the result."""
        function.__name__ = key[0].replace(" ", "_")
        per_device = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(self._param_specs, self._state_specs, *more_in_specs),
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


def _in_words(key: tuple, *args) -> str:
    """Names a program, given its key and arguments: "decode for batch 8, cache 1024"."""
    kind, *details = key
    if kind in ("screening table", "request keys"):
        return f"the {kind}"
    if kind == "piece of a step":
        name, length, *_ = details
        return f"the {name} of a step of {length} tokens"
    if kind in ("prefill", "score", "score tokens"):
        verb = kind if kind == "prefill" else "scoring"
        kind = f"{verb} of {details[0]} tokens"
    batch, capacity = args[1].tokens.shape if args else details[0]
    return f"{kind} for batch {batch}, cache {capacity}"
