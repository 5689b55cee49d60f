"""Tensor files that are refused: no byte of them runs, whatever it says."""

import contextlib
import os
import pickle
import re
import struct
import sys
import time

import numpy as np
import pytest

from grok1.checkpoint import symbolic_pickle
from grok1.checkpoint.tensor_file import CheckpointError, read_header
from tests.checkpoint.small_files import SCALES, VALUES, WEIGHT, body_of, framed, written
from tests.helpers import SLOW_TESTS


def with_change(old: bytes, new: bytes, *arrays: np.ndarray) -> bytes:
    """A valid file with its first `old` replaced, and the length of its frame put right."""
    body = body_of(*arrays)
    assert old in body
    return framed(body.replace(old, new, 1))


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def call(module: str, name: str, argument: str) -> bytes:
    """Opcodes that leave the result of `module.name(argument)` on the stack."""
    return text(module) + text(name) + b"\x93" + text(argument) + b"\x85R"


# Files below give this to what they call; tests run where they may create that file.
COMMAND = "echo > executed"


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (COMMAND,)


def array_pickle(array: np.ndarray, protocol: int = 4, **options) -> bytes:
    return pickle.dumps(array, protocol, **options)


def attributes(*names: str) -> bytes:
    """A quantised weight whose attributes, all int8, have these names."""
    array = body_of(WEIGHT, SCALES)
    start = array.index(b"\x8c\x06weight")
    element = b"N"
    pairs = b"".join(text(name) + element for name in names)
    return framed(array[:start] + pairs + b"ub.")


NAMED = r"names {}, expected only numpy\.core\.multiarray\._reconstruct, .*; nothing was executed\."
OPCODE = r"{} \(b'.*'\), which no valid file uses; nothing was executed\. Do not trust this file"


# Tuples of three of the tuple before: 3^90 strings to whoever walks, hashes or prints them.
def bomb_from(memo: int) -> bytes:
    numbers = range(memo, memo + 90)
    return text("x") + b"\x94" + b"".join(b"h%ch%c\x87\x94" % (i, i) for i in numbers)


BOMB = bomb_from(0)

