"""The CUDA kernels behind their operations, on a CPU in place of a device."""

import itertools
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.machine import announcement
from grok1.ops import forms
from grok1.ops.check import comparison
from grok1.ops.cuda import build, calls, presence
from grok1.ops.experts import ExpertWeights, experts
from grok1.ops.quantized import quantize
from grok1.ops.routing import choose_experts
from tests.helpers import SLOW_TESTS, slow
from tests.ops import standin

pytestmark = pytest.mark.not_on_gpu("a CPU stands for a device there")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(calls, "call", standin.call)


# The kernels of all are run by themselves in test_cuda.py.
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(operation, marks=() if operation in ("experts", "norm") else slow)
        for operation in presence.OPERATIONS
    ],
)
def test_the_check_of_a_device_finds_no_fault(operation, monkeypatch):
    most = None if SLOW_TESTS else 1
    all_of = comparison.cases
    monkeypatch.setattr(comparison, "cases", lambda of: itertools.islice(all_of(of), most))
    assert comparison.problem_of(operation) == ""


def test_experts_by_tiles_give_nothing_to_padding_and_to_no_expert():
    rng = np.random.default_rng(3)
    gate, up, down = (
        quantize(jnp.asarray(rng.standard_normal((3, 64, 64)), jnp.float32)) for _ in range(3)
    )
    weights = ExpertWeights(gate, up, down)
    x = jnp.asarray(rng.standard_normal((40, 64)), jnp.bfloat16)
    routing = choose_experts(jnp.asarray(rng.standard_normal((40, 3)), jnp.float32), 2)
    # The number behind the last expert's stands for none.
    nobody = np.arange(40)[:, None] % 4 == np.array([1, 3])
    routing = routing._replace(expert_indices=jnp.where(nobody, 3, routing.expert_indices))
    valid = jnp.arange(40) % 5 != 2
    with presence.assumed():
        found = experts(x, weights, (), routing, valid, "cuda_tiles")
    expected = experts(x, weights, (), routing, valid, "sparse")
    assert comparison.relative_difference(found, expected) < comparison.TOLERANCE
    np.testing.assert_array_equal(np.asarray(found)[~valid], 0)


def test_the_check_of_a_device_names_a_fault(monkeypatch):
    def wrong(kernel, *inputs):
        return [jnp.zeros(array.shape, array.dtype) for array in kernel.outputs]

    monkeypatch.setattr(calls, "call", wrong)
    assert comparison.problem_of("norm") == "on 3 rows it is 1.0e+00 away"

    def not_a_number(kernel, *inputs):
        return [jnp.full(array.shape, jnp.nan, array.dtype) for array in kernel.outputs]

    monkeypatch.setattr(calls, "call", not_a_number)
    assert comparison.problem_of("add_norm") == "on 1 norms it is nan away"

    def fails(kernel, *inputs):
        raise RuntimeError("CUDA_ERROR_INVALID_PTX\nand more")

    monkeypatch.setattr(calls, "call", fails)
    assert comparison.problem_of("route") == "RuntimeError: CUDA_ERROR_INVALID_PTX"


def test_the_check_of_a_device_says_each_verdict(monkeypatch, capsys):
    compute = calls.call

    def fails(kernel, *inputs):
        if kernel.name == "grok1_route":
            raise RuntimeError("CUDA_ERROR_INVALID_PTX")
        return compute(kernel, *inputs)

    monkeypatch.setattr(presence, "OPERATIONS", ("route", "experts_prompt", "norm"))
    monkeypatch.setattr(calls, "call", fails)
    comparison.main()
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    found = {line["operation"]: line["problem"] for line in lines}
    # The second is for devices of another kind.
    assert found == {
        "route": "RuntimeError: CUDA_ERROR_INVALID_PTX",
        "experts_prompt": "",
        "norm": "",
    }


def test_what_is_for_another_device_is_left_out_without_a_word(gpus, monkeypatch, tmp_path, capfd):
    child(monkeypatch, f"print({verdicts('experts_prompt')!r}, end='')", tmp_path)
    assert gpus("8.0") == frozenset(presence.OPERATIONS) - {*presence.ONLY_ON}
    assert "experts_prompt" not in capfd.readouterr().err
    assert gpus("9.0") == frozenset(presence.OPERATIONS) - {"experts_prompt"}
    said = capfd.readouterr().err
    assert "experts_prompt runs in another form, its CUDA kernel was refused" in said


