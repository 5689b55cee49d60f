"""Kernels of 4-bit matrices for given shapes; see `shapes`.

Here a multiprocessor needs its warps to turn codes into bytes: 16 of them keep up with the memory.
"""

import math
from typing import NamedTuple

from grok1.ops.cuda.kernel import Array, Kernel, struct
from grok1.ops.cuda.shapes import BUSY, NARROW, WIDE, Cut, Matrix, Precision, columns_of_block

MOST_EXACT = 8
"""Tokens of bfloat16 whose inputs are exact; of more 15 bits below a block's largest count."""

WEIGHTS = ("uint8", "uint8", "float16")
"""The types of the parts of a 4-bit matrix."""

_GROUP = 32  # rows of the products of integers
_MULTIPROCESSORS = 128  # about as many as a device has
_LEAST_TILES = 4  # of 32 rows, for each team
_WARPS = 4  # of a block that makes digits

_HEADERS = (
    "floats.h",
    "arrivals.h",
    "product.h",
    "codes.h",
    "product_int4.h",
    "experts.h",
    "digits.h",
    "experts_int4.h",
)


def block_rows(matrix: Matrix) -> int:
    """Rows of a block; the groups of a 4-bit `Matrix` are its blocks."""
    return matrix.rows // matrix.groups


def refusal_of(matrix: Matrix) -> str | None:
    """Why a matrix cannot be multiplied; None if it can."""
    if matrix.columns % WIDE:
        return f"its rows must be a multiple of {WIDE} wide, not {matrix.columns}"
    if block_rows(matrix) % _GROUP:
        return f"its blocks must be a multiple of {_GROUP} rows, not {block_rows(matrix)}"
    return None


def cuts(tiles: int) -> tuple[tuple[Cut, int], tuple[Cut, int]]:
    """How gate and up are cut, and how down is, for so many tiles of inputs.

    Beside it how many blocks a multiprocessor holds at once.
    """
    if tiles == 1:
        return (Cut(2, 2, 1, 4), 2), (Cut(2, 2, 16, 3), 4)
    # What a multiprocessor's registers hold: more tiles leave them to fewer warps.
    resident = 2 if tiles == 3 else 1
    return (Cut(4, 1, 1, 4), resident), (Cut(4, 1, 8, 3), resident + 1)


