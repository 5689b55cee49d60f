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


@pytest.fixture
def launched(monkeypatch):
    """Has programs for CPUs take the forms for NVIDIA GPUs; the kernels that are run, by name."""
    names = []
    run = standin.run_once

    def noted(library, kernel, *inputs):
        names.append(kernel.name.removeprefix("grok1_"))
        return run(library, kernel, *inputs)

    for operation, table in forms.PREFERRED.items():
        if operation != "logits":  # whose form there is XLA's, and not for CPUs
            monkeypatch.setitem(table, "cpu", table.get("cuda", table["default"]))
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    monkeypatch.setattr(calls, "call", standin.call)
    monkeypatch.setattr(standin, "run_once", noted)
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
