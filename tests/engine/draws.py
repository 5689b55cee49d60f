"""Draws by every form of sampling, and what they draw from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.engine.sampling import SamplingState, sample, sampling_state
from grok1.ops import race
from grok1.ops.cpu import bindings

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
sample_by = {"native": jax.jit(sample), "xla": through_xla(sample)}


def log(probs):
    return np.log(np.asarray(probs, np.float32))


def log_weights(logits, temperature=1.0, allowed=None):
    temperature = np.broadcast_to(np.float32(temperature), len(logits))
    allowed = np.ones(logits.shape[-1], bool) if allowed is None else allowed
    return log_weights_compiled(logits, allowed, temperature)


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
