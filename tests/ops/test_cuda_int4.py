"""The CUDA kernels of 4-bit weights against float64, on a CPU in place of a device."""

import functools
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from grok1.ops import int4
from grok1.ops.cuda import shapes, shapes_int4
from grok1.ops.cuda.shapes import Matrix
from grok1.ops.cuda.shapes_int4 import Sizes
from tests.helpers import SLOW_TESTS, slow
from tests.ops import standin
from tests.ops.cuda_cases import LAYER, assert_close, choices, gelu, inputs

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

EXACT = 2e-6  # inputs in four digits
TWO_DIGITS = 3e-4  # of blocks of a few rows; bfloat16 leaves as much of each number

# Precision, tokens, experts a token, experts, model dim, hidden dim: one block and several, blocks
# of one group and of more than are under way, a width that is not whole tiles, more inputs than an
# instruction has columns for, and than fit one pass.
EXPERTS = [
    ("float32", 1, 2, 4, 256, 512),
    ("bfloat16", 1, 2, 4, 96, 160),
    ("bfloat16", 2, 2, 4, 32, 288),
    ("float32", 5, 2, 4, 64, 768),
    ("bfloat16", 9, 2, 4, 512, 288),
    ("float32", 33, 2, 8, 64, 128),
    ("bfloat16", 33, 2, 8, 224, 96),
    ("bfloat16", 64, 1, 4, 32, 64),
    ("float32", 2, 1, 4, 1024, 1088),
]
# Of one row at a time: one block of rows, several that blocks of threads share, and so many that a
# warp makes the digits of more than one.
OF_ONE = [
    ("float32", 1, 2, 4, 256, 512),
    ("bfloat16", 2, 1, 4, 96, 160),
    ("float32", 2, 2, 8, 1024, 64),
    ("bfloat16", 1, 2, 4, 2560, 32),
]
# Rows, columns: blocks of 256 rows and of fewer, groups of 32 and of fewer.
COPIES = [(512, 264), (96, 8), (144, 520), (40, 16)]
DIGITS = [(3, 512, 4), (2, 96, 4), (5, 256, 2)]

SOME_EXPERTS = EXPERTS if SLOW_TESTS else [EXPERTS[i] for i in (0, 2, 3, 6, 8)]


def matrix(rows, columns):
    return Matrix(rows, columns, int4.num_blocks(rows))


def experts_kernels(case, is_made_in_blocks=False):
    precision, tokens, selected, num_experts, width, hidden = case
    sizes = matrix(width, hidden), matrix(hidden, width)
    of_choice = tokens, selected, num_experts
    # As if a device were busy with the columns alone.
    busy = 1 if case == OF_ONE[3] else shapes_int4._MULTIPROCESSORS
    with mock.patch.object(shapes_int4, "_MULTIPROCESSORS", busy):
        return shapes_int4.experts(Sizes(*of_choice, *sizes, precision), is_made_in_blocks)


def digits_kernel(case):
    rows, width, digits = case
    return shapes_int4.digits_of(rows, matrix(width, 16), digits)


KERNELS = [
    *(kernel for case in SOME_EXPERTS for kernel in experts_kernels(case)),
    *(kernel for case in OF_ONE for kernel in experts_kernels(case, is_made_in_blocks=True)[1:]),
    *map(digits_kernel, DIGITS),
    *(shapes_int4.convert(matrix(*case)) for case in COPIES),
]


@pytest.fixture(scope="module")
def library():
    return standin.build(KERNELS)


@pytest.fixture
def rng():
    return np.random.default_rng(16)


def weight(rng, lead, rows, columns):
    """The parts, and the float64 weight that they stand for."""
    blocks = int4.num_blocks(rows)
    groups = rows // blocks // int4.group_rows(rows // blocks)
    parts = int4.Int4Array(
        int4.pack(rng.integers(16, size=(*lead, rows, columns))),
        int4.pack_subscales(rng.integers(-32, 32, (*lead, blocks, groups, columns))),
        (2e-4 + 4e-4 * rng.random((*lead, blocks, columns))).astype(np.float16),
    )
    return parts, int4.dequantize_int4(parts).astype(float)


