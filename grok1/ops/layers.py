"""The position-wise pieces of the transformer, as pure functions in float32.

Dimension key: B batch row, T query position, D model dim, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

RMS_NORM_EPSILON = 1e-5  # as trained
ROPE_BASE = 10_000.0  # Su et al., RoFormer (arXiv 2104.09864), and as trained


def exact_einsum(subscripts: str, x: Array, y: Array) -> Array:
    """`jnp.einsum` of two arrays of one type: products as they are, sums in float32.

    Args:
      subscripts: As for `jnp.einsum`.
      x: float32, float16 or bfloat16.
      y: Of the same type.

    Returns:
      float32.
    """
    # By default float32 is rounded on accelerators, and float16 on TPUs; products of bfloat16 are
    # exact everywhere. To ask for more would keep XLA on NVIDIA from fusing an int8 operand's
    # conversion into them: it compiles such products for the default precision alone.
    is_exact = x.dtype == y.dtype == jnp.bfloat16
    precision = jax.lax.Precision.DEFAULT if is_exact else jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def dot_of_copy(x: Float[Array, "M K"], copy: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """Multiplies by a copy in memory; XLA would make it anew for each block of the result.

    Nor does XLA see that inputs are those of another product, whose copy it would put beside this
    one, in a third.

    Args:
      x: float16 or bfloat16, whose products are exact in float32 at the default precision.
      copy: Of the same type.

    Returns:
      float32.
    """
    x, copy = jax.lax.optimization_barrier((x, copy))
    return jnp.einsum("MK,KN->MN", x, copy, preferred_element_type=jnp.float32)


def rounded(x: Array, dtype: Any) -> Array:
    """Rounds to the numbers that a smaller type holds, and keeps the type of `x`.

    A conversion there and back need not round: where XLA may keep excess precision, as it does on
    GPUs, it drops the pair. What is compared with its own rounding has to be rounded this way.

    Args:
      x: float32.
      dtype: bfloat16 or float16, or float32 for `x` itself.
    """
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def split_terms(x: Array, dtype: Any) -> tuple[Array, Array]:
    """Two numbers of a smaller type whose sum is `x`, as far as both their mantissas reach.

    Args:
      x: float32.
      dtype: bfloat16 or float16.

    Returns:
      The high and the low term, of `dtype`.
    """
    high = rounded(x, dtype)
    return high.astype(dtype), (x - high).astype(dtype)


def power_of_two(x: Array) -> Array:
    """The largest power of two up to each number, from 2**-126 to 2**126: it divides exactly.

    Args:
      x: float32, not negative; what is no number gives the largest.
    """
    exponents = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    return jax.lax.bitcast_convert_type(jnp.clip(exponents, 1 << 23, 253 << 23), jnp.float32)


def rms_norm(x: Float[Array, "*M D"], scale: Float[Array, " D"]) -> Float[Array, "*M D"]:
    """Divides by the root mean square over the last axis and scales (Zhang & Sennrich, 1910.07467).

    Returns:
      float32, whatever the type of `x`.
    """
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(mean_square + RMS_NORM_EPSILON) * scale


def rope_frequencies(size: int, module: Any = jnp) -> Any:
    """By which factor a position turns each pair of a head; float32 `[size / 2]`.

    Args:
      size: H.
      module: What computes them: NumPy for a constant of the program.
    """
    half = size // 2
    exponents = -module.arange(half, dtype=module.float32) / half
    return ROPE_BASE**exponents


def apply_rope(
    x: Float[Array, "B T heads H"], positions: Int[Array, "B T"]
) -> Float[Array, "B T heads H"]:
    """Turns each pair (i, i + H/2) of a head by its position's phase (rotary embedding).

    Pairs are the two halves of the head, not neighbours. Phases are float32: bfloat16 could not
    tell position 257 from 256.

    Returns:
      float32.
    """
    phases = (positions[..., None].astype(jnp.float32) * rope_frequencies(x.shape[-1]))[
        :, :, None, :
    ]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(phases), jnp.sin(phases)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
