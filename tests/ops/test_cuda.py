"""The CUDA kernels' sources against float64, on a CPU in place of a device (`standin.h`)."""

import itertools
import math
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
from grok1.ops.cuda.shapes_int4 import Sizes
from grok1.ops.cuda.shapes_of_rows import Heads
from tests.helpers import SLOW_TESTS, slow
from tests.ops import standin
from tests.ops.cuda_cases import LAYER, assert_close, choices, gelu, inputs

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

EXACT = 2e-6  # float32 inputs in three terms, or of bfloat16
TWO_TERMS = 1e-5
BFLOAT16 = 4e-3  # hidden numbers of many tokens

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
    # Parts of a token that come in two turns.
    ("bfloat16", 5, 2, 4, 192, 2176, 1, 8),
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


def copying(case, is_scaled, dtype):
    return shapes.convert(Matrix(*case), is_scaled, dtype)


KINDS = "bfloat16", "float16"

# A kernel is compiled for each size: in the gate, for one of each way through its source.
SOME_EXPERTS = EXPERTS if SLOW_TESTS else [EXPERTS[i] for i in (0, 2, 4, 6, 7, 9)]
SOME_PROJECTIONS = PROJECTIONS if SLOW_TESTS else [PROJECTIONS[i] for i in (0, 1, 3, 6)]
SOME_COPIES = COPIES if SLOW_TESTS else COPIES[1:4]
KERNELS = [
    *(kernel for case in SOME_EXPERTS for kernel in experts_kernels(case)),
    *(kernel for case in SOME_PROJECTIONS for kernel in projection(case) if kernel),
    *(copying(*case) for case in itertools.product(SOME_COPIES, (False, True), KINDS)),
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
    before = x, *gate[:2], *up[:2], LAYER, indices, valid
    mixed, *_ = standin.run(library, gate_up, *before)
    after = mixed, *down[:2], LAYER, indices, valid, weights
    found, parts = standin.run(library, of_down, *after)
    assert np.isnan(parts[:, ~is_run]).all()  # padding costs nothing
    is_rounded = precision == "bfloat16" and tokens > 16
    near = BFLOAT16 if is_rounded else EXACT if precision == "float32" else TWO_TERMS
    assert_close(found, expected, near)
    assert not found[~valid].any()


@pytest.mark.parametrize("case", SOME_PROJECTIONS, ids=str)
def test_projections(library, rng, case):
    precision, rows, width, columns, groups = case
    x = inputs(rng, (rows, width), precision)
    stacks = [weight(rng, (3,), width, *of) for of in zip(columns, groups, strict=True)]
    split, kernel = projection(case)
    operands = [part for stack in stacks for part in (*stack[:2], np.int32(2))]
    rows = x if split is None else standin.run(library, split, x)[0]
    expected = np.concatenate([x.astype(float) @ stack[2][2] for stack in stacks], axis=1)
    near = TWO_TERMS if precision == "split" else EXACT
    *sums, parts = standin.run(library, kernel, rows, *operands)
    if sums:
        assert_close(sums[0], expected, near)
    assert_close(parts.astype(float).sum(axis=0), expected, near)


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
        (parts,) = standin.run(library, projection(case)[1], x, *operands)
        found = parts[:, 0, :384].sum(axis=0)
        assert not np.isfinite(found[values[0, 17] != 0]).any()


@pytest.mark.parametrize("case", SOME_COPIES)
@pytest.mark.parametrize("dtype", KINDS)
def test_a_copy_is_the_matrix_and_with_its_scales_the_nearest(library, rng, case, dtype):
    values, scales, exact = weight(rng, (3,), *case)
    factor = np.float32(64)
    plain, scaled = (
        standin.run(library, copying(case, is_scaled, dtype), values, scales, LAYER, factor)[0]
        for is_scaled in (False, True)
    )
    np.testing.assert_array_equal(plain.astype(np.float32), values[1])
    expected = (64 * exact[1]).astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(scaled, expected)


BREAKS = [
    ("multiply_add_bfloats(moved, 0x3f803f80u, offset)", "moved", test_projections, PROJECTIONS[0]),
    ("before < term ? 0x3244u", "before <= term ? 0x3244u", test_projections, PROJECTIONS[0]),
    ("rows[input] : 0;", "rows[0] : 0;", test_projections, PROJECTIONS[6]),
    ("i % (2 * S::TERMS)", "0", test_projections, PROJECTIONS[6]),
    ("left[2] -= float_of_bits(second << 16)", "left[2] = 0", test_projections, PROJECTIONS[6]),
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
    ("index | (is_real - 1)", "index", test_experts, EXPERTS[5]),
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
    ("* (1 + tanhf(", "* (1 + erff(", test_experts, EXPERTS[0]),
    ("shuffle_xor(t % 2 ? first : second, 1)", "first", test_projections, PROJECTIONS[0]),
    ("t % 2 * (S::BYTES - EACH)", "0", test_experts, EXPERTS[0]),
    ("of_rows[first + threadIdx.x] = weight", "of_rows[0] = weight", test_experts, EXPERTS[5]),
    ("0 <= index && index < S::E ?", "true ?", test_experts, EXPERTS[5]),
    ("from < COUNT; from += AT_ONCE", "from < 16; from += AT_ONCE", test_experts, EXPERTS[8]),
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
    }[test]
    kernels = {
        test_experts: lambda: experts_kernels(case),
        test_projections: lambda: [*filter(None, projection(case))],
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
    router = shapes_of_rows.Router(WIDTH, 8, 2, None, False)
    return [
        *shapes.experts(tokens, 2, 8, *exact, "bfloat16"),
        *filter(None, shapes.project(tokens, stacks, "split")),
        *filter(None, shapes.project(tokens, (Matrix(columns[0], WIDTH, 8 // shards),), "split")),
        *(shapes_of_rows.attend(of, 0.3, 30.0) for of in (heads, narrow)),
        *(shapes_of_rows.place_and_attend(of, 2, 0.3, 30.0) for of in (heads, narrow)),
        *(shapes_of_prompts.attend(heads._replace(length=t), 0.3, 30.0) for t in (64, 8192)),
        shapes_of_rows.place(heads, 1),
        shapes_of_rows.place(narrow, 1),
        *(shapes_of_rows.norms(tokens, WIDTH, 1e-5, of) for of in ("norm", "add_norm")),
        shapes_of_rows.norms(tokens, WIDTH, 1e-5, "add_norm_and_norm"),
        shapes_of_rows.route(tokens, router),
        shapes_of_rows.add_and_route(tokens, router, 1e-5),
        shapes.convert(exact[0], False),
        shapes.convert(exact[1], True),
        shapes.convert(exact[1], True, "float16"),
        *shapes_of_screening.most_probable(min(tokens, 8), 131072 // shards, WIDTH, tokens > 1),
        *shapes_int4.experts(Sizes(tokens, 2, 8, *short, "bfloat16")),
        shapes_int4.experts(Sizes(min(tokens, 2), 2, 8, *short, "bfloat16"), True)[1],
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
        sizes = dict(shapes.project(32, matrices, "split")[1].structs)
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
        kernels = [*of_grok_1(8, 32), *of_grok_1(1, 1)[:4], *of_grok_1(1, 1)[-4:-1]]
    for tokens, shards in itertools.product((4, 20), (1, 8)):
        gate, down = (
            Matrix(WIDTH, HIDDEN // shards, 24),
            Matrix(HIDDEN // shards, WIDTH, 128 // shards),
        )
        kernels += shapes_int4.experts(Sizes(tokens, 2, 8, gate, down, "bfloat16"))
    named = [k._replace(name=f"{k.name}_{i}") for i, k in enumerate(dict.fromkeys(kernels))]
    headers = ["device.h", *dict.fromkeys(header for kernel in named for header in kernel.headers)]
    source = tmp_path_factory.mktemp("cuda") / "kernels.cu"
    source.write_text(text_of(headers) + "".join(map(function_of, named)))
    command = [NVCC, "-std=c++17", "-arch=compute_80", "-ptx", source.name]
    subprocess.run(command, cwd=source.parent, capture_output=True, check=True)
    ptx = source.with_suffix(".ptx")
    ptx.write_text(build.for_every_driver(ptx.read_text()))
    return {kernel.name: kernel for kernel in named}, ptx


@pytest.mark.parametrize(
    ("name", "most"), [("norm", 600), ("add_norm_and_norm", 1200), ("add_and_route", 3600)]
)
def test_one_multiprocessor_has_little_to_do_alone(wide, name, most):
    kernels, ptx = wide
    functions = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx.read_text(), re.DOTALL))
    assert set(functions) == set(kernels)
    found = [kernel for kernel in kernels if re.fullmatch(rf"grok1_{name}_\d+", kernel)]
    assert found
    for kernel in found:
        instructions = len(re.findall(r"^\s+(?!\.)[^\n]*;$", functions[kernel], re.MULTILINE))
        # A scheduler has every fourth warp, and starts an instruction of one of them at a time.
        assert instructions * kernels[kernel].threads / 32 / 4 <= most


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_the_products_of_a_token_take_no_second_turn_for_a_few_blocks(shards):
    for kernel in of_grok_1(shards, 1):
        if "product.h" in kernel.headers and "screen.h" not in kernel.headers:
            turns = math.prod(kernel.grid) / kernel.resident / 128  # multiprocessors, about
            assert turns <= 1, kernel.name


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
    ["sm_80", "sm_90", "sm_100"],
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
        # No array is there but that of CUDA's sine of large numbers, which is seven words.
        assert int(re.search(r"(\d+) bytes stack frame", text)[1]) <= 32, name
        (registers,) = map(int, re.findall(r"Used (\d+) registers", text))
        shared = re.search(r"(\d+) bytes smem", text)
        # A multiprocessor has 65,536 registers, given out by eights.
        assert -(-registers // 8) * 8 * kernels[name].threads <= 1 << 16, name
        assert shared is None or int(shared[1]) <= MOST_SHARED, name
