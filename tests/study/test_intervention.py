"""Interventions: what changes nothing, what must change how much, and what is refused."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1.engine.engine import Engine
from grok1.nn.hooks import STREAM_POINTS, redirect
from grok1.ops.experts import experts_dense
from grok1.ops.quantized import QuantizedArray
from grok1.ops.routing import Routing, choose_experts
from grok1.study.intervention import prepare
from grok1.study.router_interventions import AblateExperts, ForceExperts, SelectExperts
from grok1.study.stream_interventions import AddToResidual, CapLayers, Patch, ScaleHeads
from tests.helpers import named_params, readable, relative_error, slow
from tests.one_device import within

ALL = ("router", "residual", "branches")


@pytest.fixture(params=[(1, 1), pytest.param((2, 4), marks=slow)], ids=["1x1", "2x4"])
def model(request, nano_on_mesh) -> grok1.Model:
    return nano_on_mesh(request.param)


@pytest.fixture(scope="module")
def one_layer(nano_path) -> grok1.Model:
    return grok1.load(nano_path, mesh=(1, 1), dtype="float32", layers=1, progress=False)


@pytest.fixture(scope="module")
def tokens(nano_reference) -> np.ndarray:
    return nano_reference["tokens"]


def logits_with(model: grok1.Model, tokens, *interventions) -> np.ndarray:
    with model.intervene(*interventions) as changed:
        return changed.logits(tokens)


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


def pick(probs, count, without=()):
    probs = jnp.where(jnp.isin(jnp.arange(probs.shape[-1]), jnp.array(without, int)), 0, probs)
    probs /= probs.sum(axis=-1, keepdims=True)
    return Routing(probs, *jax.lax.top_k(probs, count)[::-1])


def ablated(routing):
    hit = jnp.isin(routing.expert_indices, jnp.array([1, 6]))
    return routing._replace(expert_weights=jnp.where(hit, 0, routing.expert_weights))


def forced(routing):
    indices = jnp.broadcast_to(jnp.array([5, 0, 3]), (len(routing.probs), 3))
    return Routing(routing.probs, indices, jnp.take_along_axis(routing.probs, indices, -1))


def weighted(routing):
    indices = jnp.broadcast_to(jnp.array([5, 0]), (len(routing.probs), 2))
    return Routing(routing.probs, indices, jnp.full(indices.shape, 0.5))


# What becomes of a router's choice is held by hand for all of them, below.
@pytest.mark.parametrize(
    ("intervention", "change"),
    [
        (AblateExperts((1, 6)), ablated),
        (SelectExperts(3), lambda routing: pick(routing.probs, 3)),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                (
                    AblateExperts((1, 6), reroute=True),
                    lambda routing: pick(routing.probs, 2, (1, 6)),
                ),
                (ForceExperts((5, 0, 3)), forced),
                (ForceExperts((5, 0), (0.5, 0.5)), weighted),
                (SelectExperts(1), lambda routing: pick(routing.probs, 1)),
            )
        ),
    ],
    ids=lambda of: "" if callable(of) else repr(of),
)
def test_expert_interventions_against_the_readable_form(one_layer, tokens, intervention, change):
    def experts(x, weights, index, routing):
        return experts_dense(x, weights, index, change(routing))

    found = logits_with(one_layer, tokens, intervention)
    named = named_params(one_layer)
    expected, _ = readable(named, one_layer.config, tokens, experts=experts)
    assert relative_error(found, expected) <= 2e-5
    assert relative_error(found, one_layer.logits(tokens)) >= 1e-3


ON_EXPERTS = {
    "ablate": AblateExperts((3, 1)),
    "reroute": AblateExperts((4, 6), reroute=True),
    "reroute none": AblateExperts((), reroute=True),
    "select": SelectExperts(3),
    "force": ForceExperts((1, 5)),
    "force with weights": ForceExperts((3, 4, 0), (0.2, 0.3, 0.5)),
}


def routed_by_hand(probs, names) -> dict[int, float]:
    """One token's experts and their weights, after interventions of `ON_EXPERTS` in turn."""
    excluded: set[int] = set()
    ablated: set[int] = set()
    count = 2

    def best():
        left = {e: p for e, p in enumerate(probs) if e not in excluded}
        chosen = sorted(left, key=lambda e: -left[e])[:count]
        return {e: left[e] / sum(left.values()) for e in chosen}, left

    chosen, left = best()
    for name in names:
        if name == "ablate":
            ablated |= {3, 1}
        elif name == "reroute":
            excluded |= {4, 6}
            chosen, left = best()
        elif name == "select":
            count = 3
            chosen, left = best()
        elif name == "force":
            chosen = {e: left.get(e, 0) / sum(left.values()) for e in (1, 5)}
            ablated = set()
        elif name == "force with weights":
            chosen, ablated = {3: 0.2, 4: 0.3, 0: 0.5}, set()
    return {e: weight for e, weight in chosen.items() if e not in ablated and weight}


