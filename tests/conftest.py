"""Strict settings for every test, sixteen virtual CPU devices, and the shared models.

`tests.one_device` says what else they may run on.
"""

import fcntl
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

from tests import one_device

# Before JAX starts: the devices are fixed from then on.
os.environ.update(one_device.environment())

import jax
import numpy as np
import pytest
from jax._src import compiler

import grok1
from grok1.config import ModelConfig
from grok1.ops.cuda import presence
from tests.helpers import SLOW_TESTS

ON_GPU = one_device.PLATFORM == "cuda"

# A run in the background of a shell ignores Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_dtype_promotion", "strict")
for name, value in one_device.settings().items():
    jax.config.update(name, value)
jax.devices()  # Its flags are read once and for all.
# What is imported stays, and tracing makes many objects and little garbage.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOY = pathlib.Path(__file__).parent.parent / "checkpoints" / "toy"
CACHE = pathlib.Path(os.environ["XDG_CACHE_HOME"])
BUILD_KERNELS = "from grok1.ops.cpu import bindings; bindings.is_available()"
CHECK_KERNELS = "from grok1.ops.cuda import presence; presence.kernels()"


def pytest_configure(config):
    """Builds the kernels where there are none, while the processes that test start and collect."""
    if one_device.IS_CHOSEN:
        config.pluginmanager.register(one_device)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        return
    if not ON_GPU and any(CACHE.glob("*/native-*")):
        return
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "kernels.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # It has the lock as long as it runs.
        build = subprocess.Popen(
            [sys.executable, "-c", CHECK_KERNELS if ON_GPU else BUILD_KERNELS],
            cwd=pathlib.Path(__file__).parent.parent,
            pass_fds=[lock.fileno()],
            stderr=None if ON_GPU else subprocess.DEVNULL,
        )
    config.add_cleanup(build.wait)


def wait_for_kernels():
    """Waits for those that are being built, instead of building them too."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "kernels.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)


def pytest_collection_modifyitems(items):
    """Refuses names that are others in each process: workers would not have the same tests."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: an address is no part of a test's name")


def pytest_collection_finish():
    """Waits before a test has begun: it may look for the verdict in a directory of its own."""
    if ON_GPU:
        wait_for_kernels()
        presence.kernels()


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Lets nothing run before they are there."""
    wait_for_kernels()


COMPILED = ("grok1.engine", "grok1.nn", "grok1.ops", "jax")
"""What programs are made of and stored by; the rest may be patched and no program is another."""


class Patch(pytest.MonkeyPatch):
    """`monkeypatch`, under which programs are not stored from when one is made of a patch."""

    def setattr(self, target, name, *value, **options):
        if isinstance(target, types.ModuleType):
            target_module = target.__name__
        else:
            target_module = target if isinstance(target, str) else target.__module__
        if target_module.startswith(COMPILED):
            os.environ["GROK1_COMPILATION_CACHE"] = "0"
        super().setattr(target, name, *value, **options)


OPTIMISED_ROOMS = {"command", "nn", "ops"} if SLOW_TESTS else set()
"""Whose programs are optimised whatever a test's mark says."""


# Not optimised, a program is still taken through MLIR, a pipeline for each fusion and two thirds of
# the time; later versions know no other way.
LIGHT = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
LIGHT = LIGHT if jax.__version_info__ < (0, 11) else {}
FLAGS = os.environ["XLA_FLAGS"]
LIGHT_FLAGS = FLAGS + "".join(f" --{name}={str(value).lower()}" for name, value in LIGHT.items())
compile_options = compiler.get_compile_options


def lighter_options(*arguments, **more):
    """JAX's options for a compilation, with those that it has no settings for."""
    options = compile_options(*arguments, **more)
    if jax.config.values["jax_disable_most_optimizations"]:
        options.env_option_overrides = [*LIGHT.items(), *options.env_option_overrides]
    return options


if LIGHT and not ON_GPU:
    compiler.get_compile_options = lighter_options


def optimise(is_on: bool) -> None:
    """Has XLA optimise what is compiled from here on, in this process and in those it starts.

    What is compiled for a GPU always is: without, XLA records no graphs.
    """
    if ON_GPU:
        return
    # XLA has read the flags of this process: these are for others.
    os.environ["XLA_FLAGS"] = FLAGS if is_on else LIGHT_FLAGS
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not is_on))
    jax.config.update("jax_disable_most_optimizations", not is_on)


# What a plugin imported JAX for, it has read no variable that is set here.
optimise(False)


@pytest.fixture(autouse=True)
def optimisations(request):
    """Has what marked tests compile optimised, but not what fixtures make for several tests."""
    is_marked = request.node.get_closest_marker("optimised") is not None
    optimise(is_marked or request.path.parent.name in OPTIMISED_ROOMS)
    yield
    optimise(False)


@pytest.fixture(scope="module", autouse=True)
def collected_quickly():
    """Has `gc.collect`, which some calls make, look at what a module made and nothing before."""
    gc.freeze()


@pytest.fixture(autouse=True)
def stored_programs():
    """Lets tests share compiled programs, unless one patches what they are compiled from."""
    os.environ["GROK1_COMPILATION_CACHE"] = "1"


@pytest.fixture
def monkeypatch(stored_programs):
    """As pytest's own."""
    patch = Patch()
    yield patch
    patch.undo()


@pytest.fixture(scope="session")
def nano_path() -> pathlib.Path:
    """A complete checkpoint as the released code wrote it: 12 layers, D=64."""
    return GOLDEN / "nano"


@pytest.fixture(scope="module")
def copied(nano_path, tmp_path_factory) -> pathlib.Path:
    """The nano checkpoint, for a module that moves and changes its files."""
    target = tmp_path_factory.mktemp("nano") / "copied"
    shutil.copytree(nano_path, target)
    for path in target.rglob("*"):
        path.chmod(0o755)
    return target


@pytest.fixture(scope="session")
def nano_config(nano_path) -> ModelConfig:
    return ModelConfig.load(nano_path / "config.json")


@pytest.fixture(scope="session")
def nano_reference(nano_path) -> dict[str, np.ndarray]:
    """Golden numbers of the nano checkpoint; see `logits_f64` for the float64 evaluation."""
    with np.load(nano_path / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def nano(nano_path) -> grok1.Model:
    return grok1.load(nano_path, mesh=(1, 1), dtype="float32", progress=False)


@pytest.fixture(scope="session")
def nano_on_mesh(nano, nano_path):
    """Nano by the sizes of its mesh and the type of its products, each loaded once."""
    models = {((1, 1), "float32"): nano}

    def get(mesh, dtype="float32") -> grok1.Model:
        if (mesh, dtype) not in models:
            models[mesh, dtype] = grok1.load(nano_path, mesh=mesh, dtype=dtype, progress=False)
        return models[mesh, dtype]

    return get


@pytest.fixture(scope="session")
def toy() -> grok1.Model:
    return grok1.load(TOY, mesh=(1, 1), dtype="float32", progress=False)
