"""Copies of a float32 table in fewer bits, and how far from it the products with them may be.

Dimension key: V rows of the table, D columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

_TABLE_BLOCK = 512  # rows copied at a time


class ScreeningTable(NamedTuple):
    """An int8 copy of the embedding, and how far from it each row may be.

    Attributes:
      values: int8 `[V, D]`.
      scales: float32 `[V]`; `scales * values` is close to the embedding.
      uncertainty: float32 `[V]`; a row's product with any x is within `uncertainty * |x|` of the
        product with the copy, what rounding adds in float32 included.
    """

    values: Any
    scales: Any
    uncertainty: Any


class Remainders(NamedTuple):
    """What a `ScreeningTable` leaves out, in four bits a number.

    Attributes:
      codes: uint8 `[V, 32 * ceil(D / 64)]`; byte j of 32 has the code of column j of 64 in its low
        bits, of column j + 32 in its high ones. `scales * (table.values + (code - 7.5) / 15)` is
        closer to the embedding. Each was rounded up or down at random, so that the mean of its
        error is 0.
      uncertainty: float32 `[V]`; as the table's, of the product with both.
    """

    codes: Any
    uncertainty: Any


REMAINDER_STEPS = 15
"""Steps of a `Remainders` in one of its `ScreeningTable`."""


def screening_table(embedding: Float[Array, "V D"]) -> ScreeningTable:
    """Copies an embedding to int8, one scale a row, and bounds what is lost (Cauchy-Schwarz)."""
    width = embedding.shape[1]

    def copy(start, rows):
        scales = jnp.abs(rows).max(axis=-1) / 127
        divisor = jnp.where(scales == 0, 1, scales)[:, None]
        values = jnp.clip(jnp.round(rows / divisor), -127, 127)
        kept = values * scales[:, None]
        lost = jnp.linalg.norm(rows - kept, axis=-1)
        # Adding n float32 numbers in any order is off by at most n units in the last place.
        rounding = width * jnp.finfo(jnp.float32).eps * jnp.linalg.norm(kept, axis=-1)
        return ScreeningTable(values.astype(jnp.int8), scales, 1.001 * (lost + rounding))

    return _in_blocks(copy, embedding)


def remainders(embedding: Float[Array, "V D"], table: ScreeningTable) -> Remainders:
    """Copies in four bits what a `screening_table` leaves out, and bounds what both leave out."""
    width = embedding.shape[1]

    def copy(start, rows, values, scales):
        divisor = jnp.where(scales == 0, 1, scales)[:, None]
        values = values.astype(jnp.float32)
        steps = (rows / divisor - values) * REMAINDER_STEPS + REMAINDER_STEPS / 2
        codes = jnp.clip(jnp.floor(steps + _dither(start, steps.shape)), 0, REMAINDER_STEPS)
        kept = (values + (codes / REMAINDER_STEPS - 0.5)) * scales[:, None]
        lost = jnp.linalg.norm(rows - kept, axis=-1)
        # The kernel adds up 16 or more sums in turns: so many units in the last place. It adds half
        # a step of the table to all numbers, and takes it off at the end.
        added = (width / 16 + 32) * jnp.finfo(jnp.float32).eps
        rounding = added * (jnp.linalg.norm(kept, axis=-1) + 0.5 * width**0.5 * scales)
        return Remainders(_in_half_lines(codes), 1.001 * (lost + rounding))

    return _in_blocks(copy, embedding, table.values, table.scales)


def _in_half_lines(codes: Float[Array, "rows D"]) -> UInt8[Array, "rows packed"]:
    num_rows, width = codes.shape
    padded = jnp.pad(codes.astype(jnp.uint8), ((0, 0), (0, -width % 64)))
    low, high = jnp.moveaxis(padded.reshape(num_rows, -1, 2, 32), 2, 0)
    return (low | (high << 4)).reshape(num_rows, -1)


def _dither(start: Int[Array, ""], shape: tuple[int, int]) -> Float[Array, "rows D"]:
    """Numbers from 0 to 1 for rows from `start` on, the same on every device and at any time."""
    rows = start.astype(jnp.uint32) + jnp.arange(shape[0], dtype=jnp.uint32)
    bits = rows[:, None] * shape[1] + jnp.arange(shape[1], dtype=jnp.uint32)
    # MurmurHash3's finaliser (Appleby, 2008).
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits ^= bits >> 16
    return (bits >> 8).astype(jnp.float32) * 2**-24


def _in_blocks(copy: Callable[..., Any], *arrays: Array) -> Any:
    """Applies `copy(start, *rows)` to some rows at a time, so that float32 between takes little."""
    num_rows = len(arrays[0])
    num_blocks = -(-num_rows // _TABLE_BLOCK)
    block = min(_TABLE_BLOCK, num_rows)

    def rows_from(start):
        return (jax.lax.dynamic_slice_in_dim(array, start, block) for array in arrays)

    def write_block(i, table):
        # The last block starts early where the rows are no multiple of it.
        start = jnp.minimum(i * block, num_rows - block)
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, start, axis=0),
            table,
            copy(start, *rows_from(start)),
        )

    shapes = jax.eval_shape(lambda start: copy(start, *rows_from(start)), jnp.int32(0))
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, num_blocks, write_block, empty)
