"""Tensor files: what is read, and that writing gives the released bytes."""

import io
import json
import math
import os
import pathlib
import pickle
import struct
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest

from grok1.checkpoint import symbolic_pickle, tensor_file
from grok1.checkpoint.tensor_file import (
    ArraySpan,
    CheckpointError,
    read_header,
    read_span,
    tensor_file_size,
    write_tensor,
)
from grok1.nn.manifest import TensorSpec
from tests.checkpoint.small_files import BFLOAT16, SCALES, VALUES, WEIGHT, written

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
NANO = sorted((GOLDEN / "nano" / "ckpt-0").iterdir())
KINDS = json.loads((GOLDEN / "frames.json").read_text())["kinds"]


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['shape']}-{kind['scales_shape']}")
def test_reads_a_file_of_the_real_size(tmp_path, kind):
    path = tmp_path / "tensor00000_000"
    offsets, payloads = [], []
    with path.open("wb") as file:
        for piece in kind["pieces"]:
            if isinstance(piece, str):
                file.write(bytes.fromhex(piece))
            else:
                offsets.append(file.tell())
                payloads.append(piece)
                file.seek(piece, io.SEEK_CUR)
    assert path.stat().st_blocks * 512 < 4 << 20  # Holes: it takes no space.
    header = read_header(path)
    shape, scales_shape = tuple(kind["shape"]), kind["scales_shape"]
    quantized = scales_shape is not None
    dtype = "int8" if quantized else "float32"
    assert header.values == ArraySpan(offsets[0], shape, dtype)
    assert header.values.nbytes == payloads[0]
    assert header.file_size == path.stat().st_size
    assert header.path == path
    assert header.scales == (
        ArraySpan(offsets[1], tuple(scales_shape), "bfloat16") if quantized else None
    )
    last = read_span(header, header.values, shape[0] - 1)
    assert (last.shape, last.dtype) == ((1, *shape[1:]), np.dtype(dtype))
    assert last.flat[-1] == 0


def test_reads_no_payload():
    class CountingFile(io.FileIO):
        count = 0

        def readinto(self, buffer):
            self.count += (size := super().readinto(buffer) or 0)
            return size

    path = max(NANO, key=lambda path: path.stat().st_size)
    raw = CountingFile(path)
    with io.BufferedReader(raw) as file:
        symbolic_pickle.read_notes(file, path.stat().st_size, tensor_file._ALLOWED)
        assert 0 < raw.count < 4 * io.DEFAULT_BUFFER_SIZE < path.stat().st_size


def test_reads_770_headers_in_well_under_a_second():
    start = time.process_time()
    for i in range(770):
        read_header(NANO[i % len(NANO)])
    assert time.process_time() - start < 1.5  # 0.15 s on one idle core.


@pytest.mark.parametrize("arrays", [(VALUES,), (WEIGHT, SCALES)], ids=["plain", "int8"])
def test_reads_what_was_written(tmp_path, arrays):
    write_tensor(tmp_path / "file", *arrays)
    header = read_header(tmp_path / "file")
    spans = [span for span in (header.values, header.scales) if span]
    for span, array in zip(spans, arrays, strict=True):
        found = read_span(header, span)
        assert (type(found), found.dtype) == (np.ndarray, array.dtype)
        np.testing.assert_array_equal(found, array)


def test_a_file_that_changed_is_refused(tmp_path):
    path = tmp_path / "file"
    write_tensor(path, VALUES)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"file: has 172 bytes, expected the 173 bytes it had"
    ):
        read_span(header, header.values)
    path.unlink()
    with pytest.raises(CheckpointError, match="file: cannot be read: No such file"):
        read_span(header, header.values)


def test_a_file_that_is_written_to_while_it_is_open_is_refused(tmp_path):
    path = tmp_path / "file"
    write_tensor(path, VALUES)
    header = read_header(path)
    with (
        pytest.raises(CheckpointError, match="file: has been written to since its header was read"),
        tensor_file.open_unchanged(header),
    ):
        os.utime(path, ns=(0, header.modified + 1))


def test_accepts_what_numpy_2_pickles(tmp_path, monkeypatch):
    class QuantizedWeight8bit:
        weight: np.ndarray
        scales: np.ndarray

    QuantizedWeight8bit.__module__, QuantizedWeight8bit.__qualname__ = (
        "__main__",
        "QuantizedWeight8bit",
    )
    monkeypatch.setattr(
        sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False
    )
    weight = QuantizedWeight8bit()
    weight.scales, weight.weight = SCALES, WEIGHT  # In the order that the released class has not.
    for content, shapes in ((VALUES, ((2, 3), None)), (weight, ((4, 3), (2, 3)))):
        data = pickle.dumps(content, protocol=4)
        assert b"numpy._core.multiarray" in data
        (tmp_path / "file").write_bytes(data)
        header = read_header(tmp_path / "file")
        assert (header.values.shape, header.scales and header.scales.shape) == shapes
        np.testing.assert_array_equal(
            read_span(header, header.values), VALUES if content is VALUES else WEIGHT
        )


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['shape']}-{kind['scales_shape']}")
def test_writes_the_bytes_around_a_released_payload(kind):
    scales_shape = kind["scales_shape"] and tuple(kind["scales_shape"])
    pieces = tensor_file.tensor_file_pieces(tuple(kind["shape"]), scales_shape)

    def merged(pieces):
        """Adjacent bytes joined; payloads as their length."""
        out = [b""]
        for piece in pieces:
            if isinstance(piece, int):
                out += [piece, b""]
            else:
                out[-1] += piece
        return out

    released = [bytes.fromhex(p) if isinstance(p, str) else p for p in kind["pieces"]]
    assert merged(pieces) == merged(released)