@pytest.mark.parametrize(
    "names", list(itertools.permutations(ON_EXPERTS, 2)), ids=lambda names: " then ".join(names)
)
def test_interventions_on_experts_do_not_undo_one_another(names):
    config = dataclasses.replace(grok1.TOY, num_layers=1)
    interventions = [ON_EXPERTS[name] for name in names]
    if names[0].startswith("force") and names[1] in ("reroute", "select"):
        message = (
            r"^(AblateExperts|SelectExperts): .* layer 0 choose anew where ForceExperts, which"
        )
        with pytest.raises(ValueError, match=message):
            prepare(interventions, config)
        return
    logits = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    routing = choose_experts(jnp.asarray(logits), 2)
    hooks = [hook for _, hook in prepare(interventions, config)]
    found = redirect(hooks, logits, routing, 0, np.arange(40))
    probs = np.asarray(routing.probs, np.float64)
    for token in range(40):
        indices, weights = found.expert_indices[token].tolist(), found.expert_weights[token]
        ran = {e: float(w) for e, w in zip(indices, weights, strict=True) if e < 8}
        assert ran == pytest.approx(routed_by_hand(probs[token], names), rel=1e-5)
        assert all(w == 0 for e, w in zip(indices, weights, strict=True) if e == 8)


def test_what_is_forced_may_be_chosen_anew_elsewhere(nano, tokens):
    trace = nano.trace(tokens[:10], ALL)
    patch = Patch("router", trace, layers=(2, 3))
    for later in (
        SelectExperts(3, layers=(1, 4)),
        SelectExperts(3, positions=range(10, 20)),
        AblateExperts(2, reroute=True, positions=10),
    ):
        prepare([patch, later], nano.config)
    message = "^SelectExperts: it lets the router of layer 3 choose anew where Patch, which comes"
    later = SelectExperts(3, layers=3, positions=9)
    with pytest.raises(ValueError, match=message):
        prepare([patch, later], nano.config)
    with nano.intervene(patch) as changed, pytest.raises(ValueError, match=message):
        changed.intervene(later)
    prepare([SelectExperts(3), patch], nano.config)


def test_expert_interventions_keep_renormalising_where_the_model_does(nano_path, tokens):
    model = grok1.load(
        nano_path, mesh=(1, 1), dtype="float32", layers=3, renormalize_gates=True, progress=False
    )
    with model.intervene(
        SelectExperts(3, layers=0),
        ForceExperts((1, 2, 3), layers=1),
        AblateExperts((1, 2), reroute=True, layers=2),
    ) as changed:
        trace = changed.trace(tokens, ("router",))
    np.testing.assert_allclose(trace.expert_weights.sum(axis=-1), 1, rtol=1e-6)
    assert (trace.expert_indices[1] == (1, 2, 3)).all()
    assert not np.isin(trace.expert_indices[2], (1, 2)).any()
    np.testing.assert_array_equal(trace.router_probs[2, :, 1:3], 0)


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


def test_two_ablations_that_leave_no_expert_leave_zeros(nano, tokens):
    halves = (AblateExperts(range(4), reroute=True), AblateExperts(range(4, 8), reroute=True))
    with nano.intervene(*halves) as changed:
        trace = changed.trace(tokens, ALL)
    assert (trace.expert_indices == -1).all()
    assert not trace.router_probs.any()
    np.testing.assert_array_equal(trace.moe_out, 0)
    np.testing.assert_array_equal(trace.expert_load(), 0)


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


def test_iterators_serve_more_than_once(nano, tokens):
    def made(kind):
        return (
            AblateExperts(kind((1, 2)), layers=kind((0, 5))),
            ForceExperts(kind((3, 4)), layers=kind((1,))),
            ScaleHeads(kind((0, 7)), positions=kind((2, 3))),
        )

    with nano.intervene(*made(tuple)) as outer, outer.intervene(AblateExperts(0)) as inner:
        expected = inner.logits(tokens)
    for kind in (iter, lambda numbers: dict.fromkeys(numbers).keys()):
        with nano.intervene(*made(kind)) as outer, outer.intervene(AblateExperts(0)) as inner:
            np.testing.assert_array_equal(inner.logits(tokens), expected)
    assert repr(ScaleHeads(iter((0, 7)))) == "ScaleHeads(heads=(0, 7), factor=0.0)"


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


