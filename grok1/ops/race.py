"""Draws in whole numbers: the same tokens, bit for bit, on every device and in the C++ kernel.

A token's weight and its random number are integers, made by shifts and products of integers alone.
Sums of integers do not depend on their order, so what a filter keeps and what is drawn depend on
the logits and the key, not on the form that computes them. `ops/cpu/race.h` is the same in C++.

A draw is a race (the Gumbel-max trick): the token with the largest sum of log-weight and noise has
the probability of its weight. The noise of a token depends on the row's key and the token's id
alone. Logarithms are of base 2, in units of 2**-24.

Dimension key: B batch row, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

OCTAVE = 1 << 24
"""A factor of two, in units of log-weights."""

LOWEST = -120 * OCTAVE
"""Log-weight of every token that is less probable than 2**-120 of the most probable one."""

FORBIDDEN = np.int32(-(2**31))
"""In place of a log-weight: the token must not be drawn."""

_LIMB = 15  # bits of each of the three numbers that make up a weight
_LIMB_MASK = np.uint32((1 << _LIMB) - 1)

# Polynomials in a fraction x of [0, 1), in units of 2**-31, lowest power first. No coefficient is
# negative, so that Horner's rule needs no sign. Errors are below 3e-7.
_EXP2 = (1488522236, 515882450, 119194884, 20650514, 2875340, 313683, 44540)  # (2**x - 1) / x
_LOG2 = (598381691, 211551882, 79453832, 39700180, 10724941, 0, 10835733)  # see _log2
_EARLY = (774509980, 161866735, 45823803, 22197021, 3005039, 0, 4563343)  # see noise


MOST_TOKENS = (1 << 18) - 1
"""The largest vocabulary: the sum of its weights has to fit."""


class Sum(NamedTuple):
    """A weight, or a sum of weights: high * 2**30 + middle * 2**15 + low, each a uint32."""

    high: Array
    middle: Array
    low: Array

    def value(self) -> Float[Array, "..."]:
        """The sum as float32, rounded alike everywhere and never the less for a larger sum."""
        high, middle, low = (limb.astype(jnp.float32) for limb in self.carried())
        return high * 2.0**30 + middle * 2.0**15 + low

    def plus(self, other: "Sum", times: Array) -> "Sum":
        """This and `times` the other, a single weight; `times` is at most `MOST_TOKENS`."""
        times = times.astype(jnp.uint32)
        half, result = times >> 1, self
        for part in (half, times - half):
            limbs = zip(result.carried(), other, strict=True)
            result = Sum(*(mine + part * its for mine, its in limbs))
        return result

    def plus_sum(self, other: "Sum") -> "Sum":
        """This and another sum, both carried."""
        return Sum(*(mine + its for mine, its in zip(self, other, strict=True)))

    def carried(self) -> "Sum":
        """The same sum in the only way in which middle and low are below 2**15."""
        middle = self.middle + (self.low >> _LIMB)
        high = self.high + (middle >> _LIMB)
        return Sum(high, middle & _LIMB_MASK, self.low & _LIMB_MASK)


def total(weights: Sum, among: Bool[Array, "B T V"] | None = None) -> Sum:
    """Sums weights `[B, V]` over up to `MOST_TOKENS` tokens.

    Args:
      weights: Of each token.
      among: T choices of the tokens that count; None for one of all.

    Returns:
      `[B, T]`, or `[B]` of all; carried.
    """
    size, most = weights.low.shape[-1], 1 << 17
    limbs = weights if among is None else Sum(*(limb[:, None] for limb in weights))
    result = None
    for start in range(0, size, most):
        part = (..., slice(start, min(start + most, size)))
        counted = [limb[part] for limb in limbs]
        if among is not None:
            counted = [jnp.where(among[part], limb, jnp.uint32(0)) for limb in counted]
        sums = Sum(*sum_together(counted)).carried()
        result = sums if result is None else result.plus_sum(sums).carried()
    assert result is not None  # there are tokens
    return result


def sum_together(numbers: Sequence[UInt32[Array, "... V"]]) -> list[UInt32[Array, "..."]]:
    """Sums several arrays along their last axis: where a launch costs, in one of them."""

    def one_by_one(*arrays):
        return [array.sum(axis=-1, dtype=array.dtype) for array in arrays]

    def at_once(*arrays):
        zeros = [jnp.zeros((), array.dtype) for array in arrays]
        axis = arrays[0].ndim - 1

        def add(left, right):
            return [one + other for one, other in zip(left, right, strict=True)]

        return list(jax.lax.reduce(list(arrays), zeros, add, (axis,)))

    # XLA on CPUs makes vector instructions of sums of one array alone.
    return jax.lax.platform_dependent(*numbers, cpu=one_by_one, default=at_once)


def log_weights(
    logits: Float[Array, "B V"], allowed: Bool[Array, "... V"], temperature: Float[Array, " B"]
) -> Int[Array, "B V"]:
    """Log-weights below those of each row's most probable token: `logits / temperature`, rounded.

    Args:
      logits: float32; -infinity for tokens that must not be drawn.
      allowed: False for tokens that must not be drawn either; `[V]` or `[B, V]`.
      temperature: Above 0.

    Returns:
      int32 from `LOWEST` to 0, or `FORBIDDEN`.
    """
    floats = jnp.finfo(jnp.float32)
    logits = jnp.where(allowed, logits, -jnp.inf)
    below = jnp.maximum(logits - logits.max(axis=-1, keepdims=True), floats.min)
    # Below the smallest normal number a device may round to zero.
    factor = np.float32(OCTAVE / np.log(2)) / jnp.maximum(temperature, floats.tiny)
    scaled = below * jnp.minimum(factor, floats.max)[:, None]
    whole = jnp.maximum(scaled, np.float32(LOWEST)).astype(jnp.int32)
    return jnp.where(logits > -jnp.inf, whole, FORBIDDEN)


def weights(log_weights: Int[Array, "..."]) -> Sum:
    """Weights, of which the largest is 2**44; 0 for forbidden tokens."""
    mantissa, octaves = _exp2(log_weights)
    # mantissa * 2**14 >> octaves, cut into limbs; a shift by 32 or more gives 0.
    high, middle, low = (_shifted(mantissa, octaves + right) for right in (16, 1, -14))
    return Sum(high, middle & _LIMB_MASK, low & _LIMB_MASK)


def relative_weights(log_weights: Int[Array, "..."]) -> Float[Array, "..."]:
    """Weights as float32, of which the largest is 1; exact but for the mantissa."""
    mantissa, octaves = _exp2(log_weights)
    power = jax.lax.bitcast_convert_type((127 - octaves) << 23, jnp.float32)
    return jnp.where(log_weights == FORBIDDEN, 0, mantissa.astype(jnp.float32) * 2.0**-30 * power)


def noise(keys: UInt32[Array, "B 2"], vocab_size: int) -> Int[Array, "B V"]:
    """Standard Gumbel noise of every token, in the units of log-weights."""
    bits = token_bits(keys, vocab_size)
    # -log2(-ln(1 - v)) of v = (bits + 1/2) / 2**32. Where v is below 1/2, -ln(1 - v) is v times a
    # factor near 1; elsewhere 1 - v has all the bits that matter.
    is_late = bits >= jnp.uint32(1 << 31)
    odd = (jnp.where(is_late, ~bits, bits) << 1) | jnp.uint32(1)
    of_odd = _log2(odd)
    late = _log2((33 * OCTAVE - of_odd).astype(jnp.uint32)) - 24 * OCTAVE + _LOG2_OF_LN_2
    factor = (_multiply_high(_polynomial(_EARLY, odd), odd) >> 7).astype(jnp.int32)
    return -jnp.where(is_late, late, of_odd - 33 * OCTAVE + factor)


_LOG2_OF_LN_2 = round(OCTAVE * float(np.log2(np.log(2))))


def token_bits(keys: UInt32[Array, "B 2"], vocab_size: int) -> UInt32[Array, "B V"]:
    """A random uint32 for each token: by the row's key and the token's id alone."""
    # One block of Threefry gives the numbers of tokens 32 n + i and 32 n + 16 + i.
    num_groups = -(-vocab_size // 32)
    counters = jnp.arange(num_groups * 16, dtype=jnp.uint32)
    first, second = threefry(keys[:, :1], keys[:, 1:], counters, jnp.uint32(0))
    groups = [part.reshape(len(keys), num_groups, 1, 16) for part in (first, second)]
    return jnp.concatenate(groups, axis=2).reshape(len(keys), -1)[:, :vocab_size]


def position_keys(keys: UInt32[Array, "B 2"], positions: Int[Array, " B"]) -> UInt32[Array, "B 2"]:
    """The key of each row's draw: that of the request folded with the position."""
    folded = threefry(keys[:, 0], keys[:, 1], jnp.uint32(0), positions.astype(jnp.uint32))
    return jnp.stack(folded, axis=-1)


