"""From logits to a token: small pure functions, in float32, one draw a row.

Dimension key: B batch row, V vocabulary.
"""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request draws its tokens.

    Attributes:
      temperature: Divides the logits; 0 takes the most probable token.
      top_p: Keeps the fewest most probable tokens that together reach this probability (nucleus
        sampling, Holtzman et al., arXiv 1904.09751), among those that top_k leaves.
      top_k: Keeps this many most probable tokens; None for all.
      min_p: Keeps tokens at least this fraction as probable as the most probable; None for all.

    Raises:
      ValueError: If a value is out of range; the message names it.
    """

    temperature: int | float = 0.7
    top_p: int | float = 0.95
    top_k: int | np.integer | None = None
    min_p: int | float | None = None

    def __post_init__(self):
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(
                f"temperature must be 0 (the most probable token) or above, found "
                f"{self.temperature!r}"
            )
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p!r}")
        whole = _is_number(self.top_k) and isinstance(self.top_k, numbers.Integral)
        if self.top_k is not None and not (whole and self.top_k >= 1):
            raise ValueError(f"top_k must be a whole number above 0, or None, found {self.top_k!r}")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be from 0 to 1, or None, found {self.min_p!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


NONE_LEFT = -1
"""In place of a token: every token that is allowed has a logit of -infinity."""

NOT_FINITE = -2
"""In place of a token: a logit of the model is no number, or infinite."""

PROCESSED_NOT_FINITE = -3
"""In place of a token: a logit that a processor has returned is no number, or +infinity."""


def no_token_error(code: int, processor: Any = None, *, all_allowed: bool = True) -> ValueError:
    """Returns the error that says why no token can be drawn.

    Args:
      code: What stands in place of the token: `NONE_LEFT`, `NOT_FINITE` or `PROCESSED_NOT_FINITE`.
      processor: The caller's `logits_processor`, if there is one.
      all_allowed: Whether every token of the vocabulary may be drawn.
    """
    name = getattr(processor, "__qualname__", None) or repr(processor)
    if code == NOT_FINITE:
        return ValueError(
            "no token can be drawn: the model's logits must be finite, found NaN or infinity; a "
            "weight is damaged or too large (verify --deep looks at every one), or an intervention "
            "makes it so"
        )
    if code == PROCESSED_NOT_FINITE:
        return ValueError(
            f"no token can be drawn: logits_processor {name} must return numbers, or -infinity for "
            "a token that is forbidden, found NaN or +infinity"
        )
    if all_allowed:
        return ValueError(
            f"no token can be drawn: logits_processor {name} has set every logit to -infinity; it "
            "has to leave at least one"
        )
    return ValueError(
        f"no token can be drawn: logits_processor {name} has set every logit of allowed_tokens to "
        "-infinity; let the two leave at least one token in common"
    )


class SamplingState(NamedTuple):
    """`SamplingParams` of every row, as arrays.

    Attributes:
      temperature: float32 `[B]`.
      top_p: float32 `[B]`.
      top_k: int32 `[B]`.
      min_p: float32 `[B]`.
      keys: uint32 `[B, 2]`, each request's own random key; a draw consumes it folded with the
        position, so that a row's draws do not depend on its neighbours.
    """

    temperature: Any
    top_p: Any
    top_k: Any
    min_p: Any
    keys: Any


def sampling_state(params: SamplingParams, keys: UInt32[np.ndarray, "B 2"]) -> SamplingState:
    """Returns the state of rows that share `params` and have their own keys."""
    batch = len(keys)
    largest = np.iinfo(np.int32).max
    top_k = largest if params.top_k is None else min(params.top_k, largest)
    return SamplingState(
        temperature=np.full(batch, params.temperature, np.float32),
        top_p=np.full(batch, params.top_p, np.float32),
        top_k=np.full(batch, top_k, np.int32),
        min_p=np.full(batch, params.min_p or 0, np.float32),
        keys=keys,
    )


def sample(
    logits: Float[Array, "B V"],
    allowed: Bool[Array, "*rows V"],
    state: SamplingState,
    positions: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Draws one token a row; greedy rows take the most probable one, by a branch of their own.

    Args:
      logits: float32; -infinity for tokens that must not be drawn.
      allowed: False for tokens that must not be drawn, whatever their logits; `[V]` for all
        rows or `[B, V]`.
      state: Each row's parameters and key.
      positions: Position of the token that is drawn.

    Returns:
      int32; `NONE_LEFT`, or for NaN or +infinity `NOT_FINITE`, where no token can be drawn.
    """
    largest = logits.max(axis=-1)  # NaN if any is
    logits = jnp.where(allowed, logits, -jnp.inf)
    is_left = logits.max(axis=-1) > -jnp.inf
    greedy = state.temperature == 0
    most_probable = jnp.argmax(logits, axis=-1)

    def draw():
        # Below the smallest normal number a device may round to zero; from the maximum down, a
        # tiny temperature overflows to -inf, which is right, and never to inf.
        smallest = jnp.finfo(jnp.float32).tiny
        temperature = jnp.maximum(jnp.where(greedy, 1, state.temperature), smallest)[:, None]
        unfiltered = (state.top_p >= 1) & (state.min_p <= 0) & (state.top_k >= logits.shape[-1])
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        filtered = jax.lax.cond(
            jnp.all(unfiltered | greedy),
            lambda: scaled,
            lambda: keep_probable(scaled, state.top_k, state.top_p, state.min_p),
        )

        def draw_row(key_data, position, row):
            key = jax.random.fold_in(jax.random.wrap_key_data(key_data), position)
            return jax.random.categorical(key, row)

        drawn = jax.vmap(draw_row)(state.keys, positions, filtered)
        return jnp.where(greedy, most_probable, drawn)

    drawn = jax.lax.cond(jnp.all(greedy), lambda: most_probable, draw).astype(jnp.int32)
    drawn = jnp.where(is_left, drawn, NONE_LEFT)
    return jnp.where(largest < jnp.inf, drawn, NOT_FINITE)


def keep_probable(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """Sets the logits of tokens outside top-k, nucleus or min-p to -inf; the best always stays.

    Top-k comes first; the nucleus is measured on what it leaves, renormalised. Among equal logits
    the lower token id counts as the more probable.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    ranks = jnp.arange(logits.shape[-1])
    within_k = ranks < top_k[:, None]
    probs = jax.nn.softmax(jnp.where(within_k, ordered, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    within_p = (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    within_min_p = probs >= min_p[:, None] * probs[:, :1]
    keep = (within_k & within_p & within_min_p) | (ranks == 0)
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros(logits.shape, bool).at[rows, order].set(keep)
    return jnp.where(kept, logits, -jnp.inf)


def top_logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], num_top: int
) -> tuple[Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Log-probability of each row's token, and its `num_top` most probable tokens with theirs.

    They are the model's own: no temperature, no filter.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    best, best_tokens = jax.lax.top_k(logprobs, num_top)
    return chosen, best_tokens.astype(jnp.int32), best
