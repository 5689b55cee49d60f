"""Grouped-query attention with a soft cap: the readable form and the one that reads a cache.

Dimension key: B batch row, T query position, S key position, C key/value head held here,
G query heads that share it, M = G*T, H head dim, L layer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.layers import exact_einsum

SOFT_CAP = 30.0  # bounds attention logits to (-30, 30), as trained

# Keys per step of `attend_cache`. A few queries would read most of a larger block for nothing when
# a row is short; many queries keep the products large enough to run at full speed.
_BLOCK_OF_FEW, _BLOCK_OF_MANY = 128, 512
_FEW_QUERIES = 16


class KVCache(NamedTuple):
    """Keys and values of every layer, and how much of each row is filled.

    In int8 each vector of H numbers has one float32 scale, its largest magnitude over 127, and
    stands for `values * scale`.

    Attributes:
      k: `[L, B, C, S, H]`, rotary phases applied; float32, float16, bfloat16 or int8.
      v: `[L, B, C, S, H]`, of the same type.
      length: int32 `[B]`, filled positions of each row.
      k_scales: float32 `[L, B, C, S]` for int8 keys; None for float ones.
      v_scales: float32 `[L, B, C, S]` for int8 values; None for float ones.
    """

    k: Any
    v: Any
    length: Any
    k_scales: Any = None
    v_scales: Any = None


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
      key: Keys, rotary phases applied.
      value: Values.
      mask: True where the query may attend.
      scale: Factor on the query-key products, before the soft cap.

    Returns:
      float32.
    """
    products_BCGTS = exact_einsum("BTCGH,BCSH->BCGTS", query, key)
    logits_BCGTS = SOFT_CAP * jnp.tanh(products_BCGTS * (scale / SOFT_CAP))
    logits_BCGTS = jnp.where(mask[:, None, None], logits_BCGTS, -jnp.inf)
    probs_BCGTS = jax.nn.softmax(logits_BCGTS, axis=-1).astype(value.dtype)
    return exact_einsum("BCGTS,BCSH->BTCGH", probs_BCGTS, value)


