"""Attention: by hand, what a query may not see, and every form against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.ops import attention
from grok1.ops.attention import KVCache, Place, append, attend, attend_cache, attention_map
from grok1.ops.cpu import bindings
from tests.helpers import relative_error, skip_unless_it_runs_here, slow
from tests.ops.attention_cases import (
    FORMS,
    SCALE,
    B,
    C,
    G,
    H,
    L,
    T,
    attend_by,
    attend_cached,
    attend_plainly,
    dequantized,
    filled_int8_cache,
    in_order,
    int8_cache,
    normal,
    random_cache,
    random_new,
    random_query,
    with_slots,
)


@jax.jit
def attend_masked(query, cache, mask):
    return attend(query, cache.k[0], cache.v[0], mask, SCALE)


# --- attend -----------------------------------------------------------------------------------


def test_attend_by_hand():
    # Products that the cap turns into logits 27 and 27 - ln 3, so probabilities 3/4 and 1/4;
    # without a cap they would be 44.2 and 39.2, and the first key would take nearly all.
    products = 30 * np.arctanh([0.9, 0.9 - np.log(3) / 30])
    key = np.zeros((1, 1, 2, 2), np.float32)
    key[0, 0, :, 0] = products * 4
    key[0, 0, :, 1] = 1000  # where the query is 0
    output = attend(
        query=jnp.array([1.0, 0.0]).reshape(1, 1, 1, 1, 2),
        key=jnp.asarray(key),
        value=jnp.array([[4.0, 0.0], [0.0, 8.0]]).reshape(1, 1, 2, 2),
        mask=jnp.ones((1, 1, 2), bool),
        scale=0.25,
    )
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output.reshape(2), [3, 2], rtol=1e-5)


def test_attend_gives_the_one_key_that_a_mask_allows():
    cache = random_cache(4)
    slots = np.array([[0, 2, 1], [3, 3, 0], [1, 2, 3]])
    mask = jnp.asarray(slots[..., None] == np.arange(4))
    output = np.asarray(attend_masked(random_query(), cache, mask))
    values = np.asarray(cache.v[0])
    for b, t in np.ndindex(B, T):
        expected = values[b, :, slots[b, t]][:, None]
        np.testing.assert_array_equal(output[b, t], np.broadcast_to(expected, (C, G, H)))


def test_attend_against_float64_head_by_head():
    cache, query = random_cache(11), random_query()
    positions = np.array([[0, 1, 2], [9, 10, 4], [5, 5, 8]])
    output = np.asarray(attend_plainly(query, cache, 1, positions)).reshape(B, T, C * G, H)
    queries = np.asarray(query, np.float64).reshape(B, T, C * G, H)
    keys, values = (np.asarray(array, np.float64)[1] for array in (cache.k, cache.v))
    for b, t, n in np.ndindex(B, T, C * G):
        # Consecutive query heads share a key/value head.
        seen = slice(0, positions[b, t] + 1)
        products = keys[b, n // G, seen] @ queries[b, t, n] * SCALE
        weights = np.exp(30 * np.tanh(products / 30))
        expected = weights @ values[b, n // G, seen] / weights.sum()
        np.testing.assert_allclose(output[b, t, n], expected, atol=2e-6)


@pytest.mark.parametrize("form", [attend_plainly, attend_cached])
def test_what_lies_beyond_a_position_does_not_matter(form):
    cache, query = random_cache(11), random_query()
    positions = np.array([[0, 1, 2], [9, 10, 4], [5, 5, 8]])
    output = np.asarray(form(query, cache, 1, positions))
    for b, t in np.ndindex(B, T):
        beyond = np.s_[:, b, :, positions[b, t] + 1 :]
        stale = with_slots(cache, beyond, k=-1e30, v=1e30)
        np.testing.assert_array_equal(form(query, stale, 1, positions)[b, t], output[b, t])
    # What lies at a position does, and to those that may see it only.
    poked = with_slots(cache, np.s_[1, 1, :, 9], k=2, v=3)
    changed = np.any(np.asarray(form(query, poked, 1, positions)) != output, axis=(2, 3, 4))
    np.testing.assert_array_equal(changed, [[False] * 3, [True, True, False], [False] * 3])


# --- attention_map ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
def test_a_map_holds_the_weights_that_the_values_are_mixed_with(dtype):
    cache = filled_int8_cache(11)[0] if dtype == jnp.int8 else random_cache(11)
    query = random_query()
    positions = jnp.array([[0, 1, 2], [9, 10, 4], [5, 5, 8]])
    compiled = jax.jit(lambda *arguments: attention_map(*arguments, SCALE))
    found = np.asarray(compiled(query, cache, 1, in_order(positions)))
    assert found.shape == (B, C * G, T, 11)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
    values = np.asarray(cache.v[1], np.float32)
    if cache.v_scales is not None:
        values = values * np.asarray(cache.v_scales[1])[..., None]
    mixed = np.einsum("bnts,bnsh->btnh", found, np.repeat(values, G, axis=1))
    expected = attend_cached(query, cache, 1, positions).reshape(B, T, C * G, H)
    assert relative_error(mixed, expected) <= 1e-5


# --- attend_cache -----------------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.parametrize("capacity", [37, 1024, 1100])
def test_attend_cache_is_attend(capacity):
    # Blocks are of 512 keys: less than one, two whole ones, and two and a rest of 76.
    cache, query = random_cache(capacity), random_query()
    last, middle = capacity - 1, capacity // 2
    for layer, positions in (
        (0, [[0, 1, 2], [middle - 1, middle, middle + 1], [last - 2, last - 1, last]]),
        (1, [[0, 0, 0], [1, 2, 3], [4, 0, 7]]),
    ):
        output = attend_cached(query, cache, layer, np.array(positions))
        assert output.dtype == jnp.float32
        expected = attend_plainly(query, cache, layer, np.array(positions))
        np.testing.assert_allclose(output, expected, atol=2e-6)


@pytest.mark.parametrize("position", [511, 512, 1023, 1024])
def test_attend_cache_at_the_edges_of_blocks(position):
    cache, query = random_cache(1100), random_query()
    positions = np.array([[position] * T, [3, 4, 5], [position, 0, position - 1]])
    expected = attend_plainly(query, cache, 0, positions)
    np.testing.assert_allclose(attend_cached(query, cache, 0, positions), expected, atol=2e-6)


def test_attend_cache_with_bfloat16_accumulates_in_float32():
    cache, query = random_cache(1100, jnp.bfloat16), random_query(dtype=jnp.bfloat16)
    positions = np.array([[0, 1, 2], [600, 601, 602], [1097, 1098, 1099]])
    output = np.asarray(attend_cached(query, cache, 0, positions))
    assert output.dtype == np.float32
    as_float32 = cache._replace(k=cache.k.astype(jnp.float32), v=cache.v.astype(jnp.float32))
    expected = attend_plainly(query.astype(jnp.float32), as_float32, 0, positions)
    error = np.abs(output - np.asarray(expected))
    # A weight is rounded to bfloat16, by 2**-9 at most; over many keys the roundings average out.
    assert error.max() < 0.01
    assert error[1:].max() < 1e-3


def test_attend_cache_reads_no_block_beyond_the_last_position():
    cache, query = random_cache(1100), random_query()
    positions = np.array([[0, 1, 2], [509, 510, 511], [7, 8, 9]])
    unread = with_slots(cache, np.s_[:, :, :, 512:], k=np.nan, v=np.nan)
    np.testing.assert_array_equal(
        attend_cached(query, unread, 0, positions), attend_cached(query, cache, 0, positions)
    )


def test_attend_cache_rows_do_not_depend_on_each_other():
    cache, query = random_cache(1100), np.array(random_query())
    positions = np.array([[0, 1, 2], [509, 510, 511], [7, 8, 9]])
    output = np.asarray(attend_cached(jnp.asarray(query), cache, 0, positions))
    query[1] += 1
    positions[1] = 1097, 1098, 1099
    poked = with_slots(cache, np.s_[:, 1], k=2, v=3)
    others = np.asarray(attend_cached(jnp.asarray(query), poked, 0, positions))
    np.testing.assert_array_equal(others[[0, 2]], output[[0, 2]])
    assert not np.allclose(others[1], output[1], atol=0.1)


@pytest.mark.parametrize(
    "length", [64, *(pytest.param(length, marks=slow) for length in (256, 512)), 768]
)
def test_attend_cache_with_many_queries(length):
    cache, query = random_cache(1100), random_query(length) / 5
    positions = np.arange(length) + np.array([[0], [200], [332]])
    expected = attend_plainly(query, cache, 1, positions)
    np.testing.assert_allclose(attend_cached(query, cache, 1, positions), expected, atol=2e-6)


# --- slots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.int8])
def test_many_queries_in_pieces_see_what_they_see_at_once(monkeypatch, dtype):
    cache, query = random_cache(40), random_query(36)
    if dtype == jnp.int8:
        scales = [normal(seed, L, B, C, 40) for seed in (1, 2)]
        cache = KVCache(*((20 * a).astype(jnp.int8) for a in cache[:2]), cache.length, *scales)
    else:
        cache = cache._replace(k=cache.k.astype(dtype), v=cache.v.astype(dtype))
        query = query.astype(dtype)
    positions = np.arange(36) + np.array([[0], [4], [2]])
    at_once = np.asarray(attend_by("blocked", query, cache, 1, in_order(positions)))
    monkeypatch.setattr(attention, "_FEW_QUERIES", 4)
    monkeypatch.setattr(attention, "_BLOCK_OF_MANY", 8)
    monkeypatch.setattr(attention, "_QUERIES_AT_ONCE", 36)
    program = jax.jit(lambda *arguments: attend_cache(*arguments, SCALE, "blocked"))
    arguments = query, cache, 1, in_order(positions)
    in_pieces = np.asarray(program(*arguments))
    # float16 rounds the weights by the largest logit so far, which other blocks find later.
    tolerance = 2e-3 if dtype == jnp.float16 else 5e-6
    np.testing.assert_allclose(in_pieces, at_once, atol=tolerance * np.abs(at_once).max())
    assert program.lower(*arguments).as_text().count("stablehlo.while") == 2


@pytest.mark.parametrize("length", [1, 64], ids=lambda length: f"{length} queries")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_sees_its_slot_alone(form, dtype, length):
    skip_unless_it_runs_here(form)
    if form == "cpp" and dtype == jnp.int8:
        pytest.skip("the kernel is of float32")
    cache = filled_int8_cache(600)[0] if dtype == jnp.int8 else random_cache(600)
    query = np.asarray(random_query(length)) / 5
    positions = np.arange(length) + np.array([[0], [500], [37]])
    expected = np.asarray(attend_by(form, query, cache, 1, in_order(positions)))
    for slots in ([2, 0, 1], [1]):
        place = Place(np.array(slots, np.int32), positions[slots].astype(np.int32), None)
        found = attend_by(form, query[np.array(slots)], cache, 1, place)
        # XLA orders the sums of other shapes otherwise.
        atol = 0 if form == "cpp" else 2e-6 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected[slots], rtol=0, atol=atol)
    # A row without a slot changes nothing for the others, and is finite.
    place = in_order(positions)._replace(slots=np.array([0, B, 2], np.int32))
    found = np.asarray(attend_by(form, query, cache, 1, place))
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_in_other_slots_is_not_read(form):
    skip_unless_it_runs_here(form)
    cache, query = random_cache(37), random_query()[:1]
    place = Place(np.array([1], np.int32), np.array([[3, 4, 5]], np.int32), None)
    others = with_slots(cache, np.s_[:, [0, 2]], k=np.nan, v=np.nan)
    np.testing.assert_array_equal(
        attend_by(form, query, others, 1, place), attend_by(form, query, cache, 1, place)
    )


@pytest.mark.optimised
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
def test_slots_are_read_and_written_in_place(form, dtype):
    skip_unless_it_runs_here(form)
    if form == "cpp" and dtype == jnp.int8:
        pytest.skip("the kernel is of float32")
    cache = int8_cache(4096) if dtype == jnp.int8 else random_cache(4096)
    place = Place(np.array([1], np.int32), np.array([[3, 4, 5]], np.int32), np.ones((1, T), bool))
    key, value = (new[:1] for new in random_new())

    def step(cache, query, key, value):
        layer = jnp.int32(1)
        cache = append(cache, layer, place, key, value)
        return cache, attend_cache(query, cache, layer, place, SCALE, form)

    compiled = (
        jax.jit(step, donate_argnums=0).lower(cache, random_query()[:1], key, value).compile()
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    # A slot's keys are a sixth of them.
    assert memory.temp_size_in_bytes < cache.k.nbytes / 6


@pytest.mark.parametrize(("length", "group"), [(1, 1), (1, 5), (2, 3), (40, 5)])
def test_native_attention_with_long_rows(length, group):
    skip_unless_it_runs_here("cpp")
    # More than a chunk of keys; a head size with and beyond full vectors.
    batch, heads, capacity, head_dim = 2, 3, 1300, 70
    k, v = (normal(seed, L, batch, heads, capacity, head_dim) for seed in (1, 2))
    cache = KVCache(k, v, jnp.zeros(batch, jnp.int32))
    query = normal(3, batch, length, heads, group, head_dim) / 5
    positions = np.array([[1299], [length + 60]]) - np.arange(length)[::-1]
    output = jax.jit(lambda *arguments: attend_cache(*arguments, SCALE, implementation="cpp"))(
        query, cache, 1, in_order(positions)
    )
    expected = attend_plainly(query, cache, 1, positions)
    np.testing.assert_allclose(output, expected, atol=2e-6)


# --- what is no number ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_no_number_stays_so(form, length, poison):
    skip_unless_it_runs_here(form)
    cache, query = random_cache(300), random_query(length) / 5
    positions = np.array([[0], [130], [299 - length]]) + np.arange(length)
    place = in_order(positions)
    finite = attend_by(form, query, cache, 1, place)
    assert np.isfinite(finite).all()
    # In row 2, of head 1: its last query, its first key, the value of its first position.
    where = np.s_[1, 2, 1, 0]
    poisoned = {
        "query": (query.at[2, length - 1, 1].set(np.nan), cache),
        "key": (query, with_slots(cache, where, k=np.nan, v=1)),
        "value": (query, with_slots(cache, where, k=1, v=poison)),
    }
    for name, arguments in poisoned.items():
        output = np.asarray(attend_by(form, *arguments, 1, place))
        reached = np.isnan(output) | np.isinf(output)
        expected = np.zeros_like(reached)
        expected[2, -1 if name == "query" else slice(None), 1] = True
        np.testing.assert_array_equal(reached, expected, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.int8])
@pytest.mark.parametrize("length", [1, 40])
def test_what_an_earlier_text_left_in_the_cache_is_not_mixed_in(form, dtype, length):
    if form == "cpp" and (dtype != jnp.float32 or not bindings.is_available()):
        pytest.skip("the native form reads float32")
    if dtype == jnp.int8:
        cache, *_ = filled_int8_cache(300)
    else:
        cache = random_cache(300, dtype)
    query = random_query(length) / 5
    positions = np.array([[0], [130], [250]]) + np.arange(length)
    expected = attend_by(form, query, cache, 1, in_order(positions))
    for b in range(B):
        beyond = np.s_[:, b, :, positions[b, -1] + 1 :]
        if dtype == jnp.int8:
            k_scales, v_scales = np.array(cache.k_scales), np.array(cache.v_scales)
            k_scales[beyond] = v_scales[beyond] = np.nan
            cache = cache._replace(k_scales=k_scales, v_scales=v_scales)
        else:
            cache = with_slots(cache, beyond, k=np.nan, v=np.nan)
    found = attend_by(form, query, cache, 1, in_order(positions))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.optimised
@pytest.mark.parametrize("length", [T, pytest.param(64, marks=slow)])
def test_attend_cache_in_int8_is_attention_over_what_it_stands_for(length):
    cache, _, _ = filled_int8_cache(1100)
    query = random_query(length) / 10
    positions = np.arange(length) + np.array([[0], [500], [1100 - length]])
    expected = attend_plainly(query, dequantized(cache), 1, positions)
    output = attend_cached(query, cache, 1, positions)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    # In bfloat16 nothing but the queries and the weights is rounded, to 8 bits.
    rounded = attend_cached(query.astype(jnp.bfloat16), cache, 1, positions)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, expected) < 0.01


def test_attend_cache_in_int8_is_close_to_float():
    _, key, value = filled_int8_cache(1100)
    k, v = (jnp.stack([new.transpose(0, 2, 1, 3)] * L) for new in (key, value))
    query, positions = (
        random_query() / 10,
        np.array([[5, 6, 7], [600, 601, 602], [1097, 1098, 1099]]),
    )
    expected = attend_plainly(query, KVCache(k, v, jnp.zeros(B)), 1, positions)
    cache, _, _ = filled_int8_cache(1100)
    assert 1e-4 < relative_error(attend_cached(query, cache, 1, positions), expected) < 0.02
