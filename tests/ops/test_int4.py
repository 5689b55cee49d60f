"""4-bit weights: packing, and every form of their product against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.ops import forms, int4
from grok1.ops.formats import FORMATS, INT4
from grok1.ops.int4 import BOOK, Int4Array
from grok1.ops.int4_feedback import feedback_factor, round_with_feedback
from grok1.ops.int4_rounding import round_weight
from grok1.ops.quantized import matmul
from tests.helpers import relative_error, slow


def drawn(rows, columns, lead=(), seed=0):
    """A weight of random codes and scales, and the float64 weight that it stands for."""
    rng = np.random.default_rng(seed)
    blocks = int4.num_blocks(rows)
    size = int4.group_rows(rows // blocks)
    codes = rng.integers(0, 16, (*lead, rows, columns))
    groups = rng.integers(-32, 32, (*lead, blocks, rows // blocks // size, columns))
    scales = rng.normal(size=(*lead, blocks, columns)).astype(np.float16)
    weight = Int4Array(int4.pack(codes), int4.pack_subscales(groups), scales)
    of_groups = (groups * scales.astype(float)[..., None, :]).reshape(*lead, -1, columns)
    return weight, BOOK[codes].astype(float) * of_groups.repeat(size, axis=-2)


@pytest.mark.parametrize("rows", [2, 20, 24, 128, 192, 344, 512])
def test_what_is_packed_stands_for_itself(rows):
    weight, expected = drawn(rows, 6, (3,))
    assert weight.shape == expected.shape
    np.testing.assert_allclose(int4.dequantize_int4(weight), expected, rtol=3e-7)
    shapes = INT4.part_shapes(weight.shape, weight.scales.shape[-2])
    assert shapes == [part.shape for part in weight]


def test_a_weight_of_the_released_sizes_takes_4_25_bits():
    weight = INT4.abstract((6144, 32768), int4.num_blocks(6144))
    bits = 8 * sum(part.size * part.dtype.itemsize for part in weight)
    assert bits == 4.25 * 6144 * 32768


@pytest.mark.parametrize(("rows", "shards"), [(192, 8), (192, 16), (512, 4), (344, 4), (6144, 16)])
def test_finer_blocks_for_the_shards_of_devices_change_no_weight(rows, shards):
    weight, _ = drawn(rows, 5, (2,))
    blocks = weight.scales.shape[-2]
    refined = INT4.num_refined(rows, blocks, shards)
    assert rows // shards % (rows // refined) == 0
    parts = [
        part.refine(array, refined // blocks, weight.block_rows)
        for part, array in zip(INT4.parts, weight, strict=True)
    ]
    again = int4.dequantize_int4(Int4Array(*parts))
    np.testing.assert_array_equal(again, int4.dequantize_int4(weight))


def test_shards_of_odd_rows_are_refused():
    with pytest.raises(
        ValueError, match="hold two rows in a byte, and a device would hold 3 of 24"
    ):
        FORMATS["int4"].num_refined(24, 1, 8)


# Odd counts of rows, of columns, and rows of the weight that no register divides.
SIZES = [(1, 512, 96), (2, 192, 64), (3, 512, 40), (7, 24, 33), (13, 344, 70), (33, 512, 65)]


@pytest.mark.optimised
@pytest.mark.parametrize("form", ["blocked", "halves", "cpp"])
@pytest.mark.parametrize(("num_rows", "rows", "columns"), SIZES)
def test_every_form_against_float64(form, num_rows, rows, columns):
    weight, expected = drawn(rows, columns, (2, 3), seed=num_rows)
    if form == "cpp" and not forms.has_kernels("cpu"):
        pytest.skip("no compiler here")
    x = np.random.default_rng(5).normal(size=(num_rows, rows)).astype(np.float32)
    on_device = jax.tree.map(jnp.asarray, weight)
    num_valid = num_rows - num_rows // 3
    found = np.asarray(matmul(jnp.asarray(x), on_device, (1, 2), num_valid, form))[:num_valid]
    exact = x[:num_valid].astype(float) @ expected[1, 2]
    assert relative_error(found, exact) <= 2e-6


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it():
    if not forms.has_kernels("cpu"):
        pytest.skip("no compiler here")
    weight, expected = drawn(512, 200)
    on_device = jax.tree.map(jnp.asarray, weight)
    x = np.random.default_rng(5).normal(size=(33, 512)).astype(np.float32)
    together = np.asarray(matmul(jnp.asarray(x), on_device, implementation="cpp"))
    assert relative_error(together, x.astype(float) @ expected) <= 2e-6
    for num_rows in (1, 2, 3, 4, 5, 12, 13):
        rows = matmul(jnp.asarray(x[:num_rows]), on_device, implementation="cpp")
        np.testing.assert_array_equal(rows, together[:num_rows])


@pytest.mark.parametrize("num_rows", [2, 19])
def test_rows_of_any_size_and_with_a_few_large_numbers(num_rows):
    if not forms.has_kernels("cpu"):
        pytest.skip("no compiler here")
    weight, expected = drawn(512, 100)
    rng = np.random.default_rng(6)
    x = rng.normal(size=(num_rows, 512)).astype(np.float32)
    x[:, rng.integers(0, 512, 9)] *= 1000
    x *= 10.0 ** np.linspace(-28, 28, num_rows, dtype=np.float32)[:, None]
    found = matmul(jnp.asarray(x), jax.tree.map(jnp.asarray, weight), implementation="cpp")
    for row, exact in zip(np.asarray(found), x.astype(float) @ expected, strict=True):
        assert relative_error(row, exact) <= 2e-6


def test_numbers_that_three_digits_hold_give_exact_products():
    if not forms.has_kernels("cpu"):
        pytest.skip("no compiler here")
    weight, expected = drawn(64, 70)
    weight = weight._replace(scales=np.ones_like(weight.scales))
    expected = np.round(expected / drawn(64, 70)[0].scales.astype(float))
    # The largest and the smallest of each digit, and what carries into the next.
    edges = [0x7F7F7F, -0x7F7F7F, 0x7F7F80, -0x808080, 0x3FFFFF, -0x400000, 128, -129, 0x8080, 1]
    for edge in edges:
        x = np.zeros((2, 64), np.float32)
        x[0, 7] = x[1, 38] = edge
        found = matmul(jnp.asarray(x), jax.tree.map(jnp.asarray, weight), implementation="cpp")
        exact = (x.astype(float) @ expected).astype(np.float32)
        np.testing.assert_allclose(np.asarray(found), exact, rtol=2e-7)


def test_a_row_that_is_no_number_leaves_the_others_as_they_are():
    if not forms.has_kernels("cpu"):
        pytest.skip("no compiler here")
    weight, _ = drawn(512, 40)
    on_device = jax.tree.map(jnp.asarray, weight)
    x = np.random.default_rng(7).normal(size=(14, 512)).astype(np.float32)
    spoilt = x.copy()
    spoilt[3, 100], spoilt[8, 511], spoilt[12] = np.nan, -np.inf, 0
    before, after = (
        np.asarray(matmul(jnp.asarray(rows), on_device, implementation="cpp"))
        for rows in (x, spoilt)
    )
    assert not np.isfinite(after[[3, 8]]).any()
    assert not after[12].any()
    others = np.delete(np.arange(14), [3, 8, 12])
    np.testing.assert_array_equal(after[others], before[others])


def test_bfloat16_inputs_meet_values_that_are_exact():
    weight, expected = drawn(512, 64)
    x = np.random.default_rng(5).normal(size=(4, 512)).astype(jnp.bfloat16)
    found = matmul(jnp.asarray(x), jax.tree.map(jnp.asarray, weight), implementation="blocked")
    assert relative_error(np.asarray(found), x.astype(float) @ expected) <= 2e-6


@pytest.mark.parametrize(("tails", "most"), [("normal", 0.0757), ("heavy", 0.0864)])
def test_searched_scales_against_the_largest_value_and_published_errors(tails, most):
    rng = np.random.default_rng(1)
    shape = 1024, 128
    weight = rng.normal(size=shape) if tails == "normal" else rng.standard_t(5, size=shape)
    # As released: int8 for each column.
    scale = np.abs(weight).max(axis=0) / 127
    weight = (np.round(weight / scale) * scale).astype(np.float32)
    grouped = weight.reshape(-1, 32, shape[1])
    step = np.abs(grouped).max(axis=1, keepdims=True) / 7
    nearest = (np.clip(np.round(grouped / step), -8, 7) * step).reshape(shape)
    error = relative_error(int4.dequantize_int4(round_weight(weight, 4)), weight)
    assert error <= 0.78 * relative_error(nearest, weight)
    assert error <= 1.01 * most


@pytest.mark.optimised
@pytest.mark.parametrize("rows", [pytest.param(512, marks=slow), 24])
def test_both_forms_of_rounding_find_the_same_bits(rows):
    if not forms.has_kernels("cpu"):
        pytest.skip("no compiler here")
    rng = np.random.default_rng(rows)
    weight = rng.standard_t(3, size=(rows, 75)) * 10.0 ** rng.integers(-12, 4, (rows, 75))
    weight[:, 1] = 0
    weight[: rows // 2, 2] = 0
    weight[:, 3] = np.round(rng.normal(size=rows) * 3)  # ties
    weight[:, 4] = 1e-42
    weight[:, 5] = rng.normal(size=rows)
    blocks = int4.num_blocks(rows)
    one, other = (round_weight(weight.astype(np.float32), blocks, form) for form in ("cpp", "xla"))
    for part, same in zip(one, other, strict=True):
        np.testing.assert_array_equal(part, same)


def test_a_weight_of_zeros_and_one_of_few_values_are_rounded():
    # The book has no zero: beside one large value the others become 1/127 of it.
    assert not int4.dequantize_int4(round_weight(np.zeros((64, 8), np.float32), 1)).any()
    weight = np.zeros((64, 8), np.float32)
    weight[5] = 0.3
    assert relative_error(int4.dequantize_int4(round_weight(weight, 1)), weight) < 0.05


@pytest.mark.optimised
def test_error_feedback_in_both_forms():
    rng = np.random.default_rng(0)
    rows = 512
    x = rng.normal(size=(1500, 60)) @ rng.normal(size=(60, rows)) + rng.normal(size=(1500, rows))
    weight = rng.normal(size=(rows, 40)).astype(np.float32)
    gram = (x.T @ x).astype(np.float32)
    exact = x @ weight

    def loss(rounded):
        return relative_error(x @ int4.dequantize_int4(rounded), exact)

    plain = loss(round_weight(weight, 2))
    whole, parts = [feedback_factor(gram)], [
        feedback_factor(gram[half : half + 256, half : half + 256]) for half in (0, 256)
    ]  # fmt: skip
    found = {}
    for form in ("cpp", "xla"):
        if form == "cpp" and not forms.has_kernels("cpu"):
            continue
        rounded, lost = round_with_feedback(weight, 2, whole, form)
        found[form] = loss(rounded)
        # The factor knows of the whole product, but for its damping.
        assert np.sqrt(lost) / np.linalg.norm(exact) == pytest.approx(found[form], rel=0.15)
        assert found[form] < loss(round_with_feedback(weight, 2, parts, form)[0]) < 0.8 * plain
        assert found[form] < 0.6 * plain
    assert max(found.values()) == pytest.approx(min(found.values()), rel=0.02)
