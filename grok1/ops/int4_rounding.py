"""Rounding weights to 4 bits: scales of groups and blocks for the least squared error.

Of a group the values are compared under some scales near the one that gives the largest of them
the book's largest; each time the best scale for the codes that it leads to follows from least
squares. The scales of a block's groups are then rounded to 6 bits, under the best of some scales of
the block, for which the best again follows from least squares, and the codes chosen anew.

Both forms, this and `ops/cpu/rounding.h`, find the same bits: weights are searched as whole numbers
of 15 bits, 2 to some power times which they are, sums of whole numbers do not depend on their
order, and floats are multiplied, divided and rounded, but never added.

Dimension key: K contracting rows, N output columns, B blocks along K, g groups of a block, r rows
of a group.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.formats import INT4
from grok1.ops.int4 import BIAS, BOOK, Int4Array, group_rows, pack, pack_subscales

# Between two values of the book: what is above is nearer to the larger one.
_MIDDLES = (BOOK[1:].astype(np.float32) + BOOK[:-1].astype(np.float32)) / 2
# Sizes of the largest value of a group, of either sign, that are tried, in units of the book.
LARGEST = np.array([*range(-136, -88, 4), *range(88, 128, 4)], np.int32)
# Sizes of the largest scale of a block, in units of the 6-bit scales.
LARGEST_OF_BLOCK = np.array([-32, -31, -30, -28, 28, 29, 30, 31], np.float32)
_BITS = 14  # of the largest weight of a block, but for the first
_FINE = 6  # bits behind the point of a scaled weight
_MOST_FACTOR = 32700.0  # 16 bits hold the scaled weight and what rounds it
_LEAST_LARGEST = np.float32(2.0**-100)  # below it a block is rounded to zeros


def nearest_codes(scaled: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Returns the codes of the book's values that are nearest, int32."""
    codes = jnp.zeros(scaled.shape, jnp.int32)
    for middle in _MIDDLES.tolist():
        codes += (scaled > middle).astype(jnp.int32)
    return codes


def inverse_of(number: Array) -> Array:
    """1 / number, and 0 of 0."""
    return jnp.where(number == 0, 0, 1 / jnp.where(number == 0, 1, number))


def _factors(scale: Array) -> Array:
    """What `_fit` takes for weights of a scale."""
    exact = jnp.where(scale == 0, 0, 2.0 ** (15 + _FINE) / jnp.where(scale == 0, 1, scale))
    return jnp.round(jnp.clip(exact, -_MOST_FACTOR, _MOST_FACTOR)).astype(jnp.int32)


def _fit(whole: Array, factor: Array) -> tuple[Array, Array]:
    """Sums over a group of weight * value and value**2, where values are nearest to what is scaled.

    Args:
      whole: int32 `[..., r, N]`, weights below 2**15.
      factor: int32 `[..., N]`; a weight is scaled by factor / 2**(15 + _FINE).
    """
    fine = (whole * factor[..., None, :] + (1 << 14)) >> 15
    scaled = jnp.clip((fine + (1 << (_FINE - 1))) >> _FINE, -128, 127)
    values = jnp.full(scaled.shape, int(BOOK[0]))
    for middle, step in zip(_MIDDLES, np.diff(BOOK.astype(int)).tolist(), strict=True):
        values += jnp.where(scaled > int(np.floor(middle)), step, 0)
    return (whole * values).sum(axis=-2), (values * values).sum(axis=-2)


def _better(best: tuple[Array, ...], found: tuple[Array, ...]) -> tuple[Array, ...]:
    """Whichever saves more squared error, which is the first of each; per column."""
    is_better = found[0] > best[0]
    return tuple(
        jnp.where(is_better if new.ndim == is_better.ndim else is_better[:, None], new, old)
        for new, old in zip(found, best, strict=True)
    )


def _saved(product: Array, square: Array) -> Array:
    one, other = product.astype(jnp.float32), square.astype(jnp.float32)
    return jnp.where(square == 0, 0, one * one / jnp.where(square == 0, 1, other))


def _largest(array: Array, axis: int) -> Array:
    """The first of the elements of largest magnitude along an axis."""
    place = jnp.abs(array).argmax(axis=axis, keepdims=True)
    return jnp.take_along_axis(array, place, axis=axis).squeeze(axis)


