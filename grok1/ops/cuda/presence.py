"""Whether the CUDA kernels run here, each by itself.

On the first use on a new device every kernel is compared with XLA's form of the same operation, by
a process of its own: one that fails, or never ends, then costs the user's process nothing. The
verdict is kept in the private directory.

Environment: GROK1_NATIVE=0 turns the kernels off.
"""

import contextlib
import functools
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax

from grok1.machine import environment
from grok1.machine.announcement import announced, hint
from grok1.machine.cache_directory import held_directory
from grok1.ops.cuda import build
from grok1.ops.cuda.kernel import SOURCES

OPERATIONS = (
    "experts",
    "project",
    "append_heads",
    "attend_cache",
    "append_and_attend",
    "attend_prompt",
    "experts_prompt",
    "norm",
    "add_norm",
    "route",
    "add_and_route",
    "convert",
    "experts_int4",
    "experts_int4_of_one",
    "convert_int4",
    "most_probable",
)
"""What there are kernels for, in the order in which they are checked."""

ONLY_ON = {"experts_prompt": (9, 0), "experts_int4_of_one": (9, 0)}
"""The one compute capability that an operation's kernels are for, where they are not for all."""

INSTEAD = {"experts_int4_of_one": "experts_int4"}
"""Whose kernels run where those of an operation do not, if they are there."""

_PATIENCE = 600.0  # seconds for the check of all kernels, most of which XLA compiles
_NO_MEMORY = "RESOURCE_EXHAUSTED"
_LOCK = threading.Lock()
_TURNED_OFF = threading.Event()
_ASSUMED: list[frozenset[str]] = []


def kernels() -> frozenset[str]:
    """Returns the operations whose kernels run here; checks the devices when first asked.

    Says on stderr, once a process, what is missing. Empty without a word when GROK1_NATIVE=0, or
    when JAX's default devices are no NVIDIA GPUs.

    Raises:
      ValueError: If a variable of the environment has a value that means nothing.
    """
    with _LOCK:
        if _ASSUMED:
            return _ASSUMED[-1]
        return frozenset() if _TURNED_OFF.is_set() else _kernels()


def turn_off() -> None:
    """Makes `kernels` empty, since a process that this one computes with has others."""
    _TURNED_OFF.set()


@contextlib.contextmanager
def assumed(operations: frozenset[str] = frozenset(OPERATIONS)) -> Iterator[None]:
    """Takes the kernels of these operations as there, to compile for devices that are not here."""
    _ASSUMED.append(operations)
    try:
        yield
    finally:
        _ASSUMED.pop()


@functools.cache
def _kernels() -> frozenset[str]:
    if not environment.is_on("GROK1_NATIVE") or jax.default_backend() != "gpu":
        return frozenset()
    devices = jax.local_devices()
    try:
        for device in devices:
            capability = _capability(device)
            if capability is None:
                return frozenset()  # a GPU of another maker
            if capability < build.OLDEST:
                raise build.UnavailableError(
                    f"{device.device_kind} has compute capability {capability[0]}.{capability[1]}, "
                    f"and they need {build.OLDEST[0]}.{build.OLDEST[1]}"
                )
        build.compiler()
        verdicts = _verdicts(sorted({device.device_kind for device in devices}))
    except build.UnavailableError as error:
        hint(f"running through XLA, several times slower than the CUDA kernels: {error}")
        return frozenset()
    wanted = {
        operation: problem
        for operation, problem in verdicts.items()
        if all(is_for(operation, device) for device in devices)
    }
    for operation, problem in wanted.items():
        if problem:
            hint(f"{operation} runs in another form, its CUDA kernel was refused: {problem}")
    return frozenset(operation for operation, problem in wanted.items() if not problem)


def is_for(operation: str, device: Any) -> bool:
    """Whether an operation's kernels are for devices like this one."""
    return ONLY_ON.get(operation) in (None, _capability(device))


def _capability(device: Any) -> tuple[int, int] | None:
    """An NVIDIA device's compute capability."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _verdicts(kinds: list[str]) -> dict[str, str]:
    """For each operation what is wrong with its kernels on these devices, empty for nothing."""
    folders = SOURCES, SOURCES.parent / "check"
    files = sorted(path for folder in folders for path in folder.iterdir())
    sources = [path for path in files if path.suffix in (".h", ".py")]
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    driver = jax.local_devices()[0].client.platform_version
    digest.update(f"{kinds} {driver} {jax.__version__} {version('jaxlib')}".encode())
    name = f"cuda-check-{digest.hexdigest()}"
    with contextlib.suppress(OSError, RuntimeError, ValueError), held_directory() as directory:
        kept = json.loads(directory.read(name) or b"{}")
        if isinstance(kept, dict) and sorted(kept) == sorted(OPERATIONS):
            return kept
    with announced("checking the CUDA kernels on this device (once)"):
        found, ended = _checked()
    # Memory that others have taken says nothing about the kernels.
    if ended and not any(_NO_MEMORY in problem for problem in found.values()):
        with contextlib.suppress(OSError, RuntimeError), held_directory() as directory:
            directory.write(name, json.dumps(found).encode())
    return found


def _checked() -> tuple[dict[str, str], bool]:
    """Runs `ops.check` in a process of its own; (verdicts, whether it came to one for each)."""
    # This process has taken most of the device's memory; the other needs little of the rest.
    command = [sys.executable, "-c", "from grok1.ops.check.comparison import main; main()"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment.of_child(XLA_PYTHON_CLIENT_PREALLOCATE="false", GROK1_NATIVE="0"),
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(timeout=_PATIENCE)
        why = f"its check ended with status {process.returncode}"
        last = [line for line in errors.splitlines() if line.strip()][-1:]
        why += f": {last[0].strip()[:200]}" if last else ""
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        why = f"its check took more than {_PATIENCE:.0f} s"
    found = {}
    for line in output.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            verdict = json.loads(line)
            found[str(verdict["operation"])] = str(verdict["problem"])
    known = {operation: found[operation] for operation in OPERATIONS if operation in found}
    return {operation: why for operation in OPERATIONS} | known, len(known) == len(OPERATIONS)