def of_any_type(value: Any) -> Any:
    """A value that a type checker would refuse, too."""
    return value


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (AblateExperts(8), "^AblateExperts: experts must be from 0 to 7, found 8$"),
        (AblateExperts(-1), "^AblateExperts: experts must be from 0 to 7, found -1$"),
        (
            AblateExperts(of_any_type(1.5)),
            "^AblateExperts: experts must be whole numbers, found 1.5$",
        ),
        (
            AblateExperts(of_any_type("12")),
            "^AblateExperts: experts must be whole numbers, found '12'$",
        ),
        (AblateExperts(range(8), reroute=True), "^AblateExperts: reroute leaves no expert"),
        (
            AblateExperts(1, reroute=of_any_type("no")),
            "^AblateExperts: reroute must be True or False, found 'no'$",
        ),
        (AblateExperts(1, layers=12), "^AblateExperts: layers must be from 0 to 11, found 12$"),
        (
            AblateExperts(1, layers=(0, -1)),
            "^AblateExperts: layers must be from 0 to 11, found -1$",
        ),
        (
            AblateExperts(1, positions=96),
            "^AblateExperts: positions must be from 0 to 95, found 96",
        ),
        (
            AblateExperts(1, positions=(3, -1)),
            "^AblateExperts: positions must be from 0 to 95, found -1$",
        ),
        (
            AblateExperts(1, positions=slice(-3, None)),
            "^AblateExperts: positions must be from 0 to 95, found -3$",
        ),
        (
            AblateExperts(1, positions=slice(96, None)),
            "^AblateExperts: positions must be from 0 to 95, found 96$",
        ),
        (
            AblateExperts(1, positions=slice(3, 9)),
            r"^AblateExperts: positions as a slice go on to the end, .* found slice\(3, 9, None\)$",
        ),
        (
            ScaleHeads(1, positions=()),
            "^ScaleHeads: positions names none; name at least one, or leave positions= out for all",
        ),
        (
            AblateExperts(1, layers=np.zeros(0, int)),
            "^AblateExperts: layers names none; name at least one, or leave layers= out for all$",
        ),
        (
            AddToResidual(np.zeros((2, 64)), layers=(3, 3)),
            r"^AddToResidual: layers must differ where each has vectors of its own, found \(3, 3\)",
        ),
        *(
            (
                kind(np.zeros((12, *shape), int), layers=range(11, -1, -1)),
                f"^[A-Za-z]+: {what} of all 12 layers may be in their order or in that of",
            )
            for kind, shape, what in (
                (AddToResidual, (64,), "vectors"),
                (ForceExperts, (5, 1), "experts"),
                (functools.partial(Patch, "residual"), (5, 64), "values"),
            )
        ),
        (
            ForceExperts(np.zeros((2, 5, 1), int), layers=(3, 3)),
            r"^ForceExperts: layers must differ where each has experts of its own, found \(3, 3\)",
        ),
        (
            Patch("residual", np.zeros((12, 3, 64)), positions=slice(3, None)),
            "^Patch: positions must be from 0 to 2, found 3$",
        ),
        (ForceExperts((1, 1)), "^ForceExperts: the experts of a token must differ"),
        (ForceExperts((1, 8)), "^ForceExperts: experts must be from 0 to 7, found 8$"),
        (ForceExperts((1, -1)), "^ForceExperts: experts must be from 0 to 7, found -1$"),
        (ForceExperts(0.5), "^ForceExperts: experts must be whole numbers, found float64$"),
        (ForceExperts([[1, 2]]), r"^ForceExperts: .*array \[layers, tokens, experts\].*\[1, 2\]$"),
        (
            ForceExperts((1, 2), (0.5,)),
            r"^ForceExperts: weights must have the shape of experts, \[2\], found \[1\]$",
        ),
        (
            ForceExperts(np.zeros((3, 5, 1), int), layers=(1, 2)),
            "^ForceExperts: experts are of 3 layers; give those of the 2 that layers= names, or of "
            "all 12$",
        ),
        (SelectExperts(0), "^SelectExperts: count must be from 1 to 8, found 0$"),
        (SelectExperts(9), "^SelectExperts: count must be from 1 to 8, found 9$"),
        (CapLayers(13), "^CapLayers: num_layers must be from 0 to 12, found 13$"),
        (CapLayers([2, 3]), r"^CapLayers: num_layers must be from 0 to 12, found \[2, 3\]$"),
        (CapLayers(3, layers=2), "^CapLayers: layers= has no meaning here"),
        (
            AddToResidual(np.zeros(63)),
            r"^AddToResidual: vector must have shape \[64\] or \[layers, 64\], found \[63\]$",
        ),
        (AddToResidual(np.full(64, np.nan)), "^AddToResidual: vector must be finite numbers$"),
        (AddToResidual(["a"]), "^AddToResidual: vector must be numbers, found"),
        (AddToResidual(["1"] * 64), "^AddToResidual: vector must be numbers, found"),
        (AddToResidual(np.ones(64, complex)), "^AddToResidual: vector must be numbers, found"),
        (Patch("residual", of_any_type(None)), "^Patch: values must be numbers, found None$"),
        (ScaleHeads(1, of_any_type(None)), "^ScaleHeads: factor must be numbers, found None$"),
        (
            AddToResidual(np.zeros(64), "moe_out"),
            "^AddToResidual: point must be one of residual_in, residual_mid, residual, found",
        ),
        (AddToResidual(np.zeros((3, 64))), "^AddToResidual: vectors are of 3 layers"),
        (Patch("heads", np.zeros((12, 3, 64))), "^Patch: point must be one of .*, router, found"),
        *(
            (
                Patch(
                    "router", {"expert_indices": experts, "expert_weights": experts / 2}, **where
                ),
                f"^Patch: {message}",
            )
            for experts, where, message in (
                (np.full((3, 5, 1), 4), {}, "experts are of 3 layers; give those of the 12 that"),
                (np.full((12, 5, 1), 8), {}, "experts must be from 0 to 7, found 8$"),
                (np.full((12, 5, 1), 4), {"positions": 5}, "positions must be from 0 to 4, fou"),
                (np.full((12, 5, 1), 4), {"layers": 12}, "layers must be from 0 to 11, found 12$"),
            )
        ),
        (
            Patch("router", dict.fromkeys(("expert_indices", "expert_weights"), np.ones(2, int))),
            r"^Patch: expert_indices must have shape \[layers, tokens, experts\], found \[2\]$",
        ),
        (Patch("router", np.zeros((12, 3, 2))), '^Patch: at the point "router" values must be a'),
        (Patch("residual", {}), "^Patch: the trace has no residual; it has nothing$"),
        (
            Patch("residual", np.zeros((12, 3, 63))),
            r"^Patch: values must have shape \[layers, tokens, 64\], found \[12, 3, 63\]$",
        ),
        (
            Patch("residual", np.zeros((12, 97, 64)), positions=96),
            "^Patch: positions must be from 0 to 95, found 96$",
        ),
        (Patch("residual", np.zeros((12, 97, 64))), "^Patch: values are of 97 tokens, and the con"),
        (
            Patch("residual", np.zeros((12, 3, 64)), positions=3),
            "^Patch: positions must be from 0 to 2, found 3$",
        ),
        (ScaleHeads(16), "^ScaleHeads: heads must be from 0 to 15, found 16$"),
        (AddToResidual(np.full(64, 1e300)), "^AddToResidual: vector must be finite numbers$"),
        (ScaleHeads(1, float("inf")), "^ScaleHeads: factor must be finite numbers$"),
        (
            ScaleHeads(1, of_any_type((1.0, 2.0))),
            r"^ScaleHeads: factor must be one number, found shape \[2\]$",
        ),
    ],
)
def test_bad_input(nano, intervention, message):
    with pytest.raises(ValueError, match=message), nano.intervene(intervention):
        pass


