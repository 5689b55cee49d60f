"""The product of `quantization` in C++, for CPUs, where XLA reads int8 far slower than memory can.

The source, `native_kernels.cc`, is compiled at first use with the system's compiler, for this very
processor and against the headers of the installed jaxlib, into a private directory. Where that
cannot be done, one line on stderr says why and everything runs through XLA.

Environment: GROK1_NATIVE=0 turns it off; GROK1_NUM_THREADS is the number of threads of a product
(default: the cores that the process may run on); XDG_CACHE_HOME is where the library is kept.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grok1.announcement import announced
from grok1.cache_directory import private_directory, processor

_SOURCE = pathlib.Path(__file__).with_name("native_kernels.cc")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-DNDEBUG", "-w", "-shared", "-fPIC")
_TARGET = "grok1_quantized_matmul"


class _UnavailableError(Exception):
    """Why there is no library, and what would help."""


@functools.cache
def is_available() -> bool:
    """Whether `quantized_matmul` can run; builds and registers the library when first asked.

    Says on stderr, once a process, why it cannot. False without a word when GROK1_NATIVE=0 or
    when the default backend of JAX is no CPU.
    """
    if os.environ.get("GROK1_NATIVE") == "0" or jax.default_backend() != "cpu":
        return False
    try:
        library = ctypes.CDLL(str(_built_library()))
        handler = jax.ffi.pycapsule(getattr(library, _TARGET))
    except (_UnavailableError, OSError, RuntimeError) as error:  # RuntimeError: no home directory
        print(
            f"grok1: decoding through XLA, several times slower than the native kernels: {error}",
            file=sys.stderr,
        )
        return False
    jax.ffi.register_ffi_target(_TARGET, handler, platform="cpu")
    return True


def quantized_matmul(
    x: Float[Array, "M K"],
    values: Array,
    scales: Array,
    index: tuple[int | Array, ...],
    num_valid: int | Array,
) -> Float[Array, "M N"]:
    """Computes `x @ (values[index] * scales[index])`, on a CPU where `is_available()`.

    Products and sums are float32; the result does not depend on the number of threads.

    Args:
      x: float32 `[M, K]`.
      values: int8 `[*lead, K, N]`; read in place, whatever the index.
      scales: bfloat16 `[*lead, G, N]`.
      index: One index, a number or a traced scalar, for each leading axis, from 0 on.
      num_valid: Rows of `x` to multiply, a number or a traced scalar.

    Returns:
      float32 `[M, N]`, zeros from row `num_valid` on.

    Raises:
      RuntimeError: If there is no library.
    """
    if not is_available():
        raise RuntimeError("the native kernels are not available here; use another implementation")
    matrix = jnp.int32(0)
    for size, i in zip(values.shape[:-2], index, strict=True):
        matrix = matrix * size + jnp.asarray(i, jnp.int32)
    out = jax.ShapeDtypeStruct((x.shape[0], values.shape[-1]), jnp.float32)
    return jax.ffi.ffi_call(_TARGET, out)(
        x, values, scales, matrix, jnp.asarray(num_valid, jnp.int32)
    )


def _built_library() -> pathlib.Path:
    """The compiled library; compiles it if this source, jaxlib and processor are new."""
    if os.name != "posix":
        raise _UnavailableError("they are for Linux and macOS")
    source = _SOURCE.read_bytes()
    parts = (source, " ".join(_FLAGS), version("jaxlib"), processor())
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
        raise _UnavailableError("no C++ compiler found; install g++ or clang++")
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
            [*command, str(_SOURCE), "-o", library], capture_output=True, text=True, check=False
        )
        if result.returncode == 0:
            return
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    message = next((line for line in lines if "error" in line), lines[-1])
    raise _UnavailableError(f"{compiler} failed: {message}")
