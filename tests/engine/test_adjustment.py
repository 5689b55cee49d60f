"""Biases and penalties, against what they mean written out row by row."""

import jax.numpy as jnp
import numpy as np

from grok1.engine.adjustment import adjusted
from grok1.engine.sampling import SamplingParams
from grok1.generate.request import Request, Wishes, adjustment

V, S = 11, 9


def request(tokens, wishes=None, ends=()):
    return Request(tokens=tokens, max_tokens=5, wishes=wishes, ends=ends, sampling=SamplingParams())


def test_each_row_has_its_own_and_the_others_keep_theirs_to_the_bit():
    random = np.random.default_rng(0)
    requests = [
        request([1, 2, 3]),
        request([1, 2, 3], Wishes(biases={4: 2.5, 10: -100.0})),
        request([1, 2, 3], Wishes(presence=0.5, frequency=0.25)),
        request([1, 2, 3], Wishes(repetition=2.0)),
        request([1, 2, 3], Wishes(min_tokens=3), ends=(6, 7)),
        request([1, 2, 3], Wishes(min_tokens=2), ends=(6, 7)),
    ]
    rows = np.array([5, 0, 2, 4, 6, 1])
    made = adjustment(requests, rows, 7)
    logits = random.normal(size=(7, V)).astype(np.float32)
    tokens = np.zeros((7, S), np.int32)
    tokens[:, :5] = [1, 2, 3, 9, 9]
    tokens[:, 5:] = 8  # what an earlier request has left
    length = np.full(7, 5, np.int32)
    found = np.asarray(adjusted(jnp.asarray(logits), tokens, length, made))
    np.testing.assert_array_equal(found[[3, 5]], logits[[3, 5]])
    expected = logits[rows].copy()
    expected[1, [4, 10]] += np.float32([2.5, -100.0])
    expected[2, 9] -= np.float32(0.5 + 2 * 0.25)
    for token in (1, 2, 3, 9):
        value = expected[3, token]
        expected[3, token] = value / 2 if value > 0 else value * 2
    expected[4, [6, 7]] = -np.inf
    np.testing.assert_allclose(found[rows], expected, rtol=1e-6)
    np.testing.assert_array_equal(found[1], logits[1])  # its two tokens are there
