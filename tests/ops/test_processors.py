"""The kernels' sources for other processors and compilers than this machine's own."""

import pathlib
import platform
import re
import shutil
import subprocess

import jax
import ml_dtypes
import numpy as np
import pytest

from grok1.machine import native_library
from grok1.ops.cpu import bindings
from grok1.ops.int4 import Int4Array, dequantize_int4
from grok1.ops.int4_rounding import round_weight
from tests.helpers import relative_error

SOURCES = bindings._SOURCES.directory
PROGRAM = pathlib.Path(__file__).with_name("one_thread.cc")
OPTIONS = [
    *(flag for flag in native_library._FLAGS if flag not in ("-O3", "-shared", "-fPIC")),
    "-pthread",
    f"-I{SOURCES}",
    f"-I{jax.ffi.include_dir()}",
]
# What the language leaves undefined ends the program, with no library that says what it was.
TRAPS = ["-fsanitize=undefined,float-cast-overflow", "-fsanitize-undefined-trap-on-error"]
TARGETS = [
    ["clang++", "-march=x86-64-v3"],
    ["clang++", "--target=aarch64-linux-gnu"],
    ["aarch64-linux-gnu-g++", "-march=armv8-a"],
]
LONG_LONG = r"__extension__ typedef \1signed long long \2;"
IS_ARM = platform.machine() in ("aarch64", "arm64")


READ = ["-fsyntax-only", "-x", "c++", "-"]