def _of_groups(whole: Array, sizes: Array) -> tuple[Array, Array, Array]:
    """The best scale of each group in units of the block, its weights, and how often doubled."""
    largest = _largest(whole, -2)
    shift = jnp.where(largest == 0, 0, jax.lax.clz(jnp.abs(largest)) - (31 - _BITS))
    whole = whole << shift[..., None, :]
    largest = jnp.where(largest == 0, 1 << _BITS, largest << shift).astype(jnp.float32)

    def fitted(factor):
        product, square = _fit(whole, factor)
        scale = product.astype(jnp.float32) / square.astype(jnp.float32)
        return _saved(product, square), scale

    def try_largest(best, size):
        exact = (size << (15 + _FINE)).astype(jnp.float32) / largest
        return _better(best, fitted(jnp.round(exact).astype(jnp.int32))), None

    nothing = jnp.full(largest.shape, -1.0), jnp.zeros(largest.shape)
    best, _ = jax.lax.scan(try_largest, nothing, sizes)
    best = _better(best, fitted(_factors(best[1])))
    return best[1] / (1 << shift).astype(jnp.float32), whole, shift


@functools.partial(jax.jit, static_argnums=1)
def searched(
    weight: Float[Array, "K N"],
    num_blocks: int,
    sizes: Int[Array, " tried"],
    sizes_of_block: Float[Array, " tried"],
) -> tuple[Int[Array, "K N"], Int[Array, "B g N"], Float[Array, "B N"]]:
    """Returns codes, the scales of groups, and those of blocks in float16.

    What is tried, `LARGEST` and `LARGEST_OF_BLOCK`, are arguments, because XLA would turn a
    division by a constant into a product.
    """
    rows, columns = weight.shape
    size = group_rows(rows // num_blocks)
    grouped = weight.reshape(num_blocks, -1, size, columns)
    largest = jnp.abs(grouped).max(axis=(1, 2))
    is_there = largest >= _LEAST_LARGEST
    # frexp's exponents are of numbers from a half to one.
    exponent = jnp.where(is_there, jnp.frexp(largest)[1] - 1 - _BITS, 0)
    unit = jnp.where(is_there, _power(-exponent), 0)
    whole = jnp.clip(jnp.round(grouped * unit[:, None, None]), -32767, 32767).astype(jnp.int32)

    wanted, whole, shift = _of_groups(whole, sizes)
    of_block = _largest(wanted, 1)

    def try_block(best, size_of_largest):
        step = of_block / size_of_largest
        found = jnp.clip(jnp.round(wanted * inverse_of(step)[:, None]), -BIAS, BIAS - 1)
        under = found * step[:, None] * (1 << shift).astype(jnp.float32)
        product, square = _fit(whole, _factors(under))
        found = found.astype(jnp.int32)
        # Sums of eight groups, times the scales, stay below 2**31.
        products = (found * (product >> (shift + 4))).sum(axis=1)
        squares = (found * found * (square >> 1)).sum(axis=1)
        ratio = products.astype(jnp.float32) / jnp.where(squares == 0, 1, squares).astype(
            jnp.float32
        )
        scale = jnp.where(squares == 0, 0, 8 * ratio)
        return _better(best, (_saved(products, squares), scale, found)), None

    nothing = jnp.full(of_block.shape, -1.0), jnp.zeros(of_block.shape), jnp.zeros_like(shift)
    (_, scales, found), _ = jax.lax.scan(try_block, nothing, sizes_of_block)
    scales = (scales * _power(exponent)).astype(jnp.float16)
    exact = found.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]
    codes = nearest_codes(grouped * inverse_of(exact)[:, :, None])
    return codes.reshape(rows, columns).astype(jnp.uint8), found, scales


def _power(exponent: Array) -> Array:
    """2**exponent, exactly: XLA's power is not."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


@forms.form("round_int4", "xla")
def _round_xla(weight: np.ndarray, num_blocks: int) -> Int4Array:
    codes, found, scales = map(np.asarray, searched(weight, num_blocks, LARGEST, LARGEST_OF_BLOCK))
    return Int4Array(pack(codes), pack_subscales(found), scales)


@functools.partial(jax.jit, static_argnums=1)
def _rounded_cpp(weight: Array, num_blocks: int) -> Sequence[Array]:
    return bindings.round_int4(weight, INT4.abstract(weight.shape, num_blocks))


@forms.form("round_int4", "cpp")
def _round_cpp(weight: np.ndarray, num_blocks: int) -> Int4Array:
    return Int4Array(*map(np.asarray, _rounded_cpp(weight, num_blocks)))


def round_weight(
    weight: np.ndarray, num_blocks: int, implementation: str | None = None
) -> Int4Array:
    """Rounds a matrix to 4 bits.

    Args:
      weight: float32 `[K, N]`.
      num_blocks: B.
      implementation: The form to take; None for the best here. All find the same bits.

    Returns:
      NumPy arrays.
    """
    form = implementation or forms.chosen("round_int4", jax.default_backend(), weight, num_blocks)
    return forms.run("round_int4", weight, num_blocks, implementation=form)
