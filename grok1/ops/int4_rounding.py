"""Rounding weights to 4 bits: scales of groups and blocks for the least squared error.

Of a group the values are compared under some scales near the one that gives the largest of them
the book's largest; each time the best scale for the codes that it leads to follows from least
squares. The scales of a block's groups are then rounded to 6 bits, under the best of some scales of
the block, and the codes chosen anew.

Dimension key: K contracting rows, N output columns, B blocks along K, g groups of a block, r rows
of a group.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grok1.ops.int4 import BIAS, BOOK, Int4Array, group_rows, pack, pack_subscales

# Between two values of the book: what is above is nearer to the larger one.
_MIDDLES = (BOOK[1:].astype(np.float32) + BOOK[:-1].astype(np.float32)) / 2
# Sizes of the largest value of a group, of either sign, that are tried, in units of the book.
_LARGEST = (*range(-136, -88, 4), *range(88, 128, 4))
# Sizes of the largest scale of a block, in units of the 6-bit scales.
_LARGEST_OF_BLOCK = (-32.0, -31.0, -30.0, -28.0, 28.0, 29.0, 30.0, 31.0)


def nearest_codes(scaled: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Returns the codes of the book's values that are nearest, int32."""
    codes = jnp.zeros(scaled.shape, jnp.int32)
    for middle in _MIDDLES.tolist():
        codes += (scaled > middle).astype(jnp.int32)
    return codes


def _nearest(scaled: Array) -> Array:
    """The nearest values of the book; sums of steps, which XLA makes one loop of."""
    values = jnp.full(scaled.shape, float(BOOK[0]))
    steps = np.diff(BOOK.astype(np.float32))
    for middle, step in zip(_MIDDLES.tolist(), steps.tolist(), strict=True):
        values += jnp.where(scaled > middle, step, 0.0)
    return values


def _fit(grouped: Array, inverse: Array, importance: Array) -> tuple[Array, Array]:
    """The best scale for the values chosen under one, and how much squared error it saves."""
    values = _nearest(grouped * inverse)
    weighted = importance * values
    product, square = (weighted * grouped).sum(axis=-2), (weighted * values).sum(axis=-2)
    scale = jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 0)
    return scale, product * scale


def _inverse(scale: Array) -> Array:
    return jnp.where(scale != 0, 1 / jnp.where(scale != 0, scale, 1), 0)[..., None, :]


def best_scales(
    weight: Float[Array, "K N"], num_blocks: int, importance: Float[Array, " K"]
) -> tuple[Int[Array, "B g N"], Float[Array, "B N"]]:
    """Chooses the scales of a weight.

    Args:
      weight: float32.
      num_blocks: B.
      importance: How much the squared error of each row counts.

    Returns:
      The scales of groups, from -32 to 31, and those of blocks, float32 of the values of float16.
    """
    rows, columns = weight.shape
    block = rows // num_blocks
    size = group_rows(block)
    grouped = weight.reshape(num_blocks, block // size, size, columns)
    counts = importance.reshape(num_blocks, block // size, size, 1)
    place = jnp.abs(grouped).argmax(axis=-2, keepdims=True)
    largest = jnp.take_along_axis(grouped, place, axis=-2)[..., 0, :]

    def better(best, found):
        is_better = found[1] > best[1]
        return tuple(jnp.where(is_better, new, old) for new, old in zip(found, best, strict=True))

    def try_largest(best, size_of_largest):
        found = _fit(grouped, _inverse(largest / size_of_largest), counts)
        return better(best, found), None

    nothing = (jnp.zeros_like(largest), jnp.full_like(largest, -1.0))
    best, _ = jax.lax.scan(try_largest, nothing, jnp.asarray(_LARGEST, jnp.float32))
    best = better(best, _fit(grouped, _inverse(best[0]), counts))
    wanted = best[0]  # [B, g, N]

    place = jnp.abs(wanted).argmax(axis=1, keepdims=True)
    of_block = jnp.take_along_axis(wanted, place, axis=1)[:, 0]

    def try_block(best, size_of_largest):
        # Halves that are too small for float16 to hold well would lose more than they scale.
        scale = (of_block / size_of_largest).astype(jnp.float16).astype(jnp.float32)
        inverse = jnp.where(scale != 0, 1 / jnp.where(scale != 0, scale, 1), 0)
        codes = jnp.clip(jnp.round(wanted * inverse[:, None]), -BIAS, BIAS - 1)
        exact = codes * scale[:, None]
        left = grouped - _nearest(grouped * _inverse(exact)) * exact[..., None, :]
        error = (counts * left**2).sum(axis=(1, 2))
        is_better = error < best[2]
        return (
            jnp.where(is_better[:, None], codes, best[0]),
            jnp.where(is_better, scale, best[1]),
            jnp.where(is_better, error, best[2]),
        ), None

    begin = jnp.zeros_like(wanted), jnp.zeros_like(of_block), jnp.full_like(of_block, jnp.inf)
    (codes, scales, _), _ = jax.lax.scan(
        try_block, begin, jnp.asarray(_LARGEST_OF_BLOCK, jnp.float32)
    )
    return codes.astype(jnp.int32), scales


@functools.partial(jax.jit, static_argnums=1)
def _rounded(weight: Array, num_blocks: int, importance: Array) -> tuple[Array, Array, Array]:
    sub, scales = best_scales(weight, num_blocks, importance)
    exact = sub.astype(jnp.float32) * scales[:, None]
    rows, columns = weight.shape
    size = group_rows(rows // num_blocks)
    grouped = weight.reshape(*sub.shape[:2], size, columns)
    codes = nearest_codes(grouped * _inverse(exact)).reshape(rows, columns)
    return codes.astype(jnp.uint8), sub, scales.astype(jnp.float16)


def round_weight(
    weight: np.ndarray, num_blocks: int, importance: np.ndarray | None = None
) -> Int4Array:
    """Rounds a matrix to 4 bits.

    Args:
      weight: float32 `[K, N]`.
      num_blocks: B.
      importance: float32 `[K]`, how much the squared error of each row counts; None for all alike.

    Returns:
      NumPy arrays.
    """
    counts = np.ones(len(weight), np.float32) if importance is None else importance
    codes, sub, scales = map(np.asarray, _rounded(weight, num_blocks, counts))
    return Int4Array(pack(codes), pack_subscales(sub), scales)
