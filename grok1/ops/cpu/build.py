"""Compiles the C++ kernels at first use, for this very processor, into a private directory."""

import ctypes
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from importlib.metadata import version

import jax

from grok1.machine.announcement import announced
from grok1.machine.cache_directory import private_directory
from grok1.machine.processor import instructions

_SOURCES = pathlib.Path(__file__).parent


_COMPILERS = ("c++", "g++", "clang++")


_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-DNDEBUG", "-w", "-shared", "-fPIC")


class UnavailableError(Exception):
    """Why there is no library, and what would help."""


def loaded_library() -> ctypes.CDLL:
    """Returns the library of the kernels; builds it if this source, jaxlib or processor is new.

    Raises:
      UnavailableError: If it cannot be built.
      OSError, RuntimeError: If there is no private directory for it.
    """
    path = _built_library()
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # damaged, or made where another C++ library is
        path.unlink()
        return ctypes.CDLL(str(_built_library()))


def _built_library() -> pathlib.Path:
    """The compiled library; compiles it if this source, jaxlib and processor are new."""
    if os.name != "posix":
        raise UnavailableError("they are for Linux and macOS")
    paths = [path for path in sorted(_SOURCES.iterdir()) if path.suffix in (".cc", ".h")]
    sources = [path.read_bytes() for path in paths]
    parts = (*sources, " ".join(_FLAGS), version("jaxlib"), instructions())
    key = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        key.update(len(data).to_bytes(8, "little") + data)
    directory = private_directory()
    library = directory / f"native-{key.hexdigest()}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise UnavailableError("no C++ compiler found; install g++ or clang++")
    # A name of its own, then a rename: processes that build at the same time do not meet.
    descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(descriptor)
    try:
        with announced("compiling the native CPU kernels (once)"):
            _compile(compiler, unfinished)
        os.replace(unfinished, library)
    finally:
        pathlib.Path(unfinished).unlink(missing_ok=True)
    return library


def _compile(compiler: str, library: str):
    # Compilers disagree on which of the two options means "this processor".
    for target in ("-march=native", "-mcpu=native"):
        command = [compiler, *_FLAGS, target, "-pthread", f"-I{jax.ffi.include_dir()}"]
        result = subprocess.run(
            [*command, str(_SOURCES / "kernels.cc"), "-o", library],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode == 0:
            return
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    message = next((line for line in lines if "error" in line), lines[-1])
    raise UnavailableError(f"{compiler} failed: {message}")