@pytest.fixture
def gpus(monkeypatch):
    """Makes JAX say that it has these devices; returns what then runs."""

    def of(*capabilities):
        devices = [
            types.SimpleNamespace(
                device_kind=f"GPU {capability}",
                compute_capability=capability,
                client=types.SimpleNamespace(platform_version="CUDA 13"),
            )
            for capability in capabilities
        ]
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        announcement.hint.cache_clear()
        return presence._kernels.__wrapped__()

    return of


def verdicts(*faulty):
    lines = []
    for operation in presence.OPERATIONS:
        problem = "it is wrong" if operation in faulty else ""
        lines.append(json.dumps({"operation": operation, "problem": problem}) + "\n")
    return "".join(lines)


def child(monkeypatch, script, tmp_path):
    """Lets a script of Python stand for the process that checks a device."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    started = []

    def start(command, **options):
        started.append(command)
        return popen([sys.executable, "-c", script], **options)

    popen = subprocess.Popen
    monkeypatch.setattr(presence.subprocess, "Popen", start)
    return started


def test_a_device_that_is_too_old_runs_through_xla_and_says_so(gpus, capfd):
    assert gpus("9.0", "7.5") == frozenset()
    assert capfd.readouterr().err == (
        "grok1: running through XLA, several times slower than the CUDA kernels: GPU 7.5 has "
        "compute capability 7.5, and they need 8.0\n"
    )


def test_gpus_of_another_maker_are_left_alone_without_a_word(gpus, capfd):
    assert gpus("gfx942") == frozenset()
    assert capfd.readouterr().err == ""


def test_switched_off_there_are_none(gpus, monkeypatch):
    monkeypatch.setenv("GROK1_NATIVE", "0")
    assert gpus("9.0") == frozenset()


def test_without_nvrtc_one_line_says_what_to_install(gpus, monkeypatch, capfd):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(build, "compiler", build.compiler.__wrapped__)
    assert gpus("9.0") == frozenset()
    (line,) = capfd.readouterr().err.splitlines()
    assert "NVRTC cannot be loaded: there is none; install nvidia-cuda-nvrtc-cu12" in line


def test_what_differs_is_refused_by_name_and_that_is_kept(gpus, monkeypatch, tmp_path, capfd):
    started = child(monkeypatch, f"print({verdicts('route')!r}, end='')", tmp_path)
    there = frozenset(presence.OPERATIONS) - {"route"}
    for _ in range(2):
        assert gpus("9.0") == there
        assert capfd.readouterr().err == (
            "grok1: route runs in another form, its CUDA kernel was refused: it is wrong\n"
        )
    assert len(started) == 1
    monkeypatch.setattr(presence, "_kernels", lambda: there)
    assert forms.kernels_in_words("gpu") == ["CUDA kernels but for route"]
    assert forms.kernels_in_words("cpu") == []
    # Others run instead, if they are there.
    monkeypatch.setattr(presence, "_kernels", lambda: there - {"experts_int4_of_one"})
    assert forms.kernels_in_words("gpu") == ["CUDA kernels but for route"]
    neither = there - {"experts_int4", "experts_int4_of_one"}
    monkeypatch.setattr(presence, "_kernels", lambda: neither)
    (words,) = forms.kernels_in_words("gpu")
    assert words == "CUDA kernels but for experts_int4, experts_int4_of_one, route"


def test_a_check_that_crashes_refuses_what_it_did_not_come_to(gpus, monkeypatch, tmp_path, capfd):
    first = json.dumps({"operation": "experts", "problem": ""})
    script = f"import sys; print({first!r}, flush=True); sys.exit('an illegal address')"
    started = child(monkeypatch, script, tmp_path)
    assert gpus("9.0") == frozenset(["experts"])
    assert "its check ended with status 1: an illegal address" in capfd.readouterr().err
    # It may have been for want of memory: it is tried again.
    gpus("9.0")
    assert len(started) == 2


def test_want_of_memory_is_no_verdict(gpus, monkeypatch, tmp_path, capfd):
    lines = verdicts("experts").replace("it is wrong", "JaxRuntimeError: RESOURCE_EXHAUSTED: Out")
    started = child(monkeypatch, f"print({lines!r}, end='')", tmp_path)
    for _ in range(2):
        assert gpus("9.0") == frozenset(presence.OPERATIONS) - {"experts"}
        assert "RESOURCE_EXHAUSTED" in capfd.readouterr().err
    assert len(started) == 2


def test_a_check_that_never_ends_is_given_up(gpus, monkeypatch, tmp_path, capfd):
    child(monkeypatch, "import time; time.sleep(60)", tmp_path)
    monkeypatch.setattr(presence, "_PATIENCE", 0.2)
    assert gpus("9.0") == frozenset()
    assert "its check took more than 0 s" in capfd.readouterr().err
