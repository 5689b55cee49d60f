"""Runs CUDA kernels on the CPU: `standin.h` in place of a device."""

import ctypes
import functools
import hashlib
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from grok1.ops.cuda.kernel import Kernel, function_of, text_of

_FLAGS = (
    "-std=c++17",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-w",
    "-fPIC",
    "-fvisibility=hidden",  # what templates keep is each library's own
)
_HEADER = pathlib.Path(__file__).parent / "standin.h"


def _named(kernel: Kernel) -> Kernel:
    """The kernel under a name that tells it from those of other shapes."""
    text = hashlib.sha256(repr(kernel).encode()).hexdigest()
    return kernel._replace(name=f"{kernel.name}_{text[:12]}")


def _caller(kernel: Kernel) -> str:
    arguments = ", ".join(f"({of})a[{i}]" for i, of in enumerate(kernel.parameters))
    body = f"[](void** a) {{ {kernel.name}({arguments}); }}"
    grid = f"{{{kernel.grid[0]}, {kernel.grid[1]}, 1}}"
    sizes = f"{grid}, {kernel.threads}, {kernel.shared_bytes}"
    return (
        'extern "C" __attribute__((visibility("default"))) '
        f"void run_{kernel.name}(void** buffers, int backward) {{\n"
        f"  run_grid({body}, buffers, {sizes}, backward);\n}}\n"
    )


def build(
    kernels: Sequence[Kernel], replacements: Sequence[tuple[str, str]] = (), level: str = "-O1"
) -> ctypes.CDLL:
    """Compiles kernels for the CPU.

    Args:
      kernels: Which.
      replacements: Texts of the sources, and what to put in their place.
      level: How much the compiler makes of them: less is quicker where they run once.
    """
    named = [_named(kernel) for kernel in dict.fromkeys(kernels)]
    headers = tuple(dict.fromkeys(header for kernel in named for header in kernel.headers))
    text = text_of(headers)
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in the sources"
        text = text.replace(old, new)
    parts = [text, *(function_of(k) + _caller(k) for k in named)]
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory, "kernels.cc")
        source.write_text("\n".join(parts))
        output = source.with_suffix(".so")
        header = pathlib.Path(_compiled_header(level).name, _HEADER.name)
        command = ["c++", *_FLAGS, level, "-shared", "-include", str(header), str(source)]
        subprocess.run([*command, "-o", str(output)], check=True)
        return ctypes.CDLL(str(output))


@functools.cache
def _compiled_header(level: str) -> tempfile.TemporaryDirectory:
    """A directory with the header compiled: half of a kernel's time would go into reading it."""
    directory = tempfile.TemporaryDirectory()
    header = pathlib.Path(shutil.copy(_HEADER, directory.name))
    command = ["c++", *_FLAGS, level, "-x", "c++-header", str(header)]
    subprocess.run([*command, "-o", f"{header}.gch"], check=True)
    return directory


def run(library: ctypes.CDLL, kernel: Kernel, *inputs: Any) -> list[np.ndarray]:
    """Runs a kernel, whose results may not depend on which blocks and threads go first.

    Args:
      library: Of `build`.
      kernel: One of its kernels.
      *inputs: As the kernel's.

    Returns:
      Outputs; what the kernel does not write is NaN, or the largest number.
    """
    outputs = run_once(library, kernel, *inputs)
    others = run_once(library, kernel, *inputs, backward=True)
    for both in zip(outputs, others, strict=True):
        # NumPy does not take two NaN of bfloat16 for equal.
        is_short = both[0].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(*(of.view(np.uint16) if is_short else of for of in both))
    return outputs


def run_once(
    library: ctypes.CDLL, kernel: Kernel, *inputs: Any, backward: bool = False
) -> list[np.ndarray]:
    """As `run`, in one order: the first blocks and threads go first, or the last."""
    arrays = [np.ascontiguousarray(array) for array in inputs]
    assert [str(array.dtype) for array in arrays] == list(kernel.inputs)
    outputs = []
    aliased = {output: of for of, output in kernel.aliases}
    for number, output in enumerate(kernel.outputs):
        if number in aliased:
            outputs.append(arrays[aliased[number]].copy())
            arrays[aliased[number]] = outputs[-1]
            continue
        is_float = not re.match("u?int", output.dtype)
        value = np.nan if is_float else np.iinfo(output.dtype).max
        outputs.append(
            np.full(
                output.shape,
                value,
                ml_dtypes.bfloat16 if output.dtype == "bfloat16" else output.dtype,
            )
        )
    pointers = [array.ctypes.data for array in (*arrays, *outputs)]
    function = getattr(library, f"run_{_named(kernel).name}")
    function((ctypes.c_void_p * len(pointers))(*pointers), ctypes.c_int(backward))
    return outputs


def call(kernel: Kernel, *inputs):
    """`calls.call` on the CPU, within a program."""
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in kernel.outputs]

    def on_host(*arrays):
        return run_once(_library(kernel), kernel, *map(np.asarray, arrays))

    return jax.pure_callback(on_host, shapes, *inputs)


@functools.cache
def _library(kernel: Kernel) -> ctypes.CDLL:
    return build([kernel], level="-O0")
