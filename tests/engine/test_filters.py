"""Top-k, nucleus and min-p: what is kept, by hand and by every form."""

import ctypes
import functools
import shutil
import subprocess

import jax
import numpy as np
import pytest

from grok1.engine.sampling import keep, keep_probable
from grok1.machine import native_library
from grok1.ops import race
from grok1.ops.cpu import bindings
from tests.engine.draws import ALL, PROBS, draw, log, log_weights, random_cases
from tests.helpers import SLOW_TESTS, slow

keep_by = {
    "sorting": jax.jit(keep_probable),
    "halving": jax.jit(keep),
    "four bits a pass": jax.jit(functools.partial(keep, bits=4)),
}


def kept(form, logits, top_k, top_p, min_p):
    """Bool `[B, V]`: what a form keeps of logits at temperature 1."""
    limits = np.int32(top_k), np.float32(top_p), np.float32(min_p)
    return np.asarray(keep_by[form](log_weights(logits), *limits)) != race.FORBIDDEN


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
