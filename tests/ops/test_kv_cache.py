"""Appending to the cache: where, in which type, and what is dropped."""

import jax.numpy as jnp
import numpy as np
import pytest

from grok1.ops.attention import KVCache, Place
from tests.ops.attention_cases import (
    B,
    C,
    G,
    H,
    L,
    T,
    append_at,
    append_compiled,
    attend_cached,
    attend_plainly,
    dequantized,
    filled_int8_cache,
    int8_cache,
    normal,
    random_cache,
    random_new,
    random_query,
    with_slots,
)


def test_append_writes_the_slots_of_its_rows():
    cache = random_cache(11)
    key, value = random_new()
    positions = np.array([[0, 1, 2], [7, 8, 9], [10, 3, 6]], np.int32)
    place = Place(np.array([2, B, 0], np.int32), positions, np.ones((B, T), bool))
    written = append_at(cache, 1, place, key, value)
    for new, before, after in ((key, cache.k, written.k), (value, cache.v, written.v)):
        expected = np.array(before)
        for row, slot in ((0, 2), (2, 0)):
            for t in range(T):
                expected[1, slot, :, positions[row, t]] = np.asarray(new)[row, t]
        np.testing.assert_array_equal(after, expected)


def test_append_writes_one_layer_at_the_positions_of_each_row():
    cache = random_cache(11)
    key, value = random_new()
    positions = np.array([[0, 1, 2], [7, 8, 9], [10, 3, 6]])
    written = append_compiled(cache, 1, key, value, positions, np.ones((B, T), bool))
    for new, before, after in ((key, cache.k, written.k), (value, cache.v, written.v)):
        expected = np.array(before)
        for b, t in np.ndindex(B, T):
            expected[1, b, :, positions[b, t]] = np.asarray(new)[b, t]
        np.testing.assert_array_equal(after, expected)
    np.testing.assert_array_equal(written.length, cache.length)


def test_append_drops_what_is_invalid_or_beyond_the_capacity():
    cache = random_cache(11)
    key, value = random_new()
    positions = np.array([[9, 10, 11], [11, 12, 1000], [0, 1, 2]])
    valid = np.array([[True, True, True], [True, True, True], [False, True, False]])
    written = append_compiled(cache, 0, key, value, positions, valid)
    for new, before, after in ((key, cache.k, written.k), (value, cache.v, written.v)):
        expected, new = np.array(before), np.asarray(new)
        expected[0, 0, :, 9] = new[0, 0]
        expected[0, 0, :, 10] = new[0, 1]
        expected[0, 2, :, 1] = new[2, 1]
        np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_append_rounds_to_the_type_of_the_cache(dtype):
    cache = random_cache(11, dtype)
    key, value = random_new()
    positions = np.broadcast_to(np.arange(T), (B, T))
    written = append_compiled(cache, 0, key, value, positions, np.ones((B, T), bool))
    for new, after in ((key, written.k), (value, written.v)):
        assert after.dtype == dtype
        expected = np.asarray(new.astype(dtype)).transpose(0, 2, 1, 3)
        np.testing.assert_array_equal(np.asarray(after)[0, :, :, :T], expected)


def test_append_saturates_what_float16_cannot_hold():
    cache = random_cache(11, jnp.float16)
    new = jnp.asarray(np.broadcast_to(np.resize([1e6, -1e6, 65504.0], (B, T, 1, 1)), (B, T, C, H)))
    positions = np.broadcast_to(np.arange(T), (B, T))
    written = append_compiled(
        cache, 0, new.astype(jnp.float32), -new.astype(jnp.float32), positions, positions >= 0
    )
    np.testing.assert_array_equal(written.k[0, 0, 0, :T, 0], [65504, -65504, 65504])
    np.testing.assert_array_equal(written.v[0, 0, 0, :T, 0], [-65504, 65504, -65504])


def test_chunks_through_the_cache_make_the_whole():
    length = 9
    query, (key, value) = random_query(length), random_new(length)
    k, v = (jnp.asarray(np.asarray(new).transpose(0, 2, 1, 3)[None]) for new in (key, value))
    whole = KVCache(k, v, jnp.zeros(B, jnp.int32))
    everywhere = np.broadcast_to(np.arange(length), (B, length))
    expected = attend_plainly(query, whole, 0, everywhere)

    cache = with_slots(random_cache(11), np.s_[:], k=1e30, v=1e30)
    outputs = []
    for start in range(0, length, 3):
        chunk = slice(start, start + 3)
        positions = everywhere[:, chunk]
        cache = append_compiled(
            cache, 1, key[:, chunk], value[:, chunk], positions, np.ones((B, T), bool)
        )
        outputs.append(attend_cached(query[:, chunk], cache, 1, positions))
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, atol=2e-6)


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.int8])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_cache_of_any_type_keeps_what_is_no_number(dtype, poison):
    key = normal(1, B, T, C, H).at[1, 2, 0, 3].set(poison)
    cache = int8_cache(11) if dtype == jnp.int8 else random_cache(11, dtype)
    positions = np.broadcast_to(np.arange(T), (B, T))
    written = append_compiled(cache, 1, key, key, positions, np.ones((B, T), bool))
    if dtype == jnp.int8:
        written = dequantized(written)
    for array in (written.k, written.v):
        finite = np.isfinite(np.asarray(array)[1]).all(axis=-1)
        expected = np.ones_like(finite)
        expected[1, 0, 2] = False
        np.testing.assert_array_equal(finite, expected)


def test_append_to_int8_is_within_half_a_step_of_each_vector():
    cache, key, value = filled_int8_cache(11)
    assert cache.k.dtype == cache.v.dtype == jnp.int8
    assert cache.k_scales.dtype == cache.v_scales.dtype == jnp.float32
    stands_for = dequantized(cache)
    for new, after in ((key, stands_for.k), (value, stands_for.v)):
        expected = np.asarray(new).transpose(0, 2, 1, 3)
        step = np.abs(expected).max(axis=-1, keepdims=True) / 127
        assert np.all(np.abs(np.asarray(after)[1] - expected) <= step * 0.5001)
    assert not np.asarray(cache.k)[0].any()
    assert not np.asarray(cache.v_scales)[0].any()


def test_append_to_int8_of_zeros_is_zeros():
    zeros = jnp.zeros((B, T, C, H))
    positions = np.broadcast_to(np.arange(T), (B, T))
    cache = append_compiled(int8_cache(T), 0, zeros, zeros, positions, positions >= 0)
    assert not np.asarray(dequantized(cache).k).any()
    output = attend_cached(random_query(), cache, 0, positions)
    np.testing.assert_array_equal(output, np.zeros((B, T, C, G, H)))


def test_append_to_int8_drops_values_and_scales_of_what_is_invalid():
    key, value = random_new()
    positions = np.array([[9, 10, 11], [11, 12, 1000], [0, 1, 2]])
    valid = np.array([[True, True, True], [True, True, True], [False, True, False]])
    cache = append_compiled(int8_cache(11), 0, key, value, positions, valid)
    written = np.zeros((L, B, C, 11), bool)
    written[0, 0, :, 9:] = written[0, 2, :, 1] = True
    for values, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        np.testing.assert_array_equal(np.asarray(values).any(axis=-1), written)
        np.testing.assert_array_equal(np.asarray(scales) > 0, written)
