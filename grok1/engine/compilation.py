"""Programs that are compiled once, for this process and for later ones.

An executable is stored in the private directory of `cache_directory` under a hash of everything it
is made from: this package's sources, the versions and settings of JAX, the devices, the processor,
the program and its arguments. A later process reads it back and neither traces nor compiles. JAX's
own cache keeps what XLA compiles, not the tracing and lowering, a seventh to a quarter of the time,
and is a setting of the whole process; this one leaves the user's other programs alone.

Environment: GROK1_COMPILATION_CACHE=0 turns it off. So does a cache that the user has chosen for
JAX (JAX_COMPILATION_CACHE_DIR), which then keeps these programs as well, or
JAX_ENABLE_COMPILATION_CACHE=0.
"""

import functools
import hashlib
import os
import pathlib
import pickle
import platform
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from grok1.machine.announcement import announced
from grok1.machine.cache_directory import private_directory, write_whole
from grok1.machine.processor import available_cores, instructions
from grok1.ops import forms

MAX_STORED = 256
"""Executables in the directory; the ones that were unused for the longest time give way."""

_IMPORTED = time.time()
_PACKAGE = pathlib.Path(__file__).parent.parent
_HASH_BYTES = hashlib.sha256().digest_size
_LATER = "(once; later runs take it from the cache)"


class Program:
    """A jitted function, compiled ahead of each first call with arguments of new shapes.

    It is called as the function it stands for; arguments are arrays.

    Attributes:
      executables: Those of this process, by structure, shapes and types of the arguments.
      lower: The jitted function's `lower`.
    """

    def __init__(
        self,
        jitted: Any,
        devices: Sequence[Any],
        identity: str | None,
        in_words: Callable[..., str],
    ):
        """Wraps a function.

        Args:
          jitted: The result of `jax.jit`.
          devices: Those that it runs on.
          identity: All that the computation depends on beside this package's sources and the
            arguments' shapes; None for a program that cannot be told apart and is not stored.
          in_words: Names the program for people, given the arguments.
        """
        self.executables: dict[Hashable, Any] = {}
        self.lower = jitted.lower
        self._devices, self._identity, self._in_words = list(devices), identity, in_words

    def __call__(self, *args):
        """Runs the function."""
        leaves, tree = jax.tree.flatten(args)
        key = (tree, *((leaf.shape, leaf.dtype) for leaf in leaves))
        executable = self.executables.get(key)
        if executable is None:
            executable = self.executables[key] = self._executable(args)
        return executable(*args)

    def _executable(self, args):
        # Now, and not while tracing or reading: what is stored may call the kernels, and their
        # build speaks for itself.
        has_kernels = forms.has_kernels(self._devices[0].platform)
        directory = None if self._identity is None else _directory()
        if directory is None:
            with announced(f"compiling {self._in_words(*args)}"):
                return self.lower(*args).compile()
        parts = (_environment(self._devices), has_kernels, self._identity, _signature(args))
        name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
        path = directory / f"program-{name}"
        executable = _read(path, self._devices)
        if executable is None:
            with announced(f"compiling {self._in_words(*args)} {_LATER}"):
                executable = self.lower(*args).compile()
            _store(path, executable)
        return executable


def _read(path: pathlib.Path, devices: list[Any]):
    """The executable in a file; None if there is none that works."""
    try:
        data = path.read_bytes()
        digest, payload = data[:_HASH_BYTES], data[_HASH_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        executable = serialize_executable.deserialize_and_load(
            *pickle.loads(payload), backend=devices[0].client, execution_devices=devices
        )
        os.utime(path)
    # Whatever is wrong with a file, or with JAX's experimental format, compiling is the answer.
    except Exception:
        return None
    return executable


def _store(path: pathlib.Path, executable) -> None:
    try:
        payload = pickle.dumps(serialize_executable.serialize(executable))
    # Not every backend's executables can be serialised, nor those with captured arrays.
    except Exception:
        return
    try:
        write_whole(path, hashlib.sha256(payload).digest() + payload)
        for old in sorted(path.parent.glob("program-*"), key=_last_use)[:-MAX_STORED]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _complain(str(error))


def _last_use(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has made room
        return 0


def _directory() -> pathlib.Path | None:
    """Where programs are stored; None where they are not."""
    chosen_by_user = jax.config.values
    if (
        os.environ.get("GROK1_COMPILATION_CACHE") == "0"
        or chosen_by_user["jax_compilation_cache_dir"]
        or not chosen_by_user["jax_enable_compilation_cache"]
    ):
        return None
    # One process's part of an executable is of no use to another process.
    if os.name != "posix" or jax.process_count() > 1 or _source_hash() is None:
        return None
    try:
        return private_directory()
    except (OSError, RuntimeError) as error:
        _complain(str(error))
        return None


@functools.cache
def _complain(reason: str) -> None:
    print(f"grok1: every process compiles anew, nothing is cached: {reason}", file=sys.stderr)


def _environment(devices: list[Any]) -> str:
    """What else decides which machine code comes out, and whether it works."""
    client = devices[0].client
    settings = [
        f"{name}={value}"
        for name, value in sorted(jax.config.values.items())
        if isinstance(value, bool | int | float | str | None)
    ]
    variables = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("GROK1_") or name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    ]
    kinds = [(device.id, device.device_kind) for device in devices]
    # XLA cuts its own loops on a CPU by the number of threads that it may have.
    cores = available_cores() if client.platform == "cpu" else None
    return "\n".join(
        (
            _source_hash() or "",
            f"{jax.__version__} {version('jaxlib')} {np.__version__} {platform.python_version()}",
            f"{client.platform} {client.platform_version} {client.device_count()} {kinds} {cores}",
            instructions(),
            *settings,
            *variables,
        )
    )


@functools.cache
def _source_hash() -> str | None:
    """A hash of the package's files; None when they are not what this process has imported."""
    paths = [path for path in sorted(_PACKAGE.rglob("*")) if "__pycache__" not in path.parts]
    paths = [path for path in paths if path.is_file()]
    if not paths or any(path.stat().st_mtime > _IMPORTED for path in paths):
        return None
    digest = hashlib.sha256()
    for path in paths:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE)} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _signature(args) -> str:
    leaves, tree = jax.tree.flatten(args)
    parts = [str(tree)]
    for leaf in leaves:
        placed = isinstance(leaf, jax.Array) and leaf.committed
        parts.append(f"{leaf.shape} {leaf.dtype} {leaf.sharding if placed else None}")
    return "\n".join(parts)