def test_arrays_without_axes_are_numbers(nano, tokens):
    for three in (np.int64(3), np.array(3), jnp.int32(3)):
        given = AblateExperts(of_any_type(three), layers=of_any_type(three))
        expected = nano.intervene(AblateExperts(3, layers=3)).logits(tokens)
        np.testing.assert_array_equal(nano.intervene(given).logits(tokens), expected)


def test_numbers_too_small_for_float32_are_zero_whatever_numpy_is_told(nano):
    with np.errstate(all="raise"):
        nano.intervene(AddToResidual(np.full(64, 1e-50)), ScaleHeads(1, 1e-42))
        with pytest.raises(ValueError, match=r"^ScaleHeads: factor must be finite numbers$"):
            nano.intervene(ScaleHeads(1, 1e42))


def test_only_interventions_intervene(nano):
    message = r"^intervene takes interventions .* found int$"
    with pytest.raises(TypeError, match=message), nano.intervene(of_any_type(3)):
        pass


def test_scores_are_those_of_the_changed_model(nano, tokens):
    with nano.intervene(AblateExperts(0), ScaleHeads(1, 0.5, layers=2)) as changed:
        logits = changed.logits(tokens).astype(np.float64)
        score = changed.score(tokens)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = np.take_along_axis(logprobs[:-1], np.asarray(tokens)[1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(score.logprobs[1:], expected, rtol=0, atol=1e-5)
    assert np.abs(nano.score(tokens).logprobs[1:] - expected).max() > 0.01
