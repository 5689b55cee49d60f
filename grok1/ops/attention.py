"""Grouped-query attention with a soft cap: the readable form and the one that reads a cache.

A cache holds more rows than a call runs: `slots` says which row of the cache each row of a call is.
One outside the cache belongs to none: nothing is written, and what is read for it means nothing.

Dimension key: B row of the cache, R row of a call, T query position, S key position, C key/value
head held here, G query heads that share it, M = G*T, H head dim, L layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.cuda import calls_of_rows, presence, shapes_of_prompts, shapes_of_rows
from grok1.ops.layers import exact_einsum

SOFT_CAP = 30.0  # bounds attention logits to (-30, 30), as trained

# Keys per step of `attend_cache`. A few queries would read most of a larger block for nothing when
# a row is short; many queries keep the products large enough to run at full speed.
_BLOCK_OF_FEW, _BLOCK_OF_MANY = 128, 512
_FEW_QUERIES = 16
_QUERIES_AT_ONCE = 1024  # over all rows; those before them do not pay for the keys up to the last


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


def arrays_of(cache: KVCache) -> tuple[Array, ...]:
    """Its keys and values, and their scales if there are any."""
    scales = () if cache.k_scales is None else (cache.k_scales, cache.v_scales)
    return (cache.k, cache.v, *scales)


class Place(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
      slots: int32 `[R]`, the row of the cache of each row of the call; one outside the cache
        belongs to none.
      positions: int32 `[R, T]`, each token's absolute position.
      valid: bool `[R, T]`, False for padding.
    """

    slots: Any
    positions: Any
    valid: Any


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
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "R T C G H"]:
    """`attend` over the cached positions up to each query's own; only those are read.

    Args:
      query: Queries, rotary phases applied, in the type of the products.
      cache: Keys and values, those of the queries' own positions included.
      layer: Which layer of the cache to read.
      place: Of the queries; each sees the keys of its slot at positions up to its own.
      scale: Factor on the query-key products, before the soft cap.
      implementation: "blocked", "by_row" and "sliced" go through XLA, "cpp" through C++, from a
        float32 cache, "cuda" through CUDA, for few queries, "cuda_tiles" likewise for many; None
        for that of `forms.PREFERRED`.

    Returns:
      float32.
    """
    arguments = query, cache, layer, place
    return forms.run("attend_cache", *arguments, implementation=implementation, scale=scale)


def _is_not_float32(query, cache, layer, place) -> str | None:
    return None if cache.k.dtype == jnp.float32 else f"it reads float32, not {cache.k.dtype}"


@forms.form("attend_cache", "cpp", refuses=_is_not_float32)
def attend_cpp(
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
) -> Float[Array, "R T C G H"]:
    """`attend_blocked` in C++."""
    return bindings.attention(
        query, (cache.k, cache.v), layer, place.slots, place.positions, (scale, SOFT_CAP)
    )


def _is_not_for_cuda(query, cache, layer, place) -> str | None:
    heads = calls_of_rows.heads_of(query.shape, query.dtype, arrays_of(cache))
    return shapes_of_rows.refusal_of(heads)


@forms.form("attend_cache", "cuda", refuses=_is_not_for_cuda)
def attend_cuda(
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
) -> Float[Array, "R T C G H"]:
    """`attend_blocked` in CUDA: the sequence in parts that run side by side; sums in float32."""
    limits = (scale, SOFT_CAP)
    arrays = arrays_of(cache)
    return calls_of_rows.attend(query, arrays, layer, place.slots, place.positions, limits)


def _is_not_for_tiles(query, cache, layer, place) -> str | None:
    if "attend_prompt" not in presence.kernels():
        return "its CUDA kernel is not available here"
    heads = calls_of_rows.heads_of(query.shape, query.dtype, arrays_of(cache))
    return shapes_of_prompts.refusal_of(heads)


@forms.form("attend_cache", "cuda_tiles", refuses=_is_not_for_tiles)
def attend_cuda_tiles(
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
) -> Float[Array, "R T C G H"]:
    """`attend_blocked` in CUDA, of many queries: tiles of logits never leave a multiprocessor."""
    limits = (scale, SOFT_CAP)
    arrays = arrays_of(cache)
    return calls_of_rows.attend_prompt(query, arrays, layer, place.slots, place.positions, limits)


