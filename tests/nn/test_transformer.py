"""The readable forward pass against the golden numbers, and Haiku's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.config import ModelConfig
from grok1.nn.manifest import abstract_params, arrange
from grok1.nn.transformer import NamedParams, forward, naming
from grok1.ops.quantized import QuantizedArray
from tests.helpers import named_params, random_named, readable, relative_error, slow

TINY = ModelConfig(
    vocab_size=37,
    emb_size=20,
    widening_factor=3,
    key_size=6,
    num_q_heads=6,
    num_kv_heads=3,
    num_layers=2,
    num_experts=5,
    num_selected_experts=3,
    sequence_len=16,
)


def test_forward_matches_float64(nano, nano_config, nano_reference):
    logits, traces = readable(named_params(nano), nano_config, nano_reference["tokens"])
    assert relative_error(logits, nano_reference["logits_f64"]) <= 2e-5
    for layer, trace in enumerate(traces):
        assert relative_error(trace.residual[0], nano_reference["residual"][layer]) <= 2e-5
        expected = nano_reference["selected_experts"][layer]
        np.testing.assert_array_equal(np.sort(trace.routing.expert_indices), np.sort(expected))


@pytest.fixture(scope="module")
def floats() -> NamedParams:
    return random_named(TINY, quantized=False)


def test_forward_is_causal(floats):
    tokens = np.arange(12)
    before, _ = readable(floats, TINY, tokens)
    tokens[5] = 31
    after, _ = readable(floats, TINY, tokens)
    np.testing.assert_array_equal(before[:5], after[:5])
    assert not np.allclose(before[5:], after[5:])


# The training of the toy needs them.
@slow
def test_forward_has_gradients_for_every_float_parameter(floats):
    tokens = jnp.arange(12)[None]

    def loss(named):
        logits, _ = forward(arrange(named, TINY), TINY, tokens)
        return -jnp.mean(jax.nn.log_softmax(logits[0, :-1])[jnp.arange(11), tokens[0, 1:]])

    gradients = jax.jit(jax.grad(loss))(floats)
    for name, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), name
        assert np.any(gradient != 0), name


@slow
def test_random_init_is_neither_zero_nor_exploding():
    one_layer, key = TINY.first_layers(1), jax.random.key(2, impl="unsafe_rbg")
    logits, _ = readable(jax.jit(naming(one_layer).init)(key), one_layer, np.arange(12))
    assert 0.05 < np.std(logits) < 5


@pytest.mark.parametrize("quantized", [True, False])
def test_weights_are_quantized_on_request(quantized):
    named = abstract_params(TINY, quantized=quantized)
    weight = named["transformer/decoder_layer_1/moe/linear_1"]["w"]
    assert isinstance(weight, QuantizedArray) == quantized
    assert weight.shape == (5, 40, 20)
    assert named["transformer/decoder_layer_1/router"]["w"].dtype == jnp.float32
