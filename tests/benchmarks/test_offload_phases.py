"""Where the time of an offloaded step goes."""

import pytest

import grok1
from benchmarks import offload_phases
from grok1.offload import runner
from grok1.planning import budget

_GREEDY = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}


def test_the_phases_of_steps_are_within_them(nano_path, monkeypatch):
    for module in (budget, runner):
        monkeypatch.setattr(module, "WORKING_BYTES", 0)
    monkeypatch.setattr(runner, "runs_by_layer", lambda device: True)
    model = grok1.load(nano_path, mesh=(1, 1), progress=False, offload="disk", memory=2, layers=1)
    model.generate([5], **_GREEDY)
    phases = offload_phases.StepPhases()
    with phases.watched():
        model.generate([5], **_GREEDY)
    assert phases.num_steps == 4
    assert 0 < phases.seconds["step"] <= phases.seconds_of_all
    found = {name: float(value) for name, value in phases.details().items()}
    assert min(found.values()) >= 0
    step = found["step, ms"]
    until = found["until the first expert is asked for, ms"]
    assert 0 < found["of that, waiting for the first router, ms"] < until < step
    assert until + found["from the last program to the end of the step, ms"] < step
    # Nothing goes on being watched.
    model.generate([5], **_GREEDY)
    assert phases.num_steps == 4
    assert found["between steps, ms"] == pytest.approx(
        1e3 * (phases.seconds_of_all - phases.seconds["step"]) / 4, abs=1e-2
    )
