"""From logits to a token: small pure functions, in float32, one draw a row.

Dimension key: B batch row, V vocabulary.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from grok1.keywords import shown
from grok1.ops import race
from grok1.ops.cpu import bindings, draws


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
                f"{shown(self.temperature)}"
            )
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1, found {shown(self.top_p)}")
        whole = _is_number(self.top_k) and isinstance(self.top_k, numbers.Integral)
        if self.top_k is not None and not (whole and self.top_k >= 1):
            raise ValueError(
                f"top_k must be a whole number above 0, or None, found {shown(self.top_k)}"
            )
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be from 0 to 1, or None, found {shown(self.min_p)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


NONE_LEFT = -1
"""In place of a token: every token that is allowed has a logit of -infinity."""

NOT_FINITE = -2
"""In place of a token: a logit of the model is no number, or infinite."""

PROCESSED_NOT_FINITE = -3
"""In place of a token: a logit that a processor has returned is no number, or +infinity."""


WHY_NOT_FINITE = (
    "the model's logits must be finite, found NaN or infinity; a weight is damaged or too large "
    "(verify --deep looks at every one), or an intervention makes it so"
)
"""What to say where a token cannot be drawn or scored because a logit is no number."""


def no_token_error(code: int, processor: Any = None, *, all_allowed: bool = True) -> ValueError:
    """Returns the error that says why no token can be drawn.

    Args:
      code: What stands in place of the token: `NONE_LEFT`, `NOT_FINITE` or `PROCESSED_NOT_FINITE`.
      processor: The caller's `logits_processor`, if there is one.
      all_allowed: Whether every token of the vocabulary may be drawn.
    """
    name = getattr(processor, "__qualname__", None) or repr(processor)
    if code == NOT_FINITE:
        return ValueError(f"no token can be drawn: {WHY_NOT_FINITE}")
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
    hottest = float(np.finfo(np.float32).max)  # beyond it all tokens are alike, as they are at it
    return SamplingState(
        temperature=np.full(batch, min(params.temperature, hottest), np.float32),
        top_p=np.full(batch, params.top_p, np.float32),
        top_k=np.full(batch, top_k, np.int32),
        min_p=np.full(batch, params.min_p or 0, np.float32),
        keys=keys,
    )


def sample(
    logits: Float[Array, "B V"],
    allowed: Bool[Array, "... V"],
    state: SamplingState,
    positions: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Draws one token a row, by `ops.race`; a greedy row takes the most probable one.

    Neither form sorts the vocabulary, and both draw the same tokens. On CPUs each row costs what
    its own parameters ask for; elsewhere all rows take the steps that one of them needs.

    Args:
      logits: float32; -infinity for tokens that must not be drawn.
      allowed: False for tokens that must not be drawn, whatever their logits; `[V]` or `[B, V]`.
      state: Each row's parameters and key.
      positions: Position of the token that is drawn.

    Returns:
      int32; `NONE_LEFT`, or for NaN or +infinity `NOT_FINITE`, where no token can be drawn.

    Raises:
      ValueError: If the vocabulary has more than `race.MOST_TOKENS`.
    """
    _check_vocabulary(logits.shape[-1])
    if bindings.is_available():
        parameters = draws.RowParameters(**state._asdict(), positions=positions)
        return draws.sample(logits, allowed, parameters)
    greedy = state.temperature == 0
    remaining = jnp.where(allowed, logits, -jnp.inf)
    most_probable = jnp.argmax(remaining, axis=-1).astype(jnp.int32)

    def draw():
        log_weights = race.log_weights(logits, allowed, jnp.where(greedy, 1, state.temperature))
        filtered = (state.top_p < 1) | (state.min_p > 0) | (state.top_k < logits.shape[-1])
        log_weights = jax.lax.cond(
            jnp.any(filtered & ~greedy),
            lambda: _kept(log_weights, state),
            lambda: log_weights,
        )
        keys = race.position_keys(state.keys, positions)
        scores = log_weights + race.noise(keys, logits.shape[-1])
        scores = jnp.where(log_weights == race.FORBIDDEN, race.FORBIDDEN, scores)
        return jnp.where(greedy, most_probable, jnp.argmax(scores, axis=-1).astype(jnp.int32))

    drawn = jax.lax.cond(jnp.all(greedy), lambda: most_probable, draw)
    drawn = jnp.where(remaining.max(axis=-1) > -jnp.inf, drawn, NONE_LEFT)
    return jnp.where(logits.max(axis=-1) < jnp.inf, drawn, NOT_FINITE)  # NaN is not


