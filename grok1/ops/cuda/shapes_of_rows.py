"""Kernels for given shapes that have no weights: attention over the cache, norms, the router."""

import math
from typing import NamedTuple

from grok1.ops.cuda.kernel import Array, Kernel, struct
from grok1.ops.cuda.shapes import MOST_ROWS

MOST_QUERIES = 64
"""Of a key head and row, that attention for few queries takes."""

MOST_WIDTH = 16384
"""Of a row that is normed or routed."""

_MOST_IN_REGISTERS = 8192  # numbers of a row that 512 threads have in registers, and what they need

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


def _attention_sizes(heads: Heads, scale: float, cap: float) -> dict:
    in_all = heads.group * heads.length
    queries = min(in_all, 8 if heads.size <= 128 else 4)
    blocks = -(-in_all // queries) * heads.heads * heads.rows
    return {
        **_sizes(heads),
        "PARTS": max(1, min(-(-_BUSY // blocks), heads.capacity // _LEAST_KEYS)),
        "QUERIES": queries,
        "WARPS": 4 if heads.size > 128 else _WARPS,
        "SCALE": float(scale),
        "CAP": float(cap),
    }


def _attention(name: str, heads: Heads, sizes: dict, inputs: tuple[str, ...]) -> Kernel:
    """A kernel that attends; its outputs are the result, and what its blocks leave each other."""
    parts, queries = sizes["PARTS"], sizes["QUERIES"]
    return Kernel(
        f"grok1_{name}",
        ("floats.h", "arrivals.h", "lanes.h", "cache.h", "attention.h"),
        (("S", struct(sizes)),),
        f"{name}<S>",
        inputs,
        (
            Array((heads.vectors, heads.size), "float32"),
            Array((parts, heads.vectors, heads.size), "float32"),
            Array((parts, heads.vectors), "float32"),
        ),
        (-(-heads.group * heads.length // queries) * heads.heads, heads.rows * parts),
        32 * sizes["WARPS"],
    )


def attend(heads: Heads, scale: float, cap: float) -> Kernel:
    """Attention.

    Args:
      heads: Queries and cache.
      scale: Factor on the query-key products.
      cap: Bounds the logits.
    """
    arrays = (array.dtype for array in _cache_arrays(heads))
    inputs = (heads.query_dtype, *arrays, "int32", "int32", "int32")
    return _attention("attend", heads, _attention_sizes(heads, scale, cap), inputs)


def _cache_arrays(heads: Heads) -> tuple[Array, ...]:
    """Keys, values and the scales of int8 ones, behind the layers, which the caller knows."""
    cache = Array((heads.slots, heads.heads, heads.capacity, heads.size), heads.cache_dtype)
    scales = Array(cache.shape[:-1], "float32")
    return (cache, cache, *(scales,) * 2 * (heads.cache_dtype == "int8"))


_BEFORE_CACHE = ("float32", "float32", "int32", "int32", "int32", "bool")
"""Of what places tokens: sums, frequencies, layer, slots, positions, which tokens are real."""


def _writing(kernel: Kernel, heads: Heads) -> Kernel:
    """A kernel that takes the cache last, and gives it back last, in the same memory."""
    arrays = _cache_arrays(heads)
    first, last = len(kernel.inputs), len(kernel.outputs)
    return kernel._replace(
        inputs=(*kernel.inputs, *(array.dtype for array in arrays)),
        outputs=(*kernel.outputs, *arrays),
        aliases=tuple((first + i, last + i) for i in range(len(arrays))),
    )


def place(heads: Heads, addends: int) -> Kernel:
    """Turns queries and keys by their phases, and writes keys and values to the cache.

    Args:
      heads: Queries and cache.
      addends: How many arrays what is projected is the sum of.
    """
    vectors = heads.rows * heads.length * heads.heads * (heads.group + 2)
    shape = (heads.rows, heads.length, heads.heads, heads.group, heads.size)
    kernel = Kernel(
        "grok1_place",
        ("cache.h",),
        (("S", struct({**_sizes(heads), "ADDENDS": addends, "WARPS": _WARPS})),),
        "place<S>",
        _BEFORE_CACHE,
        (Array(shape, heads.query_dtype),),
        (-(-vectors // _WARPS), 1),
        32 * _WARPS,
    )
    return _writing(kernel, heads)


def place_and_attend(heads: Heads, addends: int, scale: float, cap: float) -> Kernel:
    """What `place` does, and attention, for one token a row.

    Args:
      heads: Queries and cache.
      addends: How many arrays what is projected is the sum of.
      scale: Factor on the query-key products.
      cap: Bounds the logits.
    """
    sizes = {**_attention_sizes(heads, scale, cap), "ADDENDS": addends}
    return _writing(_attention("place_and_attend", heads, sizes, _BEFORE_CACHE), heads)


def of_layers(kernel: Kernel, layers: int) -> Kernel:
    """A kernel with the axis of layers before what it writes in place."""
    aliased = {output for _, output in kernel.aliases}
    outputs = (
        array._replace(shape=(layers, *array.shape)) if i in aliased else array
        for i, array in enumerate(kernel.outputs)
    )
    return kernel._replace(outputs=tuple(outputs))


def refusal_of_rows(shape: tuple[int, ...]) -> str | None:
    """Why rows of this shape, `[*M, D]`, cannot be normed or routed; None if they can."""
    *rows, width = shape
    if math.prod(rows) > MOST_ROWS:
        return f"it takes up to {MOST_ROWS} rows, not {math.prod(rows)}"
    if width > MOST_WIDTH:
        return f"its rows are up to {MOST_WIDTH} wide, not {width}"
    return None


def _row_threads(width: int) -> int:
    """Threads of a row, which have four numbers side by side at a time where it is a multiple."""
    pieces = width // 4 if width % 4 == 0 else width
    most = 512 if width <= _MOST_IN_REGISTERS else 1024
    return min(most, 32 * -(-pieces // 32))


def norms(rows: int, width: int, epsilon: float, which: str) -> Kernel:
    """A norm of each row.

    Args:
      rows: M.
      width: D.
      epsilon: Added to the mean square.
      which: "norm" of x; "add_norm", x and the norm of a branch; "add_norm_and_norm", that and
        its norm.
    """
    threads = _row_threads(width)
    structs = (("S", struct({"D": width, "EPSILON": float(epsilon), "THREADS": threads})),)
    of_rows = Array((rows, width), "float32")
    reads = {"norm": 2, "add_norm": 3, "add_norm_and_norm": 4}[which]
    writes = 2 if which == "add_norm_and_norm" else 1
    return Kernel(
        f"grok1_{which}",
        ("floats.h", "lanes.h", "rows.h"),
        structs,
        f"{which}<S>",
        (*("float32",) * reads, "int32"),
        (of_rows,) * writes,
        (rows, 1),
        threads,
    )


class Router(NamedTuple):
    """How tokens are routed.

    Attributes:
      width: D.
      num_experts: E.
      selected: A.
      cap: Bounds the logits; None for no bound.
      renormalize: Whether the weights of a token's experts are divided by their sum.
    """

    width: int
    num_experts: int
    selected: int
    cap: float | None
    renormalize: bool

    @property
    def sizes(self) -> dict:
        """The constants of a kernel for it."""
        return {
            "D": self.width,
            "E": self.num_experts,
            "A": self.selected,
            "CAP": float(self.cap or 0),
            "RENORMALIZE": int(self.renormalize),
            "THREADS": _row_threads(self.width),
        }

    def outputs(self, tokens: int) -> tuple[Array, ...]:
        """Logits, probabilities, indices and weights of tokens."""
        of_experts = Array((tokens, self.num_experts), "float32")
        weights = Array((tokens, self.selected), "float32")
        return of_experts, of_experts, weights._replace(dtype="int32"), weights


def route(tokens: int, router: Router) -> Kernel:
    """The router: logits, probabilities, and the most probable experts with theirs.

    Args:
      tokens: M.
      router: How.
    """
    return Kernel(
        "grok1_route",
        ("floats.h", "lanes.h", "rows.h"),
        (("S", struct(router.sizes)),),
        "route<S>",
        ("float32", "float32", "int32"),
        router.outputs(tokens),
        (tokens, 1),
        _row_threads(router.width),
    )


def add_and_route(tokens: int, router: Router, epsilon: float) -> Kernel:
    """`norms` in the form "add_norm_and_norm", then `route` of what that norms.

    Args:
      tokens: M.
      router: How.
      epsilon: Added to the mean square.
    """
    before = norms(tokens, router.width, epsilon, "add_norm_and_norm")
    *inputs, layer = before.inputs
    return before._replace(
        name="grok1_add_and_route",
        structs=(("S", struct({**router.sizes, "EPSILON": float(epsilon)})),),
        call="add_and_route<S>",
        inputs=(*inputs, "float32", layer),
        outputs=(*before.outputs, *router.outputs(tokens)),
    )
