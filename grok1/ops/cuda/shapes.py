"""Kernels for given shapes: how the work is cut into blocks, teams, shares and tiles.

Memory is busy while about 25 kB are on their way to each multiprocessor, and at its best where a
block reads long pieces of rows; the multiprocessors are, where each has eight warps or more. How
much of what that takes was measured on an H200.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from grok1.ops.cuda.kernel import Array, Kernel, struct

MOST_ROWS = 64
"""Tokens of a call that the kernels for few rows are for."""

MOST_EXACT = 16
"""Tokens of bfloat16 whose hidden numbers are not rounded to it."""

MOST_EXPERTS = 32

Precision = Literal["bfloat16", "split", "float32"]
"""What of an input counts: it is of bfloat16, 16 bits of float32, or all of it."""

WIDE, NARROW = 16, 8
"""Bytes of a row of weights that a lane takes."""

BUSY = 96
"""Blocks that keep the memory busy."""

_FULL = 128  # blocks, about one for each multiprocessor
_ACROSS = 4  # warps of a team, side by side
_LEAST_TILES = 6  # of 16 rows, for each team
_DIRECT = 3  # most tiles of inputs that threads read for themselves
_COPIED = 8  # most that come to shared memory; their sums take most registers of a multiprocessor


class Matrix(NamedTuple):
    """An int8 matrix with scales: K rows, N columns, G groups."""

    rows: int
    columns: int
    groups: int


def refusal_of(matrix: Matrix) -> str | None:
    """Why a matrix cannot be multiplied; None if it can."""
    if matrix.columns % WIDE:
        return f"its rows must be a multiple of {WIDE} wide, not {matrix.columns}"
    if matrix.rows % (4 * matrix.groups):
        return f"its groups must be a multiple of 4 rows, not {matrix.rows / matrix.groups:g}"
    return None


def refusal_of_experts(
    num_experts: int,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    refusal: Callable[[Matrix], str | None] = refusal_of,
) -> str | None:
    """Why experts of these matrices cannot be run; None if they can.

    Args:
      num_experts: E.
      gate: The gate's matrix.
      up: That beside it.
      down: That which leads back.
      refusal: Says why a kernel cannot multiply by a matrix.
    """
    if num_experts > MOST_EXPERTS:
        return f"it runs up to {MOST_EXPERTS} experts, not {num_experts}"
    return refusal_of_expert(gate, up, down, refusal)


def refusal_of_expert(
    gate: Matrix, up: Matrix, down: Matrix, refusal: Callable[[Matrix], str | None]
) -> str | None:
    """As `refusal_of_experts`, however many there are."""
    if gate != up:
        return "gate and up have scales for different groups"
    return refusal(gate) or refusal(down)


class Cut(NamedTuple):
    """How a matrix is cut.

    Attributes:
      across: Most warps of a team, side by side.
      teams: Of a block, that share the rows.
      parts: Blocks that share the rows, where there are enough.
      stages: Tiles of a team that are under way, and the one that is multiplied.
    """

    across: int
    teams: int
    parts: int
    stages: int


def columns_of_block(columns: int, cut: Cut, size: int, others: int) -> tuple[int, int, int]:
    """How wide the rows are that a block takes of a matrix.

    Narrow matrices make few blocks, whose warps then share rows and not columns.

    Args:
      columns: Of the matrix.
      cut: How it is cut, where it is wide.
      size: `WIDE` or `NARROW`, where it is wide.
      others: How many blocks there are for each tile of columns.

    Returns:
      Bytes of a row that a lane takes, warps of a team, and teams.
    """
    across = max(1, min(cut.across, columns // (8 * size)))
    across = 1 << across.bit_length() - 1
    teams = cut.teams if across > 1 else 2 * cut.teams
    while columns // (8 * size * across) * others < BUSY and across > 1:
        across, teams = across // 2, teams * 2
    if columns // (8 * size) * others < BUSY:
        size = NARROW
    return size, across, teams


def _terms_of(precision: Precision, inputs: float) -> int:
    # Two rows are as exact as float32; the second of two terms leaves 2**-17.
    return {"bfloat16": 1, "split": 4 if inputs <= 2 else 2, "float32": 4}[precision]


def _tiles_of(precision: Precision, inputs: float, most: int = 2) -> int:
    """Tiles of inputs; where there are not more than two, several blocks share a multiprocessor."""
    return min(most, -(-math.ceil(inputs * _terms_of(precision, inputs)) // 8))


def _product(
    matrix: Matrix, inputs: float, precision: Precision, tiles: int, cut: Cut, others: int = BUSY
) -> dict:
    """How a block multiplies.

    Args:
      matrix: What.
      inputs: How many rows of inputs a matrix has as a rule; more take another pass.
      precision: What of the inputs counts.
      tiles: Of inputs.
      cut: Of the matrix.
      others: How many blocks there are for each tile of columns.
    """
    size = WIDE if matrix.columns >= 8 * WIDE and tiles <= _DIRECT else NARROW
    size, across, teams = columns_of_block(matrix.columns, cut, size, others)
    most = max(1, matrix.rows // (16 * _LEAST_TILES * teams))
    parts = min(most, cut.parts)
    # A share within one group needs no second set of sums.
    step = matrix.groups // math.gcd(matrix.groups, teams)
    if step <= most:
        parts = -(-parts // step) * step
    return {
        "K": matrix.rows,
        "N": matrix.columns,
        "G": matrix.groups,
        "BYTES": size,
        "TILES": tiles,
        "TERMS": _terms_of(precision, inputs),
        "STAGES": cut.stages,
        "COPIES": int(tiles > _DIRECT),
        "ACROSS": across,
        "TEAMS": teams,
        "SHARES": parts * teams,
        "COLUMN_TILES": -(-matrix.columns // (8 * size * across)),
    }


def _product_of_many(
    matrices: tuple[Matrix, ...], inputs: int, precision: Precision
) -> dict | None:
    """As `_product`, of more inputs than threads read for themselves, for the narrowest matrix.

    Returns:
      None if the inputs are few, or the matrices' groups do not fit.
    """
    tiles = _tiles_of(precision, inputs, _COPIED)
    if tiles <= _DIRECT or any(matrix.rows // matrix.groups % 16 for matrix in matrices):
        return None
    narrowest = min(matrices, key=lambda matrix: matrix.columns)
    cut = cut_of_projection(inputs, tiles)
    size, across, teams = columns_of_block(narrowest.columns, cut, NARROW, BUSY)
    blocks = sum(-(-matrix.columns // (8 * size * across)) for matrix in matrices)
    # A multiprocessor's registers hold one block, and one set of sums: that of one group.
    step = math.lcm(*(matrix.groups // math.gcd(matrix.groups, teams) for matrix in matrices))
    most = narrowest.rows // (16 * _LEAST_TILES * teams)
    if step > most:
        return None
    parts = max(1, min(most, _FULL // blocks) // step) * step
    return _product(narrowest, inputs, precision, tiles, cut._replace(parts=parts))


def cut_of_hidden(tiles: int) -> Cut:
    """How gate and up are cut for so many tiles of inputs, where their columns make enough blocks.

    This one, and those that follow, are the best of what was measured; `tools/gpu_cuts.py`
    measures.
    """
    return Cut(_ACROSS, 2, 1, 3) if tiles == 1 else Cut(_ACROSS, 1, 1, 4)


def cut_of_down(tiles: int) -> Cut:
    """How down is cut for so many tiles of inputs."""
    return Cut(_ACROSS, 1, 16, 4) if tiles == 1 else Cut(_ACROSS, 2, 8, 3)


def cut_of_projection(rows: int, tiles: int) -> Cut:
    """How a projection is cut, or three, for so many rows of inputs in so many tiles."""
    if tiles > _DIRECT:
        return Cut(_ACROSS, 2, 1, 6)
    return Cut(_ACROSS, 2, 16 if rows <= 2 else 8, 4)


def _parts_of_hidden(gate: Matrix, chosen: int) -> int:
    """How many blocks share the rows of gate and up: one, where columns make enough blocks."""
    blocks = chosen * max(1, gate.columns // (8 * WIDE * _ACROSS))
    return 1 if blocks >= BUSY else -(-_FULL // blocks)


def _column_tiles(product: dict) -> int:
    return -(-product["N"] // (8 * product["BYTES"] * product["ACROSS"]))


def _parts(product: dict) -> int:
    return product["SHARES"] // product["TEAMS"]


def _threads(product: dict) -> int:
    return 32 * product["ACROSS"] * product["TEAMS"]


def _shared_bytes(product: dict) -> int:
    """Of what is copied by the teams that share a matrix's rows."""
    weights = 8 * product["BYTES"] * product["ACROSS"]
    inputs = 2 * 8 * product["TILES"] if product["COPIES"] else 0
    return product["STAGES"] * 16 * (weights + inputs) * product["TEAMS"]


