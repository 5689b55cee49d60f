"""Calls of the CUDA kernels that have no weights; see `calls`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.ops.cuda import calls, shapes_of_prompts, shapes_of_rows
from grok1.ops.cuda.shapes_of_rows import Heads, Router

CacheArrays = tuple[Array, ...]
"""Keys and values `[L, B, C, S, H]`; for int8 ones then their float32 scales `[L, B, C, S]`."""


class Projected(NamedTuple):
    """A layer's input after the projections, before the phases.

    Attributes:
      parts: float32 `[P, M, N]`; the sum along P is the queries, keys and values side by side.
      frequencies: float32 `[H / 2]`, of the phases.
    """

    parts: Array
    frequencies: Array


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
    kernel = shapes_of_rows.attend(heads, *limits)
    layer = jnp.asarray(layer, jnp.int32)
    out, *_ = calls.call(kernel, query, *cache, layer, slots, positions)
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
    projected: Projected,
    cache: CacheArrays,
    layer: int | Array,
    place: tuple[Int[Array, " R"], Int[Array, "R T"], Bool[Array, "R T"]],
    query: tuple[tuple[int, ...], object],
) -> tuple[Float[Array, "R T C G H"], CacheArrays]:
    """Turns queries and keys by their positions' phases, and writes keys and values to the cache.

    Args:
      projected: What the queries, keys and values are made of.
      cache: Is written in place.
      layer: Which layer of it.
      place: The slot of each row, and each token's position and whether it is real.
      query: Shape (R, T, C, G, H) and type of the queries that are returned.

    Returns:
      The queries, and the cache.
    """
    shape, dtype = query
    heads = heads_of(shape, dtype, cache)
    kernel = shapes_of_rows.place(heads, len(projected.parts))
    kernel = shapes_of_rows.of_layers(kernel, cache[0].shape[0])
    layer = jnp.asarray(layer, jnp.int32)
    turned, *written = calls.call(kernel, *projected, layer, *place, *cache)
    return turned, tuple(written)


def place_and_attend(
    projected: Projected,
    cache: CacheArrays,
    layer: int | Array,
    place: tuple[Int[Array, " R"], Int[Array, "R 1"], Bool[Array, "R 1"]],
    query: tuple[tuple[int, ...], object],
    limits: tuple[float, float],
) -> tuple[Float[Array, "R 1 C G H"], CacheArrays]:
    """`place`, then `attend`, of one token a row; arguments as theirs.

    Returns:
      What attention gives, float32, and the cache.
    """
    shape, dtype = query
    heads = heads_of(shape, dtype, cache)
    kernel = shapes_of_rows.place_and_attend(heads, len(projected.parts), *limits)
    kernel = shapes_of_rows.of_layers(kernel, cache[0].shape[0])
    layer = jnp.asarray(layer, jnp.int32)
    out, _, _, *written = calls.call(kernel, *projected, layer, *place, *cache)
    return out.reshape(shape), tuple(written)


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
    x: Float[Array, "M D"], routers: Float[Array, "L D E"], layer: int | Array, router: Router
) -> list[Array]:
    """The router's logits and probabilities `[M, E]`, indices and weights `[M, A]`."""
    kernel = shapes_of_rows.route(len(x), router)
    return calls.call(kernel, x, routers, jnp.asarray(layer, jnp.int32))


def add_and_route(
    added: tuple[Float[Array, "M D"], Float[Array, "M D"]],
    scales: tuple[Float[Array, "L D"], Float[Array, "L D"]],
    routers: Float[Array, "L D E"],
    layer: int | Array,
    router: Router,
    epsilon: float,
) -> list[Array]:
    """What `add_norm` gives of x, a branch and two scales, then what `route` gives of the last."""
    kernel = shapes_of_rows.add_and_route(len(added[0]), router, epsilon)
    return calls.call(kernel, *added, *scales, routers, jnp.asarray(layer, jnp.int32))
