"""Int8 weights: rounding, scale groups, and the product in each of its forms against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grok1.ops import quantized
from grok1.ops.quantized import (
    QuantizedArray,
    dequantize,
    matmul,
    matmul_split,
    num_refined_groups,
    quantize,
    refine_groups,
)
from tests.helpers import relative_error, skip_unless_it_runs_here, slow

M, K, N = 7, 120, 13  # K: 8 groups of 15 rows

# None: what the platform and the size choose.
IMPLEMENTATIONS = ["direct", "of_rows", "tiled", "cpp", None]

quantize_compiled = jax.jit(quantize, static_argnames="num_groups")


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def random_weight(lead=(), rows=K, num_groups=8, columns=N):
    """Int8 values of the whole range, and scales that differ from group to group."""
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (*lead, rows, columns), dtype=np.int8)
    scales = rng.uniform(0.002, 0.02, (*lead, num_groups, columns))
    return QuantizedArray(jnp.asarray(values), jnp.asarray(scales, jnp.bfloat16))


def float64(array):
    return np.asarray(array).astype(np.float64)


def float64_weight(weight):
    values, scales = float64(weight.values), float64(weight.scales)
    rows_per_group = values.shape[-2] // scales.shape[-2]
    return values * np.repeat(scales, rows_per_group, axis=-2)


# --- quantize ---------------------------------------------------------------------------------


def test_quantize_by_hand():
    # Largest magnitudes 63.5, 254 and 0: scales 0.5, 2 and 0.
    weight = jnp.array([[63.5, -254.0, 0.0], [-31.5, 127.0, 0.0], [0.7, 0.9, 0.0]])
    with jax.debug_nans(True):  # 0 / 0, which might become any int8
        quantized = quantize(weight)
    assert quantized.scales.dtype == jnp.bfloat16
    assert quantized.values.dtype == jnp.int8
    np.testing.assert_array_equal(float64(quantized.scales), [[0.5, 2, 0]])
    # Halves go to the even neighbour: 127 / 2 to 64.
    np.testing.assert_array_equal(quantized.values, [[127, -127, 0], [-63, 64, 0], [1, 0, 0]])
    assert quantized.shape == (3, 3)


def test_quantize_rounds_for_the_scale_that_is_stored():
    # 127.4465 / 127 = 1.0035 is stored as 1: 126.6 is 127 steps of that, but 126 of 1.0035.
    quantized = quantize_compiled(jnp.array([[127.4465], [126.6]]))
    np.testing.assert_array_equal(float64(quantized.scales), [[1]])
    np.testing.assert_array_equal(quantized.values, [[127], [127]])


def test_quantize_scales_each_group_of_rows():
    # Rows 0, 1 | 2, 3 | 4, 5, the magnitude of the first row of each group 127 * its scale.
    weight = jnp.array([[127.0], [1.0], [254.0], [4.0], [508.0], [-8.0]])
    quantized = quantize_compiled(weight, num_groups=3)
    np.testing.assert_array_equal(float64(quantized.scales), [[1], [2], [4]])
    np.testing.assert_array_equal(quantized.values[:, 0], [127, 1, 127, 2, 127, -2])


def test_quantize_with_leading_axes_is_within_half_a_step_everywhere():
    magnitudes = np.exp(np.random.default_rng(1).uniform(-3, 3, (2, 3, 8, 1, N)))
    weight = np.asarray(normal(0, 2, 3, 8, K // 8, N)) * magnitudes
    weight = weight.reshape(2, 3, K, N).astype(np.float32)
    quantized = quantize_compiled(jnp.asarray(weight), num_groups=8)
    assert quantized.shape == (2, 3, K, N)
    assert quantized.scales.shape == (2, 3, 8, N)
    steps = np.repeat(float64(quantized.scales), K // 8, axis=-2)
    assert np.all(np.abs(float64_weight(quantized) - weight) <= steps * 0.5001)
    # The largest value of each group uses the whole range.
    values = np.abs(float64(quantized.values)).reshape(2, 3, 8, K // 8, N)
    assert np.all(values.max(axis=-2) >= 126)


def test_quantize_refuses_groups_that_do_not_divide_the_rows():
    message = "4 scale groups do not divide the 7 rows of the weight"
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(jnp.zeros((7, 2)), num_groups=4)


# --- dequantize -------------------------------------------------------------------------------


def test_dequantize_by_hand():
    values = jnp.array([[1, -2], [3, 4], [5, 6], [-127, 8]], jnp.int8)
    scales = jnp.array([[0.5, 2], [10, 0]], jnp.bfloat16)
    weight = dequantize(QuantizedArray(values, scales))
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(weight, [[0.5, -4], [1.5, 8], [50, 0], [-1270, 0]])


def test_dequantize_with_leading_axes_against_float64():
    weight = random_weight(lead=(2, 3))
    # An int8 times a bfloat16 has 15 significant bits: float32 holds it exactly.
    np.testing.assert_array_equal(dequantize(weight), float64_weight(weight))


def test_dequantize_leaves_a_float_weight_alone():
    weight = jnp.ones((3, 2), jnp.bfloat16)
    assert dequantize(weight) is weight


# --- matmul -----------------------------------------------------------------------------------


def test_matmul_by_hand():
    # Groups of two rows: 1 * (1 + 2 * 3) + 0.5 * (4 + 10 * 6) = 39, and 2 * 2 * 4 - 10 * 5 = -34.
    values = jnp.array([[1, 0], [3, 4], [4, 0], [6, 5]], jnp.int8)
    scales = jnp.array([[1, 2], [0.5, -1]], jnp.bfloat16)
    x = jnp.array([[1.0, 2, 1, 10]])
    np.testing.assert_array_equal(matmul(x, QuantizedArray(values, scales)), [[39, -34]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
@pytest.mark.parametrize("num_groups", [1, 8])
def test_every_form_of_the_product_is_the_product(monkeypatch, num_groups, lead, implementation):
    skip_unless_it_runs_here(implementation)
    # Seven rows of float at most: tiles of 6 rows in one group of 120, of 5 rows in groups of 15.
    monkeypatch.setattr(quantized, "_TILE_ELEMENTS", 7 * N)
    weight = random_weight(lead, num_groups=num_groups)
    index = tuple(size - 1 for size in lead)
    x = normal(1, M, K)

    # Rounded before: XLA keeps excess precision within a program.
    inputs = x, x.astype(jnp.bfloat16)

    @jax.jit
    def product(inputs, weight, index):
        return [matmul(x, weight, index, implementation=implementation) for x in inputs]

    outputs = product(inputs, weight, index)
    matrix = float64_weight(weight)[index]
    # bfloat16 inputs are exact numbers too, and their products are summed as finely.
    for exact, output in zip(inputs, outputs, strict=True):
        assert output.dtype == jnp.float32
        assert relative_error(output, float64(exact) @ matrix) <= 2e-6


@pytest.mark.optimised
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_groups", [pytest.param(1, marks=slow), 5])
def test_every_number_of_rows_in_every_form(num_groups, implementation):
    skip_unless_it_runs_here(implementation)
    # Several panels and slots of the native kernel, none of them full; groups of 260 rows.
    weight = random_weight((2,), rows=1300, num_groups=num_groups, columns=2100)
    matrix = float64_weight(weight)[1]
    # Not as a constant, which XLA would fold for each number of rows.
    product = jax.jit(lambda x, weight: matmul(x, weight, (1,), implementation=implementation))
    # XLA's forms are the same for every number of rows.
    for num_rows in (1, 2, 3, 5, 7, 11, 16, 24, 35) if implementation == "cpp" else (1, 11):
        x = normal(num_rows, num_rows, 1300)
        assert relative_error(product(x, weight), float64(x) @ matrix) <= 2e-6


@pytest.mark.parametrize("num_groups", [1, 8])
def test_a_copy_in_bfloat16_is_the_matrix_and_of_groups_nearly(num_groups):
    weight, x = random_weight((3, 2), num_groups=num_groups), normal(1, 70, K, dtype=jnp.bfloat16)
    product = jax.jit(lambda x, index: matmul(x, weight, index, implementation="converted"))
    expected = float64(x) @ float64_weight(weight)[2, 1]
    # One scale a column is applied to the product; those of groups are rounded with the matrix.
    assert relative_error(product(x, (2, 1)), expected) <= (2e-6 if num_groups == 1 else 4e-3)


def _by_halves(x, weights):
    indices = [(2,), (0,)][: len(weights)]
    return jax.jit(lambda x: quantized.project(x, weights, indices, jnp.bfloat16, "halves"))(x)


@pytest.mark.parametrize("num_groups", [1, 8])
def test_a_projection_by_halves_keeps_11_bits_of_every_row(num_groups):
    weights = [random_weight((3,), num_groups=num_groups, columns=n) for n in (N, 5)]
    # Rows that float16 does not hold, and that it holds with fewer bits.
    sizes = 10.0 ** jnp.linspace(-30, 30, 35)[:, None]
    x = normal(1, 2, 35, K) * sizes
    for output, weight, layer in zip(_by_halves(x, weights), weights, (2, 0), strict=True):
        assert output.shape == (2, 35, weight.shape[-1])
        expected = float64(x) @ float64_weight(weight)[layer] / sizes
        # Scales of groups are rounded with the matrix too.
        assert relative_error(output / sizes, expected) <= (2.0**-12 if num_groups == 1 else 4e-4)


def test_every_product_by_halves_has_inputs_of_its_own_in_xlas_eyes():
    # On GPUs it would copy the matrices of products with the same inputs side by side otherwise.
    weights = [random_weight((3,), columns=n) for n in (N, 5)]
    text = jax.jit(
        lambda x: quantized.project(x, weights, [(2,), (0,)], jnp.bfloat16, "halves")
    ).lower(normal(1, 70, K))
    products = re.findall(r"dot_general %(\S+?),", text.as_text())
    barriers = re.findall(r"%(\S+?):2 = stablehlo.optimization_barrier", text.as_text())
    assert products == [f"{name}#0" for name in barriers]
    assert len(set(barriers)) == 2


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_scales_that_float16_does_not_hold_are_as_exact_in_halves(size):
    weight, x = random_weight((3,), num_groups=8), normal(1, 70, K)
    scales = (weight.scales.astype(jnp.float32) * size).astype(jnp.bfloat16)
    weight = weight._replace(scales=scales)
    (output,) = _by_halves(x, [weight])
    expected = float64(x) @ float64_weight(weight)[2]
    assert relative_error(output, expected) <= 4e-4


def test_rows_of_zeros_are_zeros_in_halves_and_no_numbers_stay_none():
    x = normal(1, 70, K).at[3].set(0).at[5, 2].set(jnp.nan).at[7, 1].set(jnp.inf)
    (output,) = _by_halves(x, [random_weight((3,))])
    np.testing.assert_array_equal(output[3], 0)
    assert not np.isfinite(output[jnp.array([5, 7])]).any()
    assert np.isfinite(np.delete(output, [5, 7], axis=0)).all()


def test_a_copy_is_made_for_many_rows_of_bfloat16_alone():
    weight = random_weight()
    for x, why in (
        (normal(1, 70, K), "its products are of bfloat16, not float32"),
        (normal(1, 64, K, dtype=jnp.bfloat16), "it is for more than 64 rows, not 64"),
    ):
        with pytest.raises(NotImplementedError, match=f"'converted': {why}"):
            matmul(x, weight, implementation="converted")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_do_not_matter_change_nothing(implementation):
    skip_unless_it_runs_here(implementation)
    weight, x = random_weight(), normal(1, M, K)
    product = jax.jit(lambda x, valid: matmul(x, weight, (), valid, implementation))
    expected = float64(x) @ float64_weight(weight)
    for num_valid in (0, 1, 4, M):
        output = product(x, num_valid)
        assert np.isfinite(output).all()
        error = np.abs(output[:num_valid] - expected[:num_valid])
        assert error.max(initial=0) <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_rows", [1, 8, 20])
def test_what_is_no_number_stays_so(num_rows, implementation):
    skip_unless_it_runs_here(implementation)
    weight, x = random_weight(), normal(1, num_rows, K)
    product = jax.jit(lambda x, weight: matmul(x, weight, (), implementation=implementation))
    for poison in (np.nan, np.inf):
        output = product(x.at[num_rows // 2, 17].set(poison), weight)
        expected = np.arange(num_rows) == num_rows // 2
        np.testing.assert_array_equal(~np.isfinite(output).any(axis=1), expected)
        scales = weight.scales.at[5, 7].set(poison)
        output = product(x, weight._replace(scales=scales))
        np.testing.assert_array_equal(~np.isfinite(output).any(axis=0), np.arange(N) == 7)


@pytest.mark.devices(4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_product_on_each_of_several_devices_in_a_loop_over_the_stack(implementation):
    skip_unless_it_runs_here(implementation)
    num_devices, depth = 4, 3
    weight = random_weight((depth,), rows=96, columns=4 * 96)
    x = normal(1, M, 96)
    mesh = jax.make_mesh((num_devices,), ("model",), (jax.sharding.AxisType.Auto,))

    def chain(x, weight):
        def multiply(layer, x):
            out = matmul(x, weight, (layer,), implementation=implementation)
            return jax.lax.psum(out, "model") / 64

        return jax.lax.fori_loop(0, depth, multiply, x)

    columns = P(None, None, "model")
    sharded = jax.shard_map(
        chain, mesh=mesh, in_specs=(P(), columns), out_specs=P(), check_vma=False
    )
    expected = float64(x)
    for layer in range(depth):
        expected = (expected @ float64_weight(weight)[layer]).reshape(M, num_devices, 96)
        expected = expected.sum(axis=1) / 64
    for _ in range(20):  # the devices meet in another order each time
        assert relative_error(jax.jit(sharded)(x, weight), expected) <= 5e-6


def test_matmul_keeps_the_leading_axes_of_the_input():
    weight, x = random_weight(), normal(1, 2, 3, K)
    assert relative_error(matmul(x, weight), float64(x) @ float64_weight(weight)) <= 2e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_of_a_float_weight_takes_the_type_of_the_input(dtype):
    weight, x = normal(0, 3, K, N), normal(1, M, K, dtype=dtype)
    output = jax.jit(matmul)(x, weight, (2,))
    assert output.dtype == jnp.float32
    rounded = float64(weight[2].astype(dtype))
    assert relative_error(output, float64(x) @ rounded) <= 2e-6


@pytest.mark.parametrize(("dtype", "asks"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_what_a_product_asks_of_an_nvidia_gpu(dtype, asks):
    # XLA fuses the conversion of int8 only into products of the default precision.
    weight = quantize(normal(0, 3, 16, 8), 2)
    product = jax.jit(lambda x: matmul(x, weight, (1,)))
    lowered = product.trace(jnp.ones((4, 16), dtype)).lower(lowering_platforms=("cuda",))
    assert ("HIGHEST" in lowered.as_text()) == asks


@pytest.mark.optimised
def test_matmul_split_keeps_the_mantissa_that_bfloat16_would_round_off():
    weight, x = random_weight((3,)), normal(1, 2, 3, K)

    @jax.jit
    def products(x, weight, index):
        return (
            matmul_split(x, weight, index, jnp.float32),
            matmul_split(x, weight, index, jnp.bfloat16),
            matmul(x.astype(jnp.bfloat16), weight, index),
        )

    expected = float64(x) @ float64_weight(weight)[2]
    errors = [relative_error(output, expected) for output in products(x, weight, (2,))]
    assert errors[0] <= 2e-6
    assert errors[1] <= 1e-5  # two terms of 8 bits each
    assert errors[2] >= 1e-3  # one


@pytest.mark.optimised
@pytest.mark.parametrize("implementation", ["tiled", "cpp"])
@pytest.mark.parametrize("num_groups", [1, 8])
def test_matmul_makes_no_copy_of_a_large_weight(num_groups, implementation):
    skip_unless_it_runs_here(implementation)
    rows = columns = 2048
    weight = QuantizedArray(
        jax.ShapeDtypeStruct((2, rows, columns), jnp.int8),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct((2, num_groups, columns), jnp.bfloat16),  # type: ignore[arg-type]
    )
    x = jax.ShapeDtypeStruct((3, rows), jnp.float32)

    @jax.jit
    def program(x, weight):
        def multiply(x, layer):
            return matmul(x, weight, (layer,), implementation=implementation), None

        return jax.lax.scan(multiply, x, jnp.arange(2))

    memory = program.lower(x, weight).compile().memory_analysis()
    # A copy of the layer is 4 MiB as int8 and 16 MiB as float32; a float32 tile is 1 MiB.
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 << 20


# --- refining groups --------------------------------------------------------------------------


def test_refine_groups_by_hand():
    scales = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    expected = np.array([[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]])
    refined = refine_groups(np.stack([scales, -scales]), 4)
    assert isinstance(refined, np.ndarray)
    np.testing.assert_array_equal(refined, [expected, -expected])
    np.testing.assert_array_equal(refine_groups(jnp.asarray(scales), 4), expected)


@pytest.mark.parametrize(
    ("rows", "num_groups", "num_shards", "expected"),
    [
        (96, 8, 1, 8),
        (96, 8, 4, 8),  # a shard of 24 rows holds two whole groups of 12
        (96, 8, 3, 24),  # shards of 32 rows and groups of 12 share no more than 4
        (96, 8, 16, 16),  # a shard of 6 rows is half a group
        (96, 1, 16, 1),  # one scale fits any shard
        (32768, 8, 8, 8),  # as released
        (32768, 8, 16, 16),
    ],
)
def test_num_refined_groups(rows, num_groups, num_shards, expected):
    assert num_refined_groups(rows, num_groups, num_shards) == expected


@pytest.mark.parametrize("num_shards", [3, 16])
def test_shards_with_refined_groups_sum_to_the_whole_product(num_shards):
    rows = 96
    weight, x = random_weight(rows=rows), normal(1, M, rows)
    num_groups = num_refined_groups(rows, 8, num_shards)
    refined = weight._replace(scales=refine_groups(weight.scales, num_groups))
    np.testing.assert_array_equal(float64_weight(refined), float64_weight(weight))

    product = jax.jit(matmul)
    values = np.split(np.asarray(refined.values), num_shards)
    scales = np.split(np.asarray(refined.scales), num_shards)
    inputs = np.split(np.asarray(x), num_shards, axis=1)
    total = sum(
        float64(product(part, QuantizedArray(jnp.asarray(v), jnp.asarray(s))))
        for part, v, s in zip(inputs, values, scales, strict=True)
    )
    assert relative_error(total, float64(x) @ float64_weight(weight)) <= 2e-6
