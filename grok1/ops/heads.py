"""Attention of a layer's input: projections, rotary phases, and the cache, written and read.

Dimension key: R row of a call, T query position, M = R*T, D model dim, C key/value head held here,
G query heads that share it, H head dim.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grok1.ops import forms
from grok1.ops.attention import SOFT_CAP, KVCache, Place, append, arrays_of, attend_cache
from grok1.ops.cpu import rowwise
from grok1.ops.cuda import calls, calls_of_rows, shapes, shapes_of_rows
from grok1.ops.layers import apply_rope, rope_frequencies
from grok1.ops.quantized import Index, QuantizedArray, Weight, project


class Projections(NamedTuple):
    """What attention's input is multiplied by, and then its output.

    Attributes:
      weights: Of queries, keys and values.
      indices: Of each in its stack.
      after: Stacks `[L, K, N]`; the output is multiplied by their matrices of the layer, which may
        be brought nearer meanwhile.
    """

    weights: tuple[Weight, Weight, Weight]
    indices: tuple[Index, Index, Index]
    after: tuple[Weight, ...] = ()


def append_heads(
    x: Float[Array, "R T D"],
    projections: Projections,
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    dtypes: tuple[Any, Any],
) -> tuple[Float[Array, "R T C G H"], KVCache]:
    """Projects queries, keys and values; keys and values are written to the cache.

    Of its forms "steps" goes step by step and "cuda" through CUDA, for few tokens.

    Args:
      x: float32.
      projections: Weights with H columns for each head, of keys and values for the cache's heads.
      cache: What there is.
      layer: Which of its layers.
      place: Where the tokens stand; invalid ones are not written.
      dtypes: Type of the products, and type of the queries that are returned.

    Returns:
      The queries, rotary phases applied, and the cache with the same `length`.
    """
    arguments = x, tuple(projections), cache, layer, place
    return forms.run("append_heads", *arguments, dtypes=dtypes)


def _query_shape(x: Array, projections: Any, cache: KVCache) -> tuple[int, ...]:
    heads, size = cache.k.shape[2], cache.k.shape[4]
    (query, _, _), *_ = projections
    return (*x.shape[:2], heads, query.shape[-1] // (heads * size), size)


@forms.form("append_heads", "steps")
def append_heads_by_steps(
    x: Float[Array, "R T D"],
    projections: Any,
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    dtypes: tuple[Any, Any],
) -> tuple[Float[Array, "R T C G H"], KVCache]:
    """Each step by itself."""
    dtype, query_dtype = dtypes
    query, key, value = (
        projected.reshape(*x.shape[:2], -1, cache.k.shape[4])
        for projected in project(x, projections[0], projections[1], dtype)
    )
    query, key = forms.run("rotate", query, key, place.positions)
    cache = append(cache, layer, place, key, value)
    return query.astype(query_dtype).reshape(_query_shape(x, projections, cache)), cache


@forms.form("rotate", "xla")
def rotate_by_xla(
    query: Float[Array, "R T N H"], key: Float[Array, "R T C H"], positions: Int[Array, "R T"]
) -> tuple[Float[Array, "R T N H"], Float[Array, "R T C H"]]:
    """By XLA."""
    return apply_rope(query, positions), apply_rope(key, positions)


@forms.form("rotate", "cpp")
def rotate_by_cpp(
    query: Float[Array, "R T N H"], key: Float[Array, "R T C H"], positions: Int[Array, "R T"]
) -> tuple[Float[Array, "R T N H"], Float[Array, "R T C H"]]:
    """In C++, a token whatever the others are."""
    query, key = (x.astype(jnp.float32) for x in (query, key))
    return rowwise.rotate(query, key, positions, rope_frequencies(query.shape[-1]))


def _is_not_for_cuda(x, projections, cache, layer, place) -> str | None:
    weights, *_ = projections
    if not all(isinstance(weight, QuantizedArray) for weight in weights):
        return "it reads int8 weights"
    rows = x.shape[0] * x.shape[1]
    if rows > shapes.MOST_ROWS:
        return f"it projects up to {shapes.MOST_ROWS} rows, not {rows}"
    shape = _query_shape(x, projections, cache)
    heads = calls_of_rows.heads_of(shape, jnp.float32, arrays_of(cache))
    reasons = [shapes.refusal_of(calls.matrix_of(tuple(weight))) for weight in weights]
    return next(filter(None, (*reasons, shapes_of_rows.refusal_of(heads))), None)


@forms.form("append_heads", "cuda", refuses=_is_not_for_cuda)
def append_heads_cuda(
    x: Float[Array, "R T D"],
    projections: Any,
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    dtypes: tuple[Any, Any],
) -> tuple[Float[Array, "R T C G H"], KVCache]:
    """In two launches, in CUDA: projections, then phases and cache."""
    projected = _projected(x, projections, cache, dtypes[0])
    query = _query_shape(x, projections, cache), dtypes[1]
    query, arrays = calls_of_rows.place(projected, arrays_of(cache), layer, tuple(place), query)
    return query, _written(cache, arrays)


def _projected(x: Array, projections: Any, cache: KVCache, dtype: Any) -> calls_of_rows.Projected:
    pairs = [
        ((weight.values, weight.scales), index)
        for weight, index in zip(*projections[:2], strict=True)
    ]
    precision = calls.precision_of(x.dtype, dtype)
    parts = calls.projected(x.reshape(-1, x.shape[-1]), pairs, precision)
    frequencies = jnp.asarray(rope_frequencies(cache.k.shape[4], np))
    return calls_of_rows.Projected(parts, frequencies)


def _written(cache: KVCache, arrays: tuple[Array, ...]) -> KVCache:
    names = ("k", "v", "k_scales", "v_scales")[: len(arrays)]
    return cache._replace(**dict(zip(names, arrays, strict=True)))


class Attending(NamedTuple):
    """How a layer's input attends.

    Attributes:
      dtype: Of the products with weights.
      query_dtype: In which queries are attended with.
      scale: Factor on the query-key products, before the soft cap.
    """

    dtype: Any
    query_dtype: Any
    scale: float


def append_and_attend(
    x: Float[Array, "R T D"],
    projections: Projections,
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    attending: Attending,
) -> tuple[Float[Array, "R T C G H"], KVCache]:
    """`append_heads`, then `attend_cache` with the queries.

    Of its forms "apart" does one and then the other, "cuda" joins what it can of both, for one
    token a row.

    Args:
      x: float32.
      projections: As for `append_heads`.
      cache: What there is.
      layer: Which of its layers.
      place: Where the tokens stand; invalid ones are not written, and what is attended for them
        means nothing.
      attending: How.

    Returns:
      What attention gives, float32, and the cache with the same `length`.
    """
    arguments = x, tuple(projections), cache, layer, place
    return forms.run("append_and_attend", *arguments, attending=attending)


@forms.form("append_and_attend", "apart")
def append_and_attend_apart(
    x: Float[Array, "R T D"],
    projections: Any,
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    attending: Attending,
) -> tuple[Float[Array, "R T C G H"], KVCache]:
    """One and then the other."""
    dtypes = attending.dtype, attending.query_dtype
    query, cache = append_heads(x, Projections(*projections), cache, layer, place, dtypes)
    return attend_cache(query, cache, layer, place, attending.scale), cache


def _is_not_one_token(x, projections, cache, layer, place) -> str | None:
    if x.shape[1] != 1:
        return f"it takes one token a row, not {x.shape[1]}"
    return _is_not_for_cuda(x, projections, cache, layer, place)


@forms.form("append_and_attend", "cuda", refuses=_is_not_one_token)
def append_and_attend_cuda(
    x: Float[Array, "R 1 D"],
    projections: Any,
    cache: KVCache,
    layer: Int[Array, ""],
    place: Place,
    attending: Attending,
) -> tuple[Float[Array, "R 1 C G H"], KVCache]:
    """In two launches, in CUDA: projections, then all else."""
    projected = _projected(x, projections, cache, attending.dtype)
    query, limits = _query_shape(x, projections, cache), (attending.scale, SOFT_CAP)
    mixed, arrays = calls_of_rows.place_and_attend(
        projected, arrays_of(cache), layer, tuple(place), (query, attending.query_dtype), limits
    )
    return mixed, _written(cache, arrays)