def _parts_of_down(down: Matrix, chosen: int, cut: Cut, resident: int) -> int:
    """How many blocks share the rows: a few more than run at once would take twice as long."""
    at_once = _MULTIPROCESSORS * resident
    blocks = chosen * max(1, down.columns // (8 * WIDE * cut.across)) * cut.parts
    return max(1, cut.parts // 2) if at_once < blocks < 2 * at_once else cut.parts


def _product(matrix: Matrix, tiles: int, digits: int, cut: Cut, others: int) -> dict:
    """How a block multiplies.

    Args:
      matrix: What.
      tiles: Of inputs.
      digits: Of an input.
      cut: Of the matrix.
      others: How many blocks there are for each tile of columns.
    """
    size = WIDE if tiles == 1 and matrix.columns >= 8 * WIDE else NARROW
    size, across, teams = columns_of_block(matrix.columns, cut, size, others)
    parts = max(1, min(cut.parts, matrix.rows // (_GROUP * _LEAST_TILES * teams)))
    return {
        "K": matrix.rows,
        "N": matrix.columns,
        "BLOCK": block_rows(matrix),
        "UNIT": block_rows(matrix),
        "BYTES": size,
        "TILES": tiles,
        "COPIES": 0,
        "TERMS": 2 * digits,
        # One more holds scales; those of a block are copied while those of another are read.
        "STAGES": min(cut.stages, block_rows(matrix) // _GROUP + 1) + 1,
        "ACROSS": across,
        "TEAMS": teams,
        "SHARES": parts * teams,
        "COLUMN_TILES": -(-matrix.columns // (8 * size * across)),
    }


class Sizes(NamedTuple):
    """What the kernels of the chosen experts are made for.

    Attributes:
      tokens: M, up to `shapes.MOST_ROWS`.
      selected: A.
      num_experts: E.
      gate: The gate's matrix; up is like it.
      down: The matrix that leads back.
      precision: Of x; all of float32 counts, but where x is of bfloat16 and the tokens are many.
    """

    tokens: int
    selected: int
    num_experts: int
    gate: Matrix
    down: Matrix
    precision: Precision


def experts(sizes: Sizes, is_made_in_blocks: bool = False) -> tuple[Kernel | None, Kernel, Kernel]:
    """The chosen experts of a few tokens.

    The kernels make digits of the inputs; gate, up and GELU, and digits of that; down and the sum.
    The last writes the sum, and what it adds up.

    Args:
      sizes: For what.
      is_made_in_blocks: Whether blocks of gate and up make the inputs' digits themselves where they
        have a row at a time, in more shared memory than every device has; there is no first kernel
        then.
    """
    tokens, selected, num_experts, gate, down, precision = sizes
    chosen, rows = min(num_experts, tokens * selected), tokens * selected
    # A few experts have more rows than the mean.
    inputs = math.ceil(min(tokens, 1.5 * tokens * selected / num_experts))
    digits = 2 if precision == "bfloat16" and tokens > MOST_EXACT else 4
    tiles = min(8, -(-inputs * digits // 4))
    if tiles == 2:
        tiles = 3  # which takes fewer registers, as the compiler has it
    (first, resident), (second, resident_of_down) = cuts(tiles)
    # Of a narrow matrix blocks share the rows too, so that each still reads long pieces of them.
    blocks = chosen * max(1, gate.columns // (8 * WIDE * first.across))
    shared = max(first.parts, _MULTIPROCESSORS * resident // blocks)
    hidden = _product(gate, tiles, digits, first._replace(parts=shared), chosen * shared)
    second = second._replace(parts=_parts_of_down(down, chosen, second, resident_of_down))
    out = _product(down, tiles, digits, second, BUSY)
    # Digits are made of the columns that a block has.
    out["UNIT"] = math.gcd(out["BLOCK"], 8 * hidden["BYTES"] * hidden["ACROSS"])
    structs = (
        ("H", struct(hidden)),
        ("O", struct(out)),
        (
            "S",
            struct(
                {
                    "M": tokens,
                    "A": selected,
                    "E": num_experts,
                    "CHOSEN": chosen,
                    "Hidden": "H",
                    "Out": "O",
                }
            ),
        ),
    )
    parts, of_hidden = (of["SHARES"] // of["TEAMS"] for of in (out, hidden))
    choice = ("int32", "int32", "bool")
    is_made = is_made_in_blocks and tiles == 1 and digits == 4
    # A row's digits, 32 bytes apart from each other, and a factor for each unit.
    room = digits * (gate.rows + 32) + 4 * gate.groups if is_made else 0
    return (
        None if is_made else digits_of(tokens, gate, digits),
        Kernel(
            "grok1_gate_up_int4",
            _HEADERS,
            structs,
            "gate_up_int4_of_numbers<S>" if is_made else "gate_up_int4<S>",
            (*(("float32",) if is_made else ("int8", "float32")), *WEIGHTS, *WEIGHTS, *choice),
            (
                *_arrays_of_digits(rows, down.rows, digits, out["UNIT"]),
                *(Array((2 * of_hidden, rows, gate.columns), "float32"),) * (of_hidden > 1),
            ),
            (hidden["COLUMN_TILES"], chosen * of_hidden),
            2 * _threads(hidden),
            shared_bytes=2 * _shared_bytes(hidden) + room,
            resident=resident,
        ),
        Kernel(
            "grok1_down_int4",
            _HEADERS,
            structs,
            "down_int4<S>",
            ("int8", "float32", *WEIGHTS, *choice, "float32"),
            (
                Array((tokens, down.columns), "float32"),
                Array((parts, rows, down.columns), "float32"),
            ),
            (out["COLUMN_TILES"], chosen * parts),
            _threads(out),
            shared_bytes=_shared_bytes(out),
            resident=resident_of_down,
        ),
    )


def _threads(product: dict) -> int:
    return 32 * product["ACROSS"] * product["TEAMS"]


def _shared_bytes(product: dict) -> int:
    return product["STAGES"] * 16 * 8 * product["BYTES"] * product["ACROSS"] * product["TEAMS"]


def digits_of(rows: int, matrix: Matrix, digits: int) -> Kernel:
    """Digits of rows that a matrix is multiplied with, and a factor for those of each block."""
    unit = block_rows(matrix)
    sizes = {"K": matrix.rows, "UNIT": unit, "DIGITS": digits, "WARPS": _WARPS}
    return Kernel(
        "grok1_digits",
        ("digits.h",),
        (("S", struct(sizes)),),
        "digits_of<S>",
        ("float32",),
        _arrays_of_digits(rows, matrix.rows, digits, unit),
        (rows, -(-matrix.groups // _WARPS)),
        32 * _WARPS,
    )


def _arrays_of_digits(rows: int, width: int, digits: int, unit: int) -> tuple[Array, Array]:
    return Array((rows, digits, width), "int8"), Array((rows, width // unit), "float32")


def convert(matrix: Matrix) -> Kernel:
    """A matrix, times its scales, as bfloat16."""
    group = math.gcd(_GROUP, block_rows(matrix))
    rows, warps = math.gcd(8, group // 2), 8
    sizes = {
        "K": matrix.rows,
        "N": matrix.columns,
        "BLOCK": block_rows(matrix),
        "GROUP": group,
        "ROWS": rows,
        "WARPS": warps,
    }
    return Kernel(
        "grok1_convert_int4",
        ("codes.h", "convert.h", "convert_int4.h"),
        (("S", struct(sizes)),),
        "convert_int4<S>",
        (*WEIGHTS, "int32"),
        (Array((matrix.rows, matrix.columns), "bfloat16"),),
        (-(-matrix.columns // (32 * NARROW)), -(-matrix.rows // (2 * warps * rows))),
        32 * warps,
    )
