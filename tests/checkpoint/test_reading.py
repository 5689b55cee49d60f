"""Slices of files into given memory: every layout, each byte once, and files that change."""

import threading

import ml_dtypes
import numpy as np
import pytest

from grok1.checkpoint import blocks, reading
from grok1.checkpoint.blocks import Target
from grok1.checkpoint.reading import Reader
from grok1.checkpoint.storage import StoredArray
from grok1.checkpoint.tensor_file import ArraySpan, CheckpointError, TensorHeader

SHAPE = 3, 14, 22  # matrices, rows, columns
SLICES = {
    "whole": [((0, 3), (0, 14), (0, 22))],
    "columns": [((0, 3), (0, 14), (0, 11)), ((0, 3), (0, 14), (11, 22))],
    "columns with a gap": [((0, 3), (0, 14), (2, 4)), ((0, 3), (0, 14), (20, 22))],
    "rows": [((0, 3), (0, 7), (0, 22)), ((0, 3), (7, 14), (0, 22))],
    "replicated": [((1, 2), (3, 9), (5, 16))] * 2,
}


def stored(path, values: np.ndarray, transposed=False, apart=False) -> StoredArray:
    """Writes an array behind seven other bytes, whole or a file for each matrix."""
    parts = []
    for i, part in enumerate(values if apart else [values]):
        data = part.swapaxes(-1, -2) if transposed else part
        file = path / f"part{i}"
        file.write_bytes(b"-" * 7 + np.ascontiguousarray(data).tobytes())
        found = file.stat()
        span = ArraySpan(7, data.shape, str(values.dtype))
        parts.append((TensorHeader(file, found.st_size, found.st_mtime_ns, span, None), span))
    return StoredArray(values.shape, str(values.dtype), tuple(parts), transposed)


def read(array: StoredArray, *targets: Target) -> None:
    with Reader(lambda _: None) as reader:
        reader.submit(array, targets)
        reader.wait()


@pytest.fixture
def values() -> np.ndarray:
    return np.arange(np.prod(SHAPE)).astype(np.int8).reshape(SHAPE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)  # three rows, or five of a part's
    monkeypatch.setattr(blocks, "_DIRECT_BYTES", 64)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
def test_every_slice_is_the_arrays_and_is_read_once(slices, transposed, values, tmp_path):
    array = stored(tmp_path, values, transposed, apart=transposed)
    targets = [
        Target(bounds, np.full([stop - start for start, stop in bounds], -1, np.int8))
        for bounds in slices
    ]
    placed = []
    with Reader(placed.append) as reader:
        reader.submit(array, targets)
        reader.wait()
        assert reader.bytes_read == sum(
            np.prod([stop - start for start, stop in bounds]) for bounds in set(slices)
        )
    for bounds, out, _ in targets:
        np.testing.assert_array_equal(out, values[tuple(slice(*pair) for pair in bounds)])
    assert sum(placed) == sum(out.nbytes for _, out, _ in targets)


def test_vectors_and_conversions(tmp_path):
    values = np.linspace(-1, 1, 70).astype(ml_dtypes.bfloat16)
    out = np.empty(40, np.float32)
    with Reader(lambda _: None) as reader:
        reader.submit(stored(tmp_path, values), [Target(((10, 50),), out)])
        reader.wait()
    np.testing.assert_array_equal(out, values[10:50].astype(np.float32))


def test_a_strided_place_is_filled_and_nothing_beside_it(values, tmp_path):
    out = np.full((14, 44), -1, np.int8)
    with Reader(lambda _: None) as reader:
        target = Target(((2, 3), (0, 14), (0, 22)), out[None, :, ::2])
        reader.submit(stored(tmp_path, values), [target])
        reader.wait()
    np.testing.assert_array_equal(out[:, ::2], values[2])
    assert (out[:, 1::2] == -1).all()


def test_a_file_that_changed_is_an_error_and_no_crash(values, tmp_path):
    array = stored(tmp_path, values)
    path = array.parts[0][0].path
    path.write_bytes(path.read_bytes()[:-1])
    out = np.empty(SHAPE, np.int8)
    whole = Target(tuple((0, n) for n in SHAPE), out)
    with pytest.raises(CheckpointError, match="part0: has 930 bytes, expected the 931 bytes"):
        read(array, whole)
    path.unlink()
    with pytest.raises(CheckpointError, match="part0: cannot be read: No such file"):
        read(array, whole)


def test_a_file_that_shrinks_between_open_and_read_is_an_error(values, tmp_path, monkeypatch):
    array = stored(tmp_path, values)
    real_fstat = reading.os.fstat

    def cut_after_the_check(descriptor):
        result = real_fstat(descriptor)
        reading.os.truncate(array.parts[0][0].path, 100)
        return result

    monkeypatch.setattr(reading.os, "fstat", cut_after_the_check)
    whole = Target(tuple((0, n) for n in SHAPE), np.empty(SHAPE, np.int8))
    with pytest.raises(CheckpointError, match=r"(ends at byte 100|has 100 bytes), expected"):
        read(array, whole)


def test_an_interrupt_stops_what_is_queued(values, tmp_path, monkeypatch):
    array = stored(tmp_path, values)
    started, released = [], threading.Event()

    def wait(*arguments):
        started.append(arguments)
        released.wait(10)

    monkeypatch.setattr(blocks, "read_at", wait)

    def interrupted():
        with Reader(lambda _: None) as reader:
            targets = [Target(tuple((0, n) for n in SHAPE), np.empty(SHAPE, np.int8))]
            reader.submit(array, targets)
            threading.Timer(0.1, released.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(started) < 15  # blocks; as many as there are threads
    assert not [thread for thread in threading.enumerate() if "grok1-reader" in thread.name]


def test_large_files_leave_the_page_cache_unless_others_want_them(values, tmp_path, monkeypatch):
    array = stored(tmp_path, values)
    size = array.parts[0][0].file_size
    dropped = []
    monkeypatch.setattr(reading, "_LARGE_FILE", 100)
    monkeypatch.setattr(blocks, "_DIRECT_BYTES", SHAPE[-1])  # a row
    monkeypatch.setattr(
        reading.os, "posix_fadvise", lambda _, *range: dropped.append(range[:2]), raising=False
    )
    for keep_pages in (True, False):
        with Reader(lambda _: None, keep_pages) as reader:
            targets = [Target(tuple((0, n) for n in SHAPE), np.empty(SHAPE, np.int8))]
            reader.submit(array, targets)
            reader.wait()
            while_reading = list(dropped)
        if keep_pages:
            assert not dropped
    # Each row's part once it is read, and at the end what lies around them.
    _, span = array.parts[0]
    rows = [(span.offset + start, SHAPE[-1]) for start in range(0, span.nbytes, SHAPE[-1])]
    assert sorted(while_reading) == rows
    assert dropped[len(rows) :] == [(0, size)]
