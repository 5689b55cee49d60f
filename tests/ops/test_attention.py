"""Attention: values by hand, what a query may not see, and the cached form against the plain one.

Sizes: B=3 rows, T=3 queries, C=2 key/value heads of G=5 query heads each, H=7, L=2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.ops import attention
from grok1.ops.attention import KVCache, Place, append, attend, attend_cache, attention_map
from grok1.ops.cpu import bindings
from tests.helpers import relative_error, slow

B, T, C, G, H, L = 3, 3, 2, 5, 7, 2
SCALE = 0.6


def in_order(positions, valid=None):
    """The place of rows that are the cache's, in its order."""
    positions = np.asarray(positions, np.int32)
    valid = np.ones(positions.shape, bool) if valid is None else valid
    return Place(np.arange(len(positions), dtype=np.int32), positions, valid)


@jax.jit
def append_at(cache, layer, place, key, value):
    return append(cache, layer, place, key, value)


def append_compiled(cache, layer, key, value, positions, valid):
    return append_at(cache, layer, in_order(positions, valid), key, value)


@jax.jit
def attend_at(query, cache, layer, place):
    return attend_cache(query, cache, layer, place, SCALE)


def attend_cached(query, cache, layer, positions):
    return attend_at(query, cache, layer, in_order(positions))


@jax.jit
def attend_plainly(query, cache, layer, positions):
    mask = jnp.arange(cache.k.shape[3]) <= positions[..., None]
    return attend(query, cache.k[layer], cache.v[layer], mask, SCALE)


@jax.jit
def attend_masked(query, cache, mask):
    return attend(query, cache.k[0], cache.v[0], mask, SCALE)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def random_query(length=T, dtype=jnp.float32):
    return normal(7, B, length, C, G, H, dtype=dtype)


def random_cache(capacity, dtype=jnp.float32):
    k, v = (normal(seed, L, B, C, capacity, H, dtype=dtype) for seed in (8, 9))
    return KVCache(k, v, jnp.zeros(B, jnp.int32))


def with_slots(cache, where, k, v):
    """The cache with other keys and values at `where`, an index of `[L, B, C, S, H]`."""
    new_k, new_v = np.array(cache.k), np.array(cache.v)
    new_k[where], new_v[where] = k, v
    return cache._replace(k=jnp.asarray(new_k), v=jnp.asarray(new_v))


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


FORMS = ["blocked", "sliced", "cpp"]


def skip_unless_it_runs_here(form):
    if form == "cpp" and not bindings.is_available():
        pytest.skip("no native kernels on this machine")


@functools.partial(jax.jit, static_argnames="form")
def attend_by(form, query, cache, layer, place):
    return attend_cache(query, cache, layer, place, SCALE, form)


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
        atol = 0 if form == "cpp" else 2e-6
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


# --- append -----------------------------------------------------------------------------------


def random_new(length=T):
    return normal(10, B, length, C, H), normal(11, B, length, C, H)


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


@pytest.mark.parametrize(("length", "group"), [(1, 1), (1, 5), (2, 3), (40, 5)])
def test_native_attention_with_long_rows(length, group):
    if not bindings.is_available():
        pytest.skip("no native kernels on this machine")
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


@functools.partial(jax.jit, static_argnames="form")
def attend_in_form(query, cache, positions, form):
    layer = jnp.int32(1)
    return attend_cache(
        query,
        cache,
        layer,
        Place(jnp.arange(B), positions, jnp.ones(positions.shape, bool)),
        SCALE,
        implementation=form,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_no_number_stays_so(form, length, poison):
    if form == "cpp" and not bindings.is_available():
        pytest.skip("no native kernels on this machine")
    cache, query = random_cache(300), random_query(length) / 5
    positions = np.array([[0], [130], [299 - length]]) + np.arange(length)
    positions = positions.astype(np.int32)
    finite = attend_in_form(query, cache, positions, form)
    assert np.isfinite(finite).all()
    # In row 2, of head 1: its last query, its first key, the value of its first position.
    place = np.s_[1, 2, 1, 0]
    poisoned = {
        "query": (query.at[2, length - 1, 1].set(np.nan), cache),
        "key": (query, with_slots(cache, place, k=np.nan, v=1)),
        "value": (query, with_slots(cache, place, k=1, v=poison)),
    }
    for name, arguments in poisoned.items():
        output = np.asarray(attend_in_form(*arguments, positions, form))
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
    expected = attend_in_form(query, cache, positions.astype(np.int32), form)
    for b in range(B):
        beyond = np.s_[:, b, :, positions[b, -1] + 1 :]
        if dtype == jnp.int8:
            k_scales, v_scales = np.array(cache.k_scales), np.array(cache.v_scales)
            k_scales[beyond] = v_scales[beyond] = np.nan
            cache = cache._replace(k_scales=k_scales, v_scales=v_scales)
        else:
            cache = with_slots(cache, beyond, k=np.nan, v=np.nan)
    found = attend_in_form(query, cache, positions.astype(np.int32), form)
    np.testing.assert_array_equal(found, expected)


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


# --- int8 -------------------------------------------------------------------------------------


def int8_cache(capacity):
    shape = (L, B, C, capacity, H)
    values, scales = jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1])
    return KVCache(values, values, jnp.zeros(B, jnp.int32), scales, scales)


def dequantized(cache):
    """The float32 cache that an int8 one stands for."""
    k, v = (
        values.astype(jnp.float32) * scales[..., None]
        for values, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales))
    )
    return KVCache(k, v, cache.length)


def filled_int8_cache(capacity):
    """Layer 1 filled, each position, head and row with vectors of another size, from 0.01 to 10."""
    key, value = (
        normal(seed, B, capacity, C, H)
        * 10.0 ** jnp.asarray(np.random.default_rng(seed).uniform(-2, 1, (B, capacity, C, 1)))
        for seed in (12, 13)
    )
    everywhere = np.broadcast_to(np.arange(capacity), (B, capacity))
    valid = np.ones((B, capacity), bool)
    cache = append_compiled(int8_cache(capacity), 1, key, value, everywhere, valid)
    return cache, key.astype(jnp.float32), value.astype(jnp.float32)


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
