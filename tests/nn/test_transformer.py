"""The readable forward pass against the golden numbers, and Haiku's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.config import ModelConfig
from grok1.nn.manifest import abstract_params
from grok1.nn.transformer import forward, naming
from grok1.ops.quantized import QuantizedArray
from tests.helpers import named_params, relative_error

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
    params = naming(nano_config).apply(named_params(nano), None)
    tokens = jnp.asarray(nano_reference["tokens"])[None]
    logits, traces = jax.jit(forward, static_argnums=1)(params, nano_config, tokens)
    assert relative_error(logits[0], nano_reference["logits_f64"]) <= 2e-5
    for layer, trace in enumerate(traces):
        assert relative_error(trace.residual[0], nano_reference["residual"][layer]) <= 2e-5
        expected = nano_reference["selected_experts"][layer]
        np.testing.assert_array_equal(np.sort(trace.routing.expert_indices), np.sort(expected))


def test_forward_is_causal():
    params = naming(TINY, quantized=False).init(jax.random.key(0))
    params = naming(TINY, quantized=False).apply(params, None)
    tokens = jnp.arange(8)[None]
    run = jax.jit(lambda tokens: forward(params, TINY, tokens)[0])
    before, after = run(tokens), run(tokens.at[0, 5].set(31))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert not np.allclose(before[0, 5:], after[0, 5:])


def test_forward_has_gradients_for_every_float_parameter():
    names = naming(TINY, quantized=False)
    named = names.init(jax.random.key(1))
    tokens = jnp.arange(12)[None]

    def loss(named):
        logits, _ = forward(names.apply(named, None), TINY, tokens)
        return -jnp.mean(jax.nn.log_softmax(logits[0, :-1])[jnp.arange(11), tokens[0, 1:]])

    gradients = jax.jit(jax.grad(loss))(named)
    for name, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), name
        assert np.any(gradient != 0), name


def test_random_init_is_neither_zero_nor_exploding():
    named = naming(TINY).init(jax.random.key(2))
    logits, _ = forward(naming(TINY).apply(named, None), TINY, jnp.arange(10)[None])
    assert 0.05 < float(jnp.std(logits)) < 5


@pytest.mark.parametrize("quantized", [True, False])
def test_weights_are_quantized_on_request(quantized):
    named = abstract_params(TINY, quantized=quantized)
    weight = named["transformer/decoder_layer_1/moe/linear_1"]["w"]
    assert isinstance(weight, QuantizedArray) == quantized
    assert weight.shape == (5, 40, 20)
    assert named["transformer/decoder_layer_1/router"]["w"].dtype == jnp.float32
