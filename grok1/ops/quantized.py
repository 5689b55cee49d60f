"""8-bit weights: the type, and the one matrix product, which understands 4-bit ones too.

Dimension key: K contracting rows, N output columns, G scale groups along K, M rows of the input.
Leading axes (layers, experts) come before K; `index` picks one matrix from them, so that a product
never needs a copy of "its" weight.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.cuda import calls, shapes
from grok1.ops.int4 import Int4Array, dequantize_int4
from grok1.ops.layers import dot_of_copy, exact_einsum, power_of_two, rounded, split_terms

# A weight tile of this many elements is converted to float at a time on a CPU, where XLA cannot
# fuse the conversion into the product: as float32 it is 1 MiB and stays in the second-level cache.
_TILE_ELEMENTS = 1 << 18

Index = tuple[int | Array, ...]


class QuantizedArray(NamedTuple):
    """An int8 weight with bfloat16 scales; stands for `values * scales`, group by group.

    Attributes:
      values: int8 `[*lead, K, N]`.
      scales: bfloat16 `[*lead, G, N]`; group g scales rows `g*K/G` to `(g+1)*K/G`.
    """

    # Any, here and in the other containers: the same tuple also holds shapes or partition specs.
    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for, `(*lead, K, N)`."""
        return self.values.shape


Weight = Array | np.ndarray | QuantizedArray | Int4Array


