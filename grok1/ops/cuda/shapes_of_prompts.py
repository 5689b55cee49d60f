"""Kernels for given shapes of prompts: attention of many queries, experts of many tokens."""

from grok1.ops.cuda.kernel import Array, Kernel, struct
from grok1.ops.cuda.shapes import Matrix
from grok1.ops.cuda.shapes_of_rows import Heads

MOST_FEW = 32
"""Tokens whose experts are not run by tiles, of which they would fill next to nothing."""

_SIZES = (64, 128)  # of a head: rows of a tile are whole lines of the banks
_KEYS = 64  # of a tile; two of keys and two of values are in shared memory
_WARPS = 4  # each with 16 rows; the quickest of those that were measured on an H200

# As in prompt_experts.h.
_SLAB, _DEPTH, _TOKENS = 128, 64, 128
_STAGE_BYTES = 2 * _DEPTH * _SLAB + 2 * _TOKENS * _DEPTH
_BORDER = 1024  # that tiles begin on
_STAGES = 6  # what fits into a multiprocessor's shared memory


def refusal_of(heads: Heads) -> str | None:
    """Why attention of many queries cannot take these; None if it can."""
    if (heads.cache_dtype, heads.query_dtype) != ("float16", "float16"):
        found = f"{heads.cache_dtype} with queries of {heads.query_dtype}"
        return f"of many queries it reads a cache of float16 with float16, not {found}"
    if heads.size not in _SIZES:
        return f"of many queries it takes heads 64 or 128 wide, not {heads.size}"
    return None


def attend(heads: Heads, scale: float, cap: float) -> Kernel:
    """Attention of many queries.

    Args:
      heads: Queries and cache.
      scale: Factor on the query-key products.
      cap: Bounds the logits.
    """
    blocks = -(-heads.group * heads.length // (16 * _WARPS)) * heads.heads
    sizes = {
        **heads.sizes,
        "SCALE": float(scale),
        "CAP": float(cap),
        "KEYS": _KEYS,
        "WARPS": _WARPS,
    }
    return Kernel(
        "grok1_attend_prompt",
        ("prompt_attention.h",),
        (("S", struct(sizes)),),
        "attend_prompt<S>",
        ("float16", "float16", "float16", "int32", "int32", "int32"),
        (Array((heads.vectors, heads.size), "float32"),),
        (blocks, heads.rows),
        32 * _WARPS,
        shared_bytes=2 * 2 * _KEYS * heads.size * 2,
    )


def refusal_of_tiles(matrix: Matrix) -> str | None:
    """Why a matrix cannot be multiplied by tiles; None if it can."""
    if matrix.columns % 16:
        return f"its rows must be a multiple of 16 wide, not {matrix.columns}"
    if matrix.rows % (_DEPTH * matrix.groups):
        found = f"{matrix.rows / matrix.groups:g}"
        return f"its groups must be a multiple of {_DEPTH} rows, not {found}"
    return None


def experts(rows: int, num_experts: int, gate: Matrix, down: Matrix) -> tuple[Kernel, Kernel]:
    """The experts of many tokens, whose rows are sorted: gate, up and GELU; down.

    Args:
      rows: R.
      num_experts: E.
      gate: The gate's matrix; up is like it.
      down: The matrix that leads back.
    """
    stages = min(_STAGES, 2 + -(-min(gate.rows, down.rows) // _DEPTH))
    structs, grids = [], []
    for matrix, slabs in ((gate, 1), (down, 2)):
        column_tiles = -(-matrix.columns // (slabs * _SLAB))
        sizes = {
            "K": matrix.rows,
            "N": matrix.columns,
            "G": matrix.groups,
            "E": num_experts,
            "COLUMN_TILES": column_tiles,
            "STAGES": max(3, stages),
        }
        structs.append((("S", struct(sizes)),))
        grids.append(((rows // _TOKENS + num_experts) * column_tiles, 1))
    headers = ("floats.h", "product.h", "prompt_experts.h")
    weights, of_rows = ("int8", "bfloat16"), ("int32", "int32", "int32")
    how = {
        "threads": 2 * _SLAB,
        "shared_bytes": _STAGES * _STAGE_BYTES + _BORDER,
        "architecture": "90a",
    }
    return (
        Kernel(
            "grok1_prompt_gate_up",
            headers,
            structs[0],
            "prompt_gate_up<S>",
            ("bfloat16", *weights, *weights, *of_rows),
            (Array((rows, gate.columns), "bfloat16"),),
            grids[0],
            **how,
        ),
        Kernel(
            "grok1_prompt_down",
            headers,
            structs[1],
            "prompt_down<S>",
            ("bfloat16", *weights, *of_rows),
            (Array((rows, down.columns), "float32"),),
            grids[1],
            **how,
        ),
    )
