"""The kernels in C++ behind the last layer: draws and log-probabilities, for `engine.sampling`.

Dimension key: B batch row, D model dim, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grok1.ops.cpu import bindings


class RowParameters(NamedTuple):
    """How each row of `sample` draws, as `engine.sampling` says.

    Attributes:
      temperature: float32 `[B]`; 0 takes the largest logit.
      top_p: float32 `[B]`; 1 is off.
      top_k: int32 `[B]`; the vocabulary or more is off.
      min_p: float32 `[B]`; 0 is off.
      keys: uint32 `[B, 2]`.
      positions: int32 `[B]`.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    keys: Array
    positions: Array


def sample(
    logits: Float[Array, "B V"], allowed: Bool[Array, "... V"], parameters: RowParameters
) -> Int[Array, " B"]:
    """Draws a token a row, the one that `ops.race` draws, without a pass that sorts.

    Args:
      logits: float32.
      allowed: False for tokens that must not be drawn; `[V]` or `[B, V]`.
      parameters: How each row draws.

    Returns:
      int32; -1 where nothing is left to draw, -2 where a logit is NaN or +infinity.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    out = jax.ShapeDtypeStruct((len(logits),), jnp.int32)
    return jax.ffi.ffi_call(bindings.SAMPLE, out)(logits, allowed, *parameters)


def draw(
    x: Float[Array, "B D"],
    table: tuple[Array, Array, Array, Array],
    factor: float,
    allowed: Bool[Array, "... V"],
    parameters: RowParameters,
) -> Int[Array, " B"]:
    """Draws as `sample` does from the logits `factor * (rows @ x)`, few of which it computes.

    Args:
      x: float32.
      table: rows, values, scales and uncertainty, as `most_probable` takes them.
      factor: Above 0.
      allowed: As for `sample`.
      parameters: How each row draws.

    Returns:
      int32; -1 where nothing is left to draw, -2 where a logit that was computed is not finite, or
      `x` or a row of the table is not.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    out = jax.ShapeDtypeStruct((len(x),), jnp.int32)
    return jax.ffi.ffi_call(bindings.DRAW, out)(
        x, *table, allowed, *parameters, factor=np.float32(factor)
    )


def draw_measured(
    x: Float[Array, "B D"],
    table: tuple[Array, Array, Array, Array, Array],
    factor: float,
    drawing: tuple[Bool[Array, "... V"], RowParameters],
    num_top: int,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """As `draw`, with the log-probabilities that `log_probabilities` returns.

    Args:
      x: float32.
      table: rows, values and scales, as `most_probable` takes them; uint8, what the values leave
        out, and float32 `[V]`, no less than the norm of what both leave out: the parts of
        `unembedding.Remainders`.
      factor: Above 0.
      drawing: What is allowed and how each row draws, as `draw` takes them.
      num_top: How many of the most probable tokens to report.

    Returns:
      The tokens, and as `log_probabilities`.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    allowed, parameters = drawing
    of_rows = jax.ShapeDtypeStruct((len(x),), jnp.float32)
    of_top = jax.ShapeDtypeStruct((len(x), num_top), jnp.float32)
    out = (
        of_rows.update(dtype=jnp.int32),
        of_rows,
        of_top.update(dtype=jnp.int32),
        of_top,
    )
    tokens, chosen, top_tokens, top = jax.ffi.ffi_call(bindings.DRAW_MEASURED, out)(
        x, *table, allowed, *parameters, factor=np.float32(factor)
    )
    return tokens, chosen, top_tokens, top


def log_probabilities(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], num_top: int
) -> tuple[Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Log-probability of each row's token, and its `num_top` most probable tokens with theirs.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    out = (
        jax.ShapeDtypeStruct(tokens.shape, jnp.float32),
        jax.ShapeDtypeStruct((len(logits), num_top), jnp.int32),
        jax.ShapeDtypeStruct((len(logits), num_top), jnp.float32),
    )
    chosen, top_tokens, top = jax.ffi.ffi_call(bindings.LOG_PROBABILITIES, out)(logits, tokens)
    return chosen, top_tokens, top