def attend_cache(
    query: Float[Array, "B T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T C G H"]:
    """`attend` over the cached positions up to each query's own; only those are read.

    Args:
      query: Queries, rotary phases applied, in the type of the products.
      cache: Keys and values, those of the queries' own positions included.
      layer: Which layer of the cache to read.
      positions: Absolute position of each query; it sees keys at positions up to its own.
      scale: Factor on the query-key products, before the soft cap.
      implementation: "blocked" goes through XLA, "cpp" through C++, from a float32 cache; None for
        that of `forms.PREFERRED`.

    Returns:
      float32.
    """
    arguments = query, cache, layer, positions
    return forms.run("attend_cache", *arguments, implementation=implementation, scale=scale)


def _is_not_float32(query, cache, layer, positions) -> str | None:
    return None if cache.k.dtype == jnp.float32 else f"it reads float32, not {cache.k.dtype}"


@forms.form("attend_cache", "cpp", refuses=_is_not_float32)
def attend_cpp(
    query: Float[Array, "B T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T C G H"]:
    """`attend_blocked` in C++."""
    return bindings.attention(query, cache.k, cache.v, layer, positions, scale, SOFT_CAP)


@forms.form("attend_cache", "blocked")
def attend_blocked(
    query: Float[Array, "B T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T C G H"]:
    """`attend` over the cached positions, a block of keys at a time.

    The softmax is accumulated over the blocks (Milakov & Gimelshein, arXiv 1805.02867), so that a
    short sequence does not pay for the cache's capacity and no `[T, S]` score tensor exists. An
    int8 block is multiplied as it is: its scales go to the scores and to the softmax's weights.
    """
    batch, length, heads, group, head_dim = query.shape
    capacity = cache.k.shape[3]
    block = min(_BLOCK_OF_FEW if length <= _FEW_QUERIES else _BLOCK_OF_MANY, capacity)
    num_blocks = jnp.minimum(jnp.max(positions) // block + 1, -(-capacity // block))
    # The queries of a head in one axis, so that each head is one product of two matrices.
    query_BCMH = query.transpose(0, 2, 3, 1, 4).reshape(batch, heads, group * length, head_dim)
    positions_BM = jnp.tile(positions, (1, group))
    last_B = jnp.max(positions, axis=1)

    def cap(products):
        return SOFT_CAP * jnp.tanh(products * (scale / SOFT_CAP))

    def add_block(i, carry):
        top_BCM, total_BCM, mixed_BCMH = carry
        # The last block of a capacity that is no multiple of the block starts early and masks what
        # the one before has read.
        start = jnp.minimum(i * block, capacity - block)

        def take(array):
            at = (layer, 0, 0, start, 0)[: array.ndim]
            return jax.lax.dynamic_slice(
                array, at, (1, *array.shape[1:3], block, head_dim)[: array.ndim]
            )[0]

        key, value = (take(array).astype(query.dtype) for array in (cache.k, cache.v))
        key_positions = start + jnp.arange(block)
        # What an earlier text has left may be no number, and times a weight of 0 it would be none.
        is_seen_BS = key_positions <= last_B[:, None]
        value = jnp.where(is_seen_BS[:, None, :, None], value, 0)
        allowed_BMS = (key_positions <= positions_BM[..., None]) & (key_positions >= i * block)
        allowed_BCMS = allowed_BMS[:, None]
        products_BCMS = exact_einsum("BCMH,BCSH->BCMS", query_BCMH, key)
        if cache.k_scales is not None:
            products_BCMS *= take(cache.k_scales)[:, :, None]
        # The cap is monotone, so that the maximum is taken of what the product wrote, and capped.
        top_products_BCM = jnp.max(products_BCMS, axis=-1, where=allowed_BCMS, initial=-jnp.inf)
        new_top_BCM = jnp.maximum(top_BCM, cap(top_products_BCM))
        weights_BCMS = jnp.exp(cap(products_BCMS) - new_top_BCM[..., None])
        weights_BCMS = jnp.where(allowed_BCMS, weights_BCMS, 0)
        shrink_BCM = jnp.exp(top_BCM - new_top_BCM)
        total_BCM = total_BCM * shrink_BCM + weights_BCMS.sum(axis=-1)
        if cache.v_scales is not None:
            v_scales_BCS = jnp.where(is_seen_BS[:, None], take(cache.v_scales), 0)
            weights_BCMS *= v_scales_BCS[:, :, None]
        mixed_BCMH *= shrink_BCM[..., None]
        mixed_BCMH += exact_einsum("BCMS,BCSH->BCMH", weights_BCMS.astype(value.dtype), value)
        return new_top_BCM, total_BCM, mixed_BCMH

    # The least a capped logit can be.
    top_BCM = jnp.full(query_BCMH.shape[:-1], -SOFT_CAP)
    zeros_BCMH = jnp.zeros(query_BCMH.shape)
    start = (top_BCM, zeros_BCMH[..., 0], zeros_BCMH)
    _, total_BCM, mixed_BCMH = jax.lax.fori_loop(0, num_blocks, add_block, start)
    mixed_BCMH /= total_BCM[..., None]
    mixed_BCGTH = mixed_BCMH.reshape(batch, heads, group, length, head_dim)
    return mixed_BCGTH.transpose(0, 3, 1, 2, 4)


def attention_map(
    query: Float[Array, "B T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B C*G T S"]:
    """The weights with which `attend_cache` mixes, over the whole capacity; arguments as there.

    Returns:
      float32; each query's sum to 1, and those of positions after its own are 0.
    """
    batch, length, heads, group, _ = query.shape
    products_BCGTS = exact_einsum("BTCGH,BCSH->BCGTS", query, cache.k[layer].astype(query.dtype))
    if cache.k_scales is not None:
        products_BCGTS *= cache.k_scales[layer][:, :, None, None]
    logits_BCGTS = SOFT_CAP * jnp.tanh(products_BCGTS * (scale / SOFT_CAP))
    allowed_BTS = jnp.arange(cache.k.shape[3]) <= positions[..., None]
    logits_BCGTS = jnp.where(allowed_BTS[:, None, None], logits_BCGTS, -jnp.inf)
    return jax.nn.softmax(logits_BCGTS, axis=-1).reshape(batch, heads * group, length, -1)


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
    # An index beyond the capacity is dropped by the scatter, never clamped onto a real position.
    slots = jnp.where(valid, positions, cache.k.shape[3])

    def put(array, new):
        return array.at[layer, rows, :, slots].set(new.astype(array.dtype), mode="drop")

    if cache.k_scales is not None:
        (key, k_scales), (value, v_scales) = _to_int8(key), _to_int8(value)
        return cache._replace(
            k=put(cache.k, key),
            v=put(cache.v, value),
            k_scales=put(cache.k_scales, k_scales),
            v_scales=put(cache.v_scales, v_scales),
        )
    if cache.k.dtype == jnp.float16:
        # Far outside what normed inputs project to; saturating keeps one outlier from being inf.
        # What is infinite already stays so, and is noticed.
        limit = float(jnp.finfo(jnp.float16).max)
        key, value = (
            jnp.where(jnp.isinf(array), array, jnp.clip(array, -limit, limit))
            for array in (key, value)
        )
    return cache._replace(k=put(cache.k, key), v=put(cache.v, value))


def _to_int8(x: Float[Array, "B T C H"]) -> tuple[Array, Array]:
    scales = jnp.abs(x).max(axis=-1) / 127
    values = jnp.round(x / jnp.where(scales == 0, 1, scales)[..., None])
    # A scale too small for a normal number is coarse, or 0.
    return jnp.clip(values, -127, 127).astype(jnp.int8), scales
