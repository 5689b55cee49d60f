"""The CUDA kernels of many tokens' experts against float64, on a CPU in place of a device."""

import ml_dtypes
import numpy as np
import pytest

from grok1.ops.cuda import shapes_of_prompts
from grok1.ops.cuda.shapes import Matrix
from tests.helpers import slow
from tests.ops import standin
from tests.ops.cuda_cases import LAYER, gelu

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

NEAR = 2e-3  # weights with scales of groups, and hidden numbers, are rounded to bfloat16

# Rows of each expert, width, hidden width, groups of gate and of down: one of each number of
# tokens that a product can have, several tiles, slabs that are not full, experts without rows.
CASES = [
    ((7, 0, 40, 70), 128, 192, 1, 1),
    ((130, 3), 192, 256, 1, 4),
    ((0, 97, 0), 256, 512, 2, 8),
]


def kernels_of(case):
    counts, width, hidden, of_gate, of_down = case
    matrices = Matrix(width, hidden, of_gate), Matrix(hidden, width, of_down)
    return shapes_of_prompts.experts(sum(counts) + 5, len(counts), *matrices)


@pytest.fixture(scope="module")
def library():
    return standin.build([kernel for case in CASES for kernel in kernels_of(case)])


def weight(rng, num_experts, rows, columns, groups):
    """Values, scales, and the weight that they stand for, rounded where groups have scales."""
    values = rng.integers(-128, 128, (2, num_experts, rows, columns), dtype=np.int8)
    shape = (2, num_experts, groups, columns)
    scales = (0.005 + 0.01 * rng.random(shape)).astype(ml_dtypes.bfloat16)
    grouped = values.astype(np.float32).reshape(2, num_experts, groups, -1, columns)
    exact = (grouped * scales.astype(np.float32)[..., None, :]).reshape(values.shape)
    return values, scales, exact if groups == 1 else exact.astype(ml_dtypes.bfloat16)


def found_and_expected(library, case):
    counts, width, hidden, of_gate, of_down = case
    rng = np.random.default_rng(9)
    x = rng.standard_normal((sum(counts) + 5, width)).astype(ml_dtypes.bfloat16)
    gate, up = (weight(rng, len(counts), width, hidden, of_gate) for _ in "gu")
    down = weight(rng, len(counts), hidden, width, of_down)
    counts = np.array(counts, np.int32)
    first = (np.cumsum(counts) - counts).astype(np.int32)
    gate_up, of_down = kernels_of(case)
    where = LAYER, first, counts
    (mixed,) = standin.run(library, gate_up, x, *gate[:2], *up[:2], *where)
    (out,) = standin.run(library, of_down, mixed, *down[:2], *where)
    expected = np.full(out.shape, np.nan)
    for expert, (begin, count) in enumerate(zip(first, counts, strict=True)):
        rows = slice(begin, begin + count)
        of = [part[2][1, expert].astype(float) for part in (gate, up, down)]
        between = gelu(x[rows].astype(float) @ of[0]) * (x[rows].astype(float) @ of[1])
        expected[rows] = between @ of[2]
    return out, expected


def farthest(library, case):
    """How far the farthest number is from the expected one, of the largest."""
    found, expected = found_and_expected(library, case)
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(~np.isnan(found), real)  # rows of nobody are left alone
    return np.abs(found - expected)[real].max() / np.abs(expected[real]).max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_of_prompts(library, case):
    assert farthest(library, case) < NEAR


BREAKS = [
    ("thread / 32 ^ t", "thread / 32"),
    ("piece ^ token % 8", "piece"),
    ("        start(tile + S::STAGES - 1, free)", "start(tile + S::STAGES - 1, stage)"),
    ("wait_for_products<1>();", ""),
    ("meet(Count<S::STAGES - 3>());", "barrier();"),
    ("tile % TILES_OF_GROUP == 0", "tile == 0"),
    ("tile.first = first_rows[expert] + before;", "tile.first = first_rows[expert];"),
    ("is_up ? j + HALF : j", "j"),
    ("if (count <= 32)", "if (count <= 64)"),
]
"""A text of the source, and what stands there when it is broken."""


@pytest.mark.parametrize(
    ("text", "broken"),
    [BREAKS[0], *(pytest.param(*each, marks=slow) for each in BREAKS[1:])],
    ids=lambda of: str(of)[:40],
)
def test_a_broken_kernel_is_noticed(text, broken):
    libraries = [standin.build(kernels_of(case), [(text, broken)], level="-O0") for case in CASES]
    with pytest.raises(AssertionError):
        assert sum(map(farthest, libraries, CASES)) < NEAR
