"""What the CUDA kernels are given in tests, and how near they must come."""

import ml_dtypes
import numpy as np

LAYER = np.array([1], np.int32)


def inputs(rng, shape, precision):
    x = rng.standard_normal(shape).astype(np.float32)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if precision == "bfloat16" else x


def assert_close(found, expected, relative):
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def choices(rng, tokens, selected, num_experts, how):
    """Experts of each token, and which tokens are real."""
    if how == "all to one":
        first = np.full((tokens, 1), num_experts - 1)
        others = np.arange(selected - 1)[None].repeat(tokens, axis=0)
        return np.concatenate([first, others], axis=1).astype(np.int32), np.ones(tokens, bool)
    indices = np.stack([rng.permutation(num_experts)[:selected] for _ in range(tokens)])
    if how == "some to none":
        indices[:: max(2, tokens // 2), -1] = num_experts
        return indices.astype(np.int32), np.arange(tokens) % 3 != 1
    return indices.astype(np.int32), np.ones(tokens, bool)
