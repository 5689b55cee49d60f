"""Where the time of a load goes."""

import pytest

import grok1
from benchmarks import load_phases


def test_the_phases_of_a_load_are_all_of_it(nano_path):
    phases = load_phases.Phases()
    with phases.watched():
        grok1.load(nano_path, mesh=(1, 1), progress=False)
    assert all(phases.steps[name] > 0 for name in ("headers", "weights", "engine"))
    details = phases.details()
    assert int(details.pop("number of blocks")) >= 146
    found = {name: float(value) / 1e3 for name, value in details.items()}
    assert found["threads in Python, ms"] >= 0
    parts = [value for name, value in found.items() if not name.startswith("threads")]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(phases.seconds, abs=1e-3)
    # Nothing goes on being watched.
    blocks = len(phases.blocks)
    grok1.load(nano_path, mesh=(1, 1), progress=False)
    assert len(phases.blocks) == blocks