@forms.form("attend_cache", "blocked")
def attend_blocked(
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
) -> Float[Array, "R T C G H"]:
    """`attend` over the cached positions, a block of keys at a time.

    The softmax is accumulated over the blocks (Milakov & Gimelshein, arXiv 1805.02867), so that a
    short sequence does not pay for the cache's capacity and no `[T, S]` score tensor exists. An
    int8 block is multiplied as it is: its scales go to the scores and to the softmax's weights.
    """

    def gathered(of_slot, slots):
        return jax.vmap(lambda slot: of_slot(slot)[0, 0])(slots)

    return _attend_by_blocks(query, cache, layer, place, scale, gathered)


def _is_not_beside_kernels(query, cache, layer, place) -> str | None:
    # Without them what else a layer computes differs with the number of rows.
    return None if bindings.is_available() else "the native kernels are not available here"


@forms.form("attend_cache", "by_row", refuses=_is_not_beside_kernels)
def attend_by_row(
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
) -> Float[Array, "R T C G H"]:
    """`attend_blocked`, one row after another: none has other bits beside others, or waits.

    Of several rows at once XLA takes exponentials in other vectors. The last bit of a float32 then
    becomes that of a float16 or int8 where the next layer rounds keys and values to these.
    """

    def attend_row(arguments):
        query_of, *its_place = jax.tree.map(lambda array: array[None], arguments)
        return attend_blocked(query_of, cache, layer, Place(*its_place), scale)[0]

    return jax.lax.map(attend_row, (query, *place))


@forms.form("attend_cache", "sliced")
def attend_sliced(
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
) -> Float[Array, "R T C G H"]:
    """`attend_blocked` with a slice of the cache for each row instead of one gather for all.

    A TPU lays out an array that is gathered from in one way and one that is written to in another,
    and copies all layers' keys and values from one to the other and back in each layer.
    """

    def stacked(of_slot, slots):
        return jax.lax.concatenate([of_slot(slot) for slot in jnp.unstack(slots)], 1)[0]

    return _attend_by_blocks(query, cache, layer, place, scale, stacked)


