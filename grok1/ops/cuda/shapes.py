"""Kernels for given shapes: how the work is cut into blocks, warps and tiles.

Memory is busy while about 25 kB are on their way to each multiprocessor. A block of 16 warps, each
with 4 kB of weights in its registers, has 64 kB on the way, so that three quarters of the
multiprocessors suffice, and no matrix needs partial sums between blocks but those too narrow for
that.
"""

from typing import NamedTuple

from grok1.ops.cuda.kernel import Array, Kernel, struct

MOST_ROWS = 64
"""Tokens of a call that the kernels for few rows are for."""

MOST_EXPERTS = 32

_WIDE, _NARROW = 16, 8  # bytes of a row of weights that a lane reads at a time
_BUSY = 96  # blocks that keep the memory busy


class Matrix(NamedTuple):
    """An int8 matrix with scales: K rows, N columns, G groups."""

    rows: int
    columns: int
    groups: int


def refusal_of(matrix: Matrix) -> str | None:
    """Why a matrix cannot be multiplied; None if it can."""
    if matrix.columns % _WIDE:
        return f"its rows must be a multiple of {_WIDE} wide, not {matrix.columns}"
    if matrix.rows % (4 * matrix.groups):
        return f"its groups must be a multiple of 4 rows, not {matrix.rows / matrix.groups:g}"
    return None


def refusal_of_experts(num_experts: int, gate: Matrix, up: Matrix, down: Matrix) -> str | None:
    """Why experts of these matrices cannot be run; None if they can."""
    if num_experts > MOST_EXPERTS:
        return f"it runs up to {MOST_EXPERTS} experts, not {num_experts}"
    if gate != up:
        return "gate and up have scales for different groups"
    return refusal_of(gate) or refusal_of(down)


def _product(matrix: Matrix, inputs: int, exact: bool, others: int = 1, warps: int = 16) -> dict:
    """How a block multiplies.

    Args:
      matrix: What.
      inputs: Most rows of inputs that one matrix has.
      exact: Whether the inputs are of bfloat16, which takes one term.
      others: How many matrices of this size are multiplied side by side.
      warps: Most that share the rows.
    """
    # Two rows are as exact as float32; the second of two terms leaves 2**-17.
    terms = 1 if exact else 4 if inputs <= 2 else 2
    tiles = next(tiles for tiles in (1, 2, 4) if inputs * terms <= 8 * tiles or tiles == 4)
    is_wide = tiles == 1 and matrix.columns // (8 * _WIDE) * others >= _BUSY
    return {
        "K": matrix.rows,
        "N": matrix.columns,
        "G": matrix.groups,
        "BYTES": _WIDE if is_wide else _NARROW,
        "TILES": tiles,
        "TERMS": terms,
        "UNROLL": 2 if is_wide or tiles > 1 else 4,
        "WARPS": warps if tiles == 1 else warps // 2,
    }


def _column_tiles(product: dict) -> int:
    return -(-product["N"] // (8 * product["BYTES"]))


def experts(
    tokens: int, selected: int, num_experts: int, gate: Matrix, down: Matrix, exact: bool
) -> tuple[Kernel, Kernel]:
    """The chosen experts of up to `MOST_ROWS` tokens: gate, up and GELU; down and the sum.

    Args:
      tokens: M.
      selected: A.
      num_experts: E.
      gate: The gate's matrix; up is like it.
      down: The matrix that leads back.
      exact: Whether x holds numbers of bfloat16.
    """
    chosen = min(num_experts, tokens * selected)
    hidden = _product(gate, tokens, exact, others=chosen, warps=8)
    out = _product(down, tokens, False)
    sizes = {"M": tokens, "A": selected, "E": num_experts}
    structs = (
        ("H", struct(hidden)),
        ("O", struct(out)),
        ("S", struct({**sizes, "Hidden": "H", "Out": "O"})),
    )
    headers = ("product.h", "experts.h")
    weights = ("int8", "bfloat16")
    return (
        Kernel(
            "grok1_gate_up",
            headers,
            structs,
            "gate_up<S>",
            ("float32", *weights, *weights, "int32", "int32", "bool"),
            (Array((tokens * selected, gate.columns), "float32"),),
            (_column_tiles(hidden), chosen),
            2 * 32 * hidden["WARPS"],
        ),
        Kernel(
            "grok1_down",
            headers,
            structs,
            "down_sum<S>",
            ("float32", *weights, "int32", "int32", "bool", "float32"),
            (Array((tokens, down.columns), "float32"),),
            (_column_tiles(out), 1),
            32 * out["WARPS"],
        ),
    )


def project(rows: int, matrices: tuple[Matrix, ...], exact: bool) -> Kernel:
    """Up to `MOST_ROWS` rows times one matrix or three side by side.

    What it writes is `[P, M, N]`, to be added up along P: 1 where the columns alone are enough work
    for a device.

    Args:
      rows: M.
      matrices: What they are multiplied with; of as many rows each.
      exact: Whether x holds numbers of bfloat16.
    """
    products = [_product(matrix, rows, exact) for matrix in matrices]
    for product in products:
        if product["BYTES"] == _WIDE and len(products) > 1:
            product |= {"BYTES": _NARROW, "UNROLL": 4}
    tiles = sum(map(_column_tiles, products))
    parts = 1
    if len(matrices) > 1:
        # Half a tile of rows for each warp at least.
        most = max(1, matrices[0].rows // 16 // products[0]["WARPS"] // 2)
        parts = min(most, -(-_BUSY // tiles))
    columns = sum(matrix.columns for matrix in matrices)
    names = ("First", "Second", "Third")[: len(matrices)]
    structs = (
        *((name, struct(product)) for name, product in zip(names, products, strict=True)),
        ("S", struct({"M": rows, "N": columns, "PARTS": parts})),
    )
    return Kernel(
        "grok1_project",
        ("product.h", "project.h"),
        structs,
        f"project<{', '.join(('S', *names))}>",
        ("float32", *("int8", "bfloat16", "int32") * len(matrices)),
        (Array((parts, rows, columns), "float32"),),
        (tiles, parts),
        32 * products[0]["WARPS"],
    )


def refusal_of_copy(matrix: Matrix) -> str | None:
    """Why a matrix cannot be converted; None if it can."""
    if matrix.columns % _NARROW:
        return f"its rows must be a multiple of {_NARROW} wide, not {matrix.columns}"
    return None


def convert(matrix: Matrix, is_scaled: bool) -> Kernel:
    """A matrix as bfloat16.

    Args:
      matrix: What.
      is_scaled: Whether it is multiplied by its scales, and rounded.
    """
    rows_of_scale = matrix.rows // matrix.groups
    rows = next(rows for rows in (8, 4, 2, 1) if rows_of_scale % rows == 0)
    warps = 8
    sizes = {
        "K": matrix.rows,
        "N": matrix.columns,
        "GROUP": rows_of_scale if is_scaled else 0,
        "ROWS": rows,
        "WARPS": warps,
    }
    return Kernel(
        "grok1_convert",
        ("convert.h",),
        (("S", struct(sizes)),),
        "convert<S>",
        ("int8", "bfloat16", "int32"),
        (Array((matrix.rows, matrix.columns), "bfloat16"),),
        (-(-matrix.columns // (32 * _NARROW)), -(-matrix.rows // (warps * rows))),
        32 * warps,
    )
