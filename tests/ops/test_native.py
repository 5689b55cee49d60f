"""The native kernels: built once in a private place, refused in any other, never needed."""

import ctypes
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from grok1.machine import announcement, cache_directory, native_library
from grok1.ops.cpu import bindings
from tests.helpers import skip_unless_it_runs_here, slow

pytestmark = pytest.mark.not_on_gpu("it is of the CPU's form in C++")

ask_again = bindings._is_available.__wrapped__


def loaded(symbols):
    return native_library.loaded_library(symbols, bindings._SOURCES)


@pytest.fixture(scope="module", autouse=True)
def own_library():
    """The library in the tests' own cache; None where there can be none."""
    if not bindings.is_available():
        return None
    name = pathlib.Path(loaded([])._name).name
    return pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "grok1" / name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GROK1_NATIVE", raising=False)
    announcement.hint.cache_clear()
    return tmp_path / "grok1"


def pretend_to_compile(monkeypatch):
    """Replaces compiler and loader: the library is the number of times that the former ran."""
    runs = []

    def compile(compiler, library, directory):
        runs.append(library)
        pathlib.Path(library).write_text(f"{len(runs)}")

    def load(path):
        return types.SimpleNamespace(text=pathlib.Path(path).read_text(), f=None)

    monkeypatch.setattr(native_library, "_compile", compile)
    monkeypatch.setattr(native_library.ctypes, "CDLL", load)
    return runs


def compiler_that(monkeypatch, directory, script):
    """Puts a shell script in the place of the compiler."""
    compiler = directory / "c++"
    compiler.write_bytes(b"#!/bin/sh\n" + script)
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return compiler


def copying(library: pathlib.Path) -> bytes:
    """The script of a compiler that takes a while, and makes what another one has made."""
    return b'for last; do :; done; sleep 2; cp "%s" "$last"' % os.fsencode(library)


def test_off_by_the_environment_without_a_word(monkeypatch, cache, capfd):
    monkeypatch.setenv("GROK1_NATIVE", "0")
    assert not ask_again()
    assert capfd.readouterr().err == ""
    assert not cache.exists()


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, cache, capfd):
    monkeypatch.setenv("PATH", str(cache))
    assert not ask_again()
    expected = f"{ONE_LINE}no C++ compiler found; install g++ or clang++\n"
    assert capfd.readouterr().err == expected


ONE_LINE = "grok1: running through XLA, several times slower than the native kernels: "
EMPTY_LIBRARY = (
    b'for last; do :; done; echo "int unused;" >"$last.c"; /usr/bin/cc -shared -o "$last" "$last.c"'
)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (b"echo 'In file x' >&2; echo 'x:1: error: no luck' >&2; exit 1", "failed: x:1: error: no"),
        (b"printf 'x:1: \\351rror: \\377\\n' >&2; exit 1", "failed: x:1: \ufffdrror: \ufffd\n"),
        (b"kill -9 $$", "failed: exit status -9"),
        (b"exit 0", "wrote no library"),
        (b'for last; do :; done; echo text >"$last"', "made cannot be loaded: "),
        (EMPTY_LIBRARY, "made cannot be loaded: it has no function grok1_quantized_matmul"),
    ],
    ids=["error", "not utf-8", "killed", "nothing", "no library", "no symbols"],
)
def test_a_compiler_that_fails_is_one_line(monkeypatch, cache, capfd, script, message):
    compiler_that(monkeypatch, cache.parent, script)
    assert not ask_again()
    said = capfd.readouterr().err
    assert said.startswith(ONE_LINE)
    assert message in said
    assert said.count("\n") == 1
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o720, 0o702])
def test_a_directory_that_others_can_reach_is_refused(cache, capfd, mode):
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