def quantize(weight: Float[Array, "*lead K N"], num_groups: int = 1) -> QuantizedArray:
    """Rounds a float weight to int8, symmetric, one scale a group and column.

    Args:
      weight: Float `[*lead, K, N]`.
      num_groups: G; must divide K.

    Returns:
      The quantised weight; each scale is the group's largest magnitude over 127, rounded to
      bfloat16 first, so that the values are the nearest for the scale that is stored.

    Raises:
      ValueError: If `num_groups` does not divide K.
    """
    *lead, rows, columns = weight.shape
    if rows % num_groups:
        raise ValueError(f"{num_groups} scale groups do not divide the {rows} rows of the weight")
    grouped = weight.astype(jnp.float32).reshape(*lead, num_groups, rows // num_groups, columns)
    scales = rounded(jnp.abs(grouped).max(axis=-2) / 127, jnp.bfloat16)
    divisor = jnp.where(scales == 0, 1, scales)
    values = jnp.clip(jnp.round(grouped / divisor[..., None, :]), -127, 127)
    values = values.reshape(weight.shape).astype(jnp.int8)
    return QuantizedArray(values, scales.astype(jnp.bfloat16))


def dequantize(weight: Weight) -> Array:
    """Returns the float32 weight that `weight` stands for (a float weight is returned as it is)."""
    if isinstance(weight, Int4Array):
        return dequantize_int4(weight)
    if not isinstance(weight, QuantizedArray):
        return jnp.asarray(weight)
    *lead, rows, columns = weight.values.shape
    num_groups = weight.scales.shape[-2]
    values = weight.values.reshape(*lead, num_groups, rows // num_groups, columns)
    grouped = values.astype(jnp.float32) * weight.scales[..., None, :].astype(jnp.float32)
    return grouped.reshape(weight.values.shape)


def refine_groups(scales, num_groups: int):
    """Repeats each group's scales so that `[*lead, G, N]` becomes `[*lead, num_groups, N]`.

    The weight it scales is unchanged; finer groups let a device hold part of one. Works on NumPy
    and JAX arrays alike.
    """
    return scales.repeat(num_groups // scales.shape[-2], axis=-2)


def num_refined_groups(rows: int, num_groups: int, num_shards: int) -> int:
    """Fewest groups that are whole both in the file's grouping and in every shard of the rows.

    Args:
      rows: K of the whole weight.
      num_groups: G in the file; 1 stays 1, for one scale fits any shard.
      num_shards: Devices that share the rows.
    """
    if num_groups == 1:
        return 1
    return rows // math.gcd(rows // num_groups, rows // num_shards)


def matmul(
    x: Float[Array, "*M K"],
    weight: Weight,
    index: Index = (),
    num_valid: int | Array | None = None,
    implementation: str | None = None,
) -> Float[Array, "*M N"]:
    """Multiplies by one matrix of a weight: `x @ weight[index]`, accumulated in float32.

    Scales are applied to the partial product of each group, so that no float copy of a quantised
    weight need exist: the conversion to the type of `x` (exact, int8 fits bfloat16) is XLA's to
    fuse into the product on accelerators. On a CPU it is done in registers for a few rows and tile
    by tile for many, in float32 whatever `x` is.

    Args:
      x: `[*M, K]`, float32 or bfloat16.
      weight: Float or quantised `[*lead, K, N]`.
      index: One index, a number or a traced scalar, for each leading axis of `weight`.
      num_valid: How many of the M rows matter, from the first on, a number or a traced scalar; None
        for all. What comes out for the others is finite, and costs nothing where that is possible.
      implementation: Which form multiplies a quantised weight: "converted" or "cpp", an int8 one
        also "direct", "of_rows" or "tiled", a 4-bit one "blocked" or "halves"; None for that of
        `forms.PREFERRED`.

    Returns:
      float32 `[*M, N]`.
    """
    rows, columns = weight.shape[-2:]
    x_MK = x.reshape(-1, rows)
    if not isinstance(weight, (QuantizedArray, Int4Array)):
        out = _dot(x_MK, weight[index].astype(x.dtype))
    else:
        num_valid = len(x_MK) if num_valid is None else num_valid
        arguments = x_MK, weight, index, num_valid
        operation = "matmul" if isinstance(weight, QuantizedArray) else "matmul_int4"
        out = forms.run(operation, *arguments, implementation=implementation)
    return out.reshape(*x.shape[:-1], columns)


def matmul_split(
    x: Float[Array, "*M K"], weight: Weight, index: Index, dtype: Any
) -> Float[Array, "*M N"]:
    """`matmul` of a float32 input in products of type `dtype`, without rounding it to that type.

    In bfloat16 the input is the sum of two terms, which go through one product as twice the rows:
    the weight, exact in bfloat16, is read once, and 16 bits of the input's mantissa count.

    Args:
      x: float32 `[*M, K]`.
      weight: Float or quantised `[*lead, K, N]`.
      index: Index of the matrix in the leading axes, one for each.
      dtype: float32 or bfloat16.

    Returns:
      float32 `[*M, N]`.
    """
    return project(x, (weight,), (index,), dtype)[0]


def project(
    x: Float[Array, "*M K"],
    weights: Sequence[Weight],
    indices: Sequence[Index],
    dtype: Any,
    implementation: str | None = None,
) -> list[Float[Array, "*M N"]]:
    """`matmul_split` by several weights of the same rows, in one launch where that is quicker.

    Args:
      x: float32 `[*M, K]`.
      weights: Float or quantised `[*lead, K, N]`.
      indices: For each the index of its matrix.
      dtype: float32 or bfloat16.
      implementation: "one_by_one" goes through `matmul`; "halves" keeps 11 bits of many rows, for
        one product with a copy of the weight; "cuda" goes through CUDA; None for that of
        `forms.PREFERRED`.

    Returns:
      float32 `[*M, N]`, one for each weight.
    """
    arguments = x, tuple(weights), tuple(indices)
    return forms.run("project", *arguments, implementation=implementation, dtype=jnp.dtype(dtype))


@forms.form("project", "one_by_one")
def project_one_by_one(
    x: Float[Array, "*M K"], weights: tuple[Weight, ...], indices: tuple[Index, ...], dtype: Any
) -> list[Float[Array, "*M N"]]:
    """A product each."""
    both = zip(weights, indices, strict=True)
    if x.dtype == dtype:
        return [matmul(x, weight, index) for weight, index in both]
    terms = jnp.stack(split_terms(x, dtype))
    return [jnp.sum(matmul(terms, weight, index), axis=0) for weight, index in both]


def _is_not_for_cuda(x, weights, indices) -> str | None:
    if not all(isinstance(weight, QuantizedArray) for weight in weights):
        return "it reads int8 weights"
    rows = math.prod(x.shape[:-1])
    if rows > shapes.MOST_ROWS:
        return f"it multiplies up to {shapes.MOST_ROWS} rows, not {rows}"
    if len(weights) not in (1, 3):
        return f"it multiplies one matrix or three, not {len(weights)}"
    reasons = (shapes.refusal_of(calls.matrix_of(tuple(weight))) for weight in weights)
    return next(filter(None, reasons), None)


@forms.form("project", "cuda", refuses=_is_not_for_cuda)
def project_cuda(
    x: Float[Array, "*M K"],
    weights: tuple[QuantizedArray, ...],
    indices: tuple[Index, ...],
    dtype: Any,
) -> list[Float[Array, "*M N"]]:
    """All in one launch, each weight read once and in place."""
    x_MK = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    precision = calls.precision_of(x.dtype, dtype)
    pairs = [((of.values, of.scales), i) for of, i in zip(weights, indices, strict=True)]
    return [out.reshape(*x.shape[:-1], -1) for out in calls.project(x_MK, pairs, precision)]


def _is_of_few_rows(num_rows: int) -> str | None:
    if num_rows > shapes.MOST_ROWS:
        return None
    return f"it is for more than {shapes.MOST_ROWS} rows, not {num_rows}"


def _is_not_for_halves(x, weights, indices) -> str | None:
    if not all(isinstance(weight, QuantizedArray) for weight in weights):
        return "it reads int8 weights"
    if x.dtype != jnp.float32:
        return f"it rounds float32, not {x.dtype}"
    return _is_of_few_rows(math.prod(x.shape[:-1]))


@forms.form("project", "halves", refuses=_is_not_for_halves)
def project_halves(
    x: Float[Array, "*M K"],
    weights: tuple[QuantizedArray, ...],
    indices: tuple[Index, ...],
    dtype: Any,
) -> list[Float[Array, "*M N"]]:
    """A product each with a float16 copy of the weight, of inputs rounded to float16.

    That keeps 11 bits below the power of two that each row is divided by, so that none is too much.
    An int8 is exact; scales of groups go into the copy, in which 11 bits are kept as well.
    """
    if dtype != jnp.bfloat16:
        return project_one_by_one(x, weights, indices, dtype)
    rows = x.reshape(-1, x.shape[-1])
    sizes = power_of_two(jnp.abs(rows).max(axis=-1, keepdims=True))
    halves = (rows / sizes).astype(jnp.float16)
    found = []
    for weight, index in zip(weights, indices, strict=True):
        scales = weight.scales[index].astype(jnp.float32)
        size = power_of_two(scales.max()) if _has_groups(weight) else None
        steps = None if size is None else 1 / size
        copy = forms.run("convert", weight, index, steps, dtype=jnp.dtype(jnp.float16))
        out = dot_of_copy(halves, copy) * (scales if size is None else size) * sizes
        found.append(out.reshape(*x.shape[:-1], -1))
    return found


@forms.form("matmul", "direct")
def matmul_direct(
    x: Float[Array, "M K"], weight: QuantizedArray, index: Index, num_valid: int | Array
):
    """One product a group; the form whose conversion XLA can fuse on accelerators."""
    values_KN = weight.values[index]
    scales_GN = weight.scales[index].astype(jnp.float32)
    num_groups, columns = scales_GN.shape
    if num_groups == 1:
        return _dot(x, values_KN.astype(x.dtype)) * scales_GN
    x_GMk = x.reshape(x.shape[0], num_groups, -1).swapaxes(0, 1)
    values_GkN = values_KN.reshape(num_groups, -1, columns).astype(x.dtype)
    return (_dot(x_GMk, values_GkN) * scales_GN[:, None, :]).sum(axis=0)


@forms.form("matmul", "of_rows")
def matmul_of_rows(
    x: Float[Array, "M K"], weight: QuantizedArray, index: Index, num_valid: int | Array
):
    """`matmul_direct`, one row as two: for TPUs, whose matrix units XLA uses for several only."""
    if len(x) > 1:
        return matmul_direct(x, weight, index, num_valid)
    both = jax.lax.optimization_barrier(jnp.pad(x, ((0, 1), (0, 0))))
    return jax.lax.optimization_barrier(matmul_direct(both, weight, index, num_valid))[:1]


def _is_not_of_bfloat16(x, weight, index, num_valid) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"its products are of bfloat16, not {x.dtype}"
    return _is_of_few_rows(len(x))


@forms.form("matmul", "converted", refuses=_is_not_of_bfloat16)
def matmul_converted(
    x: Float[Array, "M K"], weight: QuantizedArray, index: Index, num_valid: int | Array
):
    """One product with a bfloat16 copy of the matrix, by the vendor's library where there is one.

    It takes as long to make the copy as to read it three times: for many rows. Scales of groups go
    into it, rounded to bfloat16 with it; that of a whole column is applied to the product.
    """
    out = dot_of_copy(x, forms.run("convert", weight, index, None))
    return out if _has_groups(weight) else out * weight.scales[index].astype(jnp.float32)


def _has_groups(weight: QuantizedArray) -> bool:
    return weight.scales.shape[-2] > 1


@forms.form("convert", "xla")
def convert_xla(
    weight: QuantizedArray, index: Index, steps: Array | None, dtype: Any = jnp.bfloat16
) -> Float[Array, "K N"]:
    """One matrix as floats of 16 bits, times its scales if they differ along a column.

    Args:
      weight: The stack.
      index: Of each leading axis.
      steps: What the scales are multiplied by first, where there are several for a column and the
        type is float16, which is narrow; float32.
      dtype: bfloat16 or float16.
    """
    if not _has_groups(weight):
        return weight.values[index].astype(dtype)
    scaled = _scaled(weight, index)
    return (scaled if steps is None else scaled * steps).astype(dtype)


def _is_not_to_be_copied(weight, index, steps) -> str | None:
    return shapes.refusal_of_copy(calls.matrix_of(tuple(weight)))


@forms.form("convert", "cuda", refuses=_is_not_to_be_copied)
def convert_cuda(
    weight: QuantizedArray, index: Index, steps: Array | None, dtype: Any = jnp.bfloat16
) -> Float[Array, "K N"]:
    """As `convert_xla`, in CUDA: XLA reads a few bytes at a time, at half the memory's rate."""
    return calls.convert(tuple(weight), index, _has_groups(weight), steps, dtype)


def _scaled(weight: QuantizedArray, index: Index) -> Array:
    """One matrix of a weight times its scales, float32 `[K, N]`."""
    values_KN = weight.values[index].astype(jnp.float32)
    scales_GN = weight.scales[index].astype(jnp.float32)
    scaled_GkN = values_KN.reshape(len(scales_GN), -1, values_KN.shape[1]) * scales_GN[:, None]
    return scaled_GkN.reshape(values_KN.shape)


@forms.form("matmul", "tiled")
def matmul_tiled(
    x: Float[Array, "M K"], weight: QuantizedArray, index: Index, num_valid: int | Array
):
    """The same sum, a tile of rows at a time: float memory is one tile, whatever the weight."""
    rows, columns = weight.shape[-2:]
    x = x.astype(jnp.float32)
    if rows * columns <= _TILE_ELEMENTS:
        return matmul_direct(x, weight, index, num_valid)
    num_groups = weight.scales.shape[-2]
    tile = _largest_divisor(rows // num_groups, max(1, _TILE_ELEMENTS // columns))
    lead = tuple(1 for _ in index)
    scales_GN = weight.scales[index].astype(jnp.float32)

    def add_tile(i, out):
        start = i * tile
        tile_values = jax.lax.dynamic_slice(
            weight.values, (*index, start, 0), (*lead, tile, columns)
        ).reshape(tile, columns)
        x_tile = jax.lax.dynamic_slice_in_dim(x, start, tile, axis=1)
        scales_N = jax.lax.dynamic_index_in_dim(
            scales_GN, start * num_groups // rows, keepdims=False
        )
        return out + _dot(x_tile, tile_values.astype(x.dtype)) * scales_N

    zeros = jnp.zeros((x.shape[0], columns), jnp.float32)
    return jax.lax.fori_loop(0, rows // tile, add_tile, zeros)


@forms.form("matmul", "cpp")
def matmul_cpp(
    x: Float[Array, "M K"], weight: QuantizedArray, index: Index, num_valid: int | Array
):
    """The same sum in C++, reading the weight once and in place; float32 whatever the input."""
    x = x.astype(jnp.float32)
    return bindings.quantized_matmul(x, weight, index, num_valid)


def _dot(x: Array, y: Array) -> Array:
    return exact_einsum("...MK,...KN->...MN", x, y)


def _largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(min(number, at_most), 0, -1) if number % d == 0)
