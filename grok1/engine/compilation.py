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

import contextlib
import functools
import hashlib
import os
import pathlib
import pickle
import platform
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from grok1.engine import graphs
from grok1.machine import environment
from grok1.machine.announcement import announced, hint
from grok1.machine.background import in_background, interruptible
from grok1.machine.cache_directory import held_directory
from grok1.machine.jax_settings import Settings, own_settings, settings_of_thread, under
from grok1.machine.processor import instructions, schedulable_cores
from grok1.machine.startup import check_not_forked
from grok1.ops import forms

MAX_STORED = 256
"""Executables in the directory; the ones that were unused for the longest time give way."""

_PACKAGE = pathlib.Path(__file__).parent.parent
_HASH_BYTES = hashlib.sha256().digest_size
_MOST_OF_USERS = 8  # programs with a function of the user's
_MOST_VIEWS = 16
_LATER = "(once; later runs take it from the cache)"


class Programs(dict[tuple, "Program"]):
    """The programs of one model, by key; made once, whatever number of threads ask for one.

    A function of the user's is a part of the key of what is compiled for it. A new one for each
    request, as a lambda is, would keep its program for ever, so only the last few are kept; and so
    it is with forms of the model, which captures and interventions make.
    """

    def __init__(self):
        super().__init__()
        # Again by the same thread: what a program is made of may be programs.
        self._lock = threading.RLock()
        self._views: dict[str, Programs] = {}

    def find(self, key: tuple, make: Callable[[], "Program"]) -> "Program":
        """Returns the program of a key, made if there is none.

        Args:
          key: What it is compiled for; hashable.
          make: Makes it, without compiling anything.
        """
        with self._lock:
            program = self.pop(key, None) or make()
            # At the end: the one that was used last.
            self[key] = program
            of_users = [other for other in self if any(map(callable, other))]
            for oldest in of_users[:-_MOST_OF_USERS]:
                del self[oldest]
            return program

    def of_view(self, view: str) -> "Programs":
        """Returns the programs of a view of the model.

        Args:
          view: What is compiled otherwise in all of them; nothing for the model itself.
        """
        if not view:
            return self
        with self._lock:
            programs = self._views.pop(view, None)
            self._views[view] = Programs() if programs is None else programs
            for oldest in list(self._views)[:-_MOST_VIEWS]:
                del self._views[oldest]
            return self._views[view]


class Program:
    """A jitted function, compiled ahead of each first call with arguments of new shapes.

    It is called as the function it stands for; arguments are arrays. Threads that need the same
    executable wait for one that compiles it. A wait can be interrupted; what is being compiled is
    there for the next call.

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
        self._lock = threading.Lock()
        self._coming: dict[Hashable, Future] = {}

    def __call__(self, *args):
        """Runs the function.

        Raises:
          RuntimeError: In a process that was forked after JAX had started.
        """
        check_not_forked()
        key = _key(args)
        executable = self.executables.get(key) or self._compiled(key, args)
        with own_settings():
            return executable(*args)

    def prepare(self, *args) -> None:
        """Compiles it for arguments like these; a wait for that can be interrupted."""
        key = _key(args)
        if key not in self.executables:
            self._compiled(key, args)

    def _compiled(self, key: Hashable, args: tuple):
        with interruptible() as wait:
            with self._lock:
                executable = self.executables.get(key)
                if executable is not None:
                    return executable
                coming = self._coming.get(key)
                if coming is None:
                    settings = settings_of_thread()
                    coming = in_background(lambda: self._made(key, args, settings))
                    self._coming[key] = coming
            return wait(coming)

    def _made(self, key: Hashable, args: tuple, settings: Settings):
        try:
            with under(settings), own_settings():
                executable = self.executables[key] = self._executable(args)
            return executable
        finally:
            with self._lock:
                del self._coming[key]

    def _executable(self, args):
        # Now, and not while tracing or reading: what is stored may call the kernels, and their
        # build speaks for itself.
        kernels = forms.prepare(self._devices[0].platform)
        if self._identity is None or not _are_stored():
            with announced(f"compiling {self._in_words(*args)}"):
                return graphs.compiled(self.lower(*args), self._devices)
        parts = (_environment(self._devices), kernels, self._identity, _signature(args))
        name = "program-" + hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
        executable = _read(name, self._devices)
        if executable is None:
            with announced(f"compiling {self._in_words(*args)} {_LATER}"):
                executable = graphs.compiled(self.lower(*args), self._devices)
            _store(name, executable)
        return executable


def _key(args: tuple) -> Hashable:
    leaves, tree = jax.tree.flatten(args)
    return (tree, *((leaf.shape, leaf.dtype) for leaf in leaves))


def _read(name: str, devices: list[Any]):
    """The stored executable; None if there is none that works."""
    try:
        with held_directory() as directory:
            data = directory.read(name)
            with contextlib.suppress(OSError):  # of a read-only file system
                directory.touch(name)
    except (OSError, RuntimeError) as error:
        _complain(error)
        return None
    if data is None:
        return None
    digest, payload = data[:_HASH_BYTES], data[_HASH_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        return serialize_executable.deserialize_and_load(
            *pickle.loads(payload), backend=devices[0].client, execution_devices=devices
        )
    # Whatever is wrong with a file, or with JAX's experimental format, compiling is the answer.
    except Exception:
        return None


def _store(name: str, executable) -> None:
    try:
        payload = pickle.dumps(serialize_executable.serialize(executable))
    # Not every backend's executables can be serialised, nor those with captured arrays.
    except Exception:
        return
    try:
        with held_directory() as directory:
            directory.write(name, hashlib.sha256(payload).digest() + payload)
            programs = [other for other in directory.names() if other.startswith("program-")]
            for old in sorted(programs, key=directory.last_use)[:-MAX_STORED]:
                directory.remove(old)
    except (OSError, RuntimeError) as error:
        _complain(error)


def _complain(error: Exception) -> None:
    hint(f"every process compiles anew, nothing is cached: {error}")


def _are_stored() -> bool:
    """Whether programs are stored at all."""
    chosen_by_user = jax.config.values
    if (
        not environment.is_on("GROK1_COMPILATION_CACHE")
        or chosen_by_user["jax_compilation_cache_dir"]
        or not chosen_by_user["jax_enable_compilation_cache"]
    ):
        return False
    # One process's part of an executable is of no use to another process.
    return os.name == "posix" and jax.process_count() == 1 and source_hash() is not None


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
    cores = schedulable_cores() if client.platform == "cpu" else None
    return "\n".join(
        (
            source_hash() or "",
            f"{jax.__version__} {version('jaxlib')} {np.__version__} {platform.python_version()}",
            f"{client.platform} {client.platform_version} {client.device_count()} {kinds} {cores}",
            instructions(),
            *settings,
            *variables,
        )
    )


def _sources() -> dict[pathlib.Path, tuple[int, int]]:
    """The package's files, with what tells that one of them has changed."""
    paths = [path for path in sorted(_PACKAGE.rglob("*")) if "__pycache__" not in path.parts]
    found = ((path, path.stat()) for path in paths if path.is_file())
    return {path: (status.st_mtime_ns, status.st_size) for path, status in found}


_IMPORTED = _sources()


@functools.cache
def source_hash() -> str | None:
    """Returns a hash of the package's files; None if they are not what this process imported."""
    if not _IMPORTED or _sources() != _IMPORTED:
        return None
    digest = hashlib.sha256()
    for path in _IMPORTED:
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
