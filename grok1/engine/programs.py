"""The programs of an engine: what tells one from another, and how a step becomes one.

A program is known by its `Key` and by what the whole engine is compiled for. Each is compiled once
for each set of shapes of its arguments.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.config import ModelConfig
from grok1.engine import compilation, shapes
from grok1.engine.compilation import Program
from grok1.engine.steps import (
    DecodeState,
    Head,
    LastHidden,
    LogitsProcessor,
    Rows,
    assigned,
    next_tokens,
    rows_here,
    run_steps,
)
from grok1.nn.capture import NOTHING, Capture
from grok1.nn.decoder import Run, forward
from grok1.nn.sharding import DATA_AXIS, MODEL_AXIS, abstract_cache, specs_of
from grok1.nn.transformer import Params

ROWS = P(DATA_AXIS)
"""Of an argument with an entry for each row."""

_ROW_SPECS = Rows(ROWS, ROWS)


class Weights(NamedTuple):
    """What a step reads: a model, and what intervenes in it.

    Attributes:
      params: The model.
      interventions: Hooks of `nn.hooks`, on every device.
    """

    params: Params
    interventions: tuple[Any, ...] = ()


class Kind(enum.Enum):
    """What a program does."""

    EMPTY_CACHE = "empty cache"
    REQUEST_KEYS = "request keys"
    SCREENING_TABLE = "screening table"
    REMAINDERS = "screening table's remainders"
    ASSIGN = "assign"
    PREFILL = "prefill"
    SCORE = "score"
    SCORE_TOKENS = "score tokens"
    DECODE = "decode"
    DECODE_GREEDILY = "decode greedily"
    PIECE = "piece of a step"
    EMPTY_BLOCKS = "empty blocks"
    KEEP_BLOCK = "keep block"
    PUT_BLOCK = "put block"
    TAKE_BLOCK = "take block"
    PLACE_BLOCK = "place block"


class Key(NamedTuple):
    """What tells a program from the others of an engine.

    Attributes:
      kind: What it does.
      length: Tokens of a row that it runs; 0 if it runs none.
      shape: Batch and capacity of the state that it makes.
      capture: What it captures.
      num_top: Alternatives that it reports; None for no log-probabilities.
      processor: The caller's function within it.
      masks_differ: Whether each row has allowed tokens of its own.
      adjusts: Whether it adjusts the logits of each row.
      is_screened: Whether it draws by way of the screening table.
      piece: Which piece of a layerwise step it is.
      of: The kind of step whose end the piece is.
    """

    kind: Kind
    length: int = 0
    shape: tuple[int, ...] = ()
    capture: Capture = NOTHING
    num_top: int | None = None
    processor: LogitsProcessor | None = None
    masks_differ: bool = False
    adjusts: bool = False
    is_screened: bool = False
    piece: str = ""
    of: Kind | None = None

    @property
    def decodes(self) -> bool:
        """Whether it draws tokens."""
        return self.kind in (Kind.DECODE, Kind.DECODE_GREEDILY)


class StepSpec(NamedTuple):
    """A step: the model over the next tokens of some rows, and a head.

    Attributes:
      key: Of its program.
      head: What is made of the last hidden states.
      argument_specs: How the head's arguments lie over the devices.
      output_specs: How its outputs do.
    """

    key: Key
    head: Head
    argument_specs: tuple[Any, ...]
    output_specs: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all programs of an engine are compiled for.

    Attributes:
      config: The model's architecture.
      mesh: Axes (data, model).
      dtype: Type of the products with weights.
      cache_dtype: Type of keys and values.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: Any
    cache_dtype: Any

    @functools.cached_property
    def rows_sharding(self) -> NamedSharding:
        """Of an array with an entry for each row."""
        return NamedSharding(self.mesh, ROWS)

    @property
    def is_alone(self) -> bool:
        """Whether this process has all devices."""
        return self.rows_sharding.is_fully_addressable

    def abstract_state(self, batch: int, capacity: int) -> DecodeState:
        """Returns the shapes, types and shardings of a `DecodeState`."""
        cache = abstract_cache(self.config, self.mesh, batch, capacity, self.cache_dtype)
        tokens = jax.ShapeDtypeStruct((batch, capacity), np.int32, sharding=self.rows_sharding)
        return DecodeState(cache, tokens)

    @functools.cached_property
    def smallest_state(self) -> DecodeState:
        """The state that is as every other in all but its sizes."""
        capacity = shapes.smallest_capacity(self.config.sequence_len)
        return self.abstract_state(self.mesh.shape[DATA_AXIS], capacity)


class Programs:
    """The programs of an engine in one view: what it captures, what intervenes.

    They outlive the engines that they are built for, and hold nothing of what those hold.
    """

    def __init__(
        self,
        setup: Setup,
        weights: Weights,
        view: str,
        held: compilation.Programs,
        in_words: Callable[..., str],
    ):
        """Compiles nothing yet.

        Args:
          setup: What they are compiled for.
          weights: Whose shapes and shardings they read, and whose kinds of hooks.
          view: Names what sets them apart from those of other views.
          held: Keeps them.
          in_words: Names one, given its key and arguments.
        """
        self._setup, self._view = setup, view
        self._weight_specs = specs_of(weights)
        self._held, self._in_words = held, in_words

    @property
    def setup(self) -> Setup:
        """What they are compiled for."""
        return self._setup

    @property
    def held(self) -> compilation.Programs:
        """Those that were asked for, and those of other views."""
        return self._held

    def get(self, key: Key, make: Callable[[], Any]) -> Any:
        """Returns what was made for this key, or makes it."""
        return self._held.find(key, make)

    def compiled(self, key: Key, function: Any) -> Program:
        """Returns the program of a jitted function."""
        setup = self._setup
        # A function of the user's is not known by its name: what it does may have changed.
        is_known = key.processor is None
        named = f"{key} {self._view} {setup.config} {setup.dtype} {setup.cache_dtype} {setup.mesh}"
        devices = setup.mesh.devices.flatten().tolist()
        return Program(
            function, devices, named if is_known else None, functools.partial(self._in_words, key)
        )

    def step(self, spec: StepSpec) -> Program:
        """Returns the program (weights, state, rows, *arguments) -> (state, outputs, captured)."""
        step = self._function(spec)

        def step_here(weights, state, rows, *arguments):
            return step(weights, state, rows_here(state, rows), *arguments)

        capture = spec.key.capture
        captured_specs = {name: P(None, DATA_AXIS) for name in capture.names}
        if "attention_probs" in capture:
            captured_specs["attention_probs"] = P(None, DATA_AXIS, MODEL_AXIS)
        return self._jitted(spec, step_here, captured_specs)

    def steps(self, spec: StepSpec, most: int) -> Program:
        """As `step`, for a head that draws a token: up to `most` of them, one after the other.

        Args:
          spec: The first of its arguments are the `Ends`; its outputs have an axis of steps.
          most: Most steps of a row.
        """
        step = self._function(spec)

        def steps(weights, state, rows, ends, *arguments):
            def run(state, rows):
                state, drawn, _ = step(weights, state, rows, *arguments)
                return state, drawn

            return *run_steps(run, most, state, rows_here(state, rows), ends), {}

        return self._jitted(spec, steps, {})

    def assign(self) -> Program:
        """Returns the program (state, slots, tokens) -> state of `steps.assigned`."""

        def assign(state, slots, tokens):
            return assigned(state, rows_here(state, Rows(slots, slots)).slots, tokens)

        specs = specs_of(self._setup.smallest_state)
        per_device = self.per_device(assign, (specs, ROWS, ROWS), specs)
        return self.compiled(Key(kind=Kind.ASSIGN), jax.jit(per_device, donate_argnums=0))

    def per_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Returns a function of whole arrays that runs on every device's part of them."""
        # Loops with a data-dependent length cannot be checked for replication.
        return jax.shard_map(
            function,
            mesh=self._setup.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )

    def _function(self, spec: StepSpec) -> Callable:
        """The function (weights, state, rows, *arguments) -> (state, outputs, captured).

        It runs `rows.count` of the next tokens of each row, on a device that knows its own slots
        alone (`steps.rows_here`).
        """
        config, dtype = self._setup.config, self._setup.dtype
        head, length, capture = spec.head, spec.key.length, spec.key.capture

        def step(weights, state, rows, *arguments):
            params, interventions = weights
            run = Run(config, dtype, capture, interventions)
            tokens = next_tokens(state, rows.slots, length)
            hidden, cache, captured = forward(
                params, run, state.cache, rows.slots, tokens, rows.count
            )
            state = state._replace(cache=cache)
            last = LastHidden(params.embedding, config, hidden)
            state, outputs = head(last, state, rows, *arguments)
            return state, outputs, captured

        return step

    def _jitted(self, spec: StepSpec, function: Callable, captured_specs: Any) -> Program:
        """Compiles a step per device; the state's memory is the result's."""
        setup, key = self._setup, spec.key
        function.__name__ = key.kind.value.replace(" ", "_")
        state_specs = specs_of(setup.smallest_state)
        per_device = self.per_device(
            function,
            (self._weight_specs, state_specs, _ROW_SPECS, *spec.argument_specs),
            (state_specs, spec.output_specs, captured_specs),
        )
        if setup.is_alone:
            return self.compiled(key, jax.jit(per_device, donate_argnums=1))
        # The state stays where it is; what the host reads must be whole in every process.
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.smallest_state)
        everywhere = NamedSharding(setup.mesh, P())
        shardings = (state_shardings, everywhere, everywhere)
        return self.compiled(key, jax.jit(per_device, donate_argnums=1, out_shardings=shardings))
