"""Calls of the CUDA kernels from a program, by XLA's own launch of PTX.

A launch is a node of the program's CUDA graph like one of XLA's own, without a host part: the
operands' memory is all that it is given. Stacks of weights are read in place.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.ops.cuda import shapes, shapes_int4, shapes_of_prompts, shapes_of_screening
from grok1.ops.cuda.build import ptx_of
from grok1.ops.cuda.kernel import Kernel
from grok1.ops.cuda.shapes import Matrix, Precision

_TARGET = "__gpu$xla.gpu.ptx"
_TYPED_CONFIG = 2  # version of XLA's custom calls whose configuration is a text

Quantized = tuple[Array, Array]
"""int8 values `[*lead, K, N]` and bfloat16 scales `[*lead, G, N]`."""


Int4 = tuple[Array, Array, Array]
"""4-bit values `[*lead, K/2, N]`, subscales and float16 scales `[*lead, B, N]`: an `Int4Array`."""


def call(kernel: Kernel, *inputs: Array) -> list[Array]:
    """Launches a kernel.

    Args:
      kernel: Which.
      *inputs: Arrays of its types, in order; memory in order of the axes.

    Returns:
      Its outputs.
    """
    found = [jnp.dtype(array.dtype).name for array in inputs]
    if found != list(kernel.inputs):
        raise TypeError(f"{kernel.name} takes {list(kernel.inputs)}, found {found}")
    outputs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in kernel.outputs]
    kernel = kernel._replace(name=name_of(kernel))
    (grid_x, grid_y), threads = kernel.grid, kernel.threads
    config = (
        f'{{name = "{kernel.name}", kernel_type = "ptx", kernel_data = {_quoted(ptx_of(kernel))}, '
        f"grid_x = {grid_x} : i32, grid_y = {grid_y} : i32, grid_z = 1 : i32, "
        f"block_x = {threads} : i32, block_y = 1 : i32, block_z = 1 : i32, "
        f"shared_mem_bytes = {kernel.shared_bytes} : i32}}"
    )
    launch = jax.ffi.ffi_call(
        _TARGET,
        outputs,
        custom_call_api_version=_TYPED_CONFIG,
        legacy_backend_config=config,
        input_output_aliases=dict(kernel.aliases),
    )
    return list(launch(*inputs))


def name_of(kernel: Kernel) -> str:
    """The name of a kernel's launches, another for other sizes: nothing takes one for the other."""
    return f"{kernel.name}_{hashlib.sha256(repr(kernel).encode()).hexdigest()[:8]}"


def _quoted(text: str) -> str:
    """A text as a literal of MLIR."""
    escaped = (
        c if c.isprintable() and c.isascii() and c not in '"\\' else f"\\{ord(c):02X}" for c in text
    )
    return f'"{"".join(escaped)}"'


def matrix_of(weight: Quantized) -> Matrix:
    """The sizes of one matrix of a stack."""
    values, scales = weight
    rows, columns = values.shape[-2:]
    return Matrix(rows, columns, scales.shape[-2])


def int4_matrix_of(weight: Int4) -> Matrix:
    """The sizes of one matrix of a 4-bit stack; its groups are the blocks."""
    values, _, scales = weight
    pairs, columns = values.shape[-2:]
    return Matrix(2 * pairs, columns, scales.shape[-2])


def precision_of(dtype: Any, product_dtype: Any) -> Precision:
    """What of an input counts in products of a type, as in `matmul_split`."""
    if dtype == jnp.bfloat16:
        return "bfloat16"
    return "float32" if product_dtype == jnp.float32 else "split"


