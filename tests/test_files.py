"""Files of others: what is no file is refused without waiting, and errors have fields."""

import copy
import os
import pathlib
import pickle
import socket
import threading
import tracemalloc

import pytest

from grok1 import files
from grok1.files import CheckpointError, json_object, open_regular, printable, read_bounded


def test_an_error_has_fields_and_one_line():
    error = CheckpointError("a/b", "is short", "fetch it again", "missing")
    assert (error.path, error.problem) == (pathlib.Path("a/b"), "is short")
    assert (error.remedy, error.kind) == ("fetch it again", "missing")
    assert str(error) == "a/b: is short; fetch it again"
    assert isinstance(error, ValueError)
    assert str(CheckpointError("a/b", "is short")) == "a/b: is short"
    assert CheckpointError("a/b", "is short").kind == "damaged"
    assert str(CheckpointError(None, "too wide", "use another")) == "too wide; use another"


@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_can_be_handed_on(again):
    error = again(
        CheckpointError(path="a/b", problem="is short", remedy="fetch it again", kind="missing")
    )
    assert str(error) == "a/b: is short; fetch it again"
    assert error.kind == "missing"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ▁é漢", "plain ▁é漢"),
        ("two\nlines", "two\\nlines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("half \ud800", "half \\ud800"),
        ("▁é\\\n", "▁é\\\\n"),
        ("\u2028\x00", "\\u2028\\x00"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown
    assert str(CheckpointError(f"/{text}", text, text, "damaged")) == (
        f"/{shown.replace(chr(0), '')}: {shown}; {shown}"
    )


def make(kind: str, path: pathlib.Path):
    """Puts what is no regular file at a path; returns what must be kept until the end."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(path))
            return server
    return None


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "socket"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    kept = make(kind, pathlib.Path("x"))
    for read in (open_regular, lambda path: read_bounded(path, 10)):
        with pytest.raises(
            CheckpointError, match=f"^x: not a regular file but a {kind}; move it away$"
        ) as caught:
            read("x")
        assert caught.value.kind == "irregular"
    if kept:
        kept.close()


def test_a_file_that_becomes_a_pipe_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    is_file = os.stat(tmp_path / "file")
    monkeypatch.setattr(files.os, "stat", lambda path: is_file)
    opening = threading.Thread(target=refused, args=(tmp_path / "pipe",), daemon=True)
    opening.start()
    opening.join(10)
    assert not opening.is_alive()


def refused(path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="not a regular file but a pipe"):
        open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_not_there_is_missing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, problem in (
        ("absent", "cannot be read: No such file or directory; check the path"),
        ("file/below", "cannot be read: Not a directory; check the path"),
        ("link", "is a link to nowhere, which is not there; put the file there, or remove"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {problem}") as caught:
            read_bounded(tmp_path / name, 10)
        assert caught.value.kind == "missing"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: cannot be read: Too many levels") as caught:
        read_bounded(tmp_path / "loop", 10)
    assert caught.value.kind == "unreadable"


def test_reading_is_bounded(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_bounded(tmp_path / "file", 10) == b"0123456789"
    with pytest.raises(CheckpointError, match="file: is longer than 9 bytes, which no such file"):
        read_bounded(tmp_path / "file", 9)


def test_reading_takes_no_memory_that_a_file_does_not_fill(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789" * 300_000)
    tracemalloc.start()
    assert len(read_bounded(tmp_path / "file", 1 << 28)) == 3_000_000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16e6


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 12345\n" % (b"0" * 64)


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    (tmp_path / "file").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, .* `git lfs pull`") as caught:
        read_bounded(tmp_path / "file", 1000)
    assert caught.value.kind == "pointer"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON: "),
        (b"[1, 2]", r"must be a JSON object, found \[1, 2\]"),
        (b"[" * 100_000, "is not JSON that can be read: it is nested too deeply"),
        (b'{"a":' * 100_000, "is not JSON that can be read: it is nested too deeply"),
        (b'{"a": 1, "b": 2, "a": 1}', "must have each name once, found 'a' twice"),
        (b'{"c": {"a": 1, "a": 2}}', "must have each name once, found 'a' twice"),
        (b"\xff\xfe{}", "is not JSON: .*codec can't decode"),
        (b"1" * 5000, "must be a JSON object, found an integer of 5,000 digits"),
    ],
)
def test_json_that_is_no_object_of_names(text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        json_object(text)


def test_a_long_integer_is_left_to_who_knows_its_name():
    found = json_object(b'{"a": -%b, "b": 7}' % (b"1" * 5000))
    assert found["b"] == 7
    assert repr(found["a"]) == "an integer of 5,000 digits"
