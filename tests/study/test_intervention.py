"""Interventions: what changes nothing, what must change how much, and what is compiled."""

import dataclasses

import jax
import numpy as np
import pytest

import grok1
from grok1.engine.engine import Engine
from grok1.nn.hooks import STREAM_POINTS
from grok1.ops.quantized import QuantizedArray
from grok1.study.router_interventions import AblateExperts, ForceExperts, SelectExperts
from grok1.study.stream_interventions import AddToResidual, CapLayers, Patch, ScaleHeads
from tests.helpers import relative_error, slow
from tests.one_device import within
from tests.study.helpers import ALL, logits_with


@pytest.fixture(params=[(1, 1), pytest.param((2, 4), marks=slow)], ids=["1x1", "2x4"])
def model(request, nano_on_mesh) -> grok1.Model:
    return nano_on_mesh(request.param)


def neutral(trace) -> dict:
    """Interventions that leave the traced run as it is, by what they do."""
    return {
        "ablate none": AblateExperts(()),
        "exclude none": AblateExperts((), reroute=True),
        "force the chosen": ForceExperts(trace.expert_indices),
        "force the chosen with their weights": ForceExperts(
            trace.expert_indices, trace.expert_weights
        ),
        "select as many": SelectExperts(2),
        "add nothing": AddToResidual(np.zeros(64)),
        "scale by 1": ScaleHeads(range(16), 1.0),
        **{f"patch {point}": Patch(point, trace) for point in (*STREAM_POINTS, "router")},
    }


def test_what_changes_nothing_in_any_layer(nano_on_mesh, tokens):
    # Rows, heads and experts are shared out.
    model = nano_on_mesh(within((2, 4)))
    before = model.trace(tokens, (*ALL, "logits"))
    # Each in a layer of its own, so that none repairs what another breaks.
    interventions = [
        dataclasses.replace(intervention, layers=layer % 12)
        for layer, intervention in enumerate(neutral(before).values())
    ]
    with model.intervene(*interventions, CapLayers(12)) as changed:
        after = changed.trace(tokens, (*ALL, "logits"))
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=2e-4, atol=2e-5)
        assert relative_error(after[name], before[name]) <= 2e-5, name


# Each in a layer above.
@slow
@pytest.mark.parametrize(
    "name",
    ["patch router", "ablate none", "patch residual_mid"],
)
def test_what_changes_nothing_in_all_layers(nano, tokens, name):
    intervention = neutral(nano.trace(tokens, ALL))[name]
    assert relative_error(logits_with(nano, tokens, intervention), nano.logits(tokens)) <= 2e-5


@pytest.mark.parametrize("layer", [pytest.param(0, marks=slow), 7])
def test_a_patched_residual_makes_the_other_run_from_there_on(model, tokens, layer):
    other = tokens[::-1].copy()
    recorded = model.trace(other, (*ALL, "logits"))
    unpatched = model.trace(tokens, ALL)
    with model.intervene(Patch("residual", recorded, layers=layer)) as changed:
        trace = changed.trace(tokens, (*ALL, "logits"))
        assert relative_error(changed.logits(tokens), recorded.logits) <= 2e-5
    assert relative_error(trace.logits, recorded.logits) <= 2e-5
    assert relative_error(trace.residual[layer:], recorded.residual[layer:]) <= 2e-5
    before = np.s_[: layer + 1]
    assert relative_error(trace.residual_mid[before], unpatched.residual_mid[before]) <= 2e-6


def test_layers_and_positions_bound_what_is_changed(model, tokens):
    before = model.trace(tokens, ALL)
    with model.intervene(SelectExperts(4, layers=(2, 5), positions=(7, 20))) as changed:
        after = changed.trace(tokens, ALL)
    assert after.expert_indices.shape == (12, len(tokens), 4)
    ran = (after.expert_indices >= 0).sum(axis=-1)
    expected = np.full(ran.shape, 2)
    expected[np.ix_((2, 5), (7, 20))] = 4
    np.testing.assert_array_equal(ran, expected)
    np.testing.assert_array_equal(after.expert_weights[after.expert_indices < 0], 0)
    # Nothing changes before the first of these layers, nor at the tokens before.
    assert relative_error(after.residual[:2], before.residual[:2]) <= 1e-6
    assert relative_error(after.residual[:, :7], before.residual[:, :7]) <= 2e-5
    assert relative_error(after.residual[2, 7], before.residual[2, 7]) >= 1e-3


