"""Kernels for given shapes that find the largest product with the rows of a table.

An int8 copy of the table is read once; see `screen.h`. A row of it goes into the product as it lies
in memory, so that there is nothing to convert, and what limits is the memory alone.
"""

from grok1.ops.cuda.kernel import Array, Kernel, struct

MOST_ROWS = 8
"""Inputs of a call: of more, the float32 rows that each reads for itself are as much again."""

_MOST_WIDTH = 1 << 17  # a sum of so many products of two signed bytes is below 2**31
_MOST_EXACT = 4  # inputs whose digits are 31 bits; of more 15 bits below the largest number count
_PIECE = 256  # bytes of a row that are read together
_ROWS_OF_WARP = 16
_WARPS, _STAGES, _RESIDENT = (
    4,
    3,
    4,
)  # of a block that screens: 128 kB under way in a multiprocessor
_PARTS = 384  # blocks, three for each multiprocessor, that share the rows that can win
_THREADS_OF_DIGITS = 1024
_THREADS_OF_PART = 256

_HEADERS = ("floats.h", "arrivals.h", "product.h", "digits.h", "lanes.h", "rows.h", "screen.h")


def refusal_of(inputs: int, width: int) -> str | None:
    """Why the kernels cannot find the largest of a table's products; None if they can.

    Args:
      inputs: M.
      width: D.
    """
    if inputs > MOST_ROWS:
        return f"it takes up to {MOST_ROWS} rows, not {inputs}"
    if width % 16 or width > _MOST_WIDTH:
        return f"rows must be a multiple of 16 wide, up to {_MOST_WIDTH}, not {width}"
    return None


def most_probable(
    inputs: int, rows: int, width: int, is_masked_by_row: bool
) -> tuple[Kernel, Kernel, Kernel]:
    """What makes digits of the inputs, what bounds all products, and what finds the largest.

    Args:
      inputs: M, up to `MOST_ROWS`.
      rows: V.
      width: D.
      is_masked_by_row: Whether each input has rows of its own that may be found.
    """
    digits = 4 if inputs <= _MOST_EXACT else 2
    pieces = -(-width // _PIECE)
    blocks = -(-rows // (_WARPS * _ROWS_OF_WARP))
    # By eights, and as many as one block compares in the end.
    parts = min(_THREADS_OF_PART, max(1, _PARTS // inputs), -(-rows // 8))
    of_part = 8 * -(-rows // (8 * parts))
    shared = {
        "M": inputs,
        "V": rows,
        "D": width,
        "DIGITS": digits,
        "TILES": -(-inputs * digits // 8),
        "PIECES": pieces,
        "STAGES": _STAGES,
        "WARPS": _WARPS,
        "BLOCKS": blocks,
        "MASKED": rows if is_masked_by_row else 0,
        "PARTS": parts,
        "EACH": 4 if of_part <= 4 * _THREADS_OF_PART else 8,
    }

    def kernel(name, reads, writes, grid, threads, **others):
        structs = (("S", struct({**shared, "THREADS": threads})),)
        call = f"{name}<S>"
        return Kernel(
            f"grok1_{name}", _HEADERS, structs, call, reads, writes, grid, threads, **others
        )

    return (
        kernel(
            "screen_digits",
            ("float32",),
            (Array((inputs, digits, pieces * _PIECE), "int8"), Array((inputs, 2), "float32")),
            (inputs, 1),
            min(_THREADS_OF_DIGITS, 32 * -(-width // 32)),
        ),
        kernel(
            "screen",
            ("int8", "float32", "int8", "float32", "float32", "bool"),
            (Array((inputs, rows), "float32"), Array((inputs, blocks), "float32")),
            (blocks, 1),
            32 * _WARPS,
            shared_bytes=_WARPS * _STAGES * _ROWS_OF_WARP * _PIECE,
            resident=_RESIDENT,
        ),
        kernel(
            "choose",
            ("float32", "float32", "float32", "float32"),
            (
                Array((inputs,), "int32"),
                Array((inputs,), "float32"),
                Array((inputs, parts), "int32"),
                Array((inputs, parts), "float32"),
            ),
            (parts, inputs),
            _THREADS_OF_PART,
            resident=3,
        ),
    )
