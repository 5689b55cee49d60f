"""4-bit weights: the type, how it is packed, and the matrix product through XLA.

A weight is one of 16 values times the 6-bit scale of its group of rows times the 16-bit scale of
its block of groups: 4.25 bits in groups of 32 and blocks of 256. The arrangement, and the values,
are those that llama.cpp calls IQ4_XS; here columns lie side by side, as in the other weights.

Dimension key: K contracting rows, N output columns, B blocks along K, g groups of a block, r rows
of a group, M rows of the input.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.cuda import calls, shapes
from grok1.ops.layers import dot_of_copy, exact_einsum

BOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""What the 16 codes stand for (ggml's `kvalues_iq4nl`)."""

BIAS = 32
"""What is added to a group's scale, from -32 to 31, before it is stored."""

CODE_ROWS = 6
"""Rows of bytes that hold the scales of a block's groups, up to eight."""

_GROUP, _BLOCK, _MOST_GROUPS = 32, 256, 8


class Int4Array(NamedTuple):
    """A 4-bit weight; stands for `BOOK[code] * group's scale * block's scale`.

    The number of blocks follows from the shapes, and the rows of a group from those of a block
    (`group_rows`).

    Attributes:
      values: uint8 `[*lead, K/2, N]`, the codes of rows 2i (low four bits) and 2i + 1.
      subscales: uint8 `[*lead, 6*B, N]`, six rows a block: four with the low four bits of the
        groups' scales plus 32, two to a byte, two with the high two bits, four to a byte.
      scales: float16 `[*lead, B, N]`.
    """

    values: Any
    subscales: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for, `(*lead, K, N)`."""
        *lead, pairs, columns = self.values.shape
        return (*lead, 2 * pairs, columns)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return self.shape[-2] // self.scales.shape[-2]


def group_rows(block: int) -> int:
    """Returns the rows of a group in blocks of so many rows: 32 where that divides them."""
    return math.gcd(_GROUP, block)


def is_block(rows: int) -> bool:
    """Whether a block can have so many rows: even, at most 256, in at most eight groups."""
    return rows % 2 == 0 and 0 < rows <= _BLOCK and rows <= _MOST_GROUPS * group_rows(rows)


def num_blocks(rows: int, shard_rows: int | None = None) -> int:
    """Returns B, the fewest blocks of at most 256 rows that a weight of K rows has.

    Args:
      rows: K.
      shard_rows: Rows that a device holds, of which blocks must be whole; None for all.

    Raises:
      ValueError: If the rows that a device holds are odd: two of them share a byte.
    """
    whole = math.gcd(rows, shard_rows or rows)
    for block in range(min(whole, _BLOCK), 1, -1):
        if whole % block == 0 and is_block(block):
            return rows // block
    raise ValueError(
        f"4-bit weights hold two rows in a byte, and a device would hold {whole} of {rows}; give "
        "fewer devices"
    )


def pack(codes: np.ndarray) -> np.ndarray:
    """Packs codes from 0 to 15, `[*lead, K, N]`, as `Int4Array.values`."""
    codes = np.asarray(codes, np.uint8)
    return codes[..., ::2, :] | codes[..., 1::2, :] << 4


def unpack(values: Any) -> Any:
    """Returns the codes `[*lead, K, N]` of `Int4Array.values`; of NumPy and JAX arrays alike."""
    xp = np if isinstance(values, np.ndarray) else jnp
    *lead, pairs, columns = values.shape
    codes = xp.stack([values & np.uint8(15), values >> np.uint8(4)], axis=-2)
    return codes.reshape(*lead, 2 * pairs, columns)


def pack_subscales(scales: np.ndarray) -> np.ndarray:
    """Packs the scales of groups, from -32 to 31, `[*lead, B, g, N]`, as `Int4Array.subscales`."""
    *lead, blocks, groups, columns = scales.shape
    biased = np.zeros((*lead, blocks, _MOST_GROUPS, columns), np.uint8)
    biased[..., :groups, :] = scales + BIAS
    low, high = biased & 15, biased >> 4
    rows = [low[..., i, :] | low[..., i + 1, :] << 4 for i in range(0, _MOST_GROUPS, 2)]
    for first in (0, 4):
        four = [high[..., first + i, :] << 2 * i for i in range(4)]
        rows.append(four[0] | four[1] | four[2] | four[3])
    return np.stack(rows, axis=-2).reshape(*lead, CODE_ROWS * blocks, columns)


def unpack_subscales(subscales: Any, num_groups: int) -> Any:
    """Returns the scales of groups, int32 `[*lead, B, g, N]`.

    Args:
      subscales: As `Int4Array.subscales`; a NumPy or a JAX array.
      num_groups: g.
    """
    xp = np if isinstance(subscales, np.ndarray) else jnp
    *lead, rows, columns = subscales.shape
    stored = subscales.reshape(*lead, rows // CODE_ROWS, CODE_ROWS, columns).astype(np.int32)
    found = []
    for group in range(num_groups):
        low = stored[..., group // 2, :] >> 4 * (group % 2) & 15
        high = stored[..., 4 + group // 4, :] >> 2 * (group % 4) & 3
        found.append((low | high << 4) - BIAS)
    return xp.stack(found, axis=-2)


def refine_subscales(subscales: np.ndarray, repeats: int, block: int) -> np.ndarray:
    """Returns the scales of the same groups in blocks of which `repeats` were one.

    Args:
      subscales: As `Int4Array.subscales`.
      repeats: Blocks to make of each.
      block: Rows of a block as it is.
    """
    if repeats == 1:
        return subscales
    old, new = group_rows(block), group_rows(block // repeats)
    scales = unpack_subscales(subscales, block // old).repeat(old // new, axis=-2)
    *lead, blocks, groups, columns = scales.shape
    return pack_subscales(scales.reshape(*lead, blocks * repeats, groups // repeats, columns))


def group_scales(weight: Int4Array) -> Any:
    """Returns the scale of each group, float32 `[*lead, K/rows of a group, N]`."""
    groups = weight.block_rows // group_rows(weight.block_rows)
    codes = unpack_subscales(weight.subscales, groups)
    scales = codes.astype(np.float32) * weight.scales.astype(np.float32)[..., None, :]
    *lead, blocks, groups, columns = scales.shape
    return scales.reshape(*lead, blocks * groups, columns)


def dequantize_int4(weight: Int4Array) -> Any:
    """Returns the float32 weight that a 4-bit one stands for; of NumPy or JAX arrays."""
    xp = np if isinstance(weight.values, np.ndarray) else jnp
    rows = group_rows(weight.block_rows)
    *lead, depth, columns = weight.shape
    values = xp.asarray(BOOK)[unpack(weight.values)].astype(np.float32)
    grouped = values.reshape(*lead, depth // rows, rows, columns)
    return (grouped * group_scales(weight)[..., None, :]).reshape(weight.shape)


@forms.form("matmul_int4", "blocked")
def matmul_blocked(
    x: Float[Array, "M K"],
    weight: Int4Array,
    index: tuple[int | Array, ...],
    num_valid: int | Array,
):
    """A block of groups at a time; scales are applied to the groups' partial products.

    A product a group of the whole weight at once would take 192 times the memory of the result.
    The values, below 128, are exact in bfloat16.
    """
    return _matmul_by_blocks(x, weight, index, lambda x, packed: [(x, unpack(packed))])


@forms.form("matmul_int4", "halves")
def matmul_halves(
    x: Float[Array, "M K"],
    weight: Int4Array,
    index: tuple[int | Array, ...],
    num_valid: int | Array,
):
    """As `matmul_blocked`, with a product for each of the two rows of a byte.

    Putting the two side by side takes a TPU eighteen times as long as the products, by its
    compiler's estimate.
    """

    def halves(x, packed):
        return [(x[:, ::2], packed & np.uint8(15)), (x[:, 1::2], packed >> np.uint8(4))]

    return _matmul_by_blocks(x, weight, index, halves)


def _matmul_by_blocks(
    x: Array,
    weight: Int4Array,
    index: tuple[int | Array, ...],
    parts_of: Callable[[Array, Array], list[tuple[Array, Array]]],
) -> Array:
    """`matmul_blocked`; `parts_of` gives columns of `x`, and the codes that are theirs."""
    columns = weight.shape[-1]
    block, num_blocks = weight.block_rows, weight.scales.shape[-2]
    groups = block // group_rows(block)
    # For a slice of the stack that begins in the midst of a tile, a TPU's XLA copies the stack.
    subscales = weight.subscales[index].reshape(num_blocks, CODE_ROWS, columns)
    scales = weight.scales[index][:, None]

    def grouped_product(x_Mk, codes):
        values_grN = jnp.asarray(BOOK)[codes].reshape(groups, -1, columns)
        x_gMr = x_Mk.reshape(len(x), groups, -1).swapaxes(0, 1)
        return exact_einsum("gMr,grN->gMN", x_gMr, values_grN.astype(x.dtype))

    def add_block(i, out):
        start = (*index, i * (block // 2), 0)
        sizes = (*(1 for _ in index), block // 2, columns)
        packed = jax.lax.dynamic_slice(weight.values, start, sizes).reshape(-1, columns)
        x_block = jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)
        products_gMN = sum(grouped_product(*part) for part in parts_of(x_block, packed))
        of_block = Int4Array(packed, subscales[i], scales[i])
        return out + (products_gMN * group_scales(of_block)[:, None, :]).sum(axis=0)

    zeros = jnp.zeros((len(x), columns), jnp.float32)
    return jax.lax.fori_loop(0, num_blocks, add_block, zeros)


def _is_not_to_be_converted(x, weight, index, num_valid) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"its products are of bfloat16, not {x.dtype}"
    if len(x) <= shapes.MOST_ROWS:
        return f"it is for more than {shapes.MOST_ROWS} rows, not {len(x)}"
    return None


@forms.form("matmul_int4", "converted", refuses=_is_not_to_be_converted)
def matmul_int4_converted(
    x: Float[Array, "M K"],
    weight: Int4Array,
    index: tuple[int | Array, ...],
    num_valid: int | Array,
):
    """One product with a bfloat16 copy of the matrix, which is rounded with its scales."""
    return dot_of_copy(x, forms.run("convert_int4", weight, index))


@forms.form("convert_int4", "xla")
def convert_int4_xla(weight: Int4Array, index: tuple[int | Array, ...]) -> Float[Array, "K N"]:
    """One matrix as bfloat16, times its scales."""
    one = Int4Array(*(part[index] for part in weight))
    return dequantize_int4(one).astype(jnp.bfloat16)


def _is_not_to_be_copied(weight, index) -> str | None:
    return shapes.refusal_of_copy(calls.int4_matrix_of(tuple(weight)))


@forms.form("convert_int4", "cuda", refuses=_is_not_to_be_copied)
def convert_int4_cuda(weight: Int4Array, index: tuple[int | Array, ...]) -> Float[Array, "K N"]:
    """As `convert_int4_xla`, in CUDA: XLA writes a float copy, and reads it again."""
    return calls.convert_int4(tuple(weight), index)


@forms.form("matmul_int4", "cpp")
def matmul_int4_cpp(
    x: Float[Array, "M K"],
    weight: Int4Array,
    index: tuple[int | Array, ...],
    num_valid: int | Array,
):
    """The same sum in C++, reading the weight once and in place; float32 whatever the input."""
    return bindings.quantized_matmul(x.astype(jnp.float32), weight, index, num_valid)
