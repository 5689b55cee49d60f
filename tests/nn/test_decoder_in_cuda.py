"""A step of the whole model in CUDA kernels, on a CPU in place of a device."""

import numpy as np
import pytest

import grok1
from grok1.ops import forms
from grok1.ops.cpu import bindings
from grok1.ops.cuda import calls, presence
from tests.helpers import relative_error
from tests.ops import standin

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")


class Launches(list[str]):
    """The kernels that are run, by name."""

    def __init__(self):
        super().__init__()
        self.asked = {}
        """By name, for each launch, where it asked for lines of an input."""


@pytest.fixture
def launched(monkeypatch):
    """Has programs for CPUs take the forms for NVIDIA GPUs."""
    names = Launches()
    run = standin.run

    def noted(library, kernel, *inputs):
        name = kernel.name.removeprefix("grok1_")
        names.append(name)
        outputs = run(library, kernel, *inputs)
        asked = [places for places in library.asked if places]
        names.asked.setdefault(name, []).extend(asked or [[]])
        return outputs

    for operation, table in forms.PREFERRED.items():
        if operation != "logits":  # whose form there is XLA's, and not for CPUs
            monkeypatch.setitem(table, "cpu", table.get("cuda", table["default"]))
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    monkeypatch.setattr(calls, "call", standin.call)
    monkeypatch.setattr(standin, "run", noted)
    with presence.assumed():
        yield names


@pytest.mark.parametrize(
    ("length", "attention"), [(1, ["place_and_attend"]), (3, ["place", "attend"])]
)
def test_a_layer_of_a_step_is_seven_launches_and_exact(
    length, attention, launched, nano_path, nano_reference
):
    model = grok1.load(nano_path, mesh=(1, 1), dtype="float32", progress=False)
    tokens = nano_reference["tokens"][:3]
    state = model.engine.new_state(tokens[None].astype(np.int32))
    found = []
    for _ in range(0, len(tokens), length):
        state, logits, _ = model.engine.score(state, np.array([length], np.int32), length)
        found.extend(np.asarray(logits)[0])
    assert relative_error(np.stack(found), nano_reference["logits_f64"][: len(tokens)]) <= 2e-5
    layer = ["project", *attention, "project", "add_and_route", "gate_up", "down"]
    step = ["norm", *[*layer, "add_norm_and_norm"] * model.config.num_layers]
    assert launched == step * (len(tokens) // length)


def test_what_looks_at_a_layer_takes_it_apart(launched, nano_path, nano_reference):
    model = grok1.load(nano_path, mesh=(1, 1), dtype="float32", progress=False)
    tokens = nano_reference["tokens"][:1]
    state = model.engine.new_state(tokens[None].astype(np.int32))
    capture = ("residual_in", "attention_out", "residual_mid", "moe_out", "residual")
    _, logits, captured = model.engine.score(state, np.array([1], np.int32), 1, capture)
    assert relative_error(np.asarray(logits)[0, 0], nano_reference["logits_f64"][0]) <= 2e-5
    for layer, expected in enumerate(nano_reference["residual"][:, 0]):
        assert relative_error(np.asarray(captured["residual"])[layer, 0, 0], expected) <= 2e-5
    before = "norm", "project", "place_and_attend", "project", "norm", "norm", "route"
    layer = *before, "gate_up", "down", "norm"
    assert launched == [*layer * model.config.num_layers, "norm"]


def test_a_step_asks_for_the_matrices_that_its_next_kernels_read(launched, nano_path):
    model = grok1.load(nano_path, mesh=(1, 1), dtype="float32", progress=False)
    state = model.engine.new_state(np.array([[7]], np.int32))
    *_, captured = model.engine.score(state, np.array([1], np.int32), 1, ("expert_indices",))
    layers, params = range(model.config.num_layers), model.engine.params.layers
    # They are as small as to be asked for whole.
    query, back = (np.prod(of.shape[1:]) for of in (params.query, params.attention_out))
    places = launched.asked["place_and_attend"]
    assert [(of[0], of[-1]) for of in places] == [(i * back, (i + 1) * back - 128) for i in layers]
    places = launched.asked["add_norm_and_norm"]
    assert [(of[0], of[-1]) for of in places[:-1]] == [
        (i * query, (i + 1) * query - 128) for i in layers[1:]
    ]
    assert places[-1] == []  # behind the last layer there is none
    size = np.prod(params.experts.down.shape[2:])
    for layer, of in enumerate(launched.asked["gate_up"]):
        chosen = np.asarray(captured["expert_indices"])[layer, 0, :2]
        assert {at // size - 8 * layer for at in of} == set(chosen.tolist())
