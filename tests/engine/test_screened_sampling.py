"""Draws by way of the head's copy in int8: those of all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1 import TOY
from grok1.engine.sampling import (
    NONE_LEFT,
    NOT_FINITE,
    SamplingState,
    sample,
    sample_measured,
    sample_screened,
)
from grok1.ops.screening import remainders, screening_table
from tests.engine.draws import ALL, random_cases
from tests.helpers import skip_unless_it_runs_here


@functools.cache
def screened_and_all():
    """What is drawn by way of the int8 copy, and from all logits."""

    def run(embedding, x, allowed, state, positions):
        table = screening_table(embedding)
        products = jnp.einsum("bd,vd->bv", x, embedding, precision="highest")
        logits = products * TOY.output_multiplier_scale
        factor = TOY.output_multiplier_scale
        drawn = sample_screened(x, (embedding, *table), factor, allowed, state, positions)
        return drawn, sample(logits, allowed, state, positions)

    skip_unless_it_runs_here("cpp")
    return jax.jit(run)


def screened_cases(seed, rows=512, vocab_size=1203, width=70):
    """Tables and inputs whose logits are flat, peaked or alike, with `random_cases`' parameters."""
    random = np.random.default_rng(seed)
    _, allowed, state = random_cases(seed, rows, vocab_size)
    # Mostly without top-k, so that bounds of the nucleus decide.
    state = state._replace(top_k=np.where(np.arange(rows) % 4, ALL, state.top_k).astype(np.int32))
    embedding = random.standard_normal((vocab_size, width)) / np.sqrt(width)
    if seed % 2:
        embedding = embedding[random.integers(vocab_size // 4, size=vocab_size)]
    x = random.standard_normal((rows, width)) * random.choice([0.1, 1, 4, 20], (rows, 1))
    peak = random.choice([0, 0, 1, 4], (rows, 1)) * np.sqrt(width)
    x += peak * embedding[random.integers(vocab_size, size=rows)]
    return embedding.astype(np.float32), x.astype(np.float32), allowed, state


def test_a_screened_draw_is_that_of_all_logits():
    for seed in range(4):
        *arrays, state = screened_cases(seed)
        drawn, expected = screened_and_all()(*arrays, state, np.arange(512) + seed)
        np.testing.assert_array_equal(drawn, expected)
        assert len(set(np.asarray(drawn).tolist())) > 100


def test_a_screened_draw_does_not_depend_on_its_batch():
    embedding, x, allowed, state = screened_cases(7)
    positions = np.arange(512)
    drawn, _ = screened_and_all()(embedding, x, allowed, state, positions)
    turned = SamplingState(*(part[::-1] for part in state))
    again, _ = screened_and_all()(embedding, x[::-1], allowed[::-1], turned, positions[::-1])
    np.testing.assert_array_equal(again, drawn[::-1])


@functools.cache
def measured(num_top):
    """Draws by way of the copies, with log-probabilities."""

    def run(embedding, x, allowed, state, positions):
        table = screening_table(embedding)
        factor = TOY.output_multiplier_scale
        parts = (embedding, table.values, table.scales, *remainders(embedding, table))
        return sample_measured(x, parts, factor, (allowed, state, positions), num_top)

    skip_unless_it_runs_here("cpp")
    return jax.jit(run)


def logprobs_of(embedding, x):
    logits = TOY.output_multiplier_scale * (x.astype(np.float64) @ embedding.T.astype(np.float64))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("num_top", [0, 5])
def test_a_measured_draw_is_that_of_all_logits_and_its_log_probabilities_are_the_models(num_top):
    for seed in range(4):
        embedding, x, allowed, state = screened_cases(seed)
        positions = np.arange(512) + seed
        drawn, chosen, tokens, top = measured(num_top)(embedding, x, allowed, state, positions)
        _, expected = screened_and_all()(embedding, x, allowed, state, positions)
        np.testing.assert_array_equal(drawn, expected)
        logprobs = logprobs_of(embedding, x)
        rows = np.arange(512)
        # What a sum in float32 may be off by grows with the norms.
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(embedding, axis=-1).max()
        # Of the sum the error is known on average, and five times that is not seen.
        tolerance = 15e-6 + 1e-7 * TOY.output_multiplier_scale * norms
        assert np.all(np.abs(chosen - logprobs[rows, expected]) <= tolerance)
        # By what they are worth: nearly equal ones may change places.
        best = -np.sort(-logprobs, axis=-1)[:, :num_top]
        assert np.all(np.abs(top - best) <= tolerance[:, None])
        found = np.take_along_axis(logprobs, np.asarray(tokens), axis=-1)
        assert np.all(np.abs(found - best) <= 2 * tolerance[:, None])
        assert all(len(set(row)) == num_top for row in np.asarray(tokens).tolist())


def test_a_measured_draw_does_not_depend_on_its_batch():
    embedding, x, allowed, state = screened_cases(7)
    positions = np.arange(512)
    found = measured(5)(embedding, x, allowed, state, positions)
    turned = SamplingState(*(part[::-1] for part in state))
    again = measured(5)(embedding, x[::-1], allowed[::-1], turned, positions[::-1])
    for one, other in zip(again, found, strict=True):
        np.testing.assert_array_equal(one, other[::-1])


# Inputs are multiplied by four, by two and one by one.
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_measured_draw_does_not_depend_on_how_many_rows_there_are(count):
    for seed in range(2):
        embedding, x, allowed, state = screened_cases(seed, 32, width=200)
        positions = np.arange(32)
        whole = measured(5)(embedding, x, allowed, state, positions)
        for first in range(0, 32 - count, count):
            rows = slice(first, first + count)
            few = SamplingState(*(part[rows] for part in state))
            part = measured(5)(embedding, x[rows], allowed[rows], few, positions[rows])
            for one, of_all in zip(part, whole, strict=True):
                np.testing.assert_array_equal(one, of_all[rows])


def test_where_logits_are_not_finite_measured_log_probabilities_are_no_numbers():
    embedding, x, allowed, state = screened_cases(2)
    x[3, 5], x[4, 0] = np.nan, -np.inf
    allowed[9] = False
    drawn, chosen, _, top = measured(5)(embedding, x, allowed, state, np.arange(512))
    assert np.flatnonzero(drawn == NOT_FINITE).tolist() == [3, 4]
    assert np.flatnonzero(drawn == NONE_LEFT).tolist() == [9]
    assert np.flatnonzero(~np.isfinite(chosen)).tolist() == [3, 4]
    assert np.flatnonzero(~np.isfinite(top).all(axis=-1)).tolist() == [3, 4]
    embedding[700, 5] = np.nan
    drawn, chosen, _, _ = measured(5)(embedding, x, allowed, state, np.arange(512))
    assert np.all(drawn == NOT_FINITE)
    assert not np.isfinite(chosen).any()


def test_where_no_token_can_be_drawn_a_screened_draw_says_why():
    embedding, x, allowed, state = screened_cases(2)
    x[3, 5], x[4, 0] = np.nan, -np.inf
    allowed[9] = False
    drawn, _ = screened_and_all()(embedding, x, allowed, state, np.arange(512))
    assert np.flatnonzero(drawn == NOT_FINITE).tolist() == [3, 4]
    assert np.flatnonzero(drawn == NONE_LEFT).tolist() == [9]
    for value in (np.nan, -np.inf):
        damaged = embedding.copy()
        damaged[700, 5] = value
        allowed[:, 700] = False
        drawn, _ = screened_and_all()(damaged, x, allowed, state, np.arange(512))
        assert np.all(drawn == NOT_FINITE)