HOSTILE = {
    # Other globals, wherever they are hidden.
    "os.system by pickle": (pickle.dumps(Evil(), 4), NAMED.format(r"(posix|nt)\.system")),
    "os.system": (framed(call("os", "system", COMMAND) + b"."), NAMED.format(r"os\.system")),
    "builtins.eval": (
        framed(call("builtins", "eval", "open('executed', 'w').close()") + b"."),
        NAMED.format("builtins.eval"),
    ),
    "builtins.getattr": (framed(call("builtins", "getattr", "x") + b"."), "names builtins.getattr"),
    "module on import": (framed(call("hostile_module", "run", "x") + b"."), "hostile_module.run"),
    "numpy gadget": (
        framed(call("numpy.testing._private.utils", "runstring", COMMAND) + b"."),
        r"names numpy\.testing\._private\.utils\.runstring",
    ),
    "numpy.core.multiarray.scalar": (
        with_change(text("_reconstruct"), text("scalar")),
        r"names numpy\.core\.multiarray\.scalar",
    ),
    "numpy scalar": (pickle.dumps(np.float32(1), 4), r"names numpy\._core\.multiarray\.scalar"),
    "dotted name": (
        framed(call("numpy", "core.multiarray._reconstruct", "x") + b"."),
        r"names numpy\.core\.multiarray\._reconstruct, expected only",
    ),
    "other class of that name": (
        with_change(text("__main__"), text("model"), WEIGHT, SCALES),
        NAMED.format(r"model\.QuantizedWeight8bit"),
    ),
    "bfloat16 of another module": (
        with_change(text("ml_dtypes"), text("os"), WEIGHT, SCALES),
        NAMED.format(r"os\.bfloat16"),
    ),
    "call in the dtype": (
        with_change(text("f4") + b"\x94", call("os", "system", COMMAND)),
        NAMED.format(r"os\.system"),
    ),
    "call in the array state": (
        with_change(b"\x89C\x18", call("os", "system", COMMAND) + b"C\x18"),
        NAMED.format(r"os\.system"),
    ),
    "call in an object array": (
        array_pickle(np.array([Evil()], dtype=object)),
        r"opcode \(b'\]'\), which no valid file uses; nothing was executed",
    ),
    "call in an attribute": (
        with_change(
            text("weight") + b"\x94", text("weight") + call("os", "system", COMMAND), WEIGHT, SCALES
        ),
        NAMED.format(r"os\.system"),
    ),
    "call in the constructor": (
        with_change(b")\x81", call("os", "system", COMMAND) + b"\x85\x81", WEIGHT, SCALES),
        NAMED.format(r"os\.system"),
    ),
    "name with an escape code": (
        framed(call("os\x1b[2J", "system\n", "x") + b"."),
        r"names os\\x1b\[2J\.system\\n, expected",
    ),
    "name that is no string": (framed(b"K\x01)\x93."), r"names 1\.\(\.\.\.\), expected only"),
    # Allowed globals, put to other uses.
    "ndarray called": (
        framed(text("numpy") + text("ndarray") + b"\x93J\xff\xff\xff\x7f\x85\x85R."),
        r"function of numpy.*_reconstruct: found numpy\.ndarray, expected numpy\.core\.multiarray",
    ),
    "class called by REDUCE": (
        with_change(b")\x81", b")R", WEIGHT, SCALES),
        r"opcode of __main__\.QuantizedWeight8bit: found 'REDUCE', expected 'NEWOBJ'",
    ),
    "class with arguments": (
        with_change(b")\x81", b"K\x01\x85\x81", WEIGHT, SCALES),
        r"args of __main__\.QuantizedWeight8bit: found \(1\), expected \(\)",
    ),
    "array of another subtype": (
        with_change(text("ndarray"), text("dtype")),
        r"args of numpy.core.multiarray._reconstruct: found numpy\.dtype, expected numpy\.ndarray",
    ),
    # Opcodes that call, or fetch from elsewhere.
    "GLOBAL": (framed(b"cos\nsystem\n" + text(COMMAND) + b"\x85R."), NAMED.format(r"os\.system")),
    "GLOBAL of a valid name": (framed(b"cnumpy\ndtype\n."), NAMED.format(r"numpy\.dtype")),
    "INST": (framed(b"(" + text(COMMAND) + b"ios\nsystem\n."), NAMED.format(r"os\.system")),
    "OBJ": (framed(b"(" + text("x") + b"o."), OPCODE.format("OBJ")),
    "PERSID": (framed(b"Px\n."), OPCODE.format("PERSID")),
    "BINPERSID": (framed(text("x") + b"Q."), OPCODE.format("BINPERSID")),
    "EXT1": (framed(b"\x82\x01."), OPCODE.format("EXT1")),
    "EXT2": (framed(b"\x83\x01\x00."), OPCODE.format("EXT2")),
    "EXT4": (framed(b"\x84\x01\x00\x00\x00."), OPCODE.format("EXT4")),
    "NEWOBJ_EX": (with_change(b")\x81", b")}\x92", WEIGHT, SCALES), OPCODE.format("NEWOBJ_EX")),
    "out-of-band buffer": (framed(b"\x97."), OPCODE.format("NEXT_BUFFER")),
    "unknown opcode": (framed(b"\xff."), r"byte 11: opcode \(b'\\xff'\), which no"),
    "PROTO again": (framed(b"\x80\x04" + body_of()), r"byte 11: opcode \(b'\\x80'\)"),
    # Other protocols.
    **{
        f"protocol {protocol}": (
            array_pickle(VALUES, protocol),
            r"byte 0: the file starts with b.*, expected b'\\x80\\x04', pickle protocol 4",
        )
        for protocol in (0, 1, 2, 3, 5)
    },
    "protocol 5 out of band": (
        array_pickle(VALUES, 5, buffer_callback=lambda _: None),
        r"byte 0: the file starts with b'\\x80\\x05",
    ),
    # Arrays of other types and layouts.
    **{
        f"{dtype} array": (
            array_pickle(np.zeros(3, dtype)),
            rf"args of numpy\.dtype: found '{code}'",
        )
        for dtype, code in {
            "f8": "f8",
            "f2": "f2",
            "i4": "i4",
            "U3": "U3",
            "?": "b1",
        }.items()
    },
    "object array": (with_change(text("f4"), text("O8")), "found 'O8', expected 'f4'"),
    "object array by pickle": (array_pickle(np.array([None])), r"opcode \(b'\]'\), which no valid"),
    "big-endian array": (
        array_pickle(np.zeros(3, ">f4")),
        "state of numpy.dtype: found '>', expected '<'",
    ),
    "structured array": (array_pickle(np.zeros(3, "f4,f4")), "found 'V8', expected 'f4'"),
    "date array": (array_pickle(np.zeros(3, "M8[s]")), "found 'M8', expected 'f4'"),
    "int8 array without scales": (array_pickle(WEIGHT), "found 'i1', expected 'f4'"),
    "bfloat16 array": (array_pickle(SCALES), r"found ml_dtypes\.bfloat16, expected 'f4'"),
    "float32 scales": (
        with_change(
            text("ml_dtypes") + b"\x94" + text("bfloat16") + b"\x94\x93", text("f4"), WEIGHT, SCALES
        ),
        r"found 'f4', expected ml_dtypes\.bfloat16",
    ),
    "Fortran order": (
        array_pickle(np.asfortranarray(VALUES)),
        r"found True, expected False \(C order, not Fortran order\)",
    ),
    "shape with a negative size": (
        with_change(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86"),
        r"found \(-1, 3\), expected a shape of 1 to 32 integers",
    ),
    "shape with a zero": (with_change(b"K\x02K\x03\x86", b"K\x00K\x03\x86"), r"found \(0, 3\)"),
    "shape with a string": (
        with_change(b"K\x02K\x03\x86", text("x") + b"K\x03\x86"),
        r"\('x', 3\)",
    ),
    "shape with a boolean": (
        with_change(b"K\x02K\x03\x86", b"\x88K\x03\x86"),
        r"found \(True, 3\)",
    ),
    "shape of 33 sizes": (
        with_change(b"K\x02K\x03\x86", b"(" + b"K\x01" * 33 + b"t"),
        r"found \(1, 1.*\), expected a shape of 1 to 32 integers",
    ),
    "scalar": (array_pickle(np.array(1, np.float32)), r"found \(\), expected a shape of 1 to 32"),
    "shape that overflows": (
        with_change(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7f" * 3 + b"\x87"),
        r"24 bytes of elements, expected \d{29} for float32\[2147483647, 2147483647, ",
    ),
    "shape that disagrees": (
        with_change(b"K\x02K\x03\x86", b"K\x02K\x04\x86"),
        r"24 bytes of elements, expected 32 for float32\[2, 4\]",
    ),
    "list of elements": (
        with_change(b"\x89C\x18" + VALUES.tobytes(), b"\x89}"),
        "found a dictionary of .*, expected the bytes of the elements",
    ),
    "array version 2": (with_change(b"(K\x01K\x02", b"(K\x02K\x02"), "found 2, expected 1"),
    "array without state": (
        framed(body_of()[: body_of().index(b"R\x94(") + 1] + b"."),
        "found None",
    ),
    "other placeholder": (with_change(b"C\x01b", b"C\x01O"), "found 1 bytes, expected b'b'"),
    # Lengths that lie.
    "payload beyond the file": (
        with_change(b"C\x18", b"B\xff\xff\xff\xff"),
        r"the file ends at byte \d+, expected 4294967295 bytes for BINBYTES at byte \d+",
    ),
    "payload of 2^64": (
        with_change(b"C\x18", b"\x8e" + b"\xff" * 8),
        r"expected 18446744073709551615 bytes for BINBYTES8",
    ),
    "string beyond the file": (framed(b"\x8c\xff."), "expected 255 bytes for SHORT_BINUNICODE"),
    "bytes after the end": (
        written(VALUES) + b"\0",
        "the pickle ends 1 bytes early with 1 objects",
    ),
    "second pickle": (written(VALUES) * 2, "the pickle ends 173 bytes early"),
    "frame beyond the file": (
        written(VALUES)[:3] + struct.pack("<Q", 1 << 60) + body_of(),
        "a frame of 1152921504606846976 bytes, expected .* at most the 162 bytes left",
    ),
    "frame that ends in an opcode": (
        written(VALUES)[:3] + struct.pack("<Q", 10) + body_of(),
        "the frame ends at byte 21, expected 21 bytes for SHORT_BINUNICODE at byte 13",
    ),
    "frame in a frame": (
        framed(framed(body_of())[2:]),
        "byte 11: a frame of 162 bytes, expected none",
    ),
    # A machine that is led astray.
    "memo not set": (framed(b"h\x05."), "byte 11: BINGET has no valid operand"),
    "empty stack": (framed(b"R."), "byte 11: REDUCE has no valid operand"),
    "stack below the mark": (framed(b"K\x01(\x85."), "byte 14: TUPLE1 has no valid operand"),
    "no mark": (framed(b"K\x01t."), "byte 13: TUPLE has no valid operand"),
    "mark left open": (
        framed(b"K\x01(K\x01."),
        "with 1 objects and 1 open marks, expected 0, 1 and 0",
    ),
    "two objects": (framed(b"K\x01K\x02."), "with 2 objects and 0 open marks"),
    "nothing": (framed(b"."), "with 0 objects and 0 open marks"),
    "nothing but a mark": (framed(b"(."), "with 0 objects and 1 open marks"),
    "BUILD on a number": (framed(b"K\x01K\x01b."), "BUILD on 1, expected an object without state"),
    "BUILD twice": (with_change(b"t\x94b\x89", b"t\x94b)b\x89"), "BUILD on an object, expected"),
    "SETITEMS on a tuple": (framed(b")(K\x01K\x01u."), r"SETITEMS on \(\), expected a dictionary"),
    "SETITEMS of a number": (framed(b"}(K\x01Nu."), "byte 16: key 1, expected a string"),
    "SETITEMS of a key": (framed(b"}(" + text("x") + b"u."), "SETITEMS has no valid operand"),
    "dictionary in itself": (
        with_change(
            text("weight") + b"\x94", text("weight") + b"\x94h\x04" + text("x"), WEIGHT, SCALES
        ),
        r"found a dictionary of \['weight', 'x', 'scales'\], expected a dictionary",
    ),
    "string that is not UTF-8": (framed(b"\x8c\x01\xff."), "SHORT_BINUNICODE has no valid operand"),
    "no end": (
        framed(b"N"),
        r"the file ends at byte 12, expected 1 bytes for an opcode at byte 12",
    ),
    "10,000 tuples": (framed(b")" + b"\x85" * 10_000 + b"."), "no end after 512 opcodes"),
    "bomb as object": (
        framed(BOMB + b"."),
        r"the object: found \(\(\.\.\.\), .*expected an object",
    ),
    "bomb as name": (framed(BOMB + text("x") + b"\x93."), r"names \(\.\.\.\)\.x, expected only"),
    "bomb as function": (framed(BOMB + b")R."), r"function of .*: found \(\(\.\.\.\), \("),
    "bomb as arguments": (
        framed(text("numpy") + text("dtype") + b"\x93" + BOMB + b"R."),
        r"function of .*: found numpy\.dtype",
    ),
    "bomb as key": (framed(b"}(" + BOMB + b"Nu."), r"key \(\(\.\.\.\), "),
    "bomb as state": (
        framed(body_of()[: body_of().index(b"R\x94(") + 1] + bomb_from(9) + b"b."),
        r"state of .*: found \(\(\.\.\.\), .*, expected \(1, a shape",
    ),
    # Whole files of another kind.
    "no attributes": (
        framed(body_of(WEIGHT, SCALES)[:37] + b"."),
        r"state of __main__\.QuantizedWeight8bit: found None, expected a dictionary of \['weight'",
    ),
    "an attribute missing": (attributes("weight"), r"found a dictionary of \['weight'\], expected"),
    "an attribute too many": (
        attributes("weight", "scales", "bias"),
        r"found a dictionary of \['weight', 'scales', 'bias'\], expected",
    ),
    "an attribute renamed": (attributes("weight", "scale"), r"\['weight', 'scale'\], expected"),
    "an attribute twice": (
        attributes("weight", "weight"),
        "key 'weight', expected a string that is",
    ),
    "attributes of the wrong type": (
        attributes("weight", "scales"),
        "weight: found None, expected",
    ),
    "a string": (pickle.dumps("hello", 4), "the object: found 'hello', expected an object"),
    "a dictionary": (
        framed(b"}(" + text("a") + b"Nu."),
        r"the object: found a dictionary of \['a'\]",
    ),
    "a list": (
        pickle.dumps([1, 2], 4),
        r"opcode \(b'\]'\), which no valid file uses; nothing was",
    ),
    "a float": (pickle.dumps(1.0, 4), r"opcode \(b'G'\)"),
    "empty file": (b"", "byte 0: the file starts with b''"),
    "one byte": (b"\x80", "byte 0: the file starts with"),
    "web page": (b"<!DOCTYPE html>", "byte 0: the file starts with b'<!DOCTYPE html>'"),
    "zip archive": (b"PK\x03\x04" + bytes(60), r"byte 0: the file starts with b'PK"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses(tmp_path, monkeypatch, name):
    data, message = HOSTILE[name]
    marker = tmp_path / "executed"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile_module.py").write_text("open('executed', 'w').close()")
    path = tmp_path / "tensor00003_000"
    path.write_bytes(data)
    modules = set(sys.modules)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert time.process_time() - start < 1
    assert re.match(
        rf"{re.escape(str(path))}: byte \d+: .*; .*[dD]ownload it again$", str(caught.value)
    )
    assert re.search(message, str(caught.value))
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()
    assert set(sys.modules) == modules
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system by pickle",
        "os.system",
        "builtins.eval",
        "module on import",
        "call in the dtype",
        "call in an object array",
        "GLOBAL",
        "INST",
    ],
)
def test_the_hostile_files_are_hostile(tmp_path, monkeypatch, name):
    """The corpus is worth refusing: unpickling does what the file says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hostile_module.py").write_text("open('executed', 'w').close()")
    with contextlib.suppress(AttributeError, TypeError):
        pickle.loads(HOSTILE[name][0])
    sys.modules.pop("hostile_module", None)
    assert (tmp_path / "executed").exists()


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="file: is a Git LFS pointer") as caught:
        read_header(tmp_path / "file")
    assert caught.value.kind == "pointer"


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"absent: cannot be read: No such file .*; check the"
    ):
        read_header(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a regular file but a directory"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: not a regular file"):
        read_header(tmp_path / "pipe")


def test_refuses_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(written(VALUES)[:100])
    real = os.stat_result((*path.stat()[:6], len(written(VALUES)), *path.stat()[7:]))
    monkeypatch.setattr(os, "fstat", lambda _: real)
    with pytest.raises(CheckpointError, match=r"file: byte 9.*: the file became shorter while"):
        read_header(path)


@pytest.mark.parametrize("arrays", [(VALUES,), (WEIGHT, SCALES)], ids=["plain", "int8"])
def test_refuses_every_truncation(tmp_path, arrays):
    data = written(*arrays)
    path = tmp_path / "file"
    path.write_bytes(data)
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        with pytest.raises(
            CheckpointError, match=r"file: byte .*; the file is damaged or no Grok-1"
        ):
            read_header(path)


@pytest.mark.parametrize("arrays", [(VALUES,), (WEIGHT, SCALES)], ids=["plain", "int8"])
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, arrays):
    data = written(*arrays)
    path = tmp_path / "file"
    path.write_bytes(data)
    valid = read_header(path)
    spans = [valid.values, valid.scales] if valid.scales else [valid.values]
    payload = {i for span in spans for i in range(span.offset, span.offset + span.nbytes)}
    # Every opcode in every place, and every bit flipped.
    opcodes = {code[0] for code in symbolic_pickle._OPCODES} | {0x00, 0xFF, ord(".")}
    harmless = set()
    places = sorted(set(range(len(data))) - payload)
    for i in places if SLOW_TESTS else places[::3]:
        for value in ({data[i] ^ 1 << bit for bit in range(8)} | opcodes) - {data[i]}:
            with path.open("r+b") as file:
                file.seek(i)
                file.write(bytes([value]))
            try:
                header = read_header(path)
            except CheckpointError:
                continue
            assert header._replace(modified=valid.modified) == valid, (i, value)
            harmless.add(i)
        with path.open("r+b") as file:
            file.seek(i)
            file.write(data[i : i + 1])
    # Only a shorter frame that still ends between two opcodes is read as if nothing had happened.
    assert harmless <= set(range(3, 11))
