"""The most probable token from an int8 copy is that of the float32 table, however close."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import grok1
from grok1.nn.sharding import MODEL_AXIS, make_mesh
from grok1.nn.unembedding import most_probable
from grok1.ops import forms, vocabulary
from grok1.ops.screening import Remainders, ScreeningTable, remainders, screening_table
from tests.helpers import skip_unless_it_runs_here

V, D = 1200, 70


@pytest.fixture(params=["cpp", "direct"])
def form(request, monkeypatch):
    """The form that computes it; of tests that ask for it."""
    skip_unless_it_runs_here(request.param)
    table = {"default": ("direct",), "cpu": (request.param,)}
    monkeypatch.setitem(forms.PREFERRED, "most_probable", table)


def find(embedding, x, allowed, num_devices=1):
    mesh = make_mesh(grok1.TOY, (1, num_devices))

    def on_device(embedding, x, allowed):
        return most_probable(embedding, screening_table(embedding), x, allowed)

    rows = P(MODEL_AXIS)
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(rows, P(), P()), out_specs=P(), check_vma=False
    )
    return np.asarray(jax.jit(run)(jnp.asarray(embedding), jnp.asarray(x), jnp.asarray(allowed)))


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def best(embedding, x, allowed):
    products = x.astype(np.float64) @ embedding.T.astype(np.float64)
    return np.argmax(np.where(allowed, products, -np.inf), axis=-1)


@pytest.mark.optimised
@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("num_rows", [1, 3, 9])
def test_the_most_probable_token(form, num_rows, num_devices):
    embedding, x = random(0, V, D), random(1, num_rows, D)
    allowed = np.arange(V) % 3 != 0
    found = find(embedding, x, allowed, num_devices)
    np.testing.assert_array_equal(found, best(embedding, x, allowed))


@pytest.mark.optimised
def test_rows_that_int8_cannot_tell_apart(form):
    # 300 rows that differ by less than a step of their int8 copies.
    embedding, x = random(2, V, D), random(3, 4, D)
    embedding[100:400] = 3 * np.sign(x[0]) + 1e-3 * random(4, 300, D)
    allowed = np.ones(V, bool)
    found = find(embedding, x, allowed)
    expected = best(embedding, x, allowed)
    assert 100 <= expected[0] < 400
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_of_equals_the_first_that_is_allowed(form, num_devices):
    embedding = np.tile(random(5, 1, D), (V, 1))
    allowed = np.arange(V) >= 7
    assert find(embedding, embedding[:1], allowed, num_devices)[0] == 7


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_finds_no_token(form, value, num_devices):
    x = random(1, 3, D)
    x[1, 5] = value
    found = find(random(6, V, D), x, np.ones(V, bool), num_devices)
    assert (found < 0).tolist() == [False, True, False]


@pytest.mark.devices(4)
def test_where_nothing_is_allowed_no_token_is_found(form):
    allowed = np.zeros((2, V), bool)
    allowed[1, 900] = True
    assert find(random(6, V, D), random(1, 2, D), allowed, 4).tolist() == [-1, 900]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_the_largest_product_is_no_number_where_one_is_none(form, num_rows, poison):
    embedding, x = random(6, V, D), random(7, num_rows, D)

    @jax.jit
    def largest(embedding, x, allowed):
        return vocabulary.most_probable(x, embedding, screening_table(embedding), allowed)[1]

    allowed = np.ones(V, bool)
    assert np.isfinite(largest(embedding, x, allowed)).all()
    of_input = x.copy()
    of_input[-1, 3] = poison
    found = largest(embedding, of_input, allowed)
    np.testing.assert_array_equal(np.isfinite(found), np.arange(num_rows) < num_rows - 1)
    of_table = embedding.copy()
    of_table[700, 5] = poison
    # Infinity may also make a product that is no number, or minus infinity, the least of all.
    if np.isnan(poison):
        assert np.isnan(largest(of_table, x, allowed)).all()
        # A damaged weight is a damaged model, whatever may be drawn.
        allowed[700] = False
        assert np.isnan(largest(of_table, x, allowed)).all()
    else:
        found = np.asarray(largest(of_table, np.abs(x), allowed))
        assert not np.isfinite(found).any()


def test_the_bound_holds_for_every_row_and_is_tight():
    embedding = random(7, V, D) * np.exp(random(8, V, 1))
    embedding[0] = 0
    table = ScreeningTable(*(np.asarray(part) for part in jax.jit(screening_table)(embedding)))
    kept = table.values.astype(np.float64) * table.scales[:, None]
    lost = np.linalg.norm(embedding - kept, axis=-1)
    assert np.all(lost <= table.uncertainty)
    assert np.all(table.uncertainty <= 0.02 * np.linalg.norm(embedding, axis=-1))


def test_with_remainders_the_bound_is_far_tighter_and_errors_have_no_sign():
    embedding = random(7, V, D) * np.exp(random(8, V, 1))
    embedding[0] = 0

    @jax.jit
    def copies(embedding):
        table = screening_table(embedding)
        return table, remainders(embedding, table)

    table, rest = (jax.tree.map(np.asarray, part) for part in copies(embedding))
    assert isinstance(rest, Remainders)
    assert rest.codes.dtype == np.uint8
    assert rest.codes.shape == (V, 32 * -(-D // 64))
    halves = rest.codes.reshape(V, -1, 1, 32)
    codes = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(V, -1)[:, :D]
    steps = table.scales[:, None].astype(np.float64) / 15
    lost = embedding - steps * (15 * table.values.astype(np.int32) + codes - 7.5)
    norms = np.linalg.norm(embedding, axis=-1)
    assert np.all(np.linalg.norm(lost, axis=-1) <= rest.uncertainty)
    assert np.all(rest.uncertainty <= 2e-3 * norms)
    assert np.abs(lost / np.where(steps == 0, 1, steps)).max() < 1.01
    # 84,000 errors of up to a step: their mean is within five standard deviations of 0.
    mean = np.mean(lost[1:] / steps[1:])
    assert abs(mean) < 5 * 0.41 / np.sqrt(lost.size)