def check_experts(library, rng, case, how, is_made_in_blocks):
    precision, tokens, selected, num_experts, width, hidden = case
    x = inputs(rng, (tokens, width), precision)
    gate, of_gate = weight(rng, (2, num_experts), width, hidden)
    up, of_up = weight(rng, (2, num_experts), width, hidden)
    down, of_down = weight(rng, (2, num_experts), hidden, width)
    indices, valid = choices(rng, tokens, selected, num_experts, how)
    weights = rng.random((tokens, selected)).astype(np.float32)
    expected = np.zeros((tokens, width))
    for token, choice in np.argwhere((indices < num_experts) & valid[:, None]):
        expert = indices[token, choice]
        mixed = gelu(x[token] @ of_gate[1, expert]) * (x[token] @ of_up[1, expert])
        expected[token] += weights[token, choice] * (mixed @ of_down[1, expert])
    digits_of_x, gate_up, down_sum = experts_kernels(case, is_made_in_blocks)
    assert is_made_in_blocks == (digits_of_x is None)
    is_run = (valid[:, None] & (indices < num_experts)).reshape(-1)
    of_x = [x] if digits_of_x is None else standin.run(library, digits_of_x, x)
    of_choice = LAYER, indices, valid
    hidden = standin.run(library, gate_up, *of_x, *gate, *up, *of_choice)[:2]
    found, parts = standin.run(library, down_sum, *hidden, *down, *of_choice, weights)
    assert np.isnan(parts[:, ~is_run]).all()  # padding costs nothing
    is_short = precision == "bfloat16" and tokens > shapes_int4.MOST_EXACT
    assert_close(found, expected, TWO_DIGITS if is_short else EXACT)
    assert not found[~valid].any()


@pytest.mark.parametrize("how", ["at random", "all to one", "some to none"])
@pytest.mark.parametrize("case", SOME_EXPERTS, ids=str)
def test_experts(library, rng, case, how):
    check_experts(library, rng, case, how, is_made_in_blocks=False)


@pytest.mark.parametrize("how", ["at random", "all to one", "some to none"])
@pytest.mark.parametrize("case", OF_ONE, ids=str)
def test_blocks_that_have_a_row_at_a_time_make_its_digits(library, rng, case, how):
    check_experts(library, rng, case, how, is_made_in_blocks=True)


