"""Interrupted conversions: resumed from any point, by one process, and through nobody's links."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import grok1
from grok1.care import conversion, staging
from grok1.care.conversion import convert
from grok1.checkpoint.storage import StoredArray, StoredTensor
from grok1.checkpoint.tensor_file import ArraySpan, TensorHeader
from grok1.files import CheckpointError
from tests.care.helpers import interrupt_after, interrupted, journal_of, released, staging_of, tree
from tests.conftest import GOLDEN, TOY
from tests.helpers import slow

# Slow enough that a signal lands where it is aimed at, fast enough for a test.
SLOW_CONVERSIONS = """
import json, os, sys, time
from grok1.care import staging
from grok1.care.conversion import convert
whole = staging._write_piece
def slow(*arguments):
    time.sleep(0.002)
    whole(*arguments)
staging._write_piece = slow
for line in sys.stdin:
    source, target, to = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            convert(source, target, to=to, progress=False)
        except BaseException:
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class SlowConversions:
    """Converts the toy in processes of their own, forked where everything is imported."""

    def __init__(self, server: subprocess.Popen):
        self._server = server

    def start(self, target: pathlib.Path, to: str) -> int:
        """Returns the process."""
        print(json.dumps([str(TOY), str(target), to]), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """Returns the exit status of the one that was started last."""
        return int(self._server.stdout.readline())


@pytest.fixture(scope="module")
def slow_conversions():
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_CONVERSIONS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield SlowConversions(server)
        server.stdin.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
@pytest.mark.parametrize("to", ["safetensors", pytest.param("gguf", marks=slow)])
def test_interrupted_at_three_points_and_resumed_is_identical(
    how, to, tmp_path, toy_safetensors, slow_conversions
):
    pytest.importorskip(to)
    stops = sorted(random.Random(f"{how} {to}").sample(range(2, 100), 3))
    for stop in stops:
        process = slow_conversions.start(tmp_path / "out", to)
        while journal_of(tmp_path / "out").count(b"\n") <= stop:
            os.kill(process, 0)  # an error if it ended before it was interrupted
            time.sleep(0.002)
        os.kill(process, how)
        assert slow_conversions.wait() != 0
        assert [tmp_path / name for name in os.listdir(tmp_path)] == [staging_of(tmp_path / "out")]
        assert stop <= journal_of(tmp_path / "out").count(b"\n")
    written = []
    whole = staging._write_piece

    def counted(*arguments):
        written.append(arguments)
        whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_write_piece", counted)
        convert(TOY, tmp_path / "out", to=to, progress=False)
        num_resumed = len(written)
        convert(TOY, tmp_path / "whole", to=to, progress=False)
    assert num_resumed <= len(written) - num_resumed - stops[-1]
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    if to == "gguf":
        assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    else:
        assert tree(tmp_path / "out") == tree(tmp_path / "whole") == tree(toy_safetensors)


def test_a_journal_cut_off_in_a_line_is_continued(tmp_path):
    journal = interrupted(tmp_path / "out", 30) / "journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert convert(TOY, tmp_path / "out", to="grok1", progress=False) == []
    assert released(tmp_path / "out") == released(TOY)


@pytest.mark.parametrize(
    ("number", "damage"),
    [
        (7, b"12 "),
        (7, b"x 12 ckpt-0/tensor00002_000"),
        (20, b"\xff\xfe\x00\x1b[31m"),
        (3, b""),
        (1, b"{"),
        (1, b"\x80"),
    ],
)
def test_a_damaged_line_of_the_journal_is_named_and_all_begun_anew(number, damage, tmp_path):
    journal = interrupted(tmp_path / "out", 30) / "journal"
    lines = journal.read_bytes().split(b"\n")
    lines[number - 1] = damage
    journal.write_bytes(b"\n".join(lines))
    (note,) = convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert note.startswith(f"{journal}: line {number} was damaged, found '")
    assert note.endswith("; the conversion was begun anew")
    assert note.isprintable()
    assert released(tmp_path / "out") == released(TOY)


def test_bytes_that_the_disk_lost_are_written_again(tmp_path):
    files = interrupted(tmp_path / "out", 30) / "files" / "ckpt-0"
    lost = files / "tensor00000_000"
    lost.write_bytes(bytes(lost.stat().st_size))
    os.truncate(files / "tensor00001_000", 100)
    convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert released(tmp_path / "out") == released(TOY)


def test_a_disk_that_loses_what_it_is_given_again_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_checksum", lambda *_: -1)
    message = "tensor00000_000: the disk does not return what was written to it, at byte 0; use an"
    with pytest.raises(CheckpointError, match=message):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_conversion_of_something_else_is_refused(tmp_path):
    interrupted(tmp_path / "out", 3)
    for source, to in ((TOY, "safetensors"), (GOLDEN / "nano", "grok1")):
        with pytest.raises(
            CheckpointError, match=r"\.out\.partial-.*: holds an unfinished conversion"
        ):
            convert(source, tmp_path / "out", to=to, progress=False)
    convert(TOY, tmp_path / "out", to="grok1", progress=False)


@pytest.mark.parametrize("foretold", [".out.partial", ".out.partial-0", "out"])
def test_links_that_were_prepared_are_not_followed(foretold, tmp_path):
    mine = tmp_path / "mine"
    (mine / "ckpt-0").mkdir(parents=True)
    (mine / "ckpt-0" / "tensor00000_000").write_text("precious")
    (mine / "journal").write_text("precious")
    place = tmp_path / foretold
    if foretold == "out":
        place.symlink_to(mine)
        with pytest.raises(CheckpointError, match="out: already exists; choose a new place"):
            convert(TOY, place, to="grok1", progress=False)
    else:
        place.mkdir()
        (place / "files").symlink_to(mine)
        (place / "journal").symlink_to(mine / "journal")
        (place / "lock").symlink_to(mine / "journal")
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
        assert released(tmp_path / "out") == released(TOY)
    assert set(tree(mine).values()) == {b"precious"}


@pytest.mark.parametrize(
    "what", ["files", "ckpt-0", "tensor00000_000", "another", "hard", "journal"]
)
def test_a_link_among_what_is_continued_is_refused(what, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("precious")
    staging = interrupted(tmp_path / "out", 30)
    place = next((path for path in staging.rglob("*") if path.name == what), None)
    if place is None:
        place = staging / "files" / "ckpt-0" / "tensor00000_000"
        if what == "another":
            place = place.with_name(what)
    if place.is_dir():
        shutil.rmtree(place)
        place.symlink_to(mine)
    else:
        place.unlink(missing_ok=True)
        link = os.link if what == "hard" else os.symlink
        link(mine / "precious", place)
    with pytest.raises(
        CheckpointError, match=f"{place.name}: is no file of this|cannot be written: .*{place.name}"
    ):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert tree(mine) == {"precious": b"precious"}
    assert not (tmp_path / "out").exists()


def test_another_directory_in_the_place_of_an_unfinished_one_is_not_used(tmp_path):
    staging = interrupted(tmp_path / "out", 30)
    staging.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", staging)
    staging.chmod(0o700)
    before = tree(staging)
    convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert tree(staging) == before


def test_what_comes_to_the_place_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    verified = staging._verify

    def race(*arguments):
        verified(*arguments)
        (tmp_path / "out").write_text("precious")

    monkeypatch.setattr(staging, "_verify", race)
    with pytest.raises(CheckpointError, match="out: something has come there meanwhile; what is"):
        convert(TOY, tmp_path / "out", to="gguf", progress=False)
    assert (tmp_path / "out").read_text() == "precious"
    monkeypatch.undo()


def test_stopped_after_its_last_step_it_leaves_no_more_than_what_it_made(tmp_path, monkeypatch):
    move = staging._move

    def move_and_stop(*arguments):
        move(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, "_move", move_and_stop)
    with pytest.raises(KeyboardInterrupt):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="out: already exists"):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert os.listdir(tmp_path) == ["out"]
    assert released(tmp_path / "out") == released(TOY)


def test_what_is_unfinished_stays_where_something_has_come_to_its_place(tmp_path):
    left = interrupted(tmp_path / "out", 30)
    before = tree(left)
    (tmp_path / "out").write_text("precious")
    with pytest.raises(CheckpointError, match="out: already exists"):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert tree(left) == before
    (tmp_path / "out").unlink()
    convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert released(tmp_path / "out") == released(TOY)


def test_without_a_private_directory_nothing_is_left_to_continue(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "grok1").mkdir(mode=0o777)
    (tmp_path / "cache" / "grok1").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    interrupt_after(monkeypatch, 3, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match="bytes; nothing of it is kept: free some space"):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["cache"]
    assert os.listdir(tmp_path / "cache" / "grok1") == []


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.model", "version"])
def test_what_is_resumed_depends_on_all_that_is_written(changed, tmp_path, monkeypatch):
    source = tmp_path / "toy"
    source.mkdir()
    (source / "ckpt-0").symlink_to(TOY / "ckpt-0")
    for name in ("config.json", "tokenizer.model"):
        (source / name).write_bytes((TOY / name).read_bytes())
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to="safetensors", progress=False)
    monkeypatch.undo()
    if changed == "version":
        monkeypatch.setattr(conversion, "__version__", "0")
    elif changed == "config.json":
        config = dataclasses.replace(grok1.TOY, sequence_len=512)
        (source / changed).write_text(config.to_json())
    else:
        (source / changed).unlink()
    with pytest.raises(CheckpointError, match=r"\.out\.partial-.*: holds an unfinished conversion"):
        convert(source, tmp_path / "out", to="safetensors", progress=False)


