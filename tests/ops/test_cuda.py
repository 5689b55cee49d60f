"""The CUDA kernels' sources against float64, on a CPU in place of a device (`standin.h`)."""

import os
import pathlib
import re
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

from grok1.ops.cuda import (
    build,
    shapes,
    shapes_int4,
    shapes_of_prompts,
    shapes_of_rows,
    shapes_of_screening,
)
from grok1.ops.cuda.kernel import function_of, text_of
from grok1.ops.cuda.shapes import Matrix
from grok1.ops.cuda.shapes_of_rows import Heads
from tests.helpers import SLOW_TESTS, slow
from tests.ops import standin

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

EXACT = 2e-6  # float32 inputs in three terms, or of bfloat16
TWO_TERMS = 1e-5
BFLOAT16 = 4e-3  # hidden numbers of many tokens
LAYER = np.array([1], np.int32)

# What of the inputs counts, tokens, experts a token, experts, model dim, hidden dim, groups of
# gate and up, groups of down: one tile and several, no multiples of a tile, groups that end within
# one, as many groups as a tile has rows.
EXPERTS = [
    ("float32", 1, 2, 4, 64, 160, 1, 8),
    ("bfloat16", 1, 2, 4, 96, 144, 1, 4),
    ("bfloat16", 2, 2, 4, 32, 144, 8, 1),
    ("float32", 3, 1, 4, 48, 48, 4, 1),
    ("bfloat16", 9, 2, 8, 48, 176, 8, 16),
    ("float32", 9, 2, 8, 64, 80, 1, 8),
    ("float32", 33, 2, 4, 64, 128, 16, 1),
    ("bfloat16", 64, 2, 8, 32, 96, 1, 24),
    ("bfloat16", 2, 1, 4, 192, 1088, 1, 8),
    # Blocks that share the rows of gate and up.
    ("bfloat16", 3, 2, 4, 768, 160, 1, 1),
    ("float32", 9, 2, 8, 1152, 256, 8, 8),
]
PROJECTIONS = [
    ("float32", 1, 512, (384, 64, 64), (1, 1, 8)),
    ("split", 5, 96, (144, 16, 32), (8, 1, 1)),
    ("split", 33, 64, (80,), (16,)),
    ("bfloat16", 64, 1024, (48,), (1,)),
    ("float32", 9, 320, (256, 128, 128), (4, 1, 1)),
    # Inputs are copied too: whole tiles of columns and not, another pass for the last row.
    ("split", 13, 768, (192, 64, 64), (1, 1, 8)),
    ("split", 33, 384, (336,), (2,)),
    ("float32", 9, 384, (48,), (1,)),
]
HEADS = [
    Heads(1, 1, 2, 6, 128, 3, 200, "float32", "float32"),
    Heads(2, 3, 1, 2, 32, 2, 64, "float16", "float16"),
    Heads(3, 1, 2, 3, 48, 4, 130, "int8", "bfloat16"),
    Heads(1, 9, 1, 7, 16, 1, 257, "bfloat16", "float32"),
    Heads(2, 1, 3, 2, 8, 2, 96, "float32", "float32"),
    Heads(1, 2, 1, 2, 256, 1, 96, "int8", "float32"),
]
ROWS = [(3, 160), (1, 2048), (2, 40)]
ROUTES = [(5, 96, 8, 2, None, False), (2, 40, 4, 3, 30.0, True), (1, 300, 32, 1, None, False)]
# Rows, columns, groups: whole blocks and not, groups of a few rows that no power of two divides.
COPIES = [(128, 256, 1), (37, 264, 1), (96, 8, 8), (45, 520, 3), (320, 512, 16)]


def experts_kernels(case):
    precision, tokens, selected, num_experts, width, hidden, of_gate, of_down = case
    gate, down = Matrix(width, hidden, of_gate), Matrix(hidden, width, of_down)
    return shapes.experts(tokens, selected, num_experts, gate, down, precision)


