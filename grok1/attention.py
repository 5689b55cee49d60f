"""Grouped-query attention with a soft cap: the readable form and the one that reads a cache.

Dimension key: B batch row, T query position, S key position, C key/value head held here,
G query heads that share it, H head dim, L layer.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1 import native

SOFT_CAP = 30.0  # bounds attention logits to (-30, 30), as trained

# Keys per step of `attend_cache`: the scores of a 1024-token chunk stay at 2 MiB a head.
_BLOCK = 512

Implementation = Literal["blocked", "native"]


class KVCache(NamedTuple):
    """Keys and values of every layer, and how much of each row is filled.

    Attributes:
      k: `[L, B, C, S, H]`, rotary phases applied.
      v: `[L, B, C, S, H]`.
      length: int32 `[B]`, filled positions of each row.
    """

    k: Any
    v: Any
    length: Any


def attend(
    query: Float[Array, "B T C G H"],
    key: Float[Array, "B C S H"],
    value: Float[Array, "B C S H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T C G H"]:
    """Mixes, for each query, the values its mask allows: the readable reference.

    Args:
      query: Queries, rotary phases applied.
      key: Keys, likewise.
      value: Values.
      mask: True where the query may attend.
      scale: Factor on the query-key products, before the soft cap.

    Returns:
      float32.
    """
    logits_BCGTS = _capped_logits(query, key, scale)
    logits_BCGTS = jnp.where(mask[:, None, None], logits_BCGTS, -jnp.inf)
    probs_BCGTS = jax.nn.softmax(logits_BCGTS, axis=-1).astype(value.dtype)
    return _mix(probs_BCGTS, value).transpose(0, 3, 1, 2, 4)


def attend_cache(
    query: Float[Array, "B T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "B T C G H"]:
    """`attend` over the cached positions up to each query's own; only those are read.

    Args:
      query: Queries, rotary phases applied.
      cache: Keys and values, those of the queries' own positions included.
      layer: Which layer of the cache to read.
      positions: Absolute position of each query; it sees keys at positions up to its own.
      scale: Factor on the query-key products, before the soft cap.
      implementation: "blocked" goes through XLA, "native" through C++, on a CPU where
        `native.is_available()` and from a float32 cache; None for the fastest.

    Returns:
      float32.
    """
    forms = {"blocked": attend_blocked, "native": attend_native}
    if implementation is not None:
        return forms[implementation](query, cache, layer, positions, scale)
    native_here = cache.k.dtype == jnp.float32 and native.is_available()
    return jax.lax.platform_dependent(
        query,
        cache,
        layer,
        positions,
        cpu=functools.partial(attend_native if native_here else attend_blocked, scale=scale),
        default=functools.partial(attend_blocked, scale=scale),
    )


def attend_native(
    query: Float[Array, "B T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T C G H"]:
    """`attend_blocked` in C++."""
    return native.attention(query, cache.k, cache.v, layer, positions, scale, SOFT_CAP)


def attend_blocked(
    query: Float[Array, "B T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T C G H"]:
    """`attend` over the cached positions, a block of keys at a time.

    The softmax is accumulated over the blocks (Milakov & Gimelshein, arXiv 1805.02867), so that a
    short sequence does not pay for the cache's capacity and no `[T, S]` score tensor exists.
    """
    batch, length, heads, group, head_dim = query.shape
    capacity = cache.k.shape[3]
    block = min(_BLOCK, capacity)
    num_blocks = jnp.minimum(jnp.max(positions) // block + 1, -(-capacity // block))

    def add_block(i, carry):
        top_BCGT, total_BCGT, mixed_BCGTH = carry
        # The last block of a capacity that is no multiple of the block starts early and masks what
        # the one before has read.
        start = jnp.minimum(i * block, capacity - block)
        sizes = (1, batch, heads, block, head_dim)
        key = jax.lax.dynamic_slice(cache.k, (layer, 0, 0, start, 0), sizes)[0]
        value = jax.lax.dynamic_slice(cache.v, (layer, 0, 0, start, 0), sizes)[0]
        key_positions = start + jnp.arange(block)
        allowed_BTS = (key_positions <= positions[..., None]) & (key_positions >= i * block)
        logits_BCGTS = _capped_logits(query, key, scale)
        logits_BCGTS = jnp.where(allowed_BTS[:, None, None], logits_BCGTS, -jnp.inf)
        new_top_BCGT = jnp.maximum(top_BCGT, logits_BCGTS.max(axis=-1))
        weights_BCGTS = jnp.exp(logits_BCGTS - new_top_BCGT[..., None])
        shrink_BCGT = jnp.exp(top_BCGT - new_top_BCGT)
        total_BCGT = total_BCGT * shrink_BCGT + weights_BCGTS.sum(axis=-1)
        mixed_BCGTH = mixed_BCGTH * shrink_BCGT[..., None]
        mixed_BCGTH += _mix(weights_BCGTS.astype(value.dtype), value)
        return new_top_BCGT, total_BCGT, mixed_BCGTH

    # Position 0 is allowed to every query, so the first block makes the running maximum finite.
    start = (
        jnp.full((batch, heads, group, length), jnp.finfo(jnp.float32).min),
        jnp.zeros((batch, heads, group, length)),
        jnp.zeros((batch, heads, group, length, head_dim)),
    )
    _, total_BCGT, mixed_BCGTH = jax.lax.fori_loop(0, num_blocks, add_block, start)
    return (mixed_BCGTH / total_BCGT[..., None]).transpose(0, 3, 1, 2, 4)


def append(
    cache: KVCache,
    layer: Int[Array, ""],
    key: Float[Array, "B T C H"],
    value: Float[Array, "B T C H"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> KVCache:
    """Writes the keys and values of one layer at their positions; invalid ones are dropped.

    Returns:
      The cache with the same `length`: the rows have grown only when every layer has written.
    """
    rows = jnp.arange(key.shape[0])[:, None]
    dtype = cache.k.dtype
    if dtype == jnp.float16:
        # Far outside what normed inputs project to; saturating keeps one outlier from being inf.
        limit = float(jnp.finfo(dtype).max)
        key, value = jnp.clip(key, -limit, limit), jnp.clip(value, -limit, limit)
    # An index beyond the capacity is dropped by the scatter, never clamped onto a real position.
    slots = jnp.where(valid, positions, cache.k.shape[3])
    k = cache.k.at[layer, rows, :, slots].set(key.astype(dtype), mode="drop")
    v = cache.v.at[layer, rows, :, slots].set(value.astype(dtype), mode="drop")
    return cache._replace(k=k, v=v)


def _capped_logits(query: Array, key: Array, scale: float) -> Array:
    logits_BCGTS = jnp.einsum(
        "BTCGH,BCSH->BCGTS",
        query,
        key,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return SOFT_CAP * jnp.tanh(logits_BCGTS * (scale / SOFT_CAP))


def _mix(probs_BCGTS: Array, value: Array) -> Array:
    return jnp.einsum(
        "BCGTS,BCSH->BCGTH",
        probs_BCGTS,
        value,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