def sample_screened(
    x: Float[Array, "B D"],
    table: tuple[Array, Array, Array, Array],
    factor: float,
    allowed: Bool[Array, "... V"],
    state: SamplingState,
    positions: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Draws as `sample` does from the logits `factor * (embedding @ x)`; computes few; on CPUs.

    Args:
      x: The final norm's output.
      table: The embedding, float32 `[V, D]`, and the parts of its `screening_table`.
      factor: Above 0.
      allowed: As for `sample`.
      state: Each row's parameters and key.
      positions: Position of the token that is drawn.

    Returns:
      As `sample`; `NOT_FINITE` also where the embedding or `x` is not finite.

    Raises:
      ValueError: As `sample`.
    """
    _check_vocabulary(len(table[0]))
    parameters = draws.RowParameters(**state._asdict(), positions=positions)
    return draws.draw(x, table, factor, allowed, parameters)


def sample_measured(
    x: Float[Array, "B D"],
    table: tuple[Array, Array, Array, Array, Array],
    factor: float,
    drawing: tuple[Bool[Array, "... V"], SamplingState, Int[Array, " B"]],
    num_top: int,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """As `sample_screened`, with what `top_logprobs` returns of the same logits; on CPUs.

    The logits of the tokens that are reported are float32, and so is the part of the probable ones
    in the sum of all; the others come into that from 12 bits of each number, rounded at random. So
    many count as probable that the sum is expected to be off by no more than 3e-6 of itself.

    Args:
      x: The final norm's output.
      table: The embedding, values and scales of its `screening_table`, and the parts of its
        `remainders`.
      factor: Above 0.
      drawing: `allowed`, `state` and `positions` of `sample_screened`.
      num_top: How many of the most probable tokens to report.

    Returns:
      The tokens, their log-probabilities, the most probable tokens and theirs.

    Raises:
      ValueError: As `sample`.
    """
    _check_vocabulary(len(table[0]))
    allowed, state, positions = drawing
    parameters = draws.RowParameters(**state._asdict(), positions=positions)
    return draws.draw_measured(x, table, factor, (allowed, parameters), num_top)


def _check_vocabulary(size: int) -> None:
    if size > race.MOST_TOKENS:
        raise ValueError(
            f"tokens can be drawn from a vocabulary of up to {race.MOST_TOKENS:,}, found {size:,}; "
            "with temperature 0 and no logprobs the most probable one is found in any"
        )


def keep_probable(
    log_weights: Int[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Int[Array, "B V"]:
    """Forbids tokens outside top-k, nucleus or min-p, by sorting; the best always stays.

    What the filters mean; `keep` and the C++ kernel do the same without sorting. Top-k comes
    first; the nucleus is measured on what it leaves, renormalised. Among equal log-weights the
    lower token id counts as the more probable.

    Args:
      log_weights: int32, of `race.log_weights`; of up to 2**17 tokens.
      top_k: How many tokens stay.
      top_p: Share of the weight that the tokens before one that stays do not reach; 1 for all.
      min_p: Least weight of one that stays, as a share of the largest.
    """
    order = jnp.argsort(log_weights, axis=-1, stable=True, descending=True)
    ordered = jnp.take_along_axis(log_weights, order, axis=-1)
    ranks = jnp.arange(log_weights.shape[-1])
    within_k = ranks < top_k[:, None]
    weights = race.weights(jnp.where(within_k, ordered, race.FORBIDDEN))
    sums = race.Sum(*(jnp.cumsum(limb, axis=-1) for limb in weights))
    before = race.Sum(*(limbs - limb for limbs, limb in zip(sums, weights, strict=True)))
    limit = top_p * race.Sum(*(limb[:, -1] for limb in sums)).value()
    within_p = (before.value() < limit[:, None]) | (top_p[:, None] >= 1)
    within_min_p = race.relative_weights(ordered) >= min_p[:, None]
    kept = (within_k & within_p & within_min_p) | (ranks == 0)
    rows = jnp.arange(len(log_weights))[:, None]
    return log_weights.at[rows, order].set(jnp.where(kept, ordered, race.FORBIDDEN))


def _kept(log_weights: Int[Array, "B V"], state: SamplingState) -> Int[Array, "B V"]:
    # A pass costs a GPU three launches: on an H200 four bits were fastest, at 1 row and at 32.
    # The comparisons take a byte for each of 15 bounds and a token, too much for very many rows.
    bits = 4 if len(log_weights) <= 64 else 2
    return jax.lax.platform_dependent(
        log_weights,
        state.top_k,
        state.top_p,
        state.min_p,
        cpu=keep,
        default=functools.partial(keep, bits=bits),
    )


def keep(
    log_weights: Int[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    bits: int = 1,
) -> Int[Array, "B V"]:
    """As `keep_probable`, without sorting: by passes over the tokens, as many whatever stays.

    Args:
      log_weights: As for `keep_probable`.
      top_k: As for `keep_probable`.
      top_p: As for `keep_probable`.
      min_p: As for `keep_probable`.
      bits: How many of the 31 bits of the least log-weight that stays a pass finds, by comparing
        every token with 2**bits - 1 log-weights.
    """
    size = log_weights.shape[-1]

    def number(log_weights):
        nothing = jnp.zeros(log_weights.shape, jnp.uint32)
        return race.Sum(nothing, nothing, jnp.ones_like(nothing))

    def within_k():
        return _keep_below(log_weights, number, jnp.minimum(top_k, size).astype(jnp.float32), bits)

    def within_p():
        limit = top_p * race.total(race.weights(within)).value()
        return _keep_below(within, race.weights, jnp.where(top_p < 1, limit, jnp.inf), bits)

    within = jax.lax.cond(jnp.any(top_k < size), within_k, lambda: log_weights)
    within = jax.lax.cond(jnp.any(top_p < 1), within_p, lambda: within)
    enough = race.relative_weights(log_weights) >= min_p[:, None]
    best = jnp.argmax(log_weights, axis=-1, keepdims=True)
    is_best = jnp.arange(size, dtype=best.dtype) == best
    return jnp.where(enough | is_best, within, race.FORBIDDEN)


def _keep_below(
    log_weights: Int[Array, "B V"],
    weigh: Callable[[Int[Array, "..."]], race.Sum],
    limit: Float[Array, " B"],
    bits: int,
) -> Int[Array, "B V"]:
    """Keeps tokens from the most probable on, as long as those before weigh less than a limit."""
    weights = weigh(log_weights)

    def stays(before: race.Sum):
        return before.value() < limit[:, None]

    def before(bounds: Int[Array, "B T"]) -> race.Sum:
        return race.total(weights, log_weights[:, None] > bounds[..., None])

    def narrow(i, low):
        # The least that stays is above low, by no more than the bits that are not yet found tell.
        shift = jnp.maximum(0, 31 - bits * (i + 1))
        bounds = low[:, None] + (jnp.arange(1, 1 << bits, dtype=jnp.int32) << shift)
        return low + (jnp.sum(~stays(before(bounds)), axis=-1, dtype=jnp.int32) << shift)

    best = log_weights.max(axis=-1)
    low = jnp.full_like(best, race.LOWEST - 1)
    # Few passes are written out: a turn of a loop costs launches. Many would take long to compile.
    low = jax.lax.fori_loop(0, -(-31 // bits), narrow, low, unroll=bits > 2)
    last = jnp.minimum(low + 1, best)

    # Of those that weigh the same: how many more than one stay, in two digits.
    equals = log_weights == last[:, None]
    num_equals = equals.sum(axis=-1, dtype=jnp.int32)
    above, one = before(last[:, None]), race.Sum(*(limb[:, None] for limb in weigh(last)))
    more = jnp.zeros_like(num_equals)
    for digit in (512, 1):
        counts = more[:, None] + digit * jnp.arange(1, 512, dtype=jnp.int32)
        stay = (counts < num_equals[:, None]) & stays(above.plus(one, counts))
        more = more + digit * stay.sum(axis=-1, dtype=jnp.int32)

    def lowest_ids():
        return equals & (jnp.cumsum(equals, axis=-1) <= more[:, None] + 1)

    equals = jax.lax.cond(jnp.any(more + 1 < num_equals), lowest_ids, lambda: equals)
    return jnp.where((log_weights > last[:, None]) | equals, log_weights, race.FORBIDDEN)


def top_logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], num_top: int
) -> tuple[Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Log-probability of each row's token, and its `num_top` most probable tokens with theirs.

    They are the model's own, no temperature, no filter, and finite if the logits are.
    """
    if bindings.is_available():
        return draws.log_probabilities(logits, tokens, num_top)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    lowest = jnp.finfo(jnp.float32).min
    logprobs = jnp.maximum(shifted - jax.nn.logsumexp(shifted, axis=-1, keepdims=True), lowest)
    # Where no token can be drawn there is none to look up.
    places = jnp.maximum(tokens, 0)[:, None]
    chosen = jnp.take_along_axis(logprobs, places, axis=-1)[:, 0]
    best, best_tokens = jax.lax.top_k(logprobs, num_top)
    return chosen, best_tokens.astype(jnp.int32), best
