"""What is skipped on one device, and in which words."""

import pathlib
from types import SimpleNamespace

import pytest

from tests import one_device

HERE = pathlib.Path(__file__).parent
HOST = "it has nothing to do with the device"


@pytest.mark.parametrize(
    ("path", "marks", "params", "reason"),
    [
        ("care/test_conversion.py", [], {}, HOST),
        ("test_plots.py", [], {"mesh": (1, 1)}, HOST),
        ("test_model.py", [], {}, None),
        ("ops/test_moe.py", [pytest.mark.not_on_gpu("why")], {"mesh": (2, 4)}, "why"),
        ("nn/test_decoder.py", [pytest.mark.optimised], {"mesh": (1, 1)}, None),
        ("nn/test_decoder.py", [], {"mesh": (2, 4)}, "it needs 8 devices, and there is one"),
        (
            "study/test_intervention.py",
            [],
            {"model": "2x4"},
            "it needs 8 devices, and there is one",
        ),
        ("nn/test_unembedding.py", [], {"num_devices": 4}, "it needs 4 devices, and there is one"),
        ("test_model.py", [pytest.mark.devices(16)], {}, "it needs 16 devices, and there is one"),
        ("generate/test_prefix.py", [], {"engine": "float32"}, None),
        ("ops/test_int4.py", [], {"form": "cpp", "num_rows": 3}, "it is of the CPU's form in C++"),
        (
            "ops/test_attention.py",
            [],
            {"form": "by_row"},
            "it is of a form that runs beside the CPU's in C++",
        ),
        ("ops/test_int4.py", [], {"form": "blocked", "num_rows": 3}, None),
        ("nn/test_sharding.py", [], {"mesh": "1x" + "8" * 5000}, None),  # no number of Python's
    ],
)
def test_why_a_test_is_skipped(path, marks, params, reason):
    item = SimpleNamespace(
        path=HERE / path,
        iter_markers=lambda name: (one.mark for one in marks if one.name == name),
        callspec=SimpleNamespace(params=params),
    )
    assert one_device.why_skipped(item) == reason


def test_what_each_test_needs_can_be_told(request):
    for item in request.session.items:
        assert isinstance(one_device.why_skipped(item), str | None)


def test_a_platform_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("GROK1_TEST_PLATFORM", "gpu")
    source = pathlib.Path(one_device.__file__)
    with pytest.raises(ValueError, match="must be cpu, cuda or one, found 'gpu'"):
        exec(compile(source.read_text(), source, "exec"), {"__name__": "again"})


def test_by_default_a_process_has_sixteen_devices_of_the_cpu(monkeypatch):
    monkeypatch.setattr(one_device, "PLATFORM", "cpu")
    monkeypatch.setattr(one_device, "IS_CHOSEN", False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    assert one_device.settings() == {}
    assert one_device.within((2, 4)) == (2, 4)
    assert one_device.environment() == {
        "XDG_CACHE_HOME": str(HERE.parent / ".pytest_cache"),
        "XLA_FLAGS": "--xla_dump_to=x --xla_force_host_platform_device_count=16",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