def test_sizes_are_those_of_the_published_listing():
    tensors = json.loads((GOLDEN / "grok1_manifest.json").read_text())["tensors"]
    assert len(tensors) == 770
    for tensor in tensors:
        scales_shape = tensor["scales_shape"] and tuple(tensor["scales_shape"])
        spec = TensorSpec(tensor["name"], tuple(tensor["shape"]), tensor["dtype"], scales_shape)
        assert tensor_file_size(spec) == tensor["bytes"], tensor["file"]


def test_rewrites_a_released_checkpoint_byte_for_byte(tmp_path):
    assert len(NANO) == 146
    for path in NANO:
        header = read_header(path)
        scales = None if header.scales is None else read_span(header, header.scales)
        write_tensor(tmp_path / "file", read_span(header, header.values), scales)
        assert (tmp_path / "file").read_bytes() == path.read_bytes(), path.name


@pytest.fixture
def cpython_pickle(monkeypatch):
    """Pickles as NumPy 1.26 did under CPython's own pickler; the oracle for the writer."""

    def stand_in(module, name):
        found = type(name, (), {"__module__": module, "__qualname__": name})
        return found

    quantized = stand_in("__main__", "QuantizedWeight8bit")
    monkeypatch.setattr(sys.modules["__main__"], quantized.__name__, quantized, raising=False)
    reconstruct = stand_in("numpy.core.multiarray", "_reconstruct")
    numpy_1 = types.SimpleNamespace(_reconstruct=reconstruct)
    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", numpy_1)

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj):
            if isinstance(obj, np.ndarray):
                return (reconstruct, *obj.__reduce__()[1:])
            return NotImplemented

    def dumps(values, scales=None):
        content = values
        if scales is not None:
            content = quantized()
            content.weight, content.scales = values, scales
        file = io.BytesIO()
        Pickler(file, 4).dump(content)
        return file.getvalue()

    return dumps


@pytest.mark.parametrize(
    "shape",
    [(1,), (63,), (64,), (255,), (256,), (65535,), (65536,), (1, 1), (2, 3, 4, 5), (1, 2, 1, 3, 1)],
    ids=str,
)
def test_writes_what_cpython_pickles(tmp_path, cpython_pickle, shape):
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    write_tensor(tmp_path / "file", values)
    assert (tmp_path / "file").read_bytes() == cpython_pickle(values)


def test_frames_end_where_cpython_ends_them(cpython_pickle):
    """A frame ends at the first object after 64 KiB, so the payload's length moves it."""
    scales = np.ones((1, 40), BFLOAT16)
    for length in (255, 256, *range(65200, 65540)):
        values = np.zeros((length, 1), np.int8)
        assert written(values, scales) == cpython_pickle(values, scales), length
    for length in (16301, 16350, 16383, 16384, 200000):
        values = np.zeros(length, np.float32)
        assert written(values) == cpython_pickle(values), length
    for shape in ((1, 32767), (1, 32768), (3, 1, 40000)):
        scales = np.ones(shape, BFLOAT16)
        assert written(WEIGHT, scales) == cpython_pickle(WEIGHT, scales), shape


def test_a_payload_of_4_gib_has_a_length_of_8_bytes(tmp_path):
    pieces = tensor_file.tensor_file_pieces((1 << 30,), None)
    payload = pieces.index(1 << 32)
    assert pieces[payload - 1] == b"\x8e" + struct.pack("<Q", 1 << 32)
    with (tmp_path / "file").open("wb") as file:
        for piece in pieces:
            file.seek(piece, io.SEEK_CUR) if isinstance(piece, int) else file.write(piece)
    assert read_header(tmp_path / "file").values[1:] == ((1 << 30,), "float32")


def test_size_is_that_of_the_file(tmp_path):
    for values, scales in ((VALUES, None), (WEIGHT, SCALES)):
        write_tensor(tmp_path / "file", values, scales)
        scales_shape = None if scales is None else scales.shape
        spec = TensorSpec("", values.shape, str(values.dtype), scales_shape)
        assert tensor_file_size(spec) == (tmp_path / "file").stat().st_size


def test_writes_a_view_in_its_own_order(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_tensor(tmp_path / "file", base.T[::2])
    header = read_header(tmp_path / "file")
    np.testing.assert_array_equal(read_span(header, header.values), base.T[::2])


def test_writes_without_a_copy_of_the_payload(tmp_path):
    values = np.zeros((16, 1 << 20), np.int8)
    scales = np.ones((16, 1), BFLOAT16)
    tracemalloc.start()
    write_tensor(tmp_path / "file", values, scales)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (
            VALUES.astype(np.float64),
            None,
            "file: values are float64 with scales None, expected flo",
        ),
        (VALUES.astype(">f4"), None, "file: values are >f4 with scales None"),
        (WEIGHT, None, "file: values are int8 with scales None"),
        (VALUES, SCALES, "file: values are float32 with scales bfloat16"),
        (WEIGHT, SCALES.astype(np.float32), "file: values are int8 with scales float32"),
        (VALUES[:0], None, r"found the shape \(0, 3\), expected a shape of 1 to 32 integers"),
        (VALUES[0, 0], None, r"found the shape \(\), expected a shape of 1 to 32 integers"),
        (WEIGHT, SCALES[:0], r"found the shape \(0, 3\), expected a shape"),
    ],
)
def test_refuses_to_write(tmp_path, values, scales, message):
    with pytest.raises(ValueError, match=message):
        write_tensor(tmp_path / "file", values, scales)
    assert not (tmp_path / "file").exists()


def test_refuses_to_write_a_dimension_of_2_to_31():
    with pytest.raises(ValueError, match=r"found the shape .2147483648,., expected a shape"):
        tensor_file_size(TensorSpec("", (1 << 31,), "float32", None))