def test_what_is_resumed_depends_on_a_file_of_scales_alone():
    def digest(modified):
        parts = []
        for name, dtype, when in ("a", "int8", 1), ("b", "bfloat16", modified):
            span = ArraySpan(0, (1, 2), dtype)
            file = TensorHeader(pathlib.Path(name), 8, when, span, None)
            parts.append(StoredArray(span.shape, dtype, ((file, span),)))
        return conversion._digest([StoredTensor(*parts)])

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_a_full_disk_is_said_and_can_be_continued(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    interrupt_after(monkeypatch, 30, full)
    with pytest.raises(CheckpointError) as caught:
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    staging = staging_of(tmp_path / "out")
    assert str(caught.value).startswith(
        f"{tmp_path}/out: No space left on device while writing 4,7"
    )
    assert str(caught.value).endswith(
        f"bytes; what is written is kept in {staging}: free some space and run the "
        "same command to continue, or delete that directory"
    )
    monkeypatch.undo()
    convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert released(tmp_path / "out") == released(TOY)


def test_two_processes_to_one_place_the_second_is_refused(tmp_path, slow_conversions):
    first = slow_conversions.start(tmp_path / "out", "grok1")
    while not journal_of(tmp_path / "out"):
        os.kill(first, 0)
        time.sleep(0.002)
    with pytest.raises(CheckpointError, match="out: another process is writing it now; wait for"):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert slow_conversions.wait() == 0
    assert released(tmp_path / "out") == released(TOY)
