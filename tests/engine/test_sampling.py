"""Sampling on vocabularies of a few tokens by hand, and on the released one against float64."""

import ctypes
import functools
import inspect
import re
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1 import TOY
from grok1.engine.sampling import (
    NONE_LEFT,
    NOT_FINITE,
    SamplingParams,
    SamplingState,
    keep,
    keep_probable,
    sample,
    sample_measured,
    sample_screened,
    sampling_state,
    top_logprobs,
)
from grok1.machine import native_library
from grok1.ops import race
from grok1.ops.cpu import bindings
from grok1.ops.screening import remainders, screening_table
from tests.helpers import SLOW_TESTS, slow

ALL = np.iinfo(np.int32).max
# In order 1, 3, 4, 0, 2; the sums from the best are 0.4, 0.7, 0.85, 0.95, 1.
PROBS = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


def through_xla(function, **options):
    """The form for devices without kernels, compiled."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bindings, "is_available", lambda: False)
            return function(*args, **kwargs)

    return jax.jit(run, **options)


log_weights_compiled = jax.jit(race.log_weights)
keep_by = {
    "sorting": jax.jit(keep_probable),
    "halving": jax.jit(keep),
    "four bits a pass": jax.jit(functools.partial(keep, bits=4)),
}
sample_by = {"native": jax.jit(sample), "xla": through_xla(sample)}
top_logprobs_by = {
    "native": jax.jit(top_logprobs, static_argnames="num_top"),
    "xla": through_xla(top_logprobs, static_argnames="num_top"),
}


def log(probs):
    return np.log(np.asarray(probs, np.float32))


def log_weights(logits, temperature=1.0, allowed=None):
    temperature = np.broadcast_to(np.float32(temperature), len(logits))
    allowed = np.ones(logits.shape[-1], bool) if allowed is None else allowed
    return log_weights_compiled(logits, allowed, temperature)


def kept(form, logits, top_k, top_p, min_p):
    """Bool `[B, V]`: what a form keeps of logits at temperature 1."""
    limits = np.int32(top_k), np.float32(top_p), np.float32(min_p)
    return np.asarray(keep_by[form](log_weights(logits), *limits)) != race.FORBIDDEN


def state_of(*params, keys=None):
    """One row for each of `params`, with keys of their own."""
    if keys is None:
        keys = [(17, row) for row in range(len(params))]
    rows = [
        sampling_state(each, np.array([key], np.uint32))
        for each, key in zip(params, keys, strict=True)
    ]
    return SamplingState(*(jnp.asarray(np.concatenate(part)) for part in zip(*rows, strict=True)))


def draw(logits, state, positions, allowed=None):
    """What every form draws, which is the same."""
    logits = jnp.asarray(logits, jnp.float32)
    if allowed is None:
        allowed = np.ones(logits.shape[-1], bool)
    tokens, others = (
        run(logits, allowed, state, jnp.asarray(positions, jnp.int32)) for run in sample_by.values()
    )
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, others, strict=True)
    return np.asarray(tokens)


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


# --- keep_probable ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", keep_by)
@pytest.mark.parametrize(
    ("probs", "top_k", "top_p", "min_p", "expected"),
    [
        (PROBS, ALL, 1, 0, [0, 1, 2, 3, 4]),
        (PROBS, 1, 1, 0, [1]),
        (PROBS, 2, 1, 0, [1, 3]),
        (PROBS, 5, 1, 0, [0, 1, 2, 3, 4]),
        (PROBS, ALL, 1e-9, 0, [1]),
        (PROBS, ALL, 0, 0, [1]),  # the best always stays
        (PROBS, ALL, 0.39, 0, [1]),
        (PROBS, ALL, 0.41, 0, [1, 3]),
        (PROBS, ALL, 0.69, 0, [1, 3]),
        (PROBS, ALL, 0.71, 0, [1, 3, 4]),
        (PROBS, ALL, 0.96, 0, [0, 1, 2, 3, 4]),
        ([1e-9, 1, 1e-8, 1e-10, 1e-9], ALL, 1, 0, [0, 1, 2, 3, 4]),  # float32 sums of 1 too early
        (PROBS, ALL, 1, 0.2, [0, 1, 3, 4]),  # 0.2 * 0.4 = 0.08
        (PROBS, ALL, 1, 0.3, [1, 3, 4]),
        (PROBS, ALL, 1, 0.5, [1, 3]),
        (PROBS, ALL, 1, 1, [1]),
        # Top-k leaves 0.47, 0.35 and 0.18 of its own: two reach 0.8, of the whole they would not.
        (PROBS, 3, 0.8, 0, [1, 3]),
        (PROBS, 4, 0.99, 0.3, [1, 3, 4]),
        (PROBS, 2, 0.99, 0.3, [1, 3]),
        (PROBS, ALL, 0.39, 0.3, [1]),
        # Among equals the lower token is the more probable.
        ([0.2] * 5, 2, 1, 0, [0, 1]),
        ([0.2] * 5, ALL, 0.5, 0, [0, 1, 2]),
        ([0.2] * 5, ALL, 1e-9, 0, [0]),
        ([0.2] * 5, ALL, 1, 1, [0, 1, 2, 3, 4]),
        ([0.1, 0.35, 0.1, 0.1, 0.35], 3, 1, 0, [0, 1, 4]),
        # A token that must not be drawn stays out.
        ([0.5, 0, 0.2, 0, 0.3], 4, 1, 0, [0, 2, 4]),
    ],
)
def test_what_is_kept_by_hand(probs, top_k, top_p, min_p, expected, form):
    with np.errstate(divide="ignore"):
        logits = log(probs)[None] + 3
    found = kept(form, logits, [top_k], [top_p], [min_p])
    assert np.flatnonzero(found).tolist() == expected


@pytest.mark.parametrize("form", keep_by)
def test_each_row_is_filtered_by_its_own_limits(form):
    logits = np.stack([log(PROBS), log(PROBS)[::-1], log(PROBS)])
    found = kept(form, logits, [1, ALL, ALL], [1, 0.69, 1], [0, 0, 0.3])
    assert [np.flatnonzero(row).tolist() for row in found] == [[1], [1, 3], [1, 3, 4]]


@pytest.mark.parametrize(
    "form", ["halving", *(pytest.param(f, marks=slow) for f in ("sorting", "four bits a pass"))]
)
def test_the_nucleus_of_the_released_vocabulary_against_float64(form):
    # In float32 the rounding of the sum is less than the probability of the tokens at the edge,
    # 1.6e-6; a sum in bfloat16 would keep 5,904.
    logits = 4 * np.random.default_rng(0).standard_normal((1, 131072), np.float32)
    found = kept(form, logits, [ALL], [0.99], [0])
    probs = np.sort(np.exp(logits[0].astype(np.float64)))[::-1]
    probs /= probs.sum()
    expected = np.sum(np.cumsum(probs) - probs < 0.99)
    assert expected == 9086
    assert abs(found.sum() - expected) <= 2


@pytest.fixture(scope="module")
def kept_by_kernel(tmp_path_factory):
    """The kernel's filters alone: (logits, allowed, state) -> log-weights of what is kept."""
    compiler = next(filter(None, map(shutil.which, native_library._COMPILERS)), None)
    if compiler is None:
        pytest.skip("no compiler on this machine")
    source = tmp_path_factory.mktemp("sample") / "sample.cc"
    library = source.with_suffix(".so")
    source.write_text("""
        #include "sample.h"
        extern "C" void keep(const float* logits, const bool* allowed,
                             const float* temperature, const float* top_p, const int* top_k,
                             const float* min_p, const unsigned* keys, const int* positions,
                             int* kept, long size, long rows) {
          grok1::Sampling sampling = {logits, allowed, temperature, top_p, top_k,
                                      min_p, keys, positions, size, size};
          for (long row = 0; row < rows; ++row) {
            grok1::RowSampler sampler(sampling, row);
            sampler.find_most_probable();
            grok1::Last last = sampler.last_kept();
            for (int id = 0; id < size; ++id) {
              int weight = sampler.log_weights()[id];
              bool keeps = weight > last.log_weight ||
                           (weight == last.log_weight && id <= last.id);
              kept[row * size + id] = keeps ? weight : grok1::kForbidden;
            }
          }
        }
    """)
    flags = [
        *native_library._FLAGS,
        "-march=native",
        f"-I{bindings._SOURCES.directory}",
        f"-I{jax.ffi.include_dir()}",
    ]
    flags[flags.index("-O3")] = "-O0"  # it runs once
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).keep

    def kept_of(logits, allowed, state):
        kept = np.zeros(logits.shape, np.int32)
        arrays = (logits, allowed, *state, np.zeros(len(logits), np.int32), kept)
        assert all(array.flags.c_contiguous for array in arrays)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        run(*pointers, ctypes.c_long(logits.shape[1]), ctypes.c_long(len(logits)))
        return kept

    return kept_of