@pytest.mark.parametrize("point", ["residual_in", "residual_mid", "residual"])
def test_a_vector_is_added_where_it_is_asked_for(model, tokens, point):
    vector = np.linspace(-1, 1, 64, dtype=np.float32)
    before = model.trace(tokens, ALL)
    with model.intervene(AddToResidual(vector, point, layers=3, positions=9)) as changed:
        after = changed.trace(tokens, ALL)
    expected = before[point][3].copy()
    expected[9] += vector
    assert relative_error(after[point][3], expected) <= 2e-6


def test_a_vector_a_layer_is_added_in_several_layers(model, tokens):
    vector = np.linspace(-1, 1, 64, dtype=np.float32)
    before = model.trace(tokens, ALL)
    with model.intervene(AddToResidual(np.stack([vector, 2 * vector]), layers=(3, 1))) as changed:
        after = changed.trace(tokens, ALL)
    assert relative_error(after.residual[1], before.residual[1] + 2 * vector) <= 2e-6
    expected = after.residual_mid[3] + after.moe_out[3] + vector
    assert relative_error(after.residual[3], expected) <= 2e-6


def test_capped_layers_equal_a_model_of_fewer(model, nano_path, tokens):
    short = grok1.load(nano_path, mesh=(1, 1), dtype="float32", layers=5, progress=False)
    found = logits_with(model, tokens, CapLayers(5))
    assert relative_error(found, short.logits(tokens)) <= 2e-5


