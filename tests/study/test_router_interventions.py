"""Interventions on experts: the readable form, choices made by hand, and one after another."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1.nn.hooks import redirect
from grok1.ops.experts import experts_dense
from grok1.ops.routing import Routing, choose_experts
from grok1.study.intervention import prepare
from grok1.study.router_interventions import AblateExperts, ForceExperts, SelectExperts
from grok1.study.stream_interventions import Patch
from tests.helpers import named_params, readable, relative_error, slow
from tests.study.helpers import ALL, logits_with


@pytest.fixture(scope="module")
def one_layer(nano_path) -> grok1.Model:
    return grok1.load(nano_path, mesh=(1, 1), dtype="float32", layers=1, progress=False)


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


def test_two_ablations_that_leave_no_expert_leave_zeros(nano, tokens):
    halves = (AblateExperts(range(4), reroute=True), AblateExperts(range(4, 8), reroute=True))
    with nano.intervene(*halves) as changed:
        trace = changed.trace(tokens, ALL)
    assert (trace.expert_indices == -1).all()
    assert not trace.router_probs.any()
    np.testing.assert_array_equal(trace.moe_out, 0)
    np.testing.assert_array_equal(trace.expert_load(), 0)