def experts(
    x: Float[Array, "M D"],
    weights: tuple[Quantized, Quantized, Quantized],
    layer: int | Array,
    choice: tuple[Int[Array, "M A"], Float[Array, "M A"]],
    valid: Bool[Array, " M"],
) -> Float[Array, "M D"]:
    """Sums, for each token, its experts' gated feed-forward times their weights.

    Args:
      x: float32 or bfloat16, of up to `shapes.MOST_ROWS` tokens.
      weights: Gate and up `[*lead, E, D, F]`, and down `[*lead, E, F, D]`.
      layer: Index of the layer, 0 where there is no such axis.
      choice: Experts, int32, of which one outside 0 to E-1 is not run; and their weights, float32.
      valid: False for padding, which gets zeros.

    Returns:
      float32.
    """
    gate, up, down = weights
    expert_indices, expert_weights = choice
    tokens, selected = expert_indices.shape
    gate_up, down_sum = shapes.experts(
        tokens,
        selected,
        gate[0].shape[-3],
        matrix_of(gate),
        matrix_of(down),
        "bfloat16" if x.dtype == jnp.bfloat16 else "float32",
    )
    indices = expert_indices.astype(jnp.int32)
    layer = jnp.asarray(layer, jnp.int32)
    hidden, *_ = call(gate_up, x.astype(jnp.float32), *gate, *up, layer, indices, valid)
    out, _ = call(down_sum, hidden, *down, layer, indices, valid, expert_weights)
    return out


def experts_of_prompts(
    x: Float[Array, "R D"],
    weights: tuple[Quantized, Quantized, Quantized],
    layer: int | Array,
    first_row: Int[Array, " E"],
    rows_per_expert: Int[Array, " E"],
) -> Float[Array, "R D"]:
    """What each row's expert makes of it, for many tokens.

    Args:
      x: bfloat16, the rows of each expert together.
      weights: Gate and up `[*lead, E, D, F]`, and down `[*lead, E, F, D]`.
      layer: Index of the layer, 0 where there is no such axis.
      first_row: Of each expert.
      rows_per_expert: How many each has; rows of none are not written.

    Returns:
      float32.
    """
    gate, up, down = weights
    num_experts = gate[0].shape[-3]
    gate_up, of_down = shapes_of_prompts.experts(
        len(x), num_experts, matrix_of(gate), matrix_of(down)
    )
    where = [jnp.asarray(of, jnp.int32) for of in (layer, first_row, rows_per_expert)]
    (hidden,) = call(gate_up, x, *gate, *up, *where)
    (out,) = call(of_down, hidden, *down, *where)
    return out


def experts_int4(
    x: Float[Array, "M D"],
    weights: tuple[Int4, Int4, Int4],
    layer: int | Array,
    choice: tuple[Int[Array, "M A"], Float[Array, "M A"]],
    valid: Bool[Array, " M"],
    is_made_in_blocks: bool = False,
) -> Float[Array, "M D"]:
    """As `experts`, of 4-bit weights; for the last argument see `shapes_int4.experts`."""
    gate, up, down = weights
    expert_indices, expert_weights = choice
    tokens, selected = expert_indices.shape
    sizes = shapes_int4.Sizes(
        tokens,
        selected,
        gate[0].shape[-3],
        int4_matrix_of(gate),
        int4_matrix_of(down),
        "bfloat16" if x.dtype == jnp.bfloat16 else "float32",
    )
    digits_of, gate_up, down_sum = shapes_int4.experts(sizes, is_made_in_blocks)
    indices = expert_indices.astype(jnp.int32)
    layer = jnp.asarray(layer, jnp.int32)
    x = x.astype(jnp.float32)
    inputs = [x] if digits_of is None else call(digits_of, x)
    hidden = call(gate_up, *inputs, *gate, *up, layer, indices, valid)[:2]
    out, _ = call(down_sum, *hidden, *down, layer, indices, valid, expert_weights)
    return out