def experts(
    tokens: int, selected: int, num_experts: int, gate: Matrix, down: Matrix, precision: Precision
) -> tuple[Kernel, Kernel]:
    """The chosen experts of up to `MOST_ROWS` tokens: gate, up and GELU; down and the sum.

    The second writes the sum, and what it adds up.

    Args:
      tokens: M.
      selected: A.
      num_experts: E.
      gate: The gate's matrix; up is like it.
      down: The matrix that leads back.
      precision: Of x, and of the hidden numbers; of these 16 bits count where x is of bfloat16 and
        the tokens are few, when it costs nothing.
    """
    chosen = min(num_experts, tokens * selected)
    # A few experts have more rows than the mean.
    inputs = min(tokens, 1.5 * tokens * selected / num_experts)
    tiles = _tiles_of(precision, inputs)
    cut = cut_of_hidden(tiles)
    parts = _parts_of_hidden(gate, chosen)
    hidden = _product(gate, inputs, precision, tiles, cut._replace(parts=parts), chosen * parts)
    of_hidden: Precision = precision
    if precision == "bfloat16" and tokens <= MOST_EXACT:
        of_hidden = "split"
    tiles = _tiles_of(of_hidden, inputs)
    cut = cut_of_down(tiles)
    out = _product(down, inputs, of_hidden, tiles, cut)
    sizes = {"M": tokens, "A": selected, "E": num_experts, "CHOSEN": chosen}
    structs = (
        ("H", struct(hidden)),
        ("O", struct(out)),
        ("S", struct({**sizes, "Hidden": "H", "Out": "O"})),
    )
    headers = ("floats.h", "arrivals.h", "product.h", "experts.h")
    weights = ("int8", "bfloat16")
    rows = tokens * selected
    return (
        Kernel(
            "grok1_gate_up",
            headers,
            structs,
            "gate_up<S>",
            ("float32", *weights, *weights, "int32", "int32", "bool"),
            (
                Array((rows, gate.columns), "float32"),
                *(Array((2 * _parts(hidden), rows, gate.columns), "float32"),)
                * (_parts(hidden) > 1),
            ),
            (_column_tiles(hidden), chosen * _parts(hidden)),
            2 * _threads(hidden),
            shared_bytes=2 * _shared_bytes(hidden),
            resident=2 if hidden["TEAMS"] == 1 else 1,
        ),
        Kernel(
            "grok1_down",
            headers,
            structs,
            "down<S>",
            ("float32", *weights, "int32", "int32", "bool", "float32"),
            (
                Array((tokens, down.columns), "float32"),
                Array((_parts(out), rows, down.columns), "float32"),
            ),
            (_column_tiles(out), chosen * _parts(out)),
            _threads(out),
            shared_bytes=_shared_bytes(out),
            resident=max(1, 512 // _threads(out)),
        ),
    )


def project(
    rows: int, matrices: tuple[Matrix, ...], precision: Precision
) -> tuple[Kernel | None, Kernel]:
    """Up to `MOST_ROWS` rows times one matrix or three side by side.

    The first kernel makes of many rows what the second takes for them. What that writes for three
    is `[P, M, N]`, to be added up along P; for one the sum, and that.

    Args:
      rows: M.
      matrices: What they are multiplied with; of as many rows each.
      precision: Of x.
    """
    columns = sum(matrix.columns for matrix in matrices)
    narrowest = min(matrices, key=lambda matrix: matrix.columns)
    both = _product_of_many(matrices, rows, precision)
    if both is None:
        tiles = _tiles_of(precision, rows, _DIRECT)
        both = _product(narrowest, rows, precision, tiles, cut_of_projection(rows, tiles))
    products = [
        {**both, "K": matrix.rows, "N": matrix.columns, "G": matrix.groups} for matrix in matrices
    ]
    for product in products:
        product["COLUMN_TILES"] = _column_tiles(product)
    names = ("First", "Second", "Third")[: len(matrices)]
    structs = (
        *((name, struct(product)) for name, product in zip(names, products, strict=True)),
        ("S", struct({"M": rows, "N": columns})),
    )
    parts = _parts(both)
    of_parts = Array((parts, rows, columns), "float32")
    before = _split(rows, both["K"], both["TERMS"]) if both["COPIES"] else None
    return before, Kernel(
        "grok1_project",
        ("floats.h", "arrivals.h", "product.h", "project.h"),
        structs,
        f"project<{', '.join(('S', *names))}>",
        ("bfloat16" if before else "float32", *("int8", "bfloat16", "int32") * len(matrices)),
        (*(Array((rows, columns), "float32"),) * (len(matrices) == 1), of_parts),
        (sum(map(_column_tiles, products)), parts),
        _threads(both),
        shared_bytes=_shared_bytes(both),
        resident=max(1, 512 // _threads(both)) if both["TILES"] == 1 else 1,
    )


def _split(rows: int, width: int, terms: int) -> Kernel:
    """Makes terms of bfloat16 of rows."""
    threads = 128
    return Kernel(
        "grok1_split",
        ("floats.h", "terms.h"),
        (("S", struct({"K": width, "TERMS": terms, "THREADS": threads})),),
        "split<S>",
        ("float32",),
        (Array((rows, width // 16, terms, 16), "bfloat16"),),
        (rows, -(-width // (4 * threads))),
        threads,
    )


def refusal_of_copy(matrix: Matrix) -> str | None:
    """Why a matrix cannot be converted; None if it can."""
    if matrix.columns % NARROW:
        return f"its rows must be a multiple of {NARROW} wide, not {matrix.columns}"
    return None


def convert(matrix: Matrix, is_scaled: bool, dtype: str = "bfloat16") -> Kernel:
    """A matrix as floats of 16 bits.

    Args:
      matrix: What.
      is_scaled: Whether it is multiplied by its scales times a factor, and rounded.
      dtype: bfloat16 or float16.
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
        "HALVES": int(dtype == "float16"),
    }
    return Kernel(
        "grok1_convert",
        ("convert.h",),
        (("S", struct(sizes)),),
        "convert<S>",
        ("int8", "bfloat16", "int32", "float32"),
        (Array((matrix.rows, matrix.columns), dtype),),
        (-(-matrix.columns // (32 * NARROW)), -(-matrix.rows // (warps * rows))),
        32 * warps,
    )