def stored(cache):
    return sorted(cache.glob("native-*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
        lambda path: path.unlink(),
        lambda path: path.chmod(0o666),
        lambda path: (path.unlink(), path.symlink_to(pathlib.Path(__file__))),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["empty", "cut short", "garbled", "gone", "open to others", "a link", "a pipe"],
)
def test_a_damaged_library_is_never_loaded_and_built_anew(monkeypatch, cache, damage):
    runs = pretend_to_compile(monkeypatch)
    assert loaded(["f"]).text == "1"
    (path,) = stored(cache)
    damage(path)
    assert loaded(["f"]).text == "2"
    (path,) = stored(cache)
    assert path.read_text() == "2"
    assert loaded(["f"]).text == "2"
    assert len(runs) == 2


@slow
def test_a_library_that_is_cut_short_does_not_end_a_process(monkeypatch, own_library, cache):
    if own_library is None:
        pytest.skip("no native kernels on this machine")
    cache.mkdir(mode=0o700)
    copy = cache / own_library.name
    copy.write_bytes(own_library.read_bytes()[:100_000])
    copy.chmod(0o600)
    compiler_that(monkeypatch, cache.parent, copying(own_library))
    result = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 4 * 3 * 1200
    assert copy.read_bytes() == own_library.read_bytes()


def test_a_compiler_that_knows_no_option_for_this_processor_is_asked_without(monkeypatch, tmp_path):
    script = b"""for each; do case $each in *=native) echo "error: native" >&2; exit 1;; esac; done
        echo "$@" > "$each" """
    compiler = compiler_that(monkeypatch, tmp_path, script)
    library = tmp_path / "native.so"
    native_library._compile(str(compiler), str(library), bindings._SOURCES.directory)
    assert "-shared" in library.read_text()


def test_the_library_is_built_once_and_again_for_other_inputs(monkeypatch, cache):
    runs = pretend_to_compile(monkeypatch)
    loaded(["f"])
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(stored(cache)[0].stat().st_mode) == 0o600
    loaded(["f"])
    assert len(runs) == 1
    changes = {"_FLAGS": ("-O0",), "instructions": lambda: "another", "version": lambda name: "0"}
    for name, value in changes.items():
        monkeypatch.setattr(native_library, name, value)
        loaded(["f"])
    assert sorted(path.read_text() for path in cache.iterdir()) == ["1", "2", "3", "4"]


def test_the_library_is_on_disk_before_it_has_its_name(monkeypatch, cache):
    pretend_to_compile(monkeypatch)
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        assert stored(cache) == []
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    loaded(["f"])
    assert synced == [1]


@pytest.mark.parametrize("place", ["_compile", "_load"])
def test_nothing_is_left_of_a_build_that_is_interrupted(monkeypatch, cache, place):
    pretend_to_compile(monkeypatch)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(native_library, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        loaded(["f"])
    assert list(cache.iterdir()) == []


def test_on_a_file_system_without_execution_nothing_is_built(monkeypatch, cache, capfd):
    runs = pretend_to_compile(monkeypatch)
    status = types.SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: status)
    assert not ask_again()
    message = f"{cache} is on a file system that is mounted noexec; set XDG_CACHE_HOME"
    assert message in capfd.readouterr().err
    assert runs == []


def test_a_stored_library_that_cannot_be_loaded_is_not_built_by_every_process(
    monkeypatch, cache, capfd
):
    runs = pretend_to_compile(monkeypatch)
    loaded(["f"])

    def fail(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(native_library.ctypes, "CDLL", fail)
    assert not ask_again()
    (path,) = stored(cache)
    message = f"{path} cannot be loaded here: failed to map segment from shared object; remove it"
    assert message in capfd.readouterr().err
    assert len(runs) == 1


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_a_place_that_cannot_be_made_is_named_with_what_to_do(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    path = re.escape(str(tmp_path / "file"))
    message = rf"{path}.*/grok1 cannot be made: Not a directory; set XDG_CACHE_HOME to a directory"
    with pytest.raises(OSError, match=message), cache_directory.held_directory():
        pass


# --- a directory below one that another user can change ------------------------------------------


def swapping(monkeypatch, cache, name):
    """Once the directory is held, puts another of the name in its place, with a file in it."""
    opened = cache_directory.PrivateDirectory.__init__

    def swap(self, path, descriptor):
        opened(self, path, descriptor)
        if path.parent.name != "hidden":
            path.parent.rename(path.parent.parent / "hidden")
            path.mkdir(parents=True)
            (path / name).write_text("another's")

    monkeypatch.setattr(cache_directory.PrivateDirectory, "__init__", swap)


def test_what_is_loaded_is_what_was_checked_whatever_is_done_above_it(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    cache = tmp_path / "shared" / "grok1"
    pretend_to_compile(monkeypatch)
    loaded(["f"])
    (path,) = stored(cache)
    swapping(monkeypatch, cache, path.name)
    assert loaded(["f"]).text == "1"
    assert [other.name for other in stored(cache)] == [path.name]
    assert path.read_text() == "another's"
    assert stored(tmp_path / "hidden" / "grok1")[0].read_text() == "1"


def test_a_program_is_written_where_was_looked(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    swapping(monkeypatch, tmp_path / "shared" / "grok1", "program")
    with cache_directory.held_directory() as directory:
        directory.write("program", b"ours")
        assert directory.read("program") == b"ours"
    assert (tmp_path / "shared" / "grok1" / "program").read_text() == "another's"
    assert (tmp_path / "hidden" / "grok1" / "program").read_bytes() == b"ours"


@pytest.mark.parametrize(("mode", "is_safe"), [(0o755, True), (0o1777, True), (0o777, False)])
def test_without_paths_to_what_is_held_open_the_chain_is_looked_at(
    monkeypatch, tmp_path, cache, mode, is_safe
):
    monkeypatch.setattr(cache_directory, "_DESCRIPTORS", tmp_path / "no such directory")
    tmp_path.chmod(mode)
    pretend_to_compile(monkeypatch)
    if is_safe:
        assert loaded(["f"]).text == "1"
        return
    message = re.escape(f"{cache}: {tmp_path}, above it, can be changed by others; set XDG_CACHE")
    with pytest.raises(PermissionError, match=message):
        loaded(["f"])
    assert list(cache.iterdir()) == []


def test_a_matrix_beyond_the_stack_is_an_error():
    skip_unless_it_runs_here("cpp")
    values, scales = jnp.zeros((3, 4, 5), jnp.int8), jnp.zeros((3, 1, 5), jnp.bfloat16)
    product = jax.jit(bindings.quantized_matmul)
    with pytest.raises(jax.errors.JaxRuntimeError, match="matrix 3 of a stack of 3"):
        product(jnp.zeros((1, 4)), (values, scales), (3,), 1).block_until_ready()


PRODUCT = """
import sys, jax, numpy as np
from grok1.ops.cpu import bindings
rng = np.random.default_rng(0)
values = rng.integers(-127, 128, (700, 1200), dtype=np.int8)
scales = rng.uniform(1, 2, (2, 1200)).astype(jax.numpy.bfloat16)
out = jax.jit(bindings.quantized_matmul)(rng.random((3, 700), np.float32), (values, scales), (), 3)
sys.stdout.buffer.write(np.asarray(out).tobytes())
"""


def test_processes_that_build_at_once_agree_whatever_their_number_of_threads(
    monkeypatch, own_library, cache
):
    if own_library is None:
        pytest.skip("no native kernels on this machine")
    compiler_that(monkeypatch, cache.parent, copying(own_library))
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
    compiler = next(filter(None, map(shutil.which, native_library._COMPILERS)), None)
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
    flags = [*native_library._FLAGS, f"-I{bindings._SOURCES.directory}"]
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
