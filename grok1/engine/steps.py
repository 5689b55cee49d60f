"""A step of a batch: the tokens to run, what is made of the last hidden states, and when to stop.

A state has a fixed number of slots, each for one request at a time; a step runs some of them, its
rows. What a step does not run stays as it is, so that a step costs what its rows cost.

A head runs per device, inside `jax.shard_map`, behind the layers, whichever way these were run. It
takes what the layers have left (`LastHidden`), the state with the cache that they have grown, the
rows that were run, and arguments of its own; it returns the state and its outputs.

Dimension key: B slot of the state, R row of a step, T position in this step, D model dim, S cache
capacity, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.config import ModelConfig
from grok1.engine.adjustment import Adjustment, adjusted
from grok1.engine.sampling import (
    NOT_FINITE,
    PROCESSED_NOT_FINITE,
    SamplingState,
    sample,
    sample_measured,
    sample_screened,
    top_logprobs,
)
from grok1.nn.sharding import DATA_AXIS
from grok1.nn.unembedding import TokenStatistics, most_probable, token_statistics, unembed
from grok1.ops.attention import KVCache
from grok1.ops.screening import Remainders, ScreeningTable

LogitsProcessor = Callable[[Array, Array, Array], Array]
"""A user's hook: (logits `[R, V]`, tokens `[R, S]`, length `[R]`) -> logits, in JAX operations."""

NUM_ENDS = 8
"""How many tokens can end a row on the device."""


class DecodeState(NamedTuple):
    """Requests in progress, one a slot.

    Attributes:
      cache: Keys and values of the positions run so far, and their number `length`.
      tokens: int32 `[B, S]`, each slot's prompt and generated tokens; those from `length` on are
        still to be run, then come zeros.
    """

    cache: KVCache
    tokens: Any


class Rows(NamedTuple):
    """Which slots a call runs, and how far.

    Attributes:
      slots: int32 `[R]`, the slot of each row, no slot twice; one outside the state belongs to no
        request. Over several devices the rows are shared out as the slots are.
      count: int32 `[R]`, how many tokens, or steps, of each row are run; 0 leaves it as it is.
    """

    slots: Any
    count: Any


class Step(NamedTuple):
    """What one decode step drew, or, with a leading axis on every leaf, several.

    Attributes:
      tokens: int32 `[R]`; meaningless for rows that were not active. Where no token can be drawn,
        the negative number that `sampling.no_token_error` explains; the state then has token 0.
      logprobs: float32 `[R]`.
      top_tokens: int32 `[R, top]`, the most probable tokens.
      top_logprobs: float32 `[R, top]`.
    """

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any


class Ends(NamedTuple):
    """What ends a row before it has run the steps that it was given.

    Attributes:
      tokens: int32 `[R, NUM_ENDS]`, those after which a row is over; -1 for none.
      begin: int32 `[R]`, the length of each row's prompt, in which they end nothing.
    """

    tokens: Any
    begin: Any


class Draw(NamedTuple):
    """How a call draws tokens.

    Attributes:
      allowed: False for tokens that must not be drawn, `[V]` for all rows or `[R, V]`.
      sampling: Each row's parameters and key.
      num_top: Alternatives to report with log-probabilities; None for no log-probabilities.
      processor: Changes the logits before the draw. Each function compiles a program.
      adjustment: Changes the logits of each row; not together with a processor.
    """

    allowed: Any
    sampling: SamplingState
    num_top: int | None = None
    processor: LogitsProcessor | None = None
    adjustment: Adjustment | None = None

    @property
    def takes_logits_as_they_are(self) -> bool:
        """Whether nothing changes the logits before the draw, or needs them all."""
        return self.processor is None and self.adjustment is None


class LastHidden(NamedTuple):
    """The output of the layers, and what makes logits of it.

    Attributes:
      embedding: This device's rows of the embedding, `[V, D]`.
      config: The architecture.
      values: float32 `[R, T, D]`, the residual stream after the final norm.
    """

    embedding: Any
    config: ModelConfig
    values: Any


Head = Callable[..., tuple[DecodeState, Any]]


def rows_here(state: DecodeState, rows: Rows) -> Rows:
    """A device's rows, with their slots among those that this device has."""
    num_slots = len(state.cache.length)
    slots = rows.slots - jax.lax.axis_index(DATA_AXIS) * num_slots
    # No index is negative, which would count from the end.
    return rows._replace(slots=jnp.where(slots < 0, num_slots, slots))


def lengths(state: DecodeState, slots: Int[Array, " R"]) -> Int[Array, " R"]:
    """How many tokens of each row have been run; 0 where there is no slot."""
    return state.cache.length.at[slots].get(mode="fill", fill_value=0)