def threefry(key0: Array, key1: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 of 20 rounds (Salmon et al., 2011): two random uint32 from a key and a counter.

    Written out, so that no setting of JAX's chooses another generator or order.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x, y = counter0 + key0, counter1 + key1
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << rotation) | (y >> (32 - rotation))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def _exp2(log_weights: Array) -> tuple[Array, Array]:
    """(mantissa, octaves) of 2**(log_weights / OCTAVE) = mantissa * 2**(-30 - octaves)."""
    octaves = -(log_weights >> 24)
    fraction = log_weights.astype(jnp.uint32) << 8
    power = _multiply_high(_polynomial(_EXP2, fraction), fraction)
    return (power >> 1) + jnp.uint32(1 << 30), octaves


def _log2(x: Array) -> Array:
    """log2 of a uint32 above 0, in units of 2**-24, as int32."""
    zeros = jax.lax.clz(x)
    fraction = (x << zeros) << 1
    rest = ~fraction
    # log2(1 + f) - f is f (1 - f) times a polynomial in 1 - f.
    bend = _multiply_high(_polynomial(_LOG2, rest), _multiply_high(fraction, rest))
    whole = (31 - zeros.astype(jnp.int32)) * OCTAVE
    return whole + ((fraction >> 8) + (bend >> 7)).astype(jnp.int32)


def _polynomial(coefficients: tuple[int, ...], x: Array) -> Array:
    result = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = _multiply_high(result, x) + jnp.uint32(coefficient)
    return result


def _multiply_high(x: Array, y: Array) -> Array:
    """The upper 32 bits of the products of uint32."""
    half = jnp.uint32(0xFFFF)
    x_low, x_high, y_low, y_high = x & half, x >> 16, y & half, y >> 16
    middle = x_high * y_low + (x_low * y_low >> 16)
    return x_high * y_high + (middle >> 16) + ((x_low * y_high + (middle & half)) >> 16)


def _shifted(x: Array, right: Array) -> Array:
    """`x` shifted right, or left where that is below 0."""
    right_by = jnp.maximum(right, 0).astype(jnp.uint32)
    left_by = jnp.maximum(-right, 0).astype(jnp.uint32)
    return jax.lax.shift_right_logical(jax.lax.shift_left(x, left_by), right_by)