@pytest.mark.parametrize("case", DIGITS, ids=str)
def test_digits_are_the_numbers(library, rng, case):
    rows, width, count = case
    x = rng.standard_normal((rows, width)).astype(np.float32)
    block = width // int4.num_blocks(width)
    x[0, :block] = 0
    x[1, :block] *= 1e-35  # as good as nothing
    x[1, -1], x[1, -2] = 1e38, -3e38
    digits, factors = standin.run(library, digits_kernel(case), x)
    places = 256.0 ** np.arange(count - 1, -1, -1)
    numbers = np.einsum("rdk,d->rk", digits.astype(float), places)
    # The scales of groups come times 4.
    found = numbers.reshape(rows, -1, block) * (4 * factors.astype(float))[..., None]
    expected = x.astype(float).reshape(found.shape)
    largest = np.maximum(np.abs(expected).max(axis=-1, keepdims=True), 1e-25)
    steps = 2.0 ** (8 * count - 2)  # at least, for the largest of a block
    assert (np.abs(found - expected) / largest).max() <= 0.51 / steps
    assert not digits[0, :, :block].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_makes_its_block_none(library, value):
    case = DIGITS[0]
    x = np.ones(case[:2], np.float32)
    x[1, 300] = value
    _, factors = standin.run(library, digits_kernel(case), x)
    np.testing.assert_array_equal(np.isnan(factors), [[0, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize("case", COPIES, ids=str)
def test_a_copy_is_the_nearest_to_the_matrix(library, rng, case):
    parts, exact = weight(rng, (3,), *case)
    (copy,) = standin.run(library, shapes_int4.convert(matrix(*case)), *parts, LAYER)
    expected = exact[1].astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(copy.view(ml_dtypes.bfloat16), expected)


BREAKS = [
    ("word ^ 0x88888888u", "word", EXPERTS[0]),
    ("g % 4 * APART + 8 * t", "g % 4 * APART", OF_ONE[0]),
    ("      barrier();\n      const int g", "      const int g", OF_ONE[0]),
    ("/ S::A;\n    barrier();", "/ S::A;", OF_ONE[0]),  # whose block before had the same token
    ("unit < end; unit += WARPS", "unit < end; unit += 2 * WARPS", OF_ONE[3]),
    ("(unit + WARPS) * S::UNIT, next", "unit * S::UNIT, next", OF_ONE[3]),
    ("(first + S::TEAMS) * TILES_OF_K", "first * TILES_OF_K", OF_ONE[2]),
    ("rings + 2 * S::Hidden::TEAMS * Of::RING", "rings", OF_ONE[0]),
    ("group % 2 ? of_low >> 2 : of_low << 2", "of_low << 2", EXPERTS[0]),
    ("g < 4 ? 0x4432u : 0x3244u", "0x4432u", EXPERTS[0]),
    ("(tile + 1) % IN_UNIT == 0 || tile + 1 == end", "tile + 1 == end", EXPERTS[8]),
    ("tile % GROUPS == 0 || tile == begin", "tile % GROUPS == 0", EXPERTS[0]),
    ("wait_for_all_but<STAGES - 2>", "wait_for_all_but<STAGES - 1>", EXPERTS[0]),
    ("sum(i) * 65536 + other", "sum(i) * 65536", EXPERTS[0]),
    ("values[2 * i] = is_odd ? other : kept", "values[2 * i] = kept", EXPERTS[0]),
    ("is_next * 2 * HALF + is_odd * HALF", "is_odd * HALF", EXPERTS[0]),
    ("128 * (i / 4) + 4 * lane", "127 * (i / 4) + 4 * lane", EXPERTS[0]),
    (": 32 * i + lane", ": 31 * i + lane", EXPERTS[3]),
    ("byte % 2 ? 0x7632", "byte % 2 ? 0x5410", EXPERTS[0]),
    (
        "    barrier();\n    for (int i = threadIdx.x / 32",
        "    for (int i = threadIdx.x / 32",
        EXPERTS[3],
    ),
]
"""A text of the sources, what stands there when it is broken, and a case that sees it."""


@pytest.mark.parametrize(
    ("text", "broken", "case"),
    [BREAKS[0], *(pytest.param(*each, marks=slow) for each in BREAKS[1:])],
    ids=lambda of: str(of)[:40],
)
def test_a_broken_kernel_is_noticed(rng, text, broken, case):
    is_made = case in OF_ONE
    library = standin.build([*filter(None, experts_kernels(case, is_made))], [(text, broken)])
    with pytest.raises(AssertionError):
        check_experts(library, rng, case, "at random", is_made)


def of_grok_1(shards, tokens, is_made_in_blocks=False):
    """The sizes of Grok-1's experts on one of some devices, and the kernels."""
    width, hidden = 6144, 32768 // shards
    sizes = matrix(width, hidden), matrix(hidden, width)
    of = Sizes(tokens, 2, 8, *sizes, "bfloat16")
    return sizes, shapes_int4.experts(of, is_made_in_blocks)


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_every_share_of_grok_1_keeps_the_memory_busy(shards, tokens):
    (first, second), kernels = of_grok_1(shards, tokens)
    assert shapes.refusal_of_experts(8, first, first, second, shapes_int4.refusal_of) is None
    for kernel in kernels[1:]:
        assert kernel.grid[0] * kernel.grid[1] >= 96
        # What the smallest multiprocessor with tensor cores for bfloat16 gives a block.
        assert kernel.shared_bytes <= 96 << 10
        assert kernel.threads * kernel.resident <= 1024


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 2])
def test_blocks_of_grok_1_that_make_digits_have_room_for_them_beside_each_other(shards, tokens):
    _, (before, gate_up, down) = of_grok_1(shards, tokens, is_made_in_blocks=True)
    assert before is None
    assert gate_up.grid[0] * gate_up.grid[1] >= 96
    # What compute capability 9.0 gives a multiprocessor, 1 kB of it to each block.
    assert gate_up.resident * (gate_up.shared_bytes + 1024 + 1024) <= 228 << 10
    assert down == of_grok_1(shards, tokens)[1][2]


@pytest.mark.parametrize("tokens", [3, 9, 64])
def test_digits_of_several_rows_are_made_before(tokens):
    assert of_grok_1(8, tokens, is_made_in_blocks=True) == of_grok_1(8, tokens)


def test_what_the_kernels_do_not_take_they_say():
    wide = Matrix(256, 64, 1)
    refused = functools.partial(shapes.refusal_of_experts, refusal=shapes_int4.refusal_of)
    assert refused(8, wide, wide, wide) is None
    assert refused(64, wide, wide, wide) == "it runs up to 32 experts, not 64"
    assert (
        refused(8, wide, Matrix(256, 64, 2), wide) == "gate and up have scales for different groups"
    )
    narrow = "its rows must be a multiple of 16 wide, not 40"
    assert refused(8, Matrix(256, 40, 1), Matrix(256, 40, 1), wide) == narrow
    short = "its blocks must be a multiple of 32 rows, not 48"
    assert refused(8, wide, wide, Matrix(144, 64, 3)) == short