def next_tokens(state: DecodeState, slots: Int[Array, " R"], count: int) -> Int[Array, "R count"]:
    """The next `count` tokens of each row; zeros, never other tokens, past the end."""
    places = lengths(state, slots)[:, None] + jnp.arange(count)
    return state.tokens.at[slots[:, None], places].get(mode="fill", fill_value=0)


def assigned(state: DecodeState, slots: Int[Array, " R"], tokens: Int[Array, "R S"]) -> DecodeState:
    """The state with these tokens in these slots, and nothing run of them."""
    return DecodeState(
        state.cache._replace(length=state.cache.length.at[slots].set(0, mode="drop")),
        state.tokens.at[slots].set(tokens, mode="drop"),
    )


def no_head(hidden: LastHidden, state: DecodeState, rows: Rows) -> tuple[DecodeState, tuple[()]]:
    """For prompts, of which only the cache is wanted."""
    return state, ()


def logits_head(
    hidden: LastHidden, state: DecodeState, rows: Rows
) -> tuple[DecodeState, Float[Array, "R T vocab"]]:
    """The logits after every position."""
    flat = hidden.values.reshape(-1, hidden.values.shape[-1])
    logits = unembed(hidden.embedding, hidden.config, flat)
    return state, logits.reshape(*hidden.values.shape[:2], -1)


def scoring_head(num_top: int) -> Head:
    """Returns the head that scores a token after every position, as `Engine.score_tokens` says."""

    def score(
        hidden: LastHidden, state: DecodeState, rows: Rows, tokens: Int[Array, "R T"]
    ) -> tuple[DecodeState, TokenStatistics]:
        flat = hidden.values.reshape(-1, hidden.values.shape[-1])
        found = token_statistics(hidden.embedding, hidden.config, flat, tokens.reshape(-1), num_top)
        return state, TokenStatistics(
            *(leaf.reshape(*tokens.shape, *leaf.shape[1:]) for leaf in found)
        )

    return score


def sampling_head(num_top: int | None, processor: LogitsProcessor | None) -> Head:
    """Returns the head that draws a token a row, as `Engine.decode` says."""

    def draw(hidden: LastHidden, state, rows: Rows, allowed, sampling: SamplingState, *adjustment):
        length = lengths(state, rows.slots)
        logits = unembed(hidden.embedding, hidden.config, hidden.values[:, 0])
        if adjustment:
            own = adjusted(logits, state.tokens[rows.slots], length, *adjustment)
            drawn = sample(own, allowed, sampling, length)
        elif processor is None:
            drawn = sample(logits, allowed, sampling, length)
        else:
            processed = _processed(processor, logits, state.tokens[rows.slots], length)
            drawn = sample(processed, allowed, sampling, length)
            drawn = jnp.where(drawn == NOT_FINITE, PROCESSED_NOT_FINITE, drawn)
        drawn = jnp.where(jnp.isfinite(logits).all(axis=-1), drawn, NOT_FINITE)
        step = _without_logprobs(drawn)
        if num_top is not None:
            step = Step(drawn, *top_logprobs(logits, drawn, num_top))
        return _advanced(state, rows, drawn), step

    return draw


def _processed(
    processor: LogitsProcessor,
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R S"],
    length: Int[Array, " R"],
) -> Float[Array, "R V"]:
    # The kernels that draw read as many float32 as there are logits, whatever they are given.
    made = processor(logits, tokens, length)
    is_array = hasattr(made, "shape") and hasattr(made, "dtype")
    if not is_array or made.shape != logits.shape or not jnp.issubdtype(made.dtype, jnp.floating):
        name = getattr(processor, "__qualname__", None) or repr(processor)
        found = f"{made.dtype}{list(made.shape)}" if is_array else type(made).__name__
        raise ValueError(
            f"logits_processor {name} must return logits as it gets them, "
            f"{logits.dtype}{list(logits.shape)}, found {found}"
        )
    return jnp.asarray(made, logits.dtype)


def greedy_head(
    hidden: LastHidden,
    state: DecodeState,
    rows: Rows,
    table: ScreeningTable,
    allowed: Bool[Array, "*R vocab"],
) -> tuple[DecodeState, Step]:
    """The most probable token of each row, by way of the `ScreeningTable`."""
    chosen = most_probable(hidden.embedding, table, hidden.values[:, 0], allowed)
    chosen = jnp.where(chosen < 0, NOT_FINITE, chosen)
    return _advanced(state, rows, chosen), _without_logprobs(chosen)