def project(
    x: Float[Array, "M K"],
    weights: list[tuple[Quantized, tuple[int | Array, ...]]],
    precision: Precision,
) -> list[Float[Array, "M N"]]:
    """Multiplies by one matrix of each of some stacks.

    Args:
      x: float32, of up to `shapes.MOST_ROWS` rows.
      weights: Stacks, one or three, and for each an index of each leading axis.
      precision: What of x counts.

    Returns:
      float32, one for each stack.
    """
    if len(weights) == 1:
        out, _ = _launch(x, weights, precision)
        return [out]
    (parts,) = _launch(x, weights, precision)
    columns = [matrix_of(weight).columns for weight, _ in weights]
    ends = [sum(columns[: i + 1]) for i in range(len(columns) - 1)]
    return jnp.split(parts.sum(axis=0), ends, axis=1)


def projected(
    x: Float[Array, "M K"],
    weights: list[tuple[Quantized, tuple[int | Array, ...]]],
    precision: Precision,
) -> Float[Array, "P M N"]:
    """As `project` of three stacks, before what parts of the rows of the matrices add is added up.

    Returns:
      float32; the products are side by side.
    """
    (parts,) = _launch(x, weights, precision)
    return parts


def _launch(
    x: Float[Array, "M K"],
    weights: list[tuple[Quantized, tuple[int | Array, ...]]],
    precision: Precision,
) -> list[Array]:
    matrices = tuple(matrix_of(weight) for weight, _ in weights)
    split, kernel = shapes.project(len(x), matrices, precision)
    if split is not None:
        (x,) = call(split, x)
    operands = []
    for (values, scales), index in weights:
        operands += [values, scales, _number(values.shape[:-2], index)]
    return call(kernel, x, *operands)


def _number(lead: tuple[int, ...], index: tuple[int | Array, ...]) -> Array:
    """Which of all matrices of a stack it is, int32."""
    number = jnp.int32(0)
    for size, i in zip(lead, index, strict=True):
        number = number * size + jnp.asarray(i, jnp.int32)
    return number


def convert(
    weight: Quantized,
    index: tuple[int | Array, ...],
    is_scaled: bool,
    steps: Array | None = None,
    dtype: Any = jnp.bfloat16,
) -> Array:
    """One matrix of a stack as floats of 16 bits `[K, N]`, times its scales or without them.

    Args:
      weight: The stack.
      index: Of each leading axis.
      is_scaled: Whether it is multiplied by its scales, and rounded.
      steps: What scales are multiplied by first, float32; None for 1.
      dtype: bfloat16 or float16.
    """
    values, scales = weight
    kernel = shapes.convert(matrix_of(weight), is_scaled, jnp.dtype(dtype).name)
    factor = jnp.float32(1) if steps is None else steps
    return call(kernel, values, scales, _number(values.shape[:-2], index), factor)[0]


def convert_int4(weight: Int4, index: tuple[int | Array, ...]) -> Array:
    """One matrix of a 4-bit stack as bfloat16 `[K, N]`, times its scales."""
    kernel = shapes_int4.convert(int4_matrix_of(weight))
    return call(kernel, *weight, _number(weight[0].shape[:-2], index))[0]


def most_probable(
    x: Float[Array, "M D"],
    rows: Float[Array, "V D"],
    table: tuple[Array, Array, Array],
    allowed: Bool[Array, "*M V"],
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Finds the allowed row of a table with the largest product, reading its int8 copy.

    Args:
      x: float32, of up to `shapes_of_screening.MOST_ROWS` rows.
      rows: float32; only those that the copy cannot rule out are read.
      table: int8 values `[V, D]`, float32 scales `[V]` and uncertainty `[V]` of a `ScreeningTable`.
      allowed: False for rows that must not be found, `[V]` for all of x or `[M, V]`.

    Returns:
      (index of the row, int32, -1 if there is none; its product, float32).
    """
    digits_of, screen, choose = shapes_of_screening.most_probable(
        len(x), *rows.shape, is_masked_by_row=allowed.ndim > 1
    )
    bounds = call(screen, *call(digits_of, x), *table, allowed)
    index, product, *_ = call(choose, x, rows, *bounds)
    return index, product