def projection(case):
    precision, rows, width, columns, groups = case
    matrices = [Matrix(width, *of) for of in zip(columns, groups, strict=True)]
    return shapes.project(rows, tuple(matrices), precision)


def attention(heads):
    return [kernel for kernel in shapes_of_rows.attend(heads, 0.3, 30.0) if kernel]


def placing(heads):
    return shapes_of_rows.of_layers(shapes_of_rows.place(heads, parts=2), layers=2)


def norms(case):
    names = ("norm", "add_norm", "add_norm_and_norm")
    return [shapes_of_rows.norms(case[0], case[1], 1e-5, name) for name in names]


# A kernel is compiled for each size: in the gate, for one of each way through its source.
SOME_EXPERTS = EXPERTS if SLOW_TESTS else [EXPERTS[i] for i in (0, 2, 4, 6, 7, 9)]
SOME_PROJECTIONS = PROJECTIONS if SLOW_TESTS else [PROJECTIONS[i] for i in (0, 1, 3, 6)]
SOME_HEADS = HEADS if SLOW_TESTS else HEADS[:4]
SOME_COPIES = COPIES if SLOW_TESTS else COPIES[1:4]
KERNELS = [
    *(kernel for case in SOME_EXPERTS for kernel in experts_kernels(case)),
    *map(projection, SOME_PROJECTIONS),
    *(kernel for heads in SOME_HEADS for kernel in (*attention(heads), placing(heads))),
    *(kernel for case in ROWS for kernel in norms(case)),
    *(shapes_of_rows.route(*case) for case in ROUTES),
    *(shapes.convert(Matrix(*case), scaled) for case in SOME_COPIES for scaled in (False, True)),
]


@pytest.fixture(scope="module")
def library():
    return standin.build(KERNELS)


@pytest.fixture
def rng():
    return np.random.default_rng(14)


