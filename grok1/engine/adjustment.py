"""What requests add to their logits before a draw: biases, penalties, and ends put off.

One function for the rows of all requests; a row that asks for nothing keeps its logits to the bit.

Dimension key: R row, V vocabulary, S cache capacity, K biased token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NUM_BIASES = 300
"""Most tokens that a row can give a bias, as OpenAI's interface has it."""


class Adjustment(NamedTuple):
    """What is done to the logits of each row.

    Attributes:
      tokens: int32 `[R, NUM_BIASES]`, tokens that get a bias; beyond the vocabulary for none.
      biases: float32 `[R, NUM_BIASES]`, what is added to the logits of these.
      presence: float32 `[R]`, taken from the logit of every token that was generated before.
      frequency: float32 `[R]`, the same, once for each time.
      repetition: float32 `[R]`, divides the positive logits of tokens of the prompt or generated
        before, and multiplies the negative ones (Keskar et al., arXiv 1909.05858).
      begin: int32 `[R]`, the length of the prompt.
      ends: int32 `[R, ends]`, tokens that are not drawn before position `open`; -1 for none.
      open: int32 `[R]`.
      is_measured: bool `[R]`, whether the row adjusts nothing and reports log-probabilities: they
        come from the copies of the head then, as in a call in which no row adjusts anything.
    """

    tokens: Any
    biases: Any
    presence: Any
    frequency: Any
    repetition: Any
    begin: Any
    ends: Any
    open: Any
    is_measured: Any


def adjusted(
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R S"],
    length: Int[Array, " R"],
    adjustment: Adjustment,
) -> Float[Array, "R V"]:
    """Returns the logits with each row's `Adjustment`.

    Args:
      logits: float32.
      tokens: Each row's tokens so far.
      length: How many these are.
      adjustment: What is done.
    """
    rows = jnp.arange(len(logits))[:, None]
    positions = jnp.arange(tokens.shape[1])
    is_text = positions < length[:, None]
    is_new = is_text & (positions >= adjustment.begin[:, None])
    none = jnp.zeros(logits.shape, jnp.float32)
    counts = none.at[rows, tokens].add(is_new.astype(jnp.float32))
    is_seen = none.at[rows, tokens].max(is_text.astype(jnp.float32)) > 0
    repetition = adjustment.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(is_seen & (repetition != 1), repeated, logits)
    logits -= counts * adjustment.frequency[:, None]
    logits -= jnp.where(counts > 0, adjustment.presence[:, None], 0)
    logits = logits.at[rows, adjustment.tokens].add(adjustment.biases, mode="drop")
    is_closed = (length < adjustment.open)[:, None] & (adjustment.ends >= 0)
    # An end that is not there, or open, is put beyond the vocabulary.
    closed = jnp.where(is_closed, adjustment.ends, logits.shape[1])
    return logits.at[rows, closed].set(-jnp.inf, mode="drop")
