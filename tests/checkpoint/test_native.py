"""Reading in C++ against the interpreter's, and what is told of elements that are not finite."""

import ctypes
import shutil
import time
from concurrent.futures import CancelledError

import ml_dtypes
import numpy as np
import pytest

from grok1.checkpoint import blocks, native
from grok1.checkpoint.blocks import Target
from grok1.checkpoint.elements import FiniteCheck
from grok1.checkpoint.reading import Reader
from grok1.files import CheckpointError
from grok1.machine import announcement
from grok1.machine.native_library import Sources, UnavailableError
from tests.checkpoint.test_reading import stored

LOOKED_AT = 1 << 19  # bytes: kLookedAt of transfer.cc
FLOATS = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture(autouse=True)
def library():
    if not native.is_available():
        pytest.skip("no C++ compiler on this machine")


def rows_of(values, path, **changes):
    path.write_bytes(b"-" * 6 + values.tobytes())
    rows, columns = values.shape
    width = columns * values.itemsize
    finite, stop = str(values.dtype), native.Stop()
    return native.Rows(-1, 6, rows, width, width, finite, stop)._replace(**changes)


def read(rows, path, out) -> bool:
    with path.open("rb") as file:
        return native.read(rows._replace(descriptor=file.fileno()), out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 17, 1000])
def test_columns_of_rows_are_read_one_behind_the_other(columns, dtype, tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 1000)).astype(dtype)
    for first in (0, 1000 - columns):
        start, width = 6 + first * dtype.itemsize, columns * dtype.itemsize
        rows = rows_of(values, tmp_path / "file", offset=start, num_bytes=width)
        out = np.full(40 * width + 8, 77, np.uint8)
        assert read(rows, tmp_path / "file", out[:-8])
        found = out[:-8].view(dtype).reshape(40, columns)
        np.testing.assert_array_equal(found, values[:, first : first + columns])
        assert (out[-8:] == 77).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_whatever_is_not_finite_is_found_wherever_it_is(bad, dtype, tmp_path):
    most = LOOKED_AT // dtype.itemsize
    size = most + 37
    values = np.full((1, size), ml_dtypes.finfo(dtype).max, dtype)
    values[0, ::3] = -values[0, 0]
    values[0, 1::5] = ml_dtypes.finfo(dtype).smallest_subnormal
    rows, out = rows_of(values, tmp_path / "file"), np.empty(values.nbytes, np.uint8)
    assert read(rows, tmp_path / "file", out)
    for place in (0, 1, 15, 16, most - 1, most, size - 2, size - 1):
        spoilt = values.copy()
        spoilt[0, place] = bad
        rows = rows_of(spoilt, tmp_path / "file")
        assert not read(rows, tmp_path / "file", out)
        # Nobody asks of what may be anything.
        assert read(rows._replace(finite=""), tmp_path / "file", out)
        np.testing.assert_array_equal(out, spoilt.reshape(-1).view(np.uint8))


def test_a_file_that_ends_is_not_read_and_what_cannot_be_is_our_own_fault(tmp_path):
    values = np.zeros((40, 10), np.float32)
    path, out = tmp_path / "file", np.zeros(1600, np.uint8)
    rows = rows_of(values, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert not read(rows, path, out)
    assert not native.read(rows, out)  # which is open nowhere
    for change in (
        {"num_rows": 41},
        {"num_rows": 0},
        {"num_bytes": 41},
        {"stride": 39},
        {"offset": -1},
    ):
        with pytest.raises(AssertionError):
            read(rows._replace(**change), path, out)


INTERRUPTED = """
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>

extern "C" std::atomic<int> calls{0}, nap{0};  // microseconds

// As a system's whose signals come all the time: two calls of three read nothing, the third a part.
static ssize_t interrupted(int descriptor, void* out, size_t bytes, off_t offset) {
  if (nap) usleep(nap);
  const size_t part = std::min<size_t>(bytes, 1000);
  if (++calls % 3 == 0) return pread(descriptor, out, part, offset);
  errno = EINTR;
  return -1;
}

#define pread interrupted
#include "transfer.h"
"""


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """The library with another call of the system's."""
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "interrupted.cc").write_text(INTERRUPTED)
    shutil.copy(native._SOURCES.directory / "transfer.cc", directory / "transfer.h")
    monkeypatch.setattr(native, "_SOURCES", Sources("interrupted", directory, "a test's library"))
    native._library.cache_clear()
    yield native._library()
    native._library.cache_clear()