def random_cases(seed, rows, vocab_size):
    """Logits, allowed tokens and parameters of every kind; in half of the rows with many ties."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, vocab_size)) * random.choice([0.1, 1, 4], (rows, 1))
    steps = random.choice([1, 8], (rows, 1))
    logits = np.where(np.arange(rows)[:, None] % 2, np.round(logits * steps) / steps, logits)
    logits[::7, : vocab_size // 2] = -np.inf  # as a processor does
    allowed = random.random((rows, vocab_size)) < random.choice([0.05, 0.5, 1], (rows, 1))
    allowed[:, random.integers(vocab_size // 2, vocab_size)] = True
    state = SamplingState(
        temperature=random.choice([0.05, 0.7, 1, 3, 1e30], rows).astype(np.float32),
        top_p=random.choice([1, 0.999, 0.95, 0.5, 0.25, 0.01], rows).astype(np.float32),
        top_k=random.choice([ALL, 1, 2, 10, 300], rows).astype(np.int32),
        min_p=random.choice([0, 1e-9, 0.01, 0.3, 1], rows).astype(np.float32),
        keys=random.integers(0, 2**32, (rows, 2), np.uint32),
    )
    return logits.astype(np.float32), allowed, state


@pytest.mark.not_on_gpu("it is of the CPU's form in C++")
def test_all_forms_keep_and_draw_the_same_in_hundreds_of_cases(kept_by_kernel):
    for seed in range(8 if SLOW_TESTS else 1):
        logits, allowed, state = random_cases(seed, rows=256, vocab_size=531)
        weights = np.asarray(log_weights(logits, state.temperature, allowed))
        expected = np.asarray(keep_by["sorting"](weights, *state[2:0:-1], state.min_p))
        for form in ("halving", "four bits a pass") if SLOW_TESTS else ("halving",):
            found = np.asarray(keep_by[form](weights, *state[2:0:-1], state.min_p))
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(kept_by_kernel(logits, allowed, state), expected)
        tokens = draw(logits, state, np.arange(256) + seed, allowed)
        assert np.all(expected[np.arange(256), tokens] != race.FORBIDDEN)


# --- race -------------------------------------------------------------------------------------


def test_weights_are_powers_of_two_to_float32():
    log_weight = -np.arange(0, 3 << 24, 97, dtype=np.int32)
    found = np.asarray(jax.jit(race.relative_weights)(log_weight), np.float64)
    np.testing.assert_allclose(found, 2.0 ** (log_weight / race.OCTAVE), rtol=1e-7)
    assert np.all(np.diff(found) <= 0)


def test_noise_is_gumbels():
    keys = np.array([[3, 4]], np.uint32)
    bits, noise = jax.jit(lambda k: (race.token_bits(k, 99_999), race.noise(k, 99_999)))(keys)
    uniform = (np.asarray(bits)[0].astype(np.float64) + 0.5) / 2**32
    expected = -np.log2(-np.log1p(-uniform))
    np.testing.assert_allclose(np.asarray(noise)[0] / race.OCTAVE, expected, atol=2e-6)
    assert abs(uniform.mean() - 0.5) < 4 / np.sqrt(12 * 99_999)


def test_keys_and_random_numbers_are_those_of_threefry():
    # The known answers of the authors' Random123, and JAX's own folding.
    block = race.threefry(*map(jnp.uint32, (0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3)))
    assert [int(word) for word in block] == [0xC4923A9C, 0x483DF7A0]
    key = jax.random.key(9, impl="threefry2x32")
    folded = race.position_keys(jax.random.key_data(key)[None], np.array([77]))
    np.testing.assert_array_equal(folded[0], jax.random.key_data(jax.random.fold_in(key, 77)))


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


def test_many_equals_are_summed_up():
    one = race.weights(jnp.zeros(1, jnp.int32))
    for times in (1, 2**17, race.MOST_TOKENS):
        limbs = one.plus(one, jnp.array([times - 1])).carried()
        found = sum(int(limb[0]) << bits for limb, bits in zip(limbs, (30, 15, 0), strict=True))
        assert found == times << 44


# --- sample_screened --------------------------------------------------------------------------


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

    if not bindings.is_available():
        pytest.skip("no native kernels on this machine")
    return jax.jit(run)


def screened_cases(seed, rows, vocab_size, width):
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
        *arrays, state = screened_cases(seed, 512, 1203, 70)
        drawn, expected = screened_and_all()(*arrays, state, np.arange(512) + seed)
        np.testing.assert_array_equal(drawn, expected)
        assert len(set(np.asarray(drawn).tolist())) > 100


def test_a_screened_draw_does_not_depend_on_its_batch():
    embedding, x, allowed, state = screened_cases(7, 512, 1203, 70)
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

    if not bindings.is_available():
        pytest.skip("no native kernels on this machine")
    return jax.jit(run)


def logprobs_of(embedding, x):
    logits = TOY.output_multiplier_scale * (x.astype(np.float64) @ embedding.T.astype(np.float64))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("num_top", [0, 5])
def test_a_measured_draw_is_that_of_all_logits_and_its_log_probabilities_are_the_models(num_top):
    for seed in range(4):
        embedding, x, allowed, state = screened_cases(seed, 512, 1203, 70)
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
    embedding, x, allowed, state = screened_cases(7, 512, 1203, 70)
    positions = np.arange(512)
    found = measured(5)(embedding, x, allowed, state, positions)
    turned = SamplingState(*(part[::-1] for part in state))
    again = measured(5)(embedding, x[::-1], allowed[::-1], turned, positions[::-1])
    np.testing.assert_array_equal(again[0], found[0][::-1])
    np.testing.assert_array_equal(again[2], found[2][::-1])
    for one, other in ((1, 1), (3, 3)):
        np.testing.assert_allclose(again[one], found[other][::-1], rtol=1e-6, atol=1e-6)


def test_where_logits_are_not_finite_measured_log_probabilities_are_no_numbers():
    embedding, x, allowed, state = screened_cases(2, 512, 1203, 70)
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
    embedding, x, allowed, state = screened_cases(2, 512, 1203, 70)
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
