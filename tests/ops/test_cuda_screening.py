"""The CUDA kernels that find the largest product, on a CPU in place of a device.

What they find is held to float64: the very row wherever two products are further apart than
float32 sums are off.
"""

import numpy as np
import pytest

from grok1.ops.cuda import shapes_of_screening
from tests.helpers import SLOW_TESTS, slow
from tests.ops import standin

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")

# Inputs, rows, columns, whether each input has rows of its own that are allowed: four digits and
# two, rows that are no whole blocks and too few for a warp, columns that are no whole piece and
# several.
CASES = [
    (1, 200, 320, False),
    (2, 77, 80, True),
    (4, 1300, 48, False),
    (8, 333, 592, True),
    (5, 9, 16, False),
    (3, 128, 256, False),
    (6, 500, 32, False),
    (1, 3000, 1040, True),
]
SOME_CASES = CASES if SLOW_TESTS else CASES[:5]


def kernels_of(case):
    return shapes_of_screening.most_probable(*case)


@pytest.fixture(scope="module")
def library():
    return standin.build([kernel for case in SOME_CASES for kernel in kernels_of(case)])


@pytest.fixture
def rng():
    return np.random.default_rng(18)


def table_of(rows):
    """As `screening_table`, in float64."""
    scales = (np.abs(rows).max(axis=1) / 127).astype(np.float32)
    divisor = np.where(scales == 0, 1, scales).astype(float)[:, None]
    values = np.clip(np.round(rows / divisor), -127, 127)
    kept = values * scales.astype(float)[:, None]
    rounding = rows.shape[1] * np.finfo(np.float32).eps * np.linalg.norm(kept, axis=1)
    uncertainty = 1.001 * (np.linalg.norm(rows - kept, axis=1) + rounding)
    return values.astype(np.int8), scales, uncertainty.astype(np.float32)


def screened(library, case, x, table, allowed):
    """The bounds, and the largest lower one of each block."""
    make_digits, screen, _ = kernels_of(case)
    digits = standin.run(library, make_digits, x)
    return standin.run(library, screen, *digits, *table, allowed)


def found(library, case, x, rows, table, allowed):
    """(index, product)."""
    bounds = screened(library, case, x, table, allowed)
    return standin.run(library, kernels_of(case)[2], x, rows, *bounds)[:2]


