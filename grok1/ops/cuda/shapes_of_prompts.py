"""The kernel for given shapes of attention of many queries."""

from grok1.ops.cuda.kernel import Array, Kernel, struct
from grok1.ops.cuda.shapes_of_rows import Heads

_SIZES = (64, 128)  # of a head: rows of a tile are whole lines of the banks
_KEYS = 64  # of a tile; two of keys and two of values are in shared memory
_WARPS = 4  # each with 16 rows; the quickest of those that were measured on an H200


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