def compiled(command, arguments, text=None):
    """Compiles, with C++ on stdin if there is a text; skips where the compiler is not there."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    if subprocess.run(
        [*command, *READ], input=b"#include <vector>", capture_output=True
    ).returncode:
        pytest.skip(f"{' '.join(command)} has no standard library here")
    subprocess.run([*command, *OPTIONS, *arguments], input=text, text=True, check=True)


def own_compiler():
    compiler = next(filter(None, map(shutil.which, native_library._COMPILERS)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


def look_at_sources(*command):
    """Has a compiler read all of them, and make nothing."""
    paths = [*sorted(SOURCES.glob("*.cc")), SOURCES.parents[1] / "checkpoint" / "transfer.cc"]
    # One after the other as one: most of the time goes into what all of them include.
    text = "".join(f'#include "{path}"\n' for path in paths)
    compiled(command, READ, text)


@pytest.mark.parametrize("command", TARGETS, ids=" ".join)
def test_another_compiler_takes_the_sources(command):
    if command[1] == "-march=x86-64-v3" and IS_ARM:
        pytest.skip("for another processor")
    look_at_sources(*command)


def test_integers_of_64_bits_may_be_long_long_as_on_macos(tmp_path):
    compiler = own_compiler()
    asked = [compiler, "-x", "c++", "-E", "-"]
    found = subprocess.run(asked, input="#include <bits/types.h>", capture_output=True, text=True)
    path = re.search('"(/[^"]*/bits/types.h)"', found.stdout)
    text = pathlib.Path(path[1]).read_text() if path else ""
    changed = re.sub(r"(?m)^typedef (un)?signed long int (__u?int64_t);", LONG_LONG, text)
    if changed == text:
        pytest.skip("not glibc's headers, or not of 64 bits")
    (tmp_path / "bits").mkdir()
    (tmp_path / "bits" / "types.h").write_text(changed)
    look_at_sources(compiler, f"-I{tmp_path}")


def records(output):
    """What the program has written: arrays by name, in their order."""
    found = {}
    while output:
        head, _, output = output.partition(b"\n")
        name, kind, size = head.decode().split()
        found.setdefault(name, []).append(np.frombuffer(output[: int(size)], kind))
        output = output[int(size) :]
    return found


@pytest.fixture(scope="module", params=["without AVX", "aarch64", "aarch64 of Apple's by clang++"])
def found(request, tmp_path_factory):
    """What the program for a processor has written."""
    program = tmp_path_factory.mktemp("processor") / "one_thread"
    runner = []
    if request.param == "without AVX":
        if IS_ARM:
            pytest.skip("Arm processors have no AVX to do without")
        command = [own_compiler(), "-march=x86-64"]
    elif IS_ARM:
        command = [own_compiler()]
    else:
        runner = [shutil.which("qemu-aarch64-static")]
        if runner == [None]:
            pytest.skip("no qemu-aarch64-static here")
        command = ["aarch64-linux-gnu-g++", "-march=armv8-a"]
        if request.param != "aarch64":
            command = ["clang++", "--target=aarch64-linux-gnu", "-mcpu=apple-m1"]
    static = [] if platform.system() == "Darwin" else ["-static"]
    compiled(command, ["-O1", *TRAPS, *static, str(PROGRAM), "-o", str(program)])
    result = subprocess.run([*runner, program], capture_output=True, check=True)
    return records(result.stdout)


def test_products_against_float64(found):
    x = found["x"][0].reshape(24, 320).astype(float)
    values = found["int8"][0].reshape(320, 75)
    scales = found["scales"][0].reshape(2, 75)
    weight = values * scales.view(ml_dtypes.bfloat16).astype(float).repeat(160, axis=0)
    for product in found["int8_product"]:
        rows = product.reshape(-1, 75)
        assert relative_error(rows, x[: len(rows)] @ weight) <= 2e-6
    parts = found["codes"][0].reshape(160, 75), found["subscales"][0].reshape(12, 75)
    weight = np.asarray(dequantize_int4(Int4Array(*parts, scales.view(np.float16))), float)
    for product in found["int4_product"]:
        rows = product.reshape(-1, 75)
        assert relative_error(rows, x[: len(rows)] @ weight) <= 2e-6


@pytest.mark.parametrize("kind", ["int8_product", "int4_product"])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(found, kind):
    for product in found[kind]:
        rows = product.reshape(-1, 75)
        np.testing.assert_array_equal(rows, found[kind][-1].reshape(-1, 75)[: len(rows)])


def test_rows_of_a_screen_against_float64(found):
    x = found["x"][0][:320].astype(float)
    rows = found["int8"][0].reshape(75, 320).astype(float)
    assert relative_error(found["dot"][0], rows @ x) <= 2e-6
    # A line of 64 columns has 32 bytes: low bits for its first half.
    bits = found["remainders"][0].reshape(75, 5, 32)
    codes = np.concatenate([bits & 15, bits >> 4], axis=-1).reshape(75, 320)
    assert relative_error(found["dot_fine"][0], (rows + (codes - 7.5) / 15) @ x) <= 2e-6


def test_attention_against_float64(found):
    query = found["query"][0].reshape(7, 3, 71).astype(float)
    keys, values = (found[name][0].reshape(40, 71).astype(float) for name in ("keys", "values"))
    logits = 30 * np.tanh(query @ keys.T * np.float32(0.1) / 30)
    logits[np.arange(40) > np.arange(33, 40)[:, None, None].repeat(3, axis=1)] = -np.inf
    weights = np.exp(logits)
    expected = weights @ values / weights.sum(axis=-1, keepdims=True)
    for out in found["attention"]:
        assert relative_error(out.reshape(7, 3, 71), expected) <= 2e-6


def test_weights_are_rounded_as_by_xla(found):
    rounded = round_weight(found["weights"][0].reshape(64, 75), 1, "xla")
    for part, expected in zip(found["rounded_to_4_bits"], rounded, strict=True):
        np.testing.assert_array_equal(part.reshape(expected.shape), expected.view(part.dtype))


def test_functions_against_float64(found):
    x = found["numbers"][0].astype(float)
    np.testing.assert_allclose(found["exp"][0], np.exp(x), rtol=3e-7)
    np.testing.assert_allclose(found["tanh"][0], np.tanh(x), rtol=1e-6)
    gelu = x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(found["gelu"][0], gelu, rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(found["rounded"][0], np.rint(x).clip(-15, 15))


def test_whole_numbers_and_halves_are_exact(found):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found["halves"][0], halves)
    scaled = np.ldexp(found["numbers"][0], np.arange(4096) % 48 - 32)
    with np.errstate(over="ignore"):
        expected = scaled.astype(np.float16)
    np.testing.assert_array_equal(found["to_halves"][0].view(np.float16), expected)
    first, second = np.split(found["words"][0].astype(np.uint64), 2)
    np.testing.assert_array_equal(found["high"][0], first * second >> 32)
    np.testing.assert_array_equal(found["any"][0], [0] + [1] * (len(found["any"][0]) - 1))
