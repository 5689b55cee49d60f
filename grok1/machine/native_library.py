"""Compiles C++ at first use, for this very processor, into a private directory."""

import ctypes
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

import jax

from grok1.machine.announcement import announced
from grok1.machine.cache_directory import PrivateDirectory, held_directory
from grok1.machine.processor import instructions

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-DNDEBUG", "-w", "-shared", "-fPIC")


class UnavailableError(Exception):
    """Why there is no library, and what would help."""


class Sources(NamedTuple):
    """What a library is made of.

    Attributes:
      name: How the names of its files begin.
      directory: All C++ in it.
      what: What it is, for the user who waits for it.
    """

    name: str
    directory: pathlib.Path
    what: str


def loaded_library(symbols: Sequence[str], sources: Sources) -> ctypes.CDLL:
    """Returns a library; builds it if its source, jaxlib or the processor is new.

    Args:
      symbols: Names of the functions that it must have.
      sources: What it is made of.

    Raises:
      UnavailableError: If it cannot be built, or not be loaded.
      OSError, RuntimeError: If there is no private directory for it.
    """
    if os.name != "posix":
        raise UnavailableError("they are for Linux and macOS")
    with held_directory() as directory:
        if not directory.is_executable:
            raise UnavailableError(
                f"{directory.path} is on a file system that is mounted noexec; set XDG_CACHE_HOME "
                "to a directory on another"
            )
        prefix = f"{sources.name}-{_key(sources)}-"
        name = _whole_library(directory, prefix)
        if name is None:
            return _built_library(directory, prefix, symbols, sources)
        try:
            return _load(directory, name, symbols)
        except UnavailableError as error:
            raise UnavailableError(
                f"{directory.path / name} cannot be loaded here: {error}; remove it, and it is "
                "built anew"
            ) from error


def _key(sources: Sources) -> str:
    """A hash of all that the library depends on."""
    paths = [path for path in sorted(sources.directory.iterdir()) if path.suffix in (".cc", ".h")]
    texts = [path.read_bytes() for path in paths]
    here = (version("jaxlib"), instructions(), *platform.libc_ver())
    key = hashlib.sha256()
    for part in (*texts, " ".join(_FLAGS), *here):
        data = part if isinstance(part, bytes) else part.encode()
        key.update(len(data).to_bytes(8, "little") + data)
    return key.hexdigest()


def _whole_library(directory: PrivateDirectory, prefix: str) -> str | None:
    """The name of a library that is as it was built: its name ends with the hash of what it holds.

    A process that maps a file which was cut short, and runs it, is ended by the system.
    """
    for name in directory.names():
        if name.startswith(prefix):
            data = directory.read(name)
            if data is not None and name == _name_of(prefix, data):
                return name
            directory.remove(name)
    return None


def _name_of(prefix: str, library: bytes) -> str:
    return f"{prefix}{hashlib.sha256(library).hexdigest()}.so"


def _built_library(
    directory: PrivateDirectory, prefix: str, symbols: Sequence[str], sources: Sources
) -> ctypes.CDLL:
    """Compiles the library, and stores it if it works."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise UnavailableError("no C++ compiler found; install g++ or clang++")
    with tempfile.TemporaryDirectory(prefix="grok1-") as scratch:
        output = pathlib.Path(scratch) / "native.so"
        with announced(f"compiling {sources.what} (once)"):
            _compile(compiler, str(output), sources.directory)
        try:
            data = output.read_bytes()
        except FileNotFoundError:
            raise UnavailableError(f"{compiler} wrote no library") from None
    with directory.new_file(data) as unfinished:
        try:
            library = _load(directory, unfinished, symbols)
        except UnavailableError as error:
            raise UnavailableError(f"what {compiler} made cannot be loaded: {error}") from error
        directory.rename(unfinished, _name_of(prefix, data))
    return library


def _load(directory: PrivateDirectory, name: str, symbols: Sequence[str]) -> ctypes.CDLL:
    path = directory.path_of(name)
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise UnavailableError(str(error).removeprefix(f"{path}: ")) from error
    missing = [symbol for symbol in symbols if not hasattr(library, symbol)]
    if missing:
        raise UnavailableError(f"it has no function {missing[0]}")
    return library


def _compile(compiler: str, library: str, directory: pathlib.Path):
    # Compilers disagree on which of the two options means "this processor", and some know neither.
    for target in (["-march=native"], ["-mcpu=native"], []):
        command = [compiler, *_FLAGS, *target, "-pthread", f"-I{jax.ffi.include_dir()}"]
        paths = sorted(directory.glob("*.cc"))
        objects = {str(path): f"{library}.{path.stem}.o" for path in paths}
        # Side by side, since one takes as long as the other.
        error = _error_of([[*command, "-c", path, "-o", made] for path, made in objects.items()])
        error = error or _error_of([[*command, *objects.values(), "-o", library]])
        if error is None:
            return
    raise UnavailableError(f"{compiler} failed: {error}")


def _error_of(commands: Sequence[Sequence[str]]) -> str | None:
    """Runs commands side by side; returns what the first that fails says, in one line."""
    running: list[subprocess.Popen] = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                )
            )
        outputs = [process.communicate()[1] for process in running]
    except BaseException:
        for process in running:
            process.kill()
        raise
    for process, output in zip(running, outputs, strict=True):
        if process.returncode != 0:
            lines = output.strip().splitlines() or [f"exit status {process.returncode}"]
            return next((line for line in lines if "error" in line), lines[-1])
    return None