def test_a_scaled_head_equals_scaled_rows_of_the_output_projection(model, tokens):
    config, layer, heads = model.config, 4, (2, 9)
    weight = model.params.layers.attention_out
    assert isinstance(weight, QuantizedArray)
    rows = np.isin(np.arange(config.num_q_heads * config.key_size) // config.key_size, heads)
    values = np.array(weight.values)
    values[layer, rows] = 0
    zeroed = QuantizedArray(jax.device_put(values, weight.values.sharding), weight.scales)
    layers = model.params.layers._replace(attention_out=zeroed)
    other = grok1.Model(
        model.params._replace(layers=layers), config, model.mesh, "float32", model.tensors
    )
    found = logits_with(model, tokens, ScaleHeads(heads, layers=layer))
    assert relative_error(found, other.logits(tokens)) <= 2e-5
    # Scaling twice by a half is scaling by a quarter.
    twice = logits_with(model, tokens, ScaleHeads(3, 0.5), ScaleHeads(3, 0.5))
    assert relative_error(twice, logits_with(model, tokens, ScaleHeads(3, 0.25))) <= 2e-5


def test_interventions_compose_in_order_and_nest(nano, tokens):
    vector = np.ones(64, np.float32)
    trace = nano.trace(tokens, ALL)
    patch, add = Patch("residual", trace, layers=5), AddToResidual(vector, layers=5)
    before = nano.logits(tokens)
    added = logits_with(nano, tokens, add)
    assert relative_error(logits_with(nano, tokens, add, patch), before) <= 2e-5
    assert relative_error(logits_with(nano, tokens, patch, add), added) <= 2e-5
    with nano.intervene(patch) as outer, outer.intervene(add) as inner:
        assert relative_error(inner.logits(tokens), added) <= 2e-5
        assert relative_error(outer.logits(tokens), before) <= 2e-5
    with nano.intervene(SelectExperts(3), AblateExperts(2, reroute=True)) as changed:
        routed = changed.trace(tokens, ("router",))
    assert not (routed.expert_indices == 2).any()
    assert routed.expert_indices.shape[-1] == 3
    assert nano.engine.params is nano.params
    np.testing.assert_array_equal(nano.logits(tokens), before)


def test_what_acts_keeps_the_numbers_that_it_was_given(nano, tokens):
    vector, recorded = np.ones(64), nano.trace(tokens, ALL)
    given = (
        AddToResidual(vector, layers=5),
        Patch("moe_out", recorded, layers=2),
        ForceExperts(recorded.expert_indices, layers=3),
    )
    with nano.intervene(*given) as outer:
        expected = outer.logits(tokens)
        for array in (vector, recorded.moe_out, recorded.expert_indices):
            array[...] = 0
        with outer.intervene(ScaleHeads((), 0.5)) as inner:
            np.testing.assert_allclose(inner.logits(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("point", ["moe_out", "router"])
def test_a_patch_comes_from_a_file_that_is_closed(nano, tokens, point, tmp_path):
    recorded = nano.trace(tokens[::-1], ALL)
    np.savez(tmp_path / "trace.npz", **recorded)
    expected = logits_with(nano, tokens, Patch(point, recorded, layers=3))
    with np.load(tmp_path / "trace.npz") as file:
        changed = nano.intervene(Patch(point, file, layers=3))
    np.testing.assert_array_equal(changed.logits(tokens), expected)
    with pytest.raises(ValueError, match=f"^Patch: values are of {len(tokens)} tokens and the"):
        changed.logits(tokens[1:])


def test_generation_is_changed_in_prefill_and_in_every_step(model, nano, tokens):
    interventions = (
        AblateExperts(3, reroute=True),
        ScaleHeads((0, 5), layers=range(6)),
        # From the 10th token on, new ones included.
        AddToResidual(np.linspace(-1, 2, 64), layers=7, positions=slice(10, None)),
    )
    prompt = tokens[:20]
    options = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    with model.intervene(*interventions) as changed:
        completion, trace = changed.trace_generation(prompt, ("router",), **options)
        logits = changed.logits([*prompt, *completion.tokens[:-1]])
    assert completion.tokens == logits[len(prompt) - 1 :].argmax(axis=-1).tolist()
    assert not (trace.expert_indices == 3).any()
    assert completion.tokens != nano.generate(prompt, **options).tokens


def test_a_patched_prompt_leaves_the_new_tokens_alone(nano, tokens):
    prompt, other = tokens[:20], tokens[20:40]
    options = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    recorded = nano.trace(other, ALL)
    with nano.intervene(*(Patch("residual_in", recorded, layers=0),)) as changed:
        # The first layer's input is all that a token is.
        assert changed.generate(prompt, **options) == nano.generate(other, **options)


def test_a_sweep_compiles_once(nano, tokens):
    def executables():
        own = nano.engine._programs.held
        views = [own, *own._views.values()]
        return sum(len(one.executables) for view in views for one in view.values())

    trace = nano.trace(tokens, ALL)

    def sweep(layer):
        vector = np.full(64, layer, np.float32)
        return (
            AddToResidual(vector, layers=layer, positions=layer),
            Patch("residual_mid", trace, layers=layer),
            AblateExperts(layer % 8, layers=layer),
            ForceExperts((layer % 8, (layer + 1) % 8), layers=layer),
            ScaleHeads(layer, layers=layer),
            CapLayers(layer),
        )

    logits_with(nano, tokens, *sweep(0))
    compiled = executables()
    found = [logits_with(nano, tokens, *sweep(layer)) for layer in (3, 8)]
    assert executables() == compiled
    assert relative_error(found[0], found[1]) >= 1e-2


def test_what_is_compiled_is_a_part_of_the_identity(nano):
    identities = set()
    vector = np.ones(64, np.float32)
    for interventions in (
        (),
        (AddToResidual(vector),),
        (AddToResidual(vector, "residual_in"),),
        (AddToResidual(vector, positions=3),),
        (SelectExperts(1),),
        (SelectExperts(2),),
        (AblateExperts(1),),
        (AblateExperts(1, reroute=True),),
    ):
        engine: Engine = nano.intervene(*interventions).engine
        identities.add(engine.prefill_program(16)._identity)
        identities.add(engine.score_program(16, ("residual",))._identity)
    assert len(identities) == 16


def test_scores_are_those_of_the_changed_model(nano, tokens):
    with nano.intervene(AblateExperts(0), ScaleHeads(1, 0.5, layers=2)) as changed:
        logits = changed.logits(tokens).astype(np.float64)
        score = changed.score(tokens)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = np.take_along_axis(logprobs[:-1], np.asarray(tokens)[1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(score.logprobs[1:], expected, rtol=0, atol=1e-5)
    assert np.abs(nano.score(tokens).logprobs[1:] - expected).max() > 0.01
