"""RMS norm and rotary embedding: values by hand, properties, and float64 at the last position."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.ops.layers import apply_rope, rms_norm, rounded, split_terms
from grok1.ops.quantized import quantize
from tests.helpers import cancelled_differences


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# --- rms_norm ---------------------------------------------------------------------------------


def test_rms_norm_by_hand():
    # Mean square 12.5, so each is divided by 3.5355.
    output = rms_norm(jnp.array([[3.0, 4.0], [-4.0, 3.0]]), jnp.array([2.0, 0.5]))
    expected = [[1.697056, 0.565685], [-2.262741, 0.424264]]
    np.testing.assert_allclose(output, expected, rtol=2e-6)


def test_rms_norm_adds_its_epsilon_to_the_mean_square():
    # Mean square 1.25e-5, with the epsilon 2.25e-5: sqrt(0.9 / 2.25) and sqrt(1.6 / 2.25).
    output = rms_norm(jnp.array([0.003, 0.004]), jnp.ones(2))
    np.testing.assert_allclose(output, [0.6324555, 0.8432740], rtol=1e-6)
    np.testing.assert_array_equal(rms_norm(jnp.zeros(3), jnp.ones(3)), np.zeros(3))


@pytest.mark.optimised
def test_rms_norm_is_float32_throughout():
    x = normal(0, 2, 3, 7, dtype=jnp.bfloat16)
    scale = normal(1, 7)
    output = rms_norm(x, scale)
    assert output.dtype == jnp.float32
    exact = np.asarray(x).astype(np.float64)
    exact /= np.sqrt(np.square(exact).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(output, exact * np.asarray(scale, np.float64), rtol=1e-6)


# --- rounding and splitting -------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_two_terms_keep_twice_the_mantissa(dtype):
    x = normal(0, 1000)
    high, low = split_terms(x, dtype)
    assert high.dtype == low.dtype == dtype
    np.testing.assert_array_equal(high, x.astype(dtype))
    np.testing.assert_array_equal(rounded(x, dtype), high.astype(jnp.float32))
    error = np.abs(np.float64(high) + np.float64(low) - np.float64(x))
    assert error.max() <= 2.0 * float(jnp.finfo(dtype).eps) ** 2


def test_what_a_smaller_type_cannot_hold_stays_so():
    x = jnp.array([np.nan, np.inf, 1e30])
    np.testing.assert_array_equal(rounded(x, jnp.float16), [np.nan, np.inf, np.inf])


def lost_in_conversion(x):
    return (x - x.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("function", "num_cancelled"),
    [
        (lambda x: split_terms(x, jnp.bfloat16), 0),
        (lambda x: quantize(x, 4), 0),
        (lost_in_conversion, 1),
    ],
    ids=["split", "quantize", "by conversion"],
)
def test_roundings_survive_where_excess_precision_is_kept(function, num_cancelled):
    lowered = jax.jit(function).trace(jnp.ones((8, 4))).lower(lowering_platforms=("cuda",))
    assert len(cancelled_differences(lowered.as_text())) == num_cancelled
    pairs = len(re.findall(r"bf16>\) -> tensor<\S*xf32>", lowered.as_text()))
    assert pairs == num_cancelled


# --- apply_rope -------------------------------------------------------------------------------


rope = jax.jit(apply_rope)


def random_heads(seed=0):
    """B=2, T=3, 5 heads, H=14."""
    return normal(seed, 2, 3, 5, 14)


def test_rope_turns_the_halves_of_a_head_by_hand():
    # H=4: the pair (0, 2) turns by the position, the pair (1, 3) by a hundredth of it.
    x = jnp.eye(4).reshape(1, 1, 4, 4)
    output = rope(x, jnp.array([[5]]))[0, 0]
    expected = [
        [np.cos(5), 0, np.sin(5), 0],
        [0, np.cos(0.05), 0, np.sin(0.05)],
        [-np.sin(5), 0, np.cos(5), 0],
        [0, -np.sin(0.05), 0, np.cos(0.05)],
    ]
    np.testing.assert_allclose(output, expected, atol=1e-6)


def test_rope_at_position_zero_is_the_identity():
    x = random_heads()
    np.testing.assert_array_equal(rope(x, jnp.zeros((2, 3), jnp.int32)), x)


def test_rope_keeps_the_length_of_each_head():
    x = random_heads()
    turned = rope(x, jnp.array([[0, 1, 17], [4095, 8190, 8191]]))
    before, after = np.linalg.norm(x, axis=-1), np.linalg.norm(turned, axis=-1)
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_rope_turns_each_row_and_token_by_its_own_position():
    x = jnp.asarray(np.broadcast_to(random_heads()[:1, :1], (2, 3, 5, 14)))
    turned = rope(x, jnp.array([[3, 11, 3], [11, 3, 7]]))
    np.testing.assert_array_equal(turned[0, 0], turned[0, 2])
    np.testing.assert_array_equal(turned[0, 0], turned[1, 1])
    np.testing.assert_array_equal(turned[0, 1], turned[1, 0])
    assert not np.allclose(turned[0, 0], turned[1, 2], atol=0.1)


def test_rope_products_depend_on_the_distance_alone():
    query, key = random_heads(0), random_heads(1)

    def products(query_position, key_position):
        turned_query = rope(query, np.full((2, 3), query_position))
        turned_key = rope(key, np.full((2, 3), key_position))
        return np.sum(np.asarray(turned_query) * np.asarray(turned_key), axis=-1)

    for position in (1, 40, 300):
        np.testing.assert_allclose(products(position + 13, position), products(13, 0), atol=2e-4)
    assert not np.allclose(products(14, 0), products(13, 0), atol=0.1)


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_at_the_last_position_of_the_context_against_float64(dtype):
    position, half = 8191, 64  # the released head size, 128
    x = normal(0, 1, 1, 5, 2 * half, dtype=dtype)
    output = rope(x, jnp.array([[position]]))
    assert output.dtype == jnp.float32

    phases = position * 10_000.0 ** (-np.arange(half) / half)
    exact = np.asarray(x).astype(np.float64)
    pairs = exact[..., :half] + 1j * exact[..., half:]
    turned = pairs * np.exp(1j * phases)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # Phases of up to 8,191 radians: float32 holds them to 5e-4, bfloat16 to 16.
    np.testing.assert_allclose(output, expected, atol=2e-3)
