"""A step of a batch: the tokens to run, what is made of the last hidden states, and when to stop.

A head runs per device, inside `jax.shard_map`, behind the layers, whichever way these were run. It
takes this device's embedding, the configuration, the state with the cache that the layers have
grown, their output `[B, T, D]`, how many of the T tokens of each row are real, and arguments of its
own; it returns the state and its outputs.

Dimension key: B batch row, T position in this step, D model dim, S cache capacity, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.config import ModelConfig
from grok1.engine.sampling import (
    NOT_FINITE,
    PROCESSED_NOT_FINITE,
    SamplingState,
    sample,
    top_logprobs,
)
from grok1.nn.unembedding import (
    ScreeningTable,
    TokenStatistics,
    most_probable,
    token_statistics,
    unembed,
)
from grok1.ops.attention import KVCache

LogitsProcessor = Callable[[Array, Array, Array], Array]
"""A user's hook: (logits `[B, V]`, tokens `[B, S]`, length `[B]`) -> logits, in JAX operations."""


class DecodeState(NamedTuple):
    """A batch in progress.

    Attributes:
      cache: Keys and values of the positions run so far, and their number `length`.
      tokens: int32 `[B, S]`, each row's prompt and generated tokens; those from `length` on are
        still to be run, then come zeros.
    """

    cache: KVCache
    tokens: Any


class Step(NamedTuple):
    """What one decode step drew, or, with a leading axis on every leaf, several.

    Attributes:
      tokens: int32 `[B]`; meaningless for rows that were not active. Where no token can be drawn,
        the negative number that `sampling.no_token_error` explains; the state then has token 0.
      logprobs: float32 `[B]`.
      top_tokens: int32 `[B, top]`, the most probable tokens.
      top_logprobs: float32 `[B, top]`.
    """

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any


class Ends(NamedTuple):
    """What ends a row before it has run the steps that it was given.

    Attributes:
      tokens: bool `[V]`, True for those after which a row is over.
      begin: int32 `[B]`, the length of each row's prompt, in which they end nothing.
    """

    tokens: Any
    begin: Any


Head = Callable[..., tuple[DecodeState, Any]]


def next_tokens(state: DecodeState, count: int) -> Int[Array, "B count"]:
    """The next `count` tokens of each row; zeros, never other tokens, past the end."""
    places = state.cache.length[:, None] + jnp.arange(count)
    return jnp.take_along_axis(state.tokens, places, axis=1, mode="fill", fill_value=0)


def no_head(
    embedding: Float[Array, "V D"],
    config: ModelConfig,
    state: DecodeState,
    hidden: Float[Array, "B T D"],
    num_valid: Int[Array, " B"],
) -> tuple[DecodeState, tuple[()]]:
    """For prompts, of which only the cache is wanted."""
    return state, ()


