"""Kernels for given shapes that have no weights: attention over the cache, norms, the router."""

from typing import NamedTuple

from grok1.ops.cuda.kernel import Array, Kernel, struct

MOST_QUERIES = 64
"""Of a key head and row, that attention for few queries takes."""

MOST_WIDTH = 16384
"""Of a row that is normed."""

MOST_EXPERTS = 32

_KINDS = {"float32": "FLOAT32", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int8": "INT8"}
_WARPS = 8
_BUSY = 96  # blocks that keep the memory busy
_LEAST_KEYS = 64  # of a part of the sequence, so that a step of its warps is full


class Heads(NamedTuple):
    """The queries of a call, and the cache.

    Attributes:
      rows: R.
      length: T, positions of each row.
      heads: C, key heads held here.
      group: G, queries that share one.
      size: H.
      slots: B, rows of the cache.
      capacity: S.
      cache_dtype: Of keys and values.
      query_dtype: Of the queries, when they are attended with.
    """

    rows: int
    length: int
    heads: int
    group: int
    size: int
    slots: int
    capacity: int
    cache_dtype: str
    query_dtype: str

    @property
    def sizes(self) -> dict[str, int]:
        """The constants of a kernel for them, but for types."""
        return {
            "R": self.rows,
            "T": self.length,
            "C": self.heads,
            "G": self.group,
            "H": self.size,
            "B": self.slots,
            "CAPACITY": self.capacity,
        }

    @property
    def vectors(self) -> int:
        """How many queries there are."""
        return self.rows * self.length * self.heads * self.group


def refusal_of(heads: Heads) -> str | None:
    """Why attention cannot take these; None if it can."""
    if heads.cache_dtype not in _KINDS or heads.query_dtype not in _KINDS:
        return f"it reads no cache of {heads.cache_dtype} with queries of {heads.query_dtype}"
    if heads.size % (8 if heads.size < 16 else 16) or heads.size > 256:
        return f"heads must be 8 or a multiple of 16 wide, up to 256, not {heads.size}"
    if heads.group * heads.length > MOST_QUERIES:
        queries = heads.group * heads.length
        return f"it takes up to {MOST_QUERIES} queries of a key head, not {queries}"
    return None


def _sizes(heads: Heads) -> dict:
    return {
        **heads.sizes,
        "KIND": _KINDS[heads.cache_dtype],
        "QUERY_KIND": _KINDS[heads.query_dtype],
    }


def attend(heads: Heads, scale: float, cap: float) -> tuple[Kernel, Kernel | None]:
    """Attention, and what adds up its parts; None where there is one part.

    Args:
      heads: Queries and cache.
      scale: Factor on the query-key products.
      cap: Bounds the logits.
    """
    in_all = heads.group * heads.length
    queries = min(in_all, 8 if heads.size <= 128 else 4)
    blocks = -(-in_all // queries) * heads.heads * heads.rows
    parts = max(1, min(-(-_BUSY // blocks), heads.capacity // _LEAST_KEYS))
    sizes = {
        **_sizes(heads),
        "PARTS": parts,
        "QUERIES": queries,
        "WARPS": 4 if heads.size > 128 else _WARPS,
        "SCALE": float(scale),
        "CAP": float(cap),
    }
    structs = (("S", struct(sizes)),)
    scales = ("float32",) * 2 * (heads.cache_dtype == "int8")
    cache = (heads.cache_dtype,) * 2
    mixed = Array((parts, heads.vectors, heads.size), "float32")
    totals = Array((parts, heads.vectors), "float32")
    first = Kernel(
        "grok1_attend",
        ("attention.h",),
        structs,
        "attend<S>",
        (heads.query_dtype, *cache, *scales, "int32", "int32", "int32"),
        (mixed, totals),
        (-(-in_all // queries) * heads.heads, heads.rows * parts),
        32 * sizes["WARPS"],
    )
    if parts == 1:
        return first, None
    out = Array((heads.vectors, heads.size), "float32")
    inputs = ("float32", "float32")
    threads = 32 * -(-heads.size // 32)
    second = Kernel(
        "grok1_combine",
        ("attention.h",),
        structs,
        "combine<S>",
        inputs,
        (out,),
        (heads.vectors, 1),
        threads,
    )
    return first, second


def place(heads: Heads, parts: int) -> Kernel:
    """Turns queries and keys by their phases, and writes keys and values to the cache.

    Args:
      heads: Queries and cache.
      parts: How many parts what is projected is the sum of.
    """
    structs = (("S", struct({**_sizes(heads), "PARTS": parts, "WARPS": _WARPS})),)
    cache = Array(
        (heads.slots, heads.heads, heads.capacity, heads.size), heads.cache_dtype
    )  # behind the layers, which the caller knows
    scales = Array(cache.shape[:-1], "float32")
    kept = (cache, cache, *(scales,) * 2 * (heads.cache_dtype == "int8"))
    vectors = heads.rows * heads.length * heads.heads * (heads.group + 2)
    shape = (heads.rows, heads.length, heads.heads, heads.group, heads.size)
    before = ("float32", "float32", "int32", "int32", "int32", "bool")
    return Kernel(
        "grok1_place",
        ("rows.h", "attention.h"),
        structs,
        "place<S>",
        (*before, *(array.dtype for array in kept)),
        (Array(shape, heads.query_dtype), *kept),
        (-(-vectors // _WARPS), 1),
        32 * _WARPS,
        aliases=tuple((len(before) + i, 1 + i) for i in range(len(kept))),
    )


def of_layers(kernel: Kernel, layers: int) -> Kernel:
    """The kernel of `place` with the axis of layers before what it writes in place."""
    aliased = {output for _, output in kernel.aliases}
    outputs = (
        array._replace(shape=(layers, *array.shape)) if i in aliased else array
        for i, array in enumerate(kernel.outputs)
    )
    return kernel._replace(outputs=tuple(outputs))


def norms(rows: int, width: int, epsilon: float, which: str) -> Kernel:
    """A norm of each row.

    Args:
      rows: M.
      width: D.
      epsilon: Added to the mean square.
      which: "norm" of x; "add_norm", x and the norm of a branch; "add_norm_and_norm", that and
        its norm.
    """
    threads = min(1024, 32 * -(-width // 32))
    structs = (("S", struct({"D": width, "EPSILON": float(epsilon), "THREADS": threads})),)
    of_rows = Array((rows, width), "float32")
    reads = {"norm": 2, "add_norm": 3, "add_norm_and_norm": 4}[which]
    writes = 2 if which == "add_norm_and_norm" else 1
    return Kernel(
        f"grok1_{which}",
        ("rows.h",),
        structs,
        f"{which}<S>",
        (*("float32",) * reads, "int32"),
        (of_rows,) * writes,
        (rows, 1),
        threads,
    )


def route(
    tokens: int, width: int, num_experts: int, selected: int, cap: float | None, renormalize: bool
) -> Kernel:
    """The router: logits, probabilities, and the most probable experts with theirs.

    Args:
      tokens: M.
      width: D.
      num_experts: E.
      selected: A.
      cap: Bounds the logits; None for no bound.
      renormalize: Whether the weights of a token's experts are divided by their sum.
    """
    threads = min(1024, 32 * -(-width // 32))
    sizes = {
        "D": width,
        "E": num_experts,
        "A": selected,
        "CAP": float(cap or 0),
        "RENORMALIZE": int(renormalize),
        "THREADS": threads,
    }
    return Kernel(
        "grok1_route",
        ("rows.h",),
        (("S", struct(sizes)),),
        "route<S>",
        ("float32", "float32", "int32"),
        (
            Array((tokens, num_experts), "float32"),
            Array((tokens, num_experts), "float32"),
            Array((tokens, selected), "int32"),
            Array((tokens, selected), "float32"),
        ),
        (tokens, 1),
        threads,
    )