def masks(rng, case):
    inputs, rows, _, is_masked_by_row = case
    allowed = rng.random((inputs, rows) if is_masked_by_row else rows) < 0.8
    allowed[..., rows // 2] = True
    return allowed


def expected_of(x, rows, allowed):
    products = x.astype(float) @ rows.astype(float).T
    return np.where(allowed, products, -np.inf)


def assert_largest(index, product, x, rows, allowed):
    products = expected_of(x, rows, allowed)
    norms = np.linalg.norm(x.astype(float), axis=1)
    near = 1e-6 * norms * np.linalg.norm(rows.astype(float), axis=1).max()
    chosen = np.take_along_axis(products, index[:, None], axis=1)[:, 0]
    assert (chosen >= products.max(axis=1) - near).all()
    np.testing.assert_array_less(np.abs(product - chosen), near + 1e-30)


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_bounds_hold_and_are_tight(library, rng, case):
    inputs, num_rows, width, _ = case
    rows = (
        rng.standard_normal((num_rows, width)) * np.exp(rng.standard_normal((num_rows, 1)))
    ).astype(np.float32)
    rows[num_rows // 3] = 0
    x = (rng.standard_normal((inputs, width)) * 10.0 ** rng.integers(-9, 9, (inputs, 1))).astype(
        np.float32
    )
    table, allowed = table_of(rows), masks(rng, case)
    upper, lower = screened(library, case, x, table, allowed)
    products = x.astype(float) @ rows.astype(float).T
    is_allowed = np.broadcast_to(allowed, upper.shape)
    assert (upper == -np.inf)[~is_allowed].all()
    assert (upper >= products)[is_allowed].all()
    norms = np.linalg.norm(x.astype(float), axis=1)[:, None]
    # Half of a last digit of 15 bits in each of all places, at the most.
    of_digits = 0.51 * width * np.abs(x).max(axis=1)[:, None] / 2**14 * 127 * table[1]
    of_digits = of_digits if inputs > 4 else of_digits / 2**16
    width_of_bounds = 2.001 * norms * table[2] + 2 * of_digits
    assert (upper - products <= width_of_bounds)[is_allowed].all()
    least = np.where(allowed, products, -np.inf)
    assert (lower.max(axis=1) <= least.max(axis=1)).all()
    assert (
        lower.max(axis=1) >= np.where(allowed, products - width_of_bounds, -np.inf).max(1)
    ).all()


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_products_with_the_copy(library, rng, case):
    inputs, num_rows, width, is_masked_by_row = case
    values = rng.integers(-127, 128, (num_rows, width), dtype=np.int8)
    scales = rng.random(num_rows).astype(np.float32)
    x = rng.standard_normal((inputs, width)).astype(np.float32)
    allowed = np.ones((inputs, num_rows) if is_masked_by_row else num_rows, bool)
    table = values, scales, np.zeros(num_rows, np.float32)
    upper, lower = screened(library, case, x, table, allowed)
    exact = x.astype(float) @ (values * scales.astype(float)[:, None]).T
    digits = 4 if inputs <= 4 else 2
    # Half of a last digit in each of all places; the largest number has one bit less at times.
    left = 0.51 * width * np.abs(x).max(axis=1)[:, None] / 2 ** (8 * digits - 2) * 127 * scales
    norms = np.linalg.norm(x.astype(float), axis=1)[:, None]
    rounding = 1e-6 * norms * np.linalg.norm(values.astype(float), axis=1) * scales
    assert (upper >= exact - rounding).all()
    assert (upper <= exact + 2 * left + rounding).all()
    assert (lower.max(axis=1) <= (exact + rounding).max(axis=1)).all()
    assert (lower.max(axis=1) >= (exact - 2 * left - rounding).max(axis=1)).all()


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_the_largest_product(library, rng, case):
    inputs, num_rows, width, _ = case
    rows = rng.standard_normal((num_rows, width)).astype(np.float32)
    x = rng.standard_normal((inputs, width)).astype(np.float32)
    allowed = masks(rng, case)
    index, product = found(library, case, x, rows, table_of(rows), allowed)
    assert_largest(index, product, x, rows, allowed)
    np.testing.assert_array_equal(index, expected_of(x, rows, allowed).argmax(axis=1))


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_rows_that_the_copy_cannot_tell_apart(library, rng, case):
    inputs, num_rows, width, _ = case
    # All of them can win: they differ by less than a step of the copy.
    rows = np.sign(rng.standard_normal((1, width))) + 1e-3 * rng.standard_normal((num_rows, width))
    rows = rows.astype(np.float32)
    x = (rows[:1] + 0.1 * rng.standard_normal((inputs, width))).astype(np.float32)
    allowed, table = masks(rng, case), table_of(rows)
    upper, lower = screened(library, case, x, table, allowed)
    assert (upper >= lower.max(axis=1)[:, None]).sum() > 0.5 * upper.size
    index, product = found(library, case, x, rows, table, allowed)
    assert_largest(index, product, x, rows, allowed)


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_of_equals(library, rng, case):
    inputs, num_rows, width, _ = case
    rows = np.tile(rng.standard_normal((1, width)).astype(np.float32), (num_rows, 1))
    x = rng.standard_normal((inputs, width)).astype(np.float32)
    x[-1] = 0  # of which all products are equal whatever the rows are
    allowed = masks(rng, case)
    allowed[..., :3] = False
    allowed[..., -2:] = True
    index, product = found(library, case, x, rows, table_of(rows), allowed)
    first = np.broadcast_to(allowed, (inputs, num_rows)).argmax(axis=1)
    np.testing.assert_array_equal(index, first)
    assert product[-1] == 0
    # Bounds that are equal too.
    rows[:] = 0
    index, product = found(library, case, x, rows, table_of(rows), allowed)
    np.testing.assert_array_equal(index, first)
    assert not product.any()


def test_a_row_finds_the_same_beside_any_others(library, rng):
    one, many = CASES[0], CASES[3]
    rows = rng.standard_normal((many[1], many[2])).astype(np.float32)
    x = rng.standard_normal((many[0], many[2])).astype(np.float32)
    allowed = np.ones((many[0], many[1]), bool)
    index, product = found(library, many, x, rows, table_of(rows), allowed)
    alone = (1, *many[1:3], False)
    by_itself = standin.build(kernels_of(alone))
    assert one[0] == alone[0]
    for i in range(many[0]):
        found_alone = found(by_itself, alone, x[i : i + 1], rows, table_of(rows), allowed[i])
        assert (found_alone[0][0], found_alone[1][0]) == (index[i], product[i])


@pytest.mark.parametrize("inputs", [3, 8])
def test_few_parts_look_at_their_rows_more_than_once(rng, monkeypatch, inputs):
    monkeypatch.setattr(shapes_of_screening, "_PARTS", inputs)
    case = (inputs, 2500, 16, False)
    assert kernels_of(case)[2].grid[0] == 1
    rows = rng.standard_normal((case[1], case[2])).astype(np.float32)
    x = rng.standard_normal((case[0], case[2])).astype(np.float32)
    rows[-1], x[0] = 9, 1
    library, allowed = standin.build(kernels_of(case)), masks(rng, case)
    allowed[-1] = True
    index, product = found(library, case, x, rows, table_of(rows), allowed)
    assert index[0] == case[1] - 1
    assert_largest(index, product, x, rows, allowed)


@pytest.mark.parametrize("case", SOME_CASES[:2], ids=str)
def test_where_nothing_is_allowed_nothing_is_found(library, rng, case):
    inputs, num_rows, width, is_masked_by_row = case
    rows = rng.standard_normal((num_rows, width)).astype(np.float32)
    x = rng.standard_normal((inputs, width)).astype(np.float32)
    allowed = np.zeros((inputs, num_rows) if is_masked_by_row else num_rows, bool)
    if is_masked_by_row:
        allowed[0, 5] = True
    index, product = found(library, case, x, rows, table_of(rows), allowed)
    assert (index[-1], product[-1]) == (-1, -np.inf)
    if is_masked_by_row:
        assert index[0] == 5


@pytest.mark.parametrize("case", SOME_CASES, ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_no_number(library, rng, case, poison):
    inputs, num_rows, width, _ = case
    rows = rng.standard_normal((num_rows, width)).astype(np.float32)
    x = rng.standard_normal((inputs, width)).astype(np.float32)
    allowed, table = masks(rng, case), table_of(rows)
    _, right = found(library, case, x, rows, table, allowed)
    of_input = x.copy()
    of_input[-1, width // 3] = poison
    _, product = found(library, case, of_input, rows, table, allowed)
    np.testing.assert_array_equal(product[:-1], right[:-1])
    assert not np.isfinite(product[-1])
    # A damaged row is a damaged table, allowed or not: its uncertainty is no number.
    damaged = table[2].copy()
    damaged[num_rows // 2 + 1] = np.nan
    allowed[..., num_rows // 2 + 1] = False
    _, product = found(library, case, x, rows, (*table[:2], damaged), allowed)
    assert np.isnan(product).all()


def test_largest_and_smallest_inputs(library, rng):
    case = CASES[0]
    rows = rng.standard_normal((case[1], case[2])).astype(np.float32)
    allowed, x = masks(rng, case), rng.standard_normal((1, case[2])).astype(np.float32)
    for factor in (1e-42, 1e-30, 1e-12, 1e20, 1e35):
        index, product = found(
            library, case, (x * factor).astype(np.float32), rows, table_of(rows), allowed
        )
        assert allowed[index[0]]
        if factor > 1e-35:
            assert index[0] == expected_of(x, rows, allowed).argmax()
            np.testing.assert_allclose(
                product / factor, expected_of(x, rows, allowed).max(), rtol=1e-4
            )


BREAKS = [
    ("(4 * j ^ g % 2 * 4) + t", "4 * j + t", test_products_with_the_copy, 0),
    ("piece * PIECE + 64 * j", "piece * PIECE + 64 * (j ^ 1)", test_products_with_the_copy, 3),
    ("wanted < S::D ? wanted : 0", "wanted % 256", test_products_with_the_copy, 3),
    (
        "start(piece + S::STAGES - 1, free)",
        "start(piece + 1, free)",
        test_products_with_the_copy,
        3,
    ),
    ("value * 65536 + shuffle_xor(value, 1)", "value * 65536", test_products_with_the_copy, 1),
    ("+ factor * LEFT * scale", "", test_products_with_the_copy, 3),
    ("norm * uncertainty[row]", "0", test_bounds_hold_and_are_tight, 0),
    ("allowed[input * S::MASKED + row]", "allowed[row]", test_bounds_hold_and_are_tight, 1),
    ("is_allowed ? value + bound : lowest()", "value + bound", test_bounds_hold_and_are_tight, 0),
    ("if (bound != bound) best = bound;", "", test_what_is_no_number, 1),
    ("(unsigned)its_row < (unsigned)row", "its_row > row", test_of_equals, 2),
    ("!(bounds[i] < least)", "bounds[i] > least", test_of_equals, 2),
    ("row_of(32 * mask + lowest_bit(left))", "row_of(32 * mask)", test_the_largest_product, 2),
    (
        "barrier();  // nobody reads the product",
        "// nobody reads the product",
        test_rows_that_the_copy_cannot_tell_apart,
        0,
    ),
]
"""A text of the sources, what stands there when it is broken, the test that sees it, its case."""


@pytest.mark.parametrize(
    ("text", "broken", "test", "number"),
    [BREAKS[0], *(pytest.param(*each, marks=slow) for each in BREAKS[1:])],
    ids=lambda of: getattr(of, "__name__", str(of))[:40],
)
def test_a_broken_kernel_is_noticed(rng, text, broken, test, number):
    case = CASES[number]
    library = standin.build(kernels_of(case), [(text, broken)])
    more = {"poison": np.nan} if test is test_what_is_no_number else {}
    with pytest.raises(AssertionError):
        test(library, rng, case, **more)


def test_what_the_kernels_do_not_take():
    assert shapes_of_screening.refusal_of(8, 6144) is None
    assert shapes_of_screening.refusal_of(9, 6144) == "it takes up to 8 rows, not 9"
    for width in (24, 1 << 18):
        reason = f"rows must be a multiple of 16 wide, up to 131072, not {width}"
        assert shapes_of_screening.refusal_of(1, width) == reason


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("inputs", [1, 2, 4, 8])
def test_every_share_of_grok_1_keeps_the_memory_busy(shards, inputs):
    _, screen, choose = kernels_of((inputs, 131072 // shards, 6144, False))
    assert screen.grid[0] >= 256
    assert choose.grid[0] * choose.grid[1] >= 256