def weight(rng, lead, rows, columns, groups):
    """Values, scales, and the float64 weight that they stand for."""
    values = rng.integers(-128, 128, (*lead, rows, columns), dtype=np.int8)
    scales = (0.005 + 0.01 * rng.random((*lead, groups, columns))).astype(ml_dtypes.bfloat16)
    grouped = values.astype(np.float64).reshape(*lead, groups, rows // groups, columns)
    return values, scales, (grouped * scales.astype(float)[..., None, :]).reshape(values.shape)


def inputs(rng, shape, precision):
    x = rng.standard_normal(shape).astype(np.float32)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if precision == "bfloat16" else x


def assert_close(found, expected, relative):
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def choices(rng, tokens, selected, num_experts, how):
    """Experts of each token, and which tokens are real."""
    if how == "all to one":
        first = np.full((tokens, 1), num_experts - 1)
        others = np.arange(selected - 1)[None].repeat(tokens, axis=0)
        return np.concatenate([first, others], axis=1).astype(np.int32), np.ones(tokens, bool)
    indices = np.stack([rng.permutation(num_experts)[:selected] for _ in range(tokens)])
    if how == "some to none":
        indices[:: max(2, tokens // 2), -1] = num_experts
        return indices.astype(np.int32), np.arange(tokens) % 3 != 1
    return indices.astype(np.int32), np.ones(tokens, bool)


@pytest.mark.parametrize("how", ["at random", "all to one", "some to none"])
@pytest.mark.parametrize("case", SOME_EXPERTS, ids=str)
def test_experts(library, rng, case, how):
    precision, tokens, selected, num_experts, width, hidden, of_gate, of_down = case
    x = inputs(rng, (tokens, width), precision)
    gate = weight(rng, (2, num_experts), width, hidden, of_gate)
    up = weight(rng, (2, num_experts), width, hidden, of_gate)
    down = weight(rng, (2, num_experts), hidden, width, of_down)
    indices, valid = choices(rng, tokens, selected, num_experts, how)
    weights = rng.random((tokens, selected)).astype(np.float32)
    expected = np.zeros((tokens, width))
    for token, choice in np.argwhere((indices < num_experts) & valid[:, None]):
        expert = indices[token, choice]
        mixed = gelu(x[token] @ gate[2][1, expert]) * (x[token] @ up[2][1, expert])
        expected[token] += weights[token, choice] * (mixed @ down[2][1, expert])
    gate_up, of_down = experts_kernels(case)
    is_run = (valid[:, None] & (indices < num_experts)).reshape(-1)
    found = []
    for backward in (False, True):
        options = {"backward": backward}
        before = x, *gate[:2], *up[:2], LAYER, indices, valid
        mixed, *_ = standin.run(library, gate_up, *before, **options)
        after = mixed, *down[:2], LAYER, indices, valid, weights
        out, parts = standin.run(library, of_down, *after, **options)
        assert np.isnan(parts[:, ~is_run]).all()  # padding costs nothing
        found.append(out)
    # The order of threads is nobody's to choose.
    np.testing.assert_array_equal(*found)
    is_rounded = precision == "bfloat16" and tokens > 16
    near = BFLOAT16 if is_rounded else EXACT if precision == "float32" else TWO_TERMS
    assert_close(found[0], expected, near)
    assert not found[0][~valid].any()


@pytest.mark.parametrize("case", SOME_PROJECTIONS, ids=str)
def test_projections(library, rng, case):
    precision, rows, width, columns, groups = case
    x = inputs(rng, (rows, width), precision)
    stacks = [weight(rng, (3,), width, *of) for of in zip(columns, groups, strict=True)]
    kernel = projection(case)
    operands = [part for stack in stacks for part in (*stack[:2], np.int32(2))]
    *sums, parts = standin.run(library, kernel, x, *operands)
    expected = np.concatenate([x.astype(float) @ stack[2][2] for stack in stacks], axis=1)
    if sums:
        assert_close(sums[0], expected, TWO_TERMS if precision == "split" else EXACT)
    assert_close(
        parts.astype(float).sum(axis=0), expected, TWO_TERMS if precision == "split" else EXACT
    )


def test_infinity_and_nan_stay_no_numbers(library, rng):
    case = PROJECTIONS[0]
    values, scales, _ = weight(rng, (1,), 512, 384, 1)
    others = [
        part
        for size, groups in ((64, 1), (64, 8))
        for part in weight(rng, (1,), 512, size, groups)[:2]
    ]
    operands = values, scales, np.int32(0), *others[:2], np.int32(0), *others[2:], np.int32(0)
    for value in (np.nan, np.inf):
        x = np.zeros((1, 512), np.float32)
        x[0, 17] = value
        (parts,) = standin.run(library, projection(case), x, *operands)
        found = parts[:, 0, :384].sum(axis=0)
        assert not np.isfinite(found[values[0, 17] != 0]).any()


def cache_of(rng, heads):
    """Keys, values and their scales, and the keys and values that they stand for."""
    shape = (2, heads.slots, heads.heads, heads.capacity, heads.size)
    if heads.cache_dtype != "int8":
        arrays = [rng.standard_normal(shape).astype(heads.cache_dtype) for _ in "kv"]
        return arrays, [array.astype(float) for array in arrays]
    arrays = [rng.integers(-127, 128, shape).astype(np.int8) for _ in "kv"]
    scales = [0.02 * rng.random(shape[:-1]).astype(np.float32) for _ in "kv"]
    exact = [of * scale.astype(float)[..., None] for of, scale in zip(arrays, scales, strict=True)]
    return [*arrays, *scales], exact


def place_of(rng, heads, last=None):
    """Slots, one outside the cache where there are several rows, and positions."""
    slots = rng.permutation(heads.slots)[: heads.rows].astype(np.int32)
    if heads.rows > 2:
        slots[1] = heads.slots
    starts = rng.integers(0, heads.capacity - heads.length + 1, (heads.rows, 1))
    if last is not None:
        starts[:] = last - heads.length + 1
    return slots, (starts + np.arange(heads.length)).astype(np.int32)


def attended(query, keys, values, slots, positions):
    out = np.zeros(query.shape)
    for row, time, head in np.ndindex(*query.shape[:3]):
        if slots[row] < keys.shape[0]:
            seen = slice(positions[row, time] + 1)
            logits = query[row, time, head].astype(float) @ keys[slots[row], head, seen].T
            logits = np.exp(30 * np.tanh(0.3 * logits / 30))
            weights = logits / logits.sum(axis=-1, keepdims=True)
            out[row, time, head] = weights @ values[slots[row], head, seen]
    return out


@pytest.mark.parametrize("at", ["anywhere", "first", "last", "border"])
@pytest.mark.parametrize("heads", SOME_HEADS, ids=str)
def test_attention(library, rng, heads, at):
    arrays, (keys, values) = cache_of(rng, heads)
    last = {"first": heads.length - 1, "last": heads.capacity - 1, "border": 15 + heads.length}
    slots, positions = place_of(rng, heads, last.get(at))
    if heads.cache_dtype != "int8":
        # What is after the last position may be no number.
        for array in arrays[:2]:
            array[..., positions.max() + 1 :, :] = np.nan
    shape = (heads.rows, heads.length, heads.heads, heads.group, heads.size)
    kind = ml_dtypes.bfloat16 if heads.query_dtype == "bfloat16" else heads.query_dtype
    query = rng.standard_normal(shape).astype(kind)
    found = []
    for backward in (False, True):
        first, *second = attention(heads)
        operands = query, *arrays, LAYER, slots, positions
        mixed, totals = standin.run(library, first, *operands, backward=backward)
        out = standin.run(library, second[0], mixed, totals)[0] if second else mixed
        found.append(out.reshape(shape))
    np.testing.assert_array_equal(*found)
    expected = attended(query, keys[1], values[1], slots, positions)
    assert_close(found[0], expected, 3e-6)


@pytest.mark.parametrize("heads", SOME_HEADS, ids=str)
def test_placing(library, rng, heads):
    arrays, (keys, values) = cache_of(rng, heads)
    slots, positions = place_of(rng, heads)
    valid = np.arange(heads.length)[None].repeat(heads.rows, axis=0) != 1
    in_all = heads.heads * (heads.group + 2)
    projected = rng.standard_normal((2, heads.rows * heads.length, in_all * heads.size))
    projected = projected.astype(np.float32)
    half = heads.size // 2
    frequencies = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    operands = projected, frequencies, LAYER, slots, positions, valid, *arrays
    query, *cache = standin.run(library, placing(heads), *operands)

    phases = (positions[..., None].astype(np.float32) * frequencies)[:, :, None].astype(float)
    vectors = projected.sum(axis=0).reshape(heads.rows, heads.length, in_all, heads.size)
    first, second = np.split(vectors.astype(float), 2, axis=-1)
    turned = np.concatenate(
        [
            first * np.cos(phases) - second * np.sin(phases),
            second * np.cos(phases) + first * np.sin(phases),
        ],
        axis=-1,
    )
    kept = heads.heads * heads.group
    for row, time in np.argwhere(valid & (slots[:, None] < heads.slots)):
        at = 1, slots[row], slice(None), positions[row, time]
        keys[at] = turned[row, time, kept : kept + heads.heads]
        values[at] = vectors[row, time, kept + heads.heads :]
    # Half of the last place: of float32 with its sums, of 10 bits, of 7 bits, of 254 steps.
    near = {"float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.51 / 127}
    of_query = near[heads.query_dtype]
    assert_close(
        query.astype(float).reshape(turned[:, :, :kept].shape), turned[:, :, :kept], of_query
    )
    for number, expected in enumerate((keys, values)):
        found = cache[number].astype(float)
        if heads.cache_dtype == "int8":
            found *= cache[2 + number][..., None]
        assert_close(found, expected, near[heads.cache_dtype])


def test_what_is_too_large_for_float16_saturates_but_for_infinity(library, rng):
    heads = HEADS[1]
    arrays, _ = cache_of(rng, heads)
    slots, positions = np.arange(2, dtype=np.int32), np.zeros((2, 3), np.int32)
    projected = np.zeros((2, 6, heads.heads * (heads.group + 2) * heads.size), np.float32)
    projected[0, :, -heads.size :] = [1e5, -1e5, np.inf, np.nan, *np.zeros(heads.size - 4)]
    valid = np.zeros((2, 3), bool)
    valid[:, 0] = True
    operands = projected, np.zeros(16, np.float32), LAYER, slots, positions, valid, *arrays
    values = standin.run(library, placing(heads), *operands)[2]
    np.testing.assert_array_equal(values[1, 0, 0, 0, :4], [65504, -65504, np.inf, np.nan])


@pytest.mark.parametrize("case", SOME_COPIES)
def test_a_copy_is_the_matrix_and_with_its_scales_the_nearest(library, rng, case):
    values, scales, exact = weight(rng, (3,), *case)
    kernels = [shapes.convert(Matrix(*case), is_scaled) for is_scaled in (False, True)]
    plain, scaled = (standin.run(library, one, values, scales, LAYER)[0] for one in kernels)
    np.testing.assert_array_equal(plain.astype(np.float32), values[1])
    expected = exact[1].astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(scaled.view(ml_dtypes.bfloat16), expected)


def normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_norms(library, rng, case):
    x, branch = (rng.standard_normal(case).astype(np.float32) for _ in "xb")
    scales = [rng.random((2, case[1])).astype(np.float32) for _ in range(2)]
    exact, of_branch = x.astype(float), branch.astype(float)
    norm, add, add_and_norm = norms(case)
    (alone,) = standin.run(library, norm, x, scales[0], LAYER)
    assert_close(alone, normed(exact, scales[0][1]), 1e-6)
    expected = exact + normed(of_branch, scales[0][1])
    (added,) = standin.run(library, add, x, branch, scales[0], LAYER)
    assert_close(added, expected, 1e-6)
    both = standin.run(library, add_and_norm, x, branch, *scales, LAYER)
    assert_close(both[0], expected, 1e-6)
    assert_close(both[1], normed(expected, scales[1][1]), 1e-6)


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_routing(library, rng, case):
    tokens, width, num_experts, selected, cap, renormalize = case
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    routers = rng.standard_normal((2, width, num_experts)).astype(np.float32)
    routers[1, :, 1] = routers[1, :, 0]  # of equals the first comes first
    found = standin.run(library, shapes_of_rows.route(*case), x, routers, LAYER)
    logits = x.astype(float) @ routers[1]
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    assert_close(found[0], logits, 1e-6)
    assert_close(found[1], probs, 1e-5)
    order = np.argsort(-found[1], axis=-1, kind="stable")[:, :selected]
    np.testing.assert_array_equal(found[2], order)
    weights = np.take_along_axis(probs, order, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True) if renormalize else weights
    assert_close(found[3], weights, 1e-5)


def test_routing_of_no_numbers_chooses_experts_that_exist(library):
    x, routers = np.full((5, 96), np.nan, np.float32), np.ones((2, 96, 8), np.float32)
    _, _, indices, weights = standin.run(
        library, shapes_of_rows.route(*ROUTES[0]), x, routers, LAYER
    )
    np.testing.assert_array_equal(indices, [[0, 1]] * 5)
    assert np.isnan(weights).all()


BREAKS = [
    ("multiply_add_bfloats(moved, 0x3f803f80u, offset)", "moved", test_projections, PROJECTIONS[0]),
    ("before < term ? 0x3244u", "before <= term ? 0x3244u", test_projections, PROJECTIONS[0]),
    ("rows[input] : 0;", "rows[0] : 0;", test_projections, PROJECTIONS[6]),
    (
        "barrier();\n  for (int i = threadIdx.x; i < count * WIDTH",
        "for (int i = threadIdx.x; i < count * WIDTH",
        test_projections,
        PROJECTIONS[5],
    ),
    (
        "(tile + 1) % IN_GROUP == 0 || tile + 1 == end",
        "tile + 1 == end",
        test_experts,
        EXPERTS[7],
    ),
    ("valid[i / S::A] ? indices[i] : -1", "indices[i]", test_experts, EXPERTS[5]),
    (
        "    barrier();\n    if (team < half) {",
        "    if (team < half) {",
        test_projections,
        PROJECTIONS[0],
    ),
    (
        "wait_for_all_but<S::STAGES - 2>",
        "wait_for_all_but<S::STAGES - 1>",
        test_projections,
        PROJECTIONS[4],
    ),
    ("wanted >= end || wanted > upto[m]", "wanted >= end", test_attention, HEADS[1]),
    ("* (1 + tanhf(", "* (1 + erff(", test_experts, EXPERTS[0]),
]
"""A text of the sources, what stands there when it is broken, and the test that sees it."""


@pytest.mark.parametrize(
    ("text", "broken", "test", "case"),
    [BREAKS[0], *(pytest.param(*each, marks=slow) for each in BREAKS[1:])],
    ids=lambda of: getattr(of, "__name__", str(of))[:40],
)
def test_a_broken_kernel_is_noticed(rng, text, broken, test, case):
    options = {
        test_experts: {"how": "some to none"},
        test_projections: {},
        test_attention: {"at": "anywhere"},
    }[test]
    kernels = {
        test_experts: lambda: experts_kernels(case),
        test_projections: lambda: [projection(case)],
        test_attention: lambda: attention(case),
    }[test]()
    library = standin.build(kernels, [(text, broken)])
    with pytest.raises(AssertionError):
        test(library, rng, case, **options)


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
WIDTH, HIDDEN, GROK_1_HEADS = 6144, 32768, (48, 8, 128)
MOST_SHARED = 48 << 10  # bytes a block has without asking


def of_grok_1(shards, tokens):
    """Every kernel of a step of Grok-1 on one of some devices."""
    queries, keys, size = GROK_1_HEADS
    exact = Matrix(WIDTH, HIDDEN // shards, 1), Matrix(HIDDEN // shards, WIDTH, 8 // shards)
    short = Matrix(WIDTH, HIDDEN // shards, 24), Matrix(HIDDEN // shards, WIDTH, 128 // shards)
    heads = Heads(tokens, 1, keys // shards, 6, size, tokens, 8192, "float16", "float16")
    columns = [count * size // shards for count in (queries, keys, keys)]
    stacks = tuple(Matrix(WIDTH, count, 1) for count in columns)
    narrow = heads._replace(cache_dtype="int8", query_dtype="bfloat16")
    return [
        *shapes.experts(tokens, 2, 8, *exact, "bfloat16"),
        shapes.project(tokens, stacks, "split"),
        shapes.project(tokens, (Matrix(columns[0], WIDTH, 8 // shards),), "split"),
        *attention(heads),
        attention(narrow)[0],
        *(shapes_of_prompts.attend(heads._replace(length=t), 0.3, 30.0) for t in (64, 8192)),
        shapes_of_rows.place(heads, 1),
        shapes_of_rows.place(narrow, 1),
        *norms((tokens, WIDTH)),
        shapes_of_rows.route(tokens, WIDTH, 8, 2, None, False),
        shapes.convert(exact[0], False),
        shapes.convert(exact[1], True),
        *shapes_of_screening.most_probable(min(tokens, 8), 131072 // shards, WIDTH, tokens > 1),
        *shapes_int4.experts(tokens, 2, 8, *short, "bfloat16"),
        shapes_int4.convert(short[0]),
    ]


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 8])
def test_every_share_of_grok_1_keeps_the_memory_busy(shards, tokens):
    first = Matrix(WIDTH, HIDDEN // shards, 1)
    second = Matrix(HIDDEN // shards, WIDTH, 8 // shards)
    for kernel in shapes.experts(tokens, 2, 8, first, second, "bfloat16"):
        assert kernel.grid[0] * kernel.grid[1] >= 96


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_projections_of_32_rows_read_their_weights_once(shards):
    queries, keys = 6144 // shards, 1024 // shards
    three = tuple(Matrix(WIDTH, columns, 1) for columns in (queries, keys, keys))
    for matrices in (three, (Matrix(queries, WIDTH, 8 // shards),)):
        sizes = dict(shapes.project(32, matrices, "split").structs)
        tiles, terms = (
            int(re.search(rf"{name} = (\d+)", next(iter(sizes.values())))[1])
            for name in ("TILES", "TERMS")
        )
        assert 8 * tiles // terms >= 32


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The kernels of Grok-1's width, by name, and a file with them as the driver is given them."""
    if NVCC is None:
        pytest.skip("no nvcc here, whose assembler says what kernels take of a device")
    if SLOW_TESTS:
        kernels = [kernel for case in ((1, 1), (1, 8), (8, 32)) for kernel in of_grok_1(*case)]
    else:
        # Of one token products are others, and the rest of a step is the same.
        kernels = [*of_grok_1(8, 32), *of_grok_1(1, 1)[:4], *of_grok_1(1, 1)[-3:-1]]
    named = [k._replace(name=f"{k.name}_{i}") for i, k in enumerate(dict.fromkeys(kernels))]
    headers = ["device.h", *dict.fromkeys(header for kernel in named for header in kernel.headers)]
    source = tmp_path_factory.mktemp("cuda") / "kernels.cu"
    source.write_text(text_of(headers) + "".join(map(function_of, named)))
    command = [NVCC, "-std=c++17", "-arch=compute_80", "-ptx", source.name]
    subprocess.run(command, cwd=source.parent, capture_output=True, check=True)
    ptx = source.with_suffix(".ptx")
    ptx.write_text(build.for_every_driver(ptx.read_text()))
    return {kernel.name: kernel for kernel in named}, ptx


def test_no_kernel_of_prompts_spills(tmp_path):
    if NVCC is None:
        pytest.skip("no nvcc here, whose assembler says what kernels take of a device")
    matrices = Matrix(6144, 32768, 1), Matrix(32768, 6144, 8)
    kernels = shapes_of_prompts.experts(4096, 8, *matrices)
    source = tmp_path / "kernels.cu"
    source.write_text(
        text_of(("device.h", *kernels[0].headers)) + "".join(map(function_of, kernels))
    )
    command = [NVCC, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    command += ["-cubin", source.name, "-o", os.devnull]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stderr.count(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2
    assert "serialized" not in run.stderr  # products that wait for each other, it warns of
    assert max(kernel.shared_bytes for kernel in kernels) <= 227 << 10


@pytest.mark.parametrize(
    "architecture",
    [pytest.param("sm_80", marks=slow), "sm_90", pytest.param("sm_100", marks=slow)],
)
def test_no_kernel_of_grok_1_spills(wide, architecture):
    kernels, ptx = wide
    assembler = pathlib.Path(str(NVCC)).resolve().with_name("ptxas")
    found = subprocess.run(
        [assembler, f"-arch={architecture}", "-v", ptx.name, "-o", os.devnull],
        cwd=ptx.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    about = dict(part.split("'", 1) for part in found.split("Compiling entry function '")[1:])
    assert set(about) == set(kernels)
    for name, text in about.items():
        assert "0 bytes spill stores, 0 bytes spill loads" in text, name
        (registers,) = map(int, re.findall(r"Used (\d+) registers", text))
        shared = re.search(r"(\d+) bytes smem", text)
        # A multiprocessor has 65,536 registers, given out by eights.
        assert -(-registers // 8) * 8 * kernels[name].threads <= 1 << 16, name
        assert shared is None or int(shared[1]) <= MOST_SHARED, name
