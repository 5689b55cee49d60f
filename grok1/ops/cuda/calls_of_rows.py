"""Calls of the CUDA kernels that have no weights; see `calls`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.ops.cuda import calls, shapes_of_prompts, shapes_of_rows
from grok1.ops.cuda.shapes_of_rows import Heads

CacheArrays = tuple[Array, ...]
"""Keys and values `[L, B, C, S, H]`; for int8 ones then their float32 scales `[L, B, C, S]`."""


def heads_of(query_shape: tuple[int, ...], query_dtype, cache: CacheArrays) -> Heads:
    """The sizes of a call.

    Args:
      query_shape: (R, T, C, G, H).
      query_dtype: Of the queries, when they are attended with.
      cache: Keys and values.
    """
    rows, length, heads, group, size = query_shape
    keys = cache[0]
    slots, capacity = keys.shape[1], keys.shape[3]
    names = (jnp.dtype(of).name for of in (keys.dtype, query_dtype))
    return Heads(rows, length, heads, group, size, slots, capacity, *names)


def attend(
    query: Float[Array, "R T C G H"],
    cache: CacheArrays,
    layer: int | Array,
    slots: Int[Array, " R"],
    positions: Int[Array, "R T"],
    limits: tuple[float, float],
) -> Float[Array, "R T C G H"]:
    """Soft-capped attention over the cached positions up to each query's own, for few queries.

    Args:
      query: float32, float16 or bfloat16.
      cache: Only the filled positions of the layer are read, in place.
      layer: Which layer of the cache to read.
      slots: int32, which row of the cache each row of queries sees; one outside it sees nothing,
        and its result is zeros.
      positions: int32, absolute position of each query.
      limits: Factor on the query-key products, and what the logits are bounded by.

    Returns:
      float32.
    """
    heads = heads_of(query.shape, query.dtype, cache)
    first, second = shapes_of_rows.attend(heads, *limits)
    layer = jnp.asarray(layer, jnp.int32)
    mixed, totals = calls.call(first, query, *cache, layer, slots, positions)
    (out,) = (mixed,) if second is None else calls.call(second, mixed, totals)
    return out.reshape(query.shape)


def attend_prompt(
    query: Float[Array, "R T C G H"],
    cache: CacheArrays,
    layer: int | Array,
    slots: Int[Array, " R"],
    positions: Int[Array, "R T"],
    limits: tuple[float, float],
) -> Float[Array, "R T C G H"]:
    """As `attend`, for many queries of float16 and a cache of float16."""
    heads = heads_of(query.shape, query.dtype, cache)
    kernel = shapes_of_prompts.attend(heads, *limits)
    layer = jnp.asarray(layer, jnp.int32)
    (out,) = calls.call(kernel, query, *cache, layer, slots, positions)
    return out.reshape(query.shape)


def place(
    projected: Float[Array, "P M N"],
    frequencies: Float[Array, " half"],
    cache: CacheArrays,
    layer: int | Array,
    place: tuple[Int[Array, " R"], Int[Array, "R T"], Bool[Array, "R T"]],
    query: tuple[tuple[int, ...], object],
) -> tuple[Float[Array, "R T C G H"], CacheArrays]:
    """Turns queries and keys by their positions' phases, and writes keys and values to the cache.

    Args:
      projected: float32; the sum along P is the queries, keys and values side by side.
      frequencies: float32, of the phases.
      cache: Is written in place.
      layer: Which layer of it.
      place: The slot of each row, and each token's position and whether it is real.
      query: Shape (R, T, C, G, H) and type of the queries that are returned.

    Returns:
      The queries, and the cache.
    """
    shape, dtype = query
    heads = heads_of(shape, dtype, cache)
    kernel = shapes_of_rows.place(heads, len(projected))
    kernel = shapes_of_rows.of_layers(kernel, cache[0].shape[0])
    layer = jnp.asarray(layer, jnp.int32)
    turned, *written = calls.call(kernel, projected, frequencies, layer, *place, *cache)
    return turned, tuple(written)


def norm(
    x: Float[Array, "M D"], scales: Float[Array, "L D"], layer: int | Array, epsilon: float
) -> Float[Array, "M D"]:
    """The norm of each row, times the scales of a layer."""
    kernel = shapes_of_rows.norms(len(x), x.shape[1], epsilon, "norm")
    (normed,) = calls.call(kernel, x, scales, jnp.asarray(layer, jnp.int32))
    return normed


def add_norm(
    x: Float[Array, "M D"],
    branch: Float[Array, "M D"],
    scales: tuple[Float[Array, "L D"], ...],
    layer: int | Array,
    epsilon: float,
) -> tuple[Float[Array, "M D"], ...]:
    """`x` and the norm of a branch; then the norm of that, if there are scales for it."""
    which = "add_norm" if len(scales) == 1 else "add_norm_and_norm"
    kernel = shapes_of_rows.norms(len(x), x.shape[1], epsilon, which)
    return tuple(calls.call(kernel, x, branch, *scales, jnp.asarray(layer, jnp.int32)))


def route(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: int | Array,
    num_selected: int,
    softcap: float | None,
    renormalize: bool,
) -> tuple[Array, Array, Array, Array]:
    """The router's logits and probabilities `[M, E]`, indices and weights `[M, A]`."""
    kernel = shapes_of_rows.route(
        len(x), x.shape[1], routers.shape[-1], num_selected, softcap, renormalize
    )
    logits, probs, indices, weights = calls.call(kernel, x, routers, jnp.asarray(layer, jnp.int32))
    return logits, probs, indices, weights
