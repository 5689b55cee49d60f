"""Sampling: parameters, draws and log-probabilities, on vocabularies of a few tokens."""

import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.engine.sampling import SamplingParams, SamplingState, sampling_state, top_logprobs
from grok1.ops import race
from tests.engine.draws import ALL, PROBS, draw, log, sample_by, state_of, through_xla
from tests.helpers import SLOW_TESTS

top_logprobs_by = {
    "native": jax.jit(top_logprobs, static_argnames="num_top"),
    "xla": through_xla(top_logprobs, static_argnames="num_top"),
}


# --- SamplingParams ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"temperature": -0.5},
            "temperature must be 0 (the most probable token) or above, found -0.5",
        ),
        (
            {"temperature": float("nan")},
            "temperature must be 0 (the most probable token) or above, found nan",
        ),
        (
            {"temperature": float("inf")},
            "temperature must be 0 (the most probable token) or above, found inf",
        ),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, found 1.01"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, found nan"),
        ({"top_k": 0}, "top_k must be a whole number above 0, or None, found 0"),
        ({"top_k": 2.5}, "top_k must be a whole number above 0, or None, found 2.5"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, or None, found -0.1"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, or None, found 1.5"),
        ({"min_p": float("nan")}, "min_p must be from 0 to 1, or None, found nan"),
    ],
)
def test_values_out_of_range_are_refused(params, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        # The constructor itself, without the type checker that a test run may put around it.
        inspect.unwrap(SamplingParams.__init__)(object.__new__(SamplingParams), **params)


def test_the_ends_of_the_ranges_are_accepted():
    SamplingParams(temperature=0.0, top_p=1.0, top_k=1, min_p=0.0)
    SamplingParams(min_p=1.0)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p"])
def test_a_number_in_quotes_is_shown_in_quotes(name):
    given = types.SimpleNamespace(temperature=0.7, top_p=0.95, top_k=None, min_p=None)
    setattr(given, name, "1")
    with pytest.raises(ValueError, match=rf"{name} must be .*, found '1'"):
        # The method itself: a test run puts a type checker around the class.
        inspect.unwrap(SamplingParams.__post_init__)(given)


def test_sampling_state_has_a_row_for_each_key():
    keys = np.arange(6, dtype=np.uint32).reshape(3, 2)
    state = sampling_state(SamplingParams(temperature=0.5, top_p=0.75, top_k=7, min_p=0.25), keys)
    for part, value, dtype in zip(
        state, (0.5, 0.75, 7, 0.25), (np.float32, np.float32, np.int32, np.float32), strict=False
    ):
        np.testing.assert_array_equal(part, np.full(3, value, dtype), strict=True)
    np.testing.assert_array_equal(state.keys, keys)
    unfiltered = sampling_state(SamplingParams(), keys)
    assert np.all(np.asarray(unfiltered.top_k) == ALL)
    assert np.all(np.asarray(unfiltered.min_p) == 0)


# --- sample -----------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0.0)
# A row of each kind: without a filter, with each of them, with all, and greedy.
MIXED = (
    SamplingParams(temperature=1.0, top_p=1.0),
    SamplingParams(temperature=0.8, top_p=0.9),
    GREEDY,
    SamplingParams(temperature=1.3, top_p=1.0, top_k=11),
    SamplingParams(temperature=2.0, top_p=1.0, min_p=0.01),
    SamplingParams(temperature=0.6, top_p=0.8, top_k=9, min_p=0.02),
    GREEDY,
)


def random_logits(rows, vocab_size=37):
    return np.random.default_rng(1).standard_normal((rows, vocab_size), np.float32)


def test_a_greedy_row_takes_the_most_probable_token_whatever_the_others_do():
    logits = random_logits(7)
    tokens = draw(logits, state_of(*MIXED), np.arange(7))
    best = logits.argmax(axis=-1)
    np.testing.assert_array_equal(tokens[[2, 6]], best[[2, 6]])
    np.testing.assert_array_equal(draw(logits, state_of(*[GREEDY] * 7), np.arange(7)), best)


def test_greedy_takes_the_lower_of_two_equals():
    logits = random_logits(1)
    logits[0, [11, 23]] = 9
    assert draw(logits, state_of(GREEDY), [0]) == [11]


def test_a_draw_does_not_depend_on_its_batch():
    logits, state, positions = random_logits(7), state_of(*MIXED), np.arange(100, 107)
    together = draw(logits, state, positions)
    for row in range(7):
        alone = SamplingState(*(part[row : row + 1] for part in state))
        assert draw(logits[row : row + 1], alone, positions[row : row + 1]) == together[row]
    turned = SamplingState(*(part[::-1] for part in state))
    np.testing.assert_array_equal(draw(logits[::-1], turned, positions[::-1]), together[::-1])


def test_a_draw_is_fixed_by_its_key_and_position():
    keys = [(1, 2), (1, 2), (1, 3), (2, 2), (1, 2), (0, 0), (1, 2)]
    state = state_of(*[SamplingParams(temperature=1.0, top_p=1.0)] * 7, keys=keys)
    # The last row is one position ahead of the others.
    offsets = np.array([0, 0, 0, 0, 0, 0, 1])
    drawn = np.stack([draw(np.zeros((7, 37)), state, offsets + step) for step in range(12)], axis=1)
    np.testing.assert_array_equal(drawn[1], drawn[0])
    np.testing.assert_array_equal(drawn[4], drawn[0])
    np.testing.assert_array_equal(drawn[6, :-1], drawn[0, 1:])
    # Of 37 tokens alike, twelve draws by another key are others, and those of one key differ.
    for other in (2, 3, 5):
        assert np.sum(drawn[other] == drawn[0]) <= 3
    assert len(set(drawn[0].tolist())) >= 8


def test_a_tiny_temperature_takes_the_most_probable_token():
    # 50 / 1e-37 is more than float32 holds.
    near_greedy = SamplingParams(temperature=1e-37, top_p=0.9)
    logits = random_logits(1)
    logits[0, [11, 23]] = 50, 60
    assert draw(logits, state_of(near_greedy), [0]) == [23]


@pytest.mark.optimised
def test_frequencies_of_many_draws():
    # Each case has so many draws, over 100 keys.
    cases = [
        ({"temperature": 1.0, "top_p": 1.0}, PROBS),
        ({"temperature": 0.5, "top_p": 1.0}, PROBS**2),
        ({"temperature": 2.0, "top_p": 1.0}, PROBS**0.5),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 3}, PROBS * [0, 1, 0, 1, 1]),
        ({"temperature": 1.0, "top_p": 0.6}, PROBS * [0, 1, 0, 1, 0]),
        # Squared and renormalised they are 0.035, 0.561, 0.009, 0.316, 0.079: a temperature comes
        # before the filters.
        ({"temperature": 0.5, "top_p": 1.0, "min_p": 0.1}, PROBS**2 * [0, 1, 0, 1, 1]),
    ]
    draws = 20_000 if SLOW_TESTS else 4_000
    parts = []
    for params, _ in cases:
        keys = np.stack([np.arange(draws) % 100, np.full(draws, 23)], axis=-1).astype(np.uint32)
        parts.append(sampling_state(SamplingParams(**params), keys))
    state = SamplingState(*(jnp.asarray(np.concatenate(part)) for part in zip(*parts, strict=True)))
    positions = np.tile(np.arange(draws) // 100, len(cases))
    logits = np.broadcast_to(log(PROBS), (len(positions), 5))

    drawn = draw(logits, state, positions).reshape(len(cases), draws)
    # A second time without the most probable token.
    allowed = np.array([True, False, True, True, True])
    drawn_of_allowed = draw(logits, state, positions, allowed).reshape(len(cases), draws)

    for tokens, (_, weights) in zip(drawn, cases, strict=True):
        counts = np.bincount(tokens, minlength=5)
        expected = draws * weights / weights.sum()
        np.testing.assert_array_equal(counts[expected == 0], 0)
        drawable = expected > 0
        surprise = np.sum((counts - expected)[drawable] ** 2 / expected[drawable])
        assert surprise < 20  # chi-square of 4 degrees of freedom: exceeded once in 2,000 tests
    counts = [np.bincount(tokens, minlength=5) for tokens in drawn_of_allowed]
    np.testing.assert_array_equal(np.array(counts)[:, 1], 0)
    # The filters work on what is allowed: of 3, 4, 0, 2 the best three, and the best two.
    np.testing.assert_array_equal(np.array(counts[3]) > 0, [True, False, False, True, True])
    np.testing.assert_array_equal(np.array(counts[4]) > 0, [False, False, False, True, True])


@pytest.mark.parametrize("rows", [MIXED, (GREEDY,) * 7])
def test_only_allowed_tokens_are_drawn(rows):
    logits = random_logits(7)
    allowed = np.zeros(37, bool)
    allowed[[3, 19]] = True
    logits[:, allowed] -= 30
    for position in range(20):
        tokens = draw(logits, state_of(*rows), np.full(7, position), allowed)
        assert set(tokens.tolist()) <= {3, 19}
        assert tokens[2] == (3 if logits[2, 3] > logits[2, 19] else 19)


@pytest.mark.parametrize("run", sample_by)
def test_a_vocabulary_whose_sums_do_not_fit_is_refused(run):
    size = race.MOST_TOKENS + 1
    with pytest.raises(ValueError, match="a vocabulary of up to 262,143, found 262,144; with temp"):
        sample_by[run](
            np.zeros((1, size), np.float32), np.ones(size, bool), state_of(GREEDY), np.zeros(1, int)
        )


# --- top_logprobs -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", top_logprobs_by)
def test_top_logprobs_against_float64(form):
    logits = random_logits(5)
    logits[0, 7] = logits[0, 30] = 9  # the best two, alike: the lower comes first
    tokens = np.array([7, 0, 36, 5, 5], np.int32)
    chosen, best_tokens, best = top_logprobs_by[form](logits, tokens, num_top=3)
    assert best_tokens.dtype == jnp.int32
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(chosen, expected[np.arange(5), tokens], atol=2e-6)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :3]
    assert order[0, :2].tolist() == [7, 30]
    np.testing.assert_array_equal(best_tokens, order)
    np.testing.assert_allclose(best, np.take_along_axis(expected, order, axis=-1), atol=2e-6)


@pytest.mark.parametrize("form", top_logprobs_by)
def test_top_logprobs_without_alternatives(form):
    chosen, best_tokens, best = top_logprobs_by[form](log([PROBS]), np.array([3]), num_top=0)
    np.testing.assert_allclose(chosen, log([0.3]), rtol=1e-6)
    assert best_tokens.shape == best.shape == (1, 0)


@pytest.mark.parametrize("form", top_logprobs_by)
def test_log_probabilities_of_finite_logits_are_finite(form):
    logits = np.array([[3e38, -3e38, 0, 5, -1]], np.float32)
    chosen, _, best = top_logprobs_by[form](logits, np.array([1]), num_top=5)
    assert np.all(np.isfinite(chosen))
    assert np.all(np.isfinite(best))


def test_all_alternatives_in_their_order():
    logits = np.round(random_logits(2, 700), 1)
    _, tokens, _ = top_logprobs_by["native"](logits, np.array([1, 2]), num_top=700)
    np.testing.assert_array_equal(tokens, np.argsort(-logits, axis=-1, kind="stable"))
