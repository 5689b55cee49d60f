"""Compiles the CUDA kernels at first use, with the NVRTC that JAX's wheels for CUDA bring along.

What comes out is PTX of the oldest device that a kernel is for; the driver makes machine code
of it for the very device. It is marked as of a version that every driver takes which these JAX run
on, since NVRTC may be newer than the driver, and nothing newer is in it.
"""

import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import importlib.util
import pathlib
import re

from grok1.machine.cache_directory import held_directory
from grok1.ops.cuda.kernel import Kernel, function_of, text_of

OLDEST = (8, 0)
"""The oldest compute capability that the kernels run on: it has tensor cores for bfloat16."""

_PTX_VERSION = "8.0"  # of CUDA 12.0
_OPTIONS = (
    "--std=c++17",
    # Lambdas of lambdas are otherwise taken for functions of the host by some versions.
    "--device-as-default-execution-space",
)
_WHEELS = ("nvidia-cuda-nvrtc-cu12 of jax[cuda12]", "nvidia-cuda-nvrtc of jax[cuda13]")
_HASH_BYTES = hashlib.sha256().digest_size


class UnavailableError(Exception):
    """Why there are no kernels, and what would help."""


@functools.cache
def compiler() -> ctypes.CDLL:
    """Returns NVRTC.

    Raises:
      UnavailableError: If it is not there.
    """
    found = importlib.util.find_spec("nvidia")
    folders = found.submodule_search_locations if found else None
    paths = [
        str(path)
        for folder in folders or ()
        for path in sorted(pathlib.Path(folder).glob("*/lib/libnvrtc.so.*"), reverse=True)
        if "builtins" not in path.name
    ]
    problem = "there is none"
    for path in (*paths, ctypes.util.find_library("nvrtc")):
        if path is None:
            continue
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            problem = str(error)
    raise UnavailableError(
        f"NVRTC cannot be loaded: {problem}; install {' or '.join(_WHEELS)} again"
    )


def ptx_of(kernel: Kernel) -> str:
    """Returns a kernel in PTX; compiles it, and keeps it in the private directory.

    Raises:
      UnavailableError: If it cannot be compiled.
    """
    source = text_of(("device.h", *kernel.headers)) + function_of(kernel)
    return _ptx_of(source, (f"--gpu-architecture=compute_{kernel.architecture}", *_OPTIONS))


@functools.lru_cache(maxsize=256)
def _ptx_of(source: str, how: tuple[str, ...]) -> str:
    options = " ".join((*how, _PTX_VERSION, str(_version())))
    name = "cuda-" + hashlib.sha256(f"{options}\n{source}".encode()).hexdigest()
    # Without a directory every process compiles for itself, which takes about a second in all.
    with contextlib.suppress(OSError, RuntimeError), held_directory() as directory:
        data = directory.read(name)
        if data is not None and hashlib.sha256(data[_HASH_BYTES:]).digest() == data[:_HASH_BYTES]:
            return data[_HASH_BYTES:].decode()
    ptx = for_every_driver(_compiled(source, how))
    data = ptx.encode()
    with contextlib.suppress(OSError, RuntimeError), held_directory() as directory:
        directory.write(name, hashlib.sha256(data).digest() + data)
    return ptx


def for_every_driver(ptx: str) -> str:
    """Marks PTX as of the version that every driver takes."""
    return re.sub(r"^\.version .*$", f".version {_PTX_VERSION}", ptx, flags=re.M)


def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _require(compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _compiled(source: str, how: tuple[str, ...]) -> str:
    nvrtc = compiler()
    program = ctypes.c_void_p()
    _require(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        )
    )
    try:
        options = (ctypes.c_char_p * len(how))(*(option.encode() for option in how))
        if nvrtc.nvrtcCompileProgram(program, len(how), options):
            lines = _text(program, "ProgramLog").splitlines()
            message = next((line for line in lines if "error" in line), "no message")
            raise UnavailableError(f"NVRTC {_version()} failed: {message}")
        return _text(program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    nvrtc = compiler()
    _require(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _require(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.value.decode(errors="replace")


def _require(status: int) -> None:
    if status:
        raise UnavailableError(f"NVRTC failed with status {status}")
