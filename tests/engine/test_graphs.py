"""XLA's options for programs on NVIDIA GPUs; what comes of them, tests/test_gpu_programs.py."""

import types

import pytest

from grok1.engine import graphs

UNROLLS = "xla_gpu_command_buffer_unroll_loops"


def gpus(count, capability="9.0"):
    return [types.SimpleNamespace(platform="gpu", compute_capability=capability)] * count


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("setting", [None, "", "1", "unrolled"])
def test_a_step_is_recorded_as_a_graph(monkeypatch, count, setting):
    if setting is not None:
        monkeypatch.setenv("GROK1_CUDA_GRAPHS", setting)
    options = graphs.compiler_options(gpus(count))
    assert "WHILE" in options["xla_gpu_enable_command_buffer"].split(",")
    assert ("COLLECTIVES" in options["xla_gpu_enable_command_buffer"]) == (count > 1)
    assert options.get(UNROLLS, False) is (setting == "unrolled")


@pytest.mark.parametrize(
    ("setting", "devices"),
    [
        ("0", gpus(1)),
        ("unrolled", [types.SimpleNamespace(platform="cpu")]),
        ("unrolled", gpus(1, capability="gfx942")),  # one of AMD's
    ],
)
def test_there_are_no_options_where_there_is_nothing_to_record(monkeypatch, setting, devices):
    monkeypatch.setenv("GROK1_CUDA_GRAPHS", setting)
    assert graphs.compiler_options(devices) == {}