def logits_head(
    embedding: Float[Array, "V D"],
    config: ModelConfig,
    state: DecodeState,
    hidden: Float[Array, "B T D"],
    num_valid: Int[Array, " B"],
) -> tuple[DecodeState, Float[Array, "B T vocab"]]:
    """The logits after every position."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = unembed(embedding, config, flat)
    return state, logits.reshape(*hidden.shape[:2], -1)


def scoring_head(num_top: int) -> Head:
    """Returns the head that scores a token after every position, as `Engine.score_tokens` says."""

    def score(
        embedding: Float[Array, "V D"],
        config: ModelConfig,
        state: DecodeState,
        hidden: Float[Array, "B T D"],
        num_valid: Int[Array, " B"],
        tokens: Int[Array, "B T"],
    ) -> tuple[DecodeState, TokenStatistics]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        found = token_statistics(embedding, config, flat, tokens.reshape(-1), num_top)
        return state, TokenStatistics(
            *(leaf.reshape(*tokens.shape, *leaf.shape[1:]) for leaf in found)
        )

    return score


def sampling_head(num_top: int | None, processor: LogitsProcessor | None) -> Head:
    """Returns the head that draws a token a row, as `Engine.decode` says."""

    def draw(embedding, config, state, hidden, active, allowed, sampling: SamplingState):
        length = state.cache.length
        logits = unembed(embedding, config, hidden[:, 0])
        if processor is None:
            drawn = sample(logits, allowed, sampling, length)
        else:
            processed = processor(logits, state.tokens, length)
            drawn = sample(processed, allowed, sampling, length)
            drawn = jnp.where(drawn == NOT_FINITE, PROCESSED_NOT_FINITE, drawn)
        drawn = jnp.where(jnp.isfinite(logits).all(axis=-1), drawn, NOT_FINITE)
        step = _without_logprobs(drawn)
        if num_top is not None:
            step = Step(drawn, *top_logprobs(logits, drawn, num_top))
        return _advanced(state, active, drawn), step

    return draw


def greedy_head(
    embedding: Float[Array, "V D"],
    config: ModelConfig,
    state: DecodeState,
    hidden: Float[Array, "B 1 D"],
    active: Bool[Array, " B"],
    table: ScreeningTable,
    allowed: Bool[Array, " vocab"],
) -> tuple[DecodeState, Step]:
    """The most probable token of each row, by way of the `ScreeningTable`."""
    chosen = most_probable(embedding, table, hidden[:, 0], allowed)
    chosen = jnp.where(chosen < 0, NOT_FINITE, chosen)
    return _advanced(state, active, chosen), _without_logprobs(chosen)


def one_step(head: Head) -> Head:
    """Returns a head that draws once for the rows whose count is not 0, whatever may end them."""

    def draw(embedding, config, state, hidden, count, ends: Ends, *arguments):
        state, step = head(embedding, config, state, hidden, count > 0, *arguments)
        return state, jax.tree.map(lambda leaf: leaf[None], step)

    return draw


def run_steps(
    step: Callable[[DecodeState, Array], tuple[DecodeState, Step]],
    most: int,
    state: DecodeState,
    num_steps: Int[Array, " B"],
    ends: Ends,
) -> tuple[DecodeState, Step]:
    """Runs decode steps until each row has run its own number of them, or is over.

    Args:
      step: Takes the state and bool `[B]`, the rows to run; returns the new state and the draws.
      most: The largest `num_steps` that there may be.
      state: The batch.
      num_steps: Steps of each row.
      ends: What ends a row earlier.

    Returns:
      The state, and the draws with a leading axis of `most` steps; what a row did not run is
      meaningless.
    """

    def active_in(number, state):
        is_new = state.cache.length >= ends.begin
        return (number < num_steps) & ~(ends.tokens[next_tokens(state, 1)[:, 0]] & is_new)

    def run(carry):
        number, state, active, drawn = carry
        state, one = step(state, active)
        drawn = jax.tree.map(lambda all_steps, leaf: all_steps.at[number].set(leaf), drawn, one)
        return number + 1, state, active_in(number + 1, state), drawn

    def goes_on(carry):
        number, _, active, _ = carry
        return (number < most) & active.any()

    active = active_in(0, state)
    _, shapes = jax.eval_shape(step, state, active)
    drawn = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)
    _, state, _, drawn = jax.lax.while_loop(goes_on, run, (0, state, active, drawn))
    return state, drawn


def _advanced(state: DecodeState, active: Array, drawn: Array) -> DecodeState:
    """The state with the drawn tokens at the active rows' ends."""
    # Written beyond the last row's end when inactive, so that the scatter drops it.
    places = jnp.where(active, state.cache.length, state.tokens.size)
    row = jnp.arange(len(drawn))
    tokens = state.tokens.at[row, places].set(jnp.maximum(drawn, 0), mode="drop")
    return state._replace(tokens=tokens)


def _without_logprobs(drawn: Array) -> Step:
    none = jnp.zeros((len(drawn), 0))
    return Step(drawn, none.sum(-1), none.astype(jnp.int32), none)
