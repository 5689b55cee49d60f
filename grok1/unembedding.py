"""The output head: logits of the whole vocabulary, or just the most probable token.

Per device, inside `jax.shard_map`, as `decoder`. The embedding is also the head; as float32 it
would be a good part of what a small model reads for a token. Where only the largest logit is
wanted, an int8 copy rules out all but a few rows, and those are compared in float32.

Dimension key: M row, V vocabulary rows held here, D model dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1 import native
from grok1.config import ModelConfig
from grok1.layers import rms_norm
from grok1.sharding import MODEL_AXIS

_TABLE_BLOCK = 512  # rows copied at a time


class ScreeningTable(NamedTuple):
    """An int8 copy of the embedding, and how far from it each row may be.

    Attributes:
      values: int8 `[V, D]`.
      scales: float32 `[V]`; `scales * values` is close to the embedding.
      uncertainty: float32 `[V]`; a row's product with any x is within `uncertainty * |x|` of the
        product with the copy, what rounding adds in float32 included.
    """

    values: Any
    scales: Any
    uncertainty: Any


def screening_table(embedding: Float[Array, "V D"]) -> ScreeningTable:
    """Copies an embedding to int8, one scale a row, and bounds what is lost (Cauchy-Schwarz)."""
    width = embedding.shape[1]

    def copy(rows):
        scales = jnp.abs(rows).max(axis=-1) / 127
        divisor = jnp.where(scales == 0, 1, scales)[:, None]
        values = jnp.clip(jnp.round(rows / divisor), -127, 127)
        kept = values * scales[:, None]
        lost = jnp.linalg.norm(rows - kept, axis=-1)
        # Adding n float32 numbers in any order is off by at most n units in the last place.
        rounding = width * jnp.finfo(jnp.float32).eps * jnp.linalg.norm(kept, axis=-1)
        return ScreeningTable(values.astype(jnp.int8), scales, 1.001 * (lost + rounding))

    # In blocks, so that the float32 copies in between take little memory.
    num_blocks = -(-len(embedding) // _TABLE_BLOCK)
    block = min(_TABLE_BLOCK, len(embedding))

    def write_block(i, table):
        # The last block starts early where the rows are no multiple of it.
        start = jnp.minimum(i * block, len(embedding) - block)
        part = copy(jax.lax.dynamic_slice_in_dim(embedding, start, block))
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, start, axis=0),
            table,
            part,
        )

    empty = ScreeningTable(
        jnp.zeros(embedding.shape, jnp.int8),
        jnp.zeros(len(embedding)),
        jnp.zeros(len(embedding)),
    )
    return jax.lax.fori_loop(0, num_blocks, write_block, empty)


def unembed(
    embedding: Float[Array, "V D"], config: ModelConfig, x: Float[Array, "M D"]
) -> Float[Array, "M vocab"]:
    """Logits of the whole vocabulary from the final norm's output; float32, on every device."""
    local = jnp.einsum(
        "MD,VD->MV",
        x,
        embedding,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    logits = jax.lax.all_gather(local, MODEL_AXIS, axis=1, tiled=True)
    return logits * config.output_multiplier_scale


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
    logits = unembed(embedding, config, rms_norm(x, final_norm))
    best, tokens = jax.lax.top_k(logits, num_top)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return tokens.astype(jnp.int32), best - total


def most_probable(
    embedding: Float[Array, "V D"],
    table: ScreeningTable,
    x: Float[Array, "M D"],
    allowed: Bool[Array, " vocab"],
) -> Int[Array, " M"]:
    """The allowed token with the largest logit, as `unembed` and an argmax would find it; on CPUs.

    Args:
      embedding: This device's rows.
      table: Their `screening_table`.
      x: The final norm's output.
      allowed: False for tokens that must not be found.
    """
    rows = len(embedding)
    first = jax.lax.axis_index(MODEL_AXIS) * rows
    here = jax.lax.dynamic_slice_in_dim(allowed, first, rows)
    index, product = native.most_probable(x, embedding, *table, here)
    products = jax.lax.all_gather(product, MODEL_AXIS)
    indices = jax.lax.all_gather(jnp.maximum(index, 0) + first, MODEL_AXIS)
    best = jnp.argmax(products, axis=0)
    return jnp.take_along_axis(indices, best[None], axis=0)[0].astype(jnp.int32)