def screened_head(
    hidden: LastHidden,
    state: DecodeState,
    rows: Rows,
    table: ScreeningTable,
    allowed: Bool[Array, "*R vocab"],
    sampling: SamplingState,
) -> tuple[DecodeState, Step]:
    """As `sampling_head` without log-probabilities or processor, by way of the `ScreeningTable`."""
    drawn = sample_screened(
        hidden.values[:, 0],
        (hidden.embedding, *table),
        hidden.config.output_multiplier_scale,
        allowed,
        sampling,
        lengths(state, rows.slots),
    )
    return _advanced(state, rows, drawn), _without_logprobs(drawn)


def measured_head(num_top: int) -> Head:
    """Returns the head that draws as `screened_head` does, with log-probabilities.

    With an `Adjustment` it draws as `sampling_head` does. What a row reports does not depend on
    whether others adjust their logits: those that do not are measured all the same.
    """

    def draw(
        hidden: LastHidden,
        state: DecodeState,
        rows: Rows,
        tables: tuple[ScreeningTable, Remainders],
        allowed: Bool[Array, "*R vocab"],
        sampling: SamplingState,
        *adjustment: Adjustment,
    ) -> tuple[DecodeState, Step]:
        table, remainders = tables

        def measured() -> Step:
            step = sample_measured(
                hidden.values[:, 0],
                (hidden.embedding, table.values, table.scales, *remainders),
                hidden.config.output_multiplier_scale,
                (allowed, sampling, lengths(state, rows.slots)),
                num_top,
            )
            return Step(*step)

        if not adjustment:
            step = measured()
            return _advanced(state, rows, step.tokens), step
        advanced, step = sampling_head(num_top, None)(
            hidden, state, rows, allowed, sampling, *adjustment
        )
        is_measured = adjustment[0].is_measured
        own = jax.lax.cond(is_measured.any(), measured, lambda: step)
        # The same tokens are drawn either way.
        found = jax.tree.map(
            lambda one, other: jnp.where(
                is_measured.reshape(-1, *(1,) * (one.ndim - 1)), one, other
            ),
            own._replace(tokens=step.tokens),
            step,
        )
        return advanced, found

    return draw


def one_step(head: Head) -> Head:
    """Returns a head that draws once for the rows whose count is not 0, whatever may end them."""

    def draw(hidden, state, rows: Rows, ends: Ends, *arguments):
        state, step = head(hidden, state, rows, *arguments)
        return state, jax.tree.map(lambda leaf: leaf[None], step)

    return draw


def run_steps(
    step: Callable[[DecodeState, Rows], tuple[DecodeState, Step]],
    most: int,
    state: DecodeState,
    rows: Rows,
    ends: Ends,
) -> tuple[DecodeState, Step]:
    """Runs decode steps until each row has run its own number of them, or is over.

    Args:
      step: Takes the state and the rows, with a count of 1 for those to run; returns the new state
        and the draws.
      most: The largest count that there may be.
      state: The requests.
      rows: Which run, and how many steps of each.
      ends: What ends a row earlier.

    Returns:
      The state, and the draws with a leading axis of `most` steps; what a row did not run is
      meaningless.
    """

    def active_in(number, state):
        is_new = lengths(state, rows.slots) >= ends.begin
        is_end = (next_tokens(state, rows.slots, 1) == ends.tokens).any(axis=1)
        return (number < rows.count) & ~(is_end & is_new)

    def run(carry):
        number, state, active, drawn = carry
        state, one = step(state, running(active))
        drawn = jax.tree.map(lambda all_steps, leaf: all_steps.at[number].set(leaf), drawn, one)
        return number + 1, state, active_in(number + 1, state), drawn

    def goes_on(carry):
        number, _, active, _ = carry
        return (number < most) & active.any()

    def running(active):
        return rows._replace(count=active.astype(jnp.int32))

    active = active_in(0, state)
    _, shapes = jax.eval_shape(step, state, running(active))
    drawn = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)
    _, state, _, drawn = jax.lax.while_loop(goes_on, run, (0, state, active, drawn))
    return state, drawn


def _advanced(state: DecodeState, rows: Rows, drawn: Array) -> DecodeState:
    """The state with the drawn tokens at the ends of the rows that run."""
    # Written beyond the last position when a row does not run, so that the scatter drops it.
    places = jnp.where(rows.count > 0, lengths(state, rows.slots), state.tokens.shape[1])
    tokens = state.tokens.at[rows.slots, places].set(jnp.maximum(drawn, 0), mode="drop")
    return state._replace(tokens=tokens)


def _without_logprobs(drawn: Array) -> Step:
    none = jnp.zeros((len(drawn), 0))
    return Step(drawn, none.sum(-1), none.astype(jnp.int32), none)
