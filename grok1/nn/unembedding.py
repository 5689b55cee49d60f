"""The output head: logits of the whole vocabulary, what a given token scores, or the best token.

Per device, inside `jax.shard_map`, as `decoder`. The embedding is also the head; as float32 it
would be a good part of what a small model reads for a token. Where only the largest logit is
wanted, or a draw, an int8 copy rules out all but a few rows, and those are compared in float32;
log-probabilities of what is drawn read a second byte of each number. Where tokens are given, their
statistics are all that leaves the devices, and logits exist for some rows at a time.

Dimension key: M row, V vocabulary rows held here, D model dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.config import ModelConfig
from grok1.nn.sharding import MODEL_AXIS
from grok1.ops import vocabulary
from grok1.ops.residual import norm
from grok1.ops.screening import ScreeningTable

_LOGITS_BYTES = 1 << 25  # most memory of one device that logits to be summed up take at a time


def unembed(
    embedding: Float[Array, "V D"], config: ModelConfig, x: Float[Array, "M D"]
) -> Float[Array, "M vocab"]:
    """Logits of the whole vocabulary from the final norm's output; float32, on every device."""
    logits = jax.lax.all_gather(vocabulary.logits(x, embedding), MODEL_AXIS, axis=1, tiled=True)
    return logits * config.output_multiplier_scale


class TokenStatistics(NamedTuple):
    """What the model makes of given tokens, each where it stands; natural logarithms.

    Attributes:
      logprobs: float32 `[...]`, of the token.
      ranks: int32 `[...]`, how many tokens are more probable, equal ones of lower id included.
      entropies: float32 `[...]`, of the distribution over the vocabulary.
      top_tokens: int32 `[..., top]`, the most probable tokens, best first.
      top_logprobs: float32 `[..., top]`.
    """

    logprobs: Any
    ranks: Any
    entropies: Any
    top_tokens: Any
    top_logprobs: Any


def token_statistics(
    embedding: Float[Array, "V D"],
    config: ModelConfig,
    x: Float[Array, "M D"],
    tokens: Int[Array, " M"],
    num_top: int,
) -> TokenStatistics:
    """Scores one token a row; each device sums up its own part of the vocabulary.

    Args:
      embedding: This device's rows.
      config: The model.
      x: The final norm's output.
      tokens: The token that follows in each row.
      num_top: How many of the most probable tokens to return.
    """
    num_rows, width = x.shape
    vocab_here = len(embedding)
    first = jax.lax.axis_index(MODEL_AXIS) * vocab_here
    ids = first + jnp.arange(vocab_here)

    def score_block(rows):
        x, tokens = rows
        logits = vocabulary.logits(x, embedding) * config.output_multiplier_scale
        # The maximum is of the whole vocabulary, so that no exponential overflows on any device.
        largest = jax.lax.pmax(logits.max(axis=-1), MODEL_AXIS)
        shifted = logits - largest[:, None]
        total, weighted = jax.lax.psum(vocabulary.exponential_sums(shifted), MODEL_AXIS)
        log_total = vocabulary.log(total)

        local = tokens - first
        is_here = (local >= 0) & (local < vocab_here)
        found = jnp.take_along_axis(shifted, jnp.where(is_here, local, 0)[:, None], axis=1)[:, 0]
        chosen = jax.lax.psum(jnp.where(is_here, found, 0), MODEL_AXIS)
        before = (shifted > chosen[:, None]) | (
            (shifted == chosen[:, None]) & (ids < tokens[:, None])
        )
        ranks = jax.lax.psum(before.sum(axis=-1, dtype=jnp.int32), MODEL_AXIS)

        best, best_ids = jnp.zeros((len(x), 0)), jnp.zeros((len(x), 0), jnp.int32)
        if num_top > 0:
            best, places = jax.lax.top_k(shifted, min(num_top, vocab_here))
            # Devices hold ascending ids, so that equal logits stay in the order of their ids.
            best = jax.lax.all_gather(best, MODEL_AXIS, axis=1, tiled=True)
            best_ids = jax.lax.all_gather(places + first, MODEL_AXIS, axis=1, tiled=True)
            best, places = jax.lax.top_k(best, num_top)
            best_ids = jnp.take_along_axis(best_ids, places, axis=1).astype(jnp.int32)
        return TokenStatistics(
            chosen - log_total,
            ranks,
            log_total - weighted / total,
            best_ids,
            best - log_total[:, None],
        )

    block = max(1, min(num_rows, _LOGITS_BYTES // (4 * vocab_here)))
    num_blocks = -(-num_rows // block)
    padding = num_blocks * block - num_rows
    blocks = (
        jnp.pad(x, ((0, padding), (0, 0))).reshape(num_blocks, block, width),
        jnp.pad(tokens, (0, padding)).reshape(num_blocks, block),
    )
    statistics = jax.lax.map(score_block, blocks)
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_blocks * block, *leaf.shape[2:])[:num_rows], statistics
    )


def logit_lens(
    embedding: Float[Array, "V D"],
    final_norm: Float[Array, " D"],
    config: ModelConfig,
    x: Float[Array, "M D"],
    num_top: int,
) -> tuple[Int[Array, "M top"], Float[Array, "M top"]]:
    """What the model would say if a layer were its last (nostalgebraist, 2020).

    Args:
      embedding: This device's rows.
      final_norm: The scale of the norm before the output head.
      config: The model.
      x: The residual stream after the layer.
      num_top: How many tokens to name.

    Returns:
      int32 tokens, the most probable first, and their float32 log-probabilities.
    """
    logits = unembed(embedding, config, norm(x, final_norm))
    best, tokens = jax.lax.top_k(logits, num_top)
    largest = logits.max(axis=-1, keepdims=True)
    total, _ = vocabulary.exponential_sums(logits - largest)
    # As of the head that scores: first what is exact between neighbours, then the rounding.
    return tokens.astype(jnp.int32), best - largest - vocabulary.log(total)[:, None]


def most_probable(
    embedding: Float[Array, "V D"],
    table: ScreeningTable,
    x: Float[Array, "M D"],
    allowed: Bool[Array, "*M vocab"],
) -> Int[Array, " M"]:
    """The allowed token with the largest logit, as `unembed` and an argmax would find it.

    Args:
      embedding: This device's rows.
      table: Their `screening_table`.
      x: The final norm's output.
      allowed: False for tokens that must not be found, `[vocab]` for all rows or `[M, vocab]`.

    Returns:
      int32; -1 where no token is found, because the largest product is no number or infinite.
    """
    rows = len(embedding)
    first = jax.lax.axis_index(MODEL_AXIS) * rows
    here = jax.lax.dynamic_slice_in_dim(allowed, first, rows, axis=-1)
    index, product = vocabulary.most_probable(x, embedding, table, here)
    # Both in one exchange.
    bits = jax.lax.bitcast_convert_type(product, jnp.int32)
    pairs = jax.lax.all_gather(jnp.stack([jnp.maximum(index, 0) + first, bits]), MODEL_AXIS)
    indices, products = pairs[:, 0], jax.lax.bitcast_convert_type(pairs[:, 1], jnp.float32)
    # Devices hold ascending ids, so that of equals the first is found.
    best = jnp.argmax(products, axis=0)
    found = jnp.take_along_axis(indices, best[None], axis=0)[0].astype(jnp.int32)
    return jnp.where(jnp.isfinite(products.max(axis=0)), found, -1)