def test_a_read_that_a_signal_interrupts_is_begun_anew(interrupted, tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 1300)).astype(np.float32)
    for columns in (1300, 1001):  # one run, and a row at a time
        rows = rows_of(values, tmp_path / "file", num_bytes=4 * columns)
        out = np.zeros(28 * columns, np.uint8)
        before = ctypes.c_int.in_dll(interrupted, "calls").value
        assert read(rows, tmp_path / "file", out)
        np.testing.assert_array_equal(out.view(np.float32).reshape(7, -1), values[:, :columns])
        calls = ctypes.c_int.in_dll(interrupted, "calls").value - before
        assert calls >= 3 * len(out) // 1000
    # One that ends in the midst is no interruption.
    assert not read(rows._replace(offset=7 + 4 * 299), tmp_path / "file", out)


def test_what_nobody_wants_is_not_read(tmp_path):
    rows, out = rows_of(np.ones((4, 10), np.float32), tmp_path / "file"), np.zeros(160, np.uint8)
    rows.stop.set()
    with pytest.raises(CancelledError):
        read(rows, tmp_path / "file", out)
    assert not out.any()


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "by the interpreter"])
def test_an_interrupted_load_ends_in_the_midst_of_a_block(
    is_native, interrupted, tmp_path, monkeypatch
):
    # A block takes ten seconds: 1,000 bytes in three naps, or 4,000 by the interpreter in one.
    ctypes.c_int.in_dll(interrupted, "nap").value = 3000
    monkeypatch.setattr(native, "is_available", lambda: is_native)
    monkeypatch.setattr(blocks, "_STOP_BYTES", 4000)
    read_at, calls = blocks.read_at, []

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.01)
        read_at(*arguments)

    monkeypatch.setattr(blocks, "read_at", slow)
    values = np.ones((1000, 1000), np.float32)
    target = Target(((0, 1000), (0, 1000)), np.zeros_like(values))
    start = time.monotonic()

    def interrupt():
        with Reader(lambda _: None) as reader:
            reader.submit(stored(tmp_path, values), [target])
            time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert time.monotonic() - start < 3
    assert target.out[0, 0] == 1
    assert target.out[-1, -1] == 0
    assert bool(calls) != is_native


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_what_is_not_finite_is_named_in_both_forms_alike(dtype, transposed, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_DIRECT_BYTES", 1 << 8)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 8)
    values = np.ones((30, 50), dtype)
    values[21, 7:9] = np.nan
    array = stored(tmp_path, values, transposed)
    target = Target(((0, 30), (3, 40)), np.empty((30, 37), dtype))
    message, found = r"part0: w: .* are not finite, the first is nan at \[21, 7\]", []

    def load():
        with Reader(lambda _: None) as reader:
            reader.submit(array, [target], FiniteCheck(array.parts[0][0], "w"))
            reader.wait()

    for is_native in (True, False):
        monkeypatch.setattr(native, "is_available", lambda is_native=is_native: is_native)
        with pytest.raises(CheckpointError, match=message) as error:
            load()
        found.append(str(error.value))
    assert found[0] == found[1]


def test_a_float_that_it_does_not_know_is_looked_at_by_the_interpreter(tmp_path):
    seen = []
    for values, check in (
        (np.ones((30, 50), np.float16), FiniteCheck),
        (np.ones((30, 50), np.float32), lambda *_: lambda *of: seen.append(of)),
    ):
        array = stored(tmp_path, values)
        (block,) = blocks.blocks(
            array, [Target(((0, 30), (0, 50)), np.empty_like(values))], check(None, "w")
        )
        assert block.rows(3, 0, 30) is None
        with Reader(lambda _: None) as reader:
            reader.submit(array, [Target(((0, 30), (0, 50)), np.empty_like(values))], block.check)
            reader.wait()
    assert len(seen) == 1


@pytest.mark.parametrize(("backend", "lines"), [("cpu", 0), ("gpu", 1)])
def test_without_a_compiler_the_interpreter_reads_and_a_gpus_user_is_told(
    backend, lines, tmp_path, monkeypatch, capfd
):
    def refuse(*_):
        raise UnavailableError("no C++ compiler found; install g++ or clang++")

    announcement.hint.cache_clear()
    native._library.cache_clear()
    monkeypatch.setattr(native, "loaded_library", refuse)
    monkeypatch.setattr(native.jax, "default_backend", lambda: backend)
    try:
        values = np.arange(60, dtype=np.float32).reshape(6, 10)
        rows = rows_of(values, tmp_path / "file")
        assert not read(rows, tmp_path / "file", np.empty(240, np.uint8))
        assert not native.is_available()
    finally:
        native._library.cache_clear()
    said = capfd.readouterr().err
    assert said.count("\n") == lines
    if lines:
        assert said == (
            "grok1: reading files without native code, which is slower: no C++ compiler found; "
            "install g++ or clang++\n"
        )


def test_it_is_off_by_the_environment_without_a_word(monkeypatch, capfd):
    monkeypatch.setenv("GROK1_NATIVE", "0")
    assert native._library.__wrapped__() is None
    assert capfd.readouterr().err == ""
