"""The fast forward pass: golden numbers on every mesh, and the shape of the compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1.config import GROK_1, ModelConfig
from grok1.engine.engine import Engine
from grok1.nn.manifest import abstract_params
from grok1.nn.sharding import abstract_stack, make_mesh
from grok1.nn.transformer import forward, naming
from grok1.ops.quantized import QuantizedArray, dequantize, quantize
from tests.helpers import (
    cancelled_differences,
    count_collectives,
    named_params,
    relative_error,
    stack,
)

MESHES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)]


def run(engine: Engine, tokens: np.ndarray, chunk: int, capture=()):
    """Logits and captures of one row in one chunk."""
    batch = engine.batch_for(1)
    padded = np.zeros((batch, engine.capacity_for(len(tokens))), np.int32)
    padded[0, : len(tokens)] = tokens
    num_valid = np.zeros(batch, np.int32)
    num_valid[0] = len(tokens)
    _, logits, captured = engine.score(engine.new_state(padded), num_valid, chunk, capture)
    return np.asarray(logits)[0, : len(tokens)], jax.tree.map(np.asarray, captured)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_golden_numbers_on_every_mesh(mesh, nano_path, nano_reference):
    model = grok1.load(nano_path, mesh=mesh, dtype="float32", progress=False)
    capture = ("residual", "router_probs", "expert_indices")
    tokens = nano_reference["tokens"]
    logits, captured = run(model.engine, tokens, 64, capture)

    assert relative_error(logits, nano_reference["logits_f64"]) <= 2e-5
    np.testing.assert_array_equal(
        logits.argmax(axis=-1), nano_reference["logits_f64"].argmax(axis=-1)
    )
    count = len(tokens)
    for layer in range(model.config.num_layers):
        residual = captured["residual"][layer, 0, :count]
        assert relative_error(residual, nano_reference["residual"][layer]) <= 2e-5
        probs = captured["router_probs"][layer, :count]
        assert relative_error(probs, nano_reference["router_probs"][layer]) <= 2e-5
    np.testing.assert_array_equal(
        np.sort(captured["expert_indices"][:, :count]), np.sort(nano_reference["selected_experts"])
    )
    completion = model.generate(
        nano_reference["greedy_prompt"], max_new_tokens=32, temperature=0, ignore_eos=True
    )
    assert completion.tokens == nano_reference["greedy_tokens"].tolist()


def test_chunks_and_single_steps_equal_one_forward_pass(nano, nano_reference):
    tokens = nano_reference["tokens"]
    whole, _ = run(nano.engine, tokens, 64)
    engine = nano.engine
    padded = np.zeros((1, 96), np.int32)
    padded[0, : len(tokens)] = tokens
    state = engine.new_state(padded)
    found = []
    for count in (16, 3, 16):
        state, logits, _ = engine.score(state, np.array([count], np.int32), 16)
        found.append(np.asarray(logits)[0, :count])
    for _ in range(len(tokens) - 35):
        state, logits, _ = engine.score(state, np.array([1], np.int32), 16)
        found.append(np.asarray(logits)[0, :1])
    assert relative_error(np.concatenate(found), whole) <= 2e-5


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_bfloat16_with_the_chosen_experts_of_the_reference(mesh, nano_path, nano_reference):
    # In layer 1 an expert is chosen by 4e-4: whoever rounds otherwise, more finely too, chooses
    # others from there on. With the choices given, what is left is what products lose.
    model = grok1.load(nano_path, mesh=mesh, dtype="bfloat16", progress=False)
    expected = jax.nn.log_softmax(nano_reference["logits_f64"].astype(np.float32))
    choices = grok1.ForceExperts(nano_reference["selected_experts"])
    found = {}
    for cache_dtype in ("float16", "float32", "int8"):
        cached = grok1.Model(
            model.params, model.config, model.mesh, model.dtype, model.tensors, None, cache_dtype
        )
        with cached.intervene(choices) as forced:
            logits = jax.nn.log_softmax(forced.logits(nano_reference["tokens"]))
        divergence = jnp.sum(jnp.exp(expected) * (expected - logits), axis=-1).mean()
        found[cache_dtype] = float(divergence)
    # 1.2e-3 where the low term of the split is lost.
    assert found["float16"] <= 4e-4
    assert found["float32"] <= 4e-4
    assert found["int8"] <= 5e-3


def test_no_step_subtracts_a_number_from_itself(nano_config):
    # On a GPU a number that is rounded by converting it there and back is the number itself.
    mesh = make_mesh(nano_config, (1, 2))
    named = abstract_params(nano_config)
    params = abstract_stack(naming(nano_config).apply(named, None), nano_config, mesh)
    embedding = params.embedding
    params = params._replace(
        embedding=jax.ShapeDtypeStruct(embedding.shape, jnp.bfloat16, sharding=embedding.sharding)
    )
    engine = Engine(params, nano_config, mesh, "bfloat16", "int8")
    state = engine.abstract_state(1, 256)
    rows, *others = engine.abstract_decode_arguments(1)
    following = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    for program, arguments in (
        (engine.decode_program(2, None), others),
        (engine.token_score_program(16, 2), [following]),
    ):
        text = program.lower(engine.weights, state, rows, *arguments).as_text()
        assert "stablehlo.reduce_precision" in text
        assert cancelled_differences(text) == []


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("model_size", [1, 2, 4, 8, 16])
def test_int8_equals_its_dequantized_weights(model_size, groups):
    config = ModelConfig(
        vocab_size=48,
        emb_size=32,
        widening_factor=3,
        key_size=6,
        num_q_heads=16,
        num_kv_heads=8,
        num_layers=2,
        num_experts=5,
        num_selected_experts=2,
        sequence_len=24,
    )
    floats = naming(config, quantized=False).init(jax.random.key(groups))

    def round_weight(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim < 2 or "router" in name or "embed" in name:
            return leaf
        return quantize(leaf, groups if "linear" in name and "_v" not in name else 1)

    quantized = jax.tree.map_with_path(round_weight, floats)
    dequantized = jax.tree.map(
        dequantize, quantized, is_leaf=lambda node: isinstance(node, QuantizedArray)
    )
    tokens = np.arange(3, 20)
    expected, _ = forward(
        naming(config).apply(dequantized, None), config, jnp.asarray(tokens)[None]
    )
    mesh = make_mesh(config, (1, model_size))
    for named in (quantized, dequantized):
        engine = Engine(stack(named, config, mesh), config, mesh, "float32")
        logits, _ = run(engine, tokens, 64)
        assert relative_error(logits, expected[0]) <= 2e-5


@pytest.mark.parametrize(("num_experts", "num_selected"), [(1, 1), (7, 4)], ids=lambda n: str(n))
def test_any_number_of_experts(num_experts, num_selected):
    config = dataclasses.replace(
        grok1.TOY, num_layers=2, num_experts=num_experts, num_selected_experts=num_selected
    )
    model = grok1.random_model(config, mesh=(1, 1), dtype="float32", seed=5)
    tokens = np.arange(100, 120)
    params = naming(config).apply(named_params(model), None)
    expected, _ = forward(params, config, jnp.asarray(tokens)[None])
    assert relative_error(model.logits(tokens), expected[0]) <= 2e-5


@pytest.mark.parametrize(
    ("change", "mesh"),
    [({"router_softcap": 0.5}, (1, 1)), ({"renormalize_gates": True}, (2, 4))],
    ids=["router_softcap", "renormalize_gates"],
)
def test_other_routers_equal_the_readable_form(change, mesh, nano_path, nano_config):
    model = grok1.load(nano_path, mesh=mesh, dtype="float32", layers=2, progress=False, **change)
    tokens = np.arange(100, 120)
    params = naming(model.config).apply(named_params(model), None)
    expected, _ = forward(params, model.config, jnp.asarray(tokens)[None])
    released, _ = forward(params, nano_config.first_layers(2), jnp.asarray(tokens)[None])
    assert relative_error(model.logits(tokens), expected[0]) <= 2e-5
    # The norm after the experts makes up for most of it: what is left is the order of 1e-3.
    assert relative_error(released, expected) >= 1e-5


def test_what_is_not_captured_is_not_computed(nano):
    assert run(nano.engine, np.arange(5), 16)[1] == {}


def test_grok_1_compiles_for_eight_devices_from_shapes_alone():
    mesh = make_mesh(GROK_1, (1, 8))
    named = abstract_params(GROK_1)
    params = abstract_stack(naming(GROK_1).apply(named, None), GROK_1, mesh)
    engine = Engine(params, GROK_1, mesh, "bfloat16")
    compiled = (
        engine.decode_program(None, None)
        .lower(engine.weights, engine.abstract_state(1, 8192), *engine.abstract_decode_arguments(1))
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes <= 41e9
    assert memory.temp_size_in_bytes <= 0.5e9
    # Two all-reduces in the body of the loop over layers and one for the embedding, whose rows are
    # shared out; the gather is of the logits.
    collectives = count_collectives(compiled.as_text())
    assert collectives == {
        "all-reduce": 3,
        "all-gather": 1,
        "all-to-all": 0,
        "collective-permute": 0,
        "reduce-scatter": 0,
    }
