"""The native kernels: built once in a private place, refused in any other, never needed."""

import ctypes
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from grok1.ops.cpu import bindings, build

ask_again = bindings._is_available.__wrapped__


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GROK1_NATIVE", raising=False)
    return tmp_path / "grok1"


def pretend_to_compile(monkeypatch):
    """Replaces the compiler by one that writes the number of times it ran."""
    runs = []

    def compile(compiler, library):
        runs.append(library)
        with open(library, "w") as file:
            file.write(f"{len(runs)}")

    monkeypatch.setattr(build, "_compile", compile)
    return runs


def test_off_by_the_environment_without_a_word(monkeypatch, cache, capfd):
    monkeypatch.setenv("GROK1_NATIVE", "0")
    assert not ask_again()
    assert capfd.readouterr().err == ""
    assert not cache.exists()


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, cache, capfd):
    monkeypatch.setenv("PATH", str(cache))
    assert not ask_again()
    expected = (
        "grok1: running through XLA, several times slower than the native kernels: "
        "no C++ compiler found; install g++ or clang++\n"
    )
    assert capfd.readouterr().err == expected


def test_a_failed_compilation_names_its_first_error(monkeypatch, cache, capfd):
    compiler = cache.parent / "c++"
    compiler.write_text("#!/bin/sh\necho 'In file x' >&2\necho 'x:1: error: no luck' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{cache.parent}:/usr/bin:/bin")
    assert not ask_again()
    assert capfd.readouterr().err.endswith(f": {compiler} failed: x:1: error: no luck\n")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o720, 0o702])
def test_a_directory_that_others_can_reach_is_refused(monkeypatch, cache, capfd, mode):
    cache.mkdir()
    cache.chmod(mode)
    assert not ask_again()
    message = f"{cache} is not private; make it a directory of yours, mode 700\n"
    assert capfd.readouterr().err.endswith(message)
    assert list(cache.iterdir()) == []


def test_a_link_to_a_directory_is_refused(cache, capfd):
    cache.symlink_to(cache.parent)
    assert not ask_again()
    assert "is not private" in capfd.readouterr().err


def test_a_damaged_library_is_built_anew(monkeypatch, cache):
    runs = pretend_to_compile(monkeypatch)
    tried = []

    def load(path):
        tried.append(pathlib.Path(path).read_text())
        if len(tried) == 1:
            raise OSError("file too short")
        return "library"

    monkeypatch.setattr(build.ctypes, "CDLL", load)
    assert build.loaded_library() == "library"
    assert tried == ["1", "2"]
    assert len(runs) == 2


def test_the_library_is_built_once_and_again_for_other_inputs(monkeypatch, cache):
    runs = pretend_to_compile(monkeypatch)
    first = build._built_library()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert build._built_library() == first
    assert len(runs) == 1
    changes = {"_FLAGS": ("-O0",), "instructions": lambda: "another", "version": lambda name: "0"}
    for name, value in changes.items():
        monkeypatch.setattr(build, name, value)
        build._built_library()
    assert sorted(path.read_text() for path in cache.iterdir()) == ["1", "2", "3", "4"]


def test_nothing_is_left_of_a_build_that_is_interrupted(monkeypatch, cache):
    def interrupt(compiler, library):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_compile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build._built_library()
    assert list(cache.iterdir()) == []


def test_a_matrix_beyond_the_stack_is_an_error():
    if not bindings.is_available():
        pytest.skip("no native kernels on this machine")
    values, scales = jnp.zeros((3, 4, 5), jnp.int8), jnp.zeros((3, 1, 5), jnp.bfloat16)
    product = jax.jit(bindings.quantized_matmul)
    with pytest.raises(jax.errors.JaxRuntimeError, match="matrix 3 of a stack of 3"):
        product(jnp.zeros((1, 4)), values, scales, (3,), 1).block_until_ready()


PRODUCT = """
import sys, jax, numpy as np
from grok1.ops.cpu import bindings, build
rng = np.random.default_rng(0)
values = rng.integers(-127, 128, (700, 1200), dtype=np.int8)
scales = rng.uniform(1, 2, (2, 1200)).astype(jax.numpy.bfloat16)
out = jax.jit(bindings.quantized_matmul)(rng.random((3, 700), np.float32), values, scales, (), 3)
sys.stdout.buffer.write(np.asarray(out).tobytes())
"""


def test_processes_that_build_at_once_agree_whatever_their_number_of_threads(cache):
    if not bindings.is_available():
        pytest.skip("no native kernels on this machine")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRODUCT],
            stdout=subprocess.PIPE,
            env={**os.environ, "GROK1_NUM_THREADS": str(number)},
        )
        for number in (1, 3)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 4 * 3 * 1200
    assert len(list(cache.iterdir())) == 1


@pytest.fixture(scope="module")
def forecast(tmp_path_factory) -> ctypes.CDLL:
    """`note(address, size, most)`, and `count()`: how often there was more to fetch."""
    compiler = next(filter(None, map(shutil.which, build._COMPILERS)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    directory = tmp_path_factory.mktemp("forecast")
    source, library = directory / "forecast.cc", directory / "forecast.so"
    source.write_text("""
        #include "forecast.h"
        extern "C" void note(intptr_t begin, int64_t size, int64_t most) {
          grok1::Forecast::get().note({reinterpret_cast<const char*>(begin), size}, most);
        }
        extern "C" int count() {
          int fetched = 0;
          while (grok1::Forecast::get().fetch_some()) ++fetched;
          return fetched;
        }
    """)
    flags = [*build._FLAGS, f"-I{build._SOURCES}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    found.note.argtypes = [ctypes.c_int64] * 3
    return found


def test_what_followed_twice_is_fetched_and_nothing_else(forecast):
    chunk, most = 1024, 16 * 1024

    def run(*products: tuple[int, int]) -> list[int]:
        """What was fetched after each product."""
        found = []
        for begin, size in products:
            forecast.note(begin, size, most)
            found.append(forecast.count())
        return found

    # Addresses where nothing is: fetching does not fault.
    query, out, experts, head = (
        (1 << 30, 3 * chunk),
        (2 << 30, 100 * chunk),
        (3 << 30, 0),
        (4 << 30, chunk // 2),
    )
    step = (query, out, experts, head)
    assert run(*step, *step) == [0] * 8
    # Up to its size, up to what stays near, never what is not foretold, a part of a chunk whole.
    assert run(*step, *step) == [16, 0, 1, 3] * 2
    # Another product in between: not trusted until the old one has followed twice again.
    other = (5 << 30, chunk)
    assert run(query, other, out, experts, head) == [16, 0, 0, 1, 3]
    assert run(*step, *step) == [0, 0, 1, 3] * 2
    assert run(*step) == [16, 0, 1, 3]
