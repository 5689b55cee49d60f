"""What the tests run on, and what is skipped on one device, before anything is compiled.

GROK1_TEST_PLATFORM is "cpu", the default: sixteen virtual devices, and nothing is skipped. "cuda"
is one GPU. "one" is a CPU device without the kernels in C++: it shows without a GPU what is skipped
on one, and whether the rest would start.
"""

import faulthandler
import math
import os
import pathlib
import re
from typing import Any

import pytest

PLATFORM = os.environ.get("GROK1_TEST_PLATFORM", "cpu")
if PLATFORM not in ("cpu", "cuda", "one"):
    raise ValueError(f"GROK1_TEST_PLATFORM must be cpu, cuda or one, found {PLATFORM!r}")
IS_CHOSEN = PLATFORM != "cpu"

_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache"
_STDERR = pytest.StashKey()
_ROOMS = ("engine", "generate", "nn", "offload", "ops", "server", "study")
_MODULES = ("checkpoint/test_loading.py", "test_comparison.py", "test_model.py")
_MOST_SECONDS = 120  # of a test on a GPU, its fixtures included
_MESHES = ("engine", "mesh", "model")
_NUMBERS = ("model_size", "num_devices")
_OF_CPUS = {
    "cpp": "it is of the CPU's form in C++",
    "by_row": "it is of a form that runs beside the CPU's in C++",
}


def settings() -> dict[str, Any]:
    """Those of JAX: it has read no variable that is set here where a plugin has imported it."""
    if not IS_CHOSEN:
        return {}
    return {
        # A function of the host's, which a program calls, runs on the CPU.
        "jax_platforms": "cuda,cpu" if PLATFORM == "cuda" else "cpu",
        # For a GPU the smallest operation takes long to compile: processes take each other's.
        "jax_compilation_cache_dir": str(_CACHE / PLATFORM),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_enable_xla_caches": "none",
    }


def environment() -> dict[str, str]:
    """The variables that JAX and this library read when they start."""
    # The user's cache is left alone; the native kernels are built once for all runs.
    variables = {"XDG_CACHE_HOME": str(_CACHE)}
    flags = os.environ.get("XLA_FLAGS", "")
    variables |= {name.upper(): str(value) for name, value in settings().items()}
    if PLATFORM == "cuda":
        return {
            **variables,
            # To try ways to multiply would take most of the time, and find others in each process:
            # what has equal bits would have others.
            "XLA_FLAGS": f"--xla_gpu_autotune_level=0 {flags}",
            # Each process has a part of the memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # What a test finds on stderr is this library's.
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
    if IS_CHOSEN:
        variables["GROK1_NATIVE"] = "0"
    number = 1 if IS_CHOSEN else 16
    return {
        **variables,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={number}",
        "JAX_PLATFORMS": "cpu",
        # A test runs a program once or twice: to compile it costs more than all that it computes.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def pytest_collection_modifyitems(items):
    for item in items:
        reason = why_skipped(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config):
    # Of what another process is writing.
    config.addinivalue_line("filterwarnings", "ignore:Error .* persistent compilation cache")
    # While a test runs, its output goes elsewhere.
    config.stash[_STDERR] = os.fdopen(os.dup(2), "w")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Ends the process of a test that hangs, with what each thread was at: others go on."""
    if PLATFORM == "cuda":
        file = item.config.stash[_STDERR]
        faulthandler.dump_traceback_later(_MOST_SECONDS, exit=True, file=file)
    try:
        return (yield)
    finally:
        if PLATFORM == "cuda":
            faulthandler.cancel_dump_traceback_later()


def within(mesh: tuple[int, int]) -> tuple[int, int]:
    """A mesh, or one device where there is no other: for what has more in it than the mesh."""
    return (1, 1) if IS_CHOSEN else mesh


def why_skipped(item) -> str | None:
    """Says why a collected test is skipped on one device; None where it is run."""
    path = item.path.relative_to(pathlib.Path(__file__).parent)
    if path.parts[0] not in _ROOMS and path.as_posix() not in _MODULES:
        return "it has nothing to do with the device"
    for mark in item.iter_markers("not_on_gpu"):
        return mark.args[0]
    params = item.callspec.params if hasattr(item, "callspec") else {}
    number = max(
        *(mark.args[0] for mark in item.iter_markers("devices")),
        *(_num_devices(params.get(name)) for name in _MESHES),
        *(params.get(name, 1) for name in _NUMBERS),
    )
    if number > 1:
        return f"it needs {number} devices, and there is one"
    for value in params.values():
        if isinstance(value, str) and value in _OF_CPUS:
            return _OF_CPUS[value]
    return None


def _num_devices(mesh: object) -> int:
    if isinstance(mesh, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", mesh):
        mesh = tuple(map(int, mesh.split("x")))
    return math.prod(mesh) if isinstance(mesh, tuple) else 1