def _attend_by_blocks(
    query: Array,
    cache: KVCache,
    layer: Array,
    place: Place,
    scale: float,
    of_all: Callable[[Callable[[Array], Array], Array], Array],
) -> Array:
    """`attend_blocked`; `of_all` puts together what a function gives of each slot."""
    batch, length, heads, group, head_dim = query.shape
    piece = max(_FEW_QUERIES, _QUERIES_AT_ONCE // batch)
    if length > piece and not length % piece:

        def attend_piece(arguments):
            piece_of, *its_place = arguments
            placed = Place(place.slots, *its_place)
            return _attend_by_blocks(piece_of, cache, layer, placed, scale, of_all)

        def cut(array):
            return array.reshape(batch, length // piece, piece, *array.shape[2:]).swapaxes(0, 1)

        pieces = jax.lax.map(attend_piece, (cut(query), cut(place.positions), cut(place.valid)))
        return pieces.swapaxes(0, 1).reshape(query.shape)
    capacity = cache.k.shape[3]
    block = min(_BLOCK_OF_FEW if length <= _FEW_QUERIES else _BLOCK_OF_MANY, capacity)
    num_blocks = jnp.minimum(jnp.max(place.positions) // block + 1, -(-capacity // block))
    # The queries of a head in one axis, so that each head is one product of two matrices.
    query_RCMH = query.transpose(0, 2, 3, 1, 4).reshape(batch, heads, group * length, head_dim)
    positions_RM = jnp.tile(place.positions, (1, group))
    last_R = jnp.max(place.positions, axis=1)
    of_layer = jnp.asarray(layer, jnp.int32)

    def cap(products):
        return SOFT_CAP * jnp.tanh(products * (scale / SOFT_CAP))

    def add_block(i, carry):
        top_RCM, total_RCM, mixed_RCMH = carry
        # The last block of a capacity that is no multiple of the block starts early and masks what
        # the one before has read.
        start = jnp.minimum(i * block, capacity - block)

        def take(array):
            sizes = (1, 1, array.shape[2], block, head_dim)[: array.ndim]

            def of_slot(slot):
                at = (of_layer, slot, 0, start, 0)[: array.ndim]
                return jax.lax.dynamic_slice(array, at, sizes, allow_negative_indices=False)

            return of_all(of_slot, place.slots)

        key, value = (take(array).astype(query.dtype) for array in (cache.k, cache.v))
        key_positions = start + jnp.arange(block)
        # What an earlier text has left may be no number, and times a weight of 0 it would be none.
        is_seen_RS = key_positions <= last_R[:, None]
        value = jnp.where(is_seen_RS[:, None, :, None], value, 0)
        allowed_RMS = (key_positions <= positions_RM[..., None]) & (key_positions >= i * block)
        allowed_RCMS = allowed_RMS[:, None]
        products_RCMS = exact_einsum("RCMH,RCSH->RCMS", query_RCMH, key)
        if cache.k_scales is not None:
            products_RCMS *= take(cache.k_scales)[:, :, None]
        # The cap is monotone, so that the maximum is taken of what the product wrote, and capped.
        top_products_RCM = jnp.max(products_RCMS, axis=-1, where=allowed_RCMS, initial=-jnp.inf)
        new_top_RCM = jnp.maximum(top_RCM, cap(top_products_RCM))
        weights_RCMS = jnp.exp(cap(products_RCMS) - new_top_RCM[..., None])
        weights_RCMS = jnp.where(allowed_RCMS, weights_RCMS, 0)
        if cache.v_scales is None:
            # Written once, in the type of the product, and the sum is of what is multiplied.
            weights_RCMS = jax.lax.optimization_barrier(weights_RCMS.astype(value.dtype))
        shrink_RCM = jnp.exp(top_RCM - new_top_RCM)
        total_RCM = total_RCM * shrink_RCM + weights_RCMS.sum(axis=-1, dtype=jnp.float32)
        if cache.v_scales is not None:
            v_scales_RCS = jnp.where(is_seen_RS[:, None], take(cache.v_scales), 0)
            weights_RCMS *= v_scales_RCS[:, :, None]
        mixed_RCMH *= shrink_RCM[..., None]
        mixed_RCMH += exact_einsum("RCMS,RCSH->RCMH", weights_RCMS.astype(value.dtype), value)
        return new_top_RCM, total_RCM, mixed_RCMH

    # The least a capped logit can be.
    top_RCM = jnp.full(query_RCMH.shape[:-1], -SOFT_CAP)
    zeros_RCMH = jnp.zeros(query_RCMH.shape)
    start = (top_RCM, zeros_RCMH[..., 0], zeros_RCMH)
    _, total_RCM, mixed_RCMH = jax.lax.fori_loop(0, num_blocks, add_block, start)
    mixed_RCMH /= total_RCM[..., None]
    mixed_RCGTH = mixed_RCMH.reshape(batch, heads, group, length, head_dim)
    return mixed_RCGTH.transpose(0, 3, 1, 2, 4)


def attention_map(
    query: Float[Array, "R T C G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    scale: float,
) -> Float[Array, "R C*G T S"]:
    """The weights with which `attend_cache` mixes, over the whole capacity; arguments as there.

    Returns:
      float32; each query's sum to 1, and those of positions after its own are 0.
    """
    batch, length, heads, group, _ = query.shape
    key = cache.k[layer, place.slots].astype(query.dtype)
    products_RCGTS = exact_einsum("RTCGH,RCSH->RCGTS", query, key)
    if cache.k_scales is not None:
        products_RCGTS *= cache.k_scales[layer, place.slots][:, :, None, None]
    logits_RCGTS = SOFT_CAP * jnp.tanh(products_RCGTS * (scale / SOFT_CAP))
    allowed_RTS = jnp.arange(cache.k.shape[3]) <= place.positions[..., None]
    logits_RCGTS = jnp.where(allowed_RTS[:, None, None], logits_RCGTS, -jnp.inf)
    return jax.nn.softmax(logits_RCGTS, axis=-1).reshape(batch, heads * group, length, -1)


def append(
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    key: Float[Array, "R T C H"],
    value: Float[Array, "R T C H"],
) -> KVCache:
    """Writes the keys and values of one layer at their place; invalid ones are dropped.

    Returns:
      The cache with the same `length`: the rows have grown only when every layer has written.
    """
    # An index beyond the capacity is dropped by the scatter, never clamped onto a real position.
    positions = jnp.where(place.valid, place.positions, cache.k.shape[3])

    def put(array, new):
        at = array.at[layer, place.slots[:, None], :, positions]
        return at.set(new.astype(array.dtype), mode="drop")

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


def _to_int8(x: Float[Array, "R T C H"]) -> tuple[Array, Array]:
    scales = jnp.abs(x).max(axis=-1) / 127
    values = jnp.round(x / jnp.where(scales == 0, 1, scales)[..., None])
    # A scale too small for a normal number is coarse, or 0.
    return jnp.clip(values, -127, 127).astype(jnp.int8), scales
