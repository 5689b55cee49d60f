"""Verification of every weight: contents, checksums, and readings that were interrupted."""

import errno
import hashlib
import os
import pathlib
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

from grok1.care import contents, verification
from grok1.checkpoint import tensor_file
from grok1.checkpoint.tensor_file import read_header, read_span, write_tensor
from grok1.files import CheckpointError
from grok1.machine.cache_directory import private_directory
from grok1.nn.manifest import file_name
from tests.care.helpers import faults_of

pytestmark = pytest.mark.usefixtures("own_cache")


def test_deep_writes_sums_that_sha256sum_reads(nano_copy):
    report = verification.verify(nano_copy, deep=True)
    assert report.is_good
    assert "0 checksums compared, 146 added" in report.notes[-1]
    assert len((nano_copy / "SHA256SUMS").read_text().splitlines()) == 146
    assert "146 checksums compared, 0 added" in verification.verify(nano_copy, deep=True).notes[-1]
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=nano_copy, check=True)
    assert verification.verify(nano_copy).is_good
    # The sums lie beside ckpt-0, not in it.
    assert len(os.listdir(nano_copy / "ckpt-0")) == 146


def test_deep_finds_wrong_bytes_of_the_right_size(nano_copy):
    verification.verify(nano_copy, deep=True)
    path = nano_copy / "ckpt-0" / file_name(6)
    header = read_header(path)
    data = bytearray(path.read_bytes())
    data[header.values.offset + 17] ^= 1
    path.write_bytes(data)
    assert verification.verify(nano_copy).is_good
    found = faults_of(nano_copy, deep=True)
    assert list(found) == ["ckpt-0/tensor00006_000"]
    assert "SHA-256 is " in found["ckpt-0/tensor00006_000"]
    assert "the contents have changed: fetch it again" in found["ckpt-0/tensor00006_000"]


def test_deep_finds_values_that_are_not_finite_and_holes(nano_copy, tmp_path):
    embedding, weight = (nano_copy / "ckpt-0" / file_name(i) for i in (0, 5))
    values = np.array(read_span(h := read_header(embedding), h.values))
    values[3, 5] = np.nan
    write_tensor(embedding, values)
    header = read_header(weight)
    scales = np.array(read_span(header, header.scales))
    scales[0, 1] = np.inf
    write_tensor(weight, np.array(read_span(header, header.values)), scales)
    sums = tmp_path / "sums"
    found = faults_of(nano_copy, deep=True, sums_file=sums)
    assert "1 of " in found["ckpt-0/tensor00000_000"]
    assert "values are not finite, the first is nan at [3, 5]" in found["ckpt-0/tensor00000_000"]
    assert (
        "scales are not finite, or above 1,048,576, the first is inf at [0, 1]"
        in found["ckpt-0/tensor00005_000"]
    )
    # The checksums of bad files are not kept.
    assert len(sums.read_text().splitlines()) == 144


def read_one(path: pathlib.Path) -> list[str]:
    file = verification._file(read_header(path))
    journal = contents.Journal(path.parent / "SHA256SUMS")
    return contents.read_contents(file, journal, lambda num_bytes: None).notes


def test_deep_finds_a_hole(tmp_path):
    values = np.ones((2048, 1024), np.int8)
    values[600:1800] = 0
    path = tmp_path / "tensor00000_000"
    write_tensor(path, values, np.ones((1, 1024), ml_dtypes.bfloat16))
    with pytest.raises(
        CheckpointError,
        match="1,048,576 bytes of the values in whole blocks are zero, expected weights; the down",
    ):
        read_one(path)
    values[values == 0] = -128
    write_tensor(path, values, np.ones((1, 1024), ml_dtypes.bfloat16))
    (note,) = read_one(path)
    assert f"{1200 * 1024} of the values are -128" in note


@pytest.mark.parametrize("scale", [1e29, -1e29, float("nan"), 1.1e6])
def test_deep_finds_scales_that_products_do_not_bear(scale, tmp_path):
    scales = np.ones((2, 64), ml_dtypes.bfloat16)
    scales[1, 7] = scale
    write_tensor(tmp_path / "tensor00000_000", np.ones((64, 64), np.int8), scales)
    with pytest.raises(
        CheckpointError, match=r"1 of 128 scales are not finite, or above 1,048,576, .* at \[1, 7\]"
    ):
        read_one(tmp_path / "tensor00000_000")


def test_an_array_is_checked_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_READ_BYTES", 1 << 12)
    values = np.ones((64, 100), np.float32)
    values[50, 7] = values[60, 1] = np.inf
    write_tensor(tmp_path / "tensor00000_000", values)
    with pytest.raises(
        CheckpointError, match=r"2 of 6400 values are not finite, the first is inf at \[50, 7\]"
    ):
        read_one(tmp_path / "tensor00000_000")


def test_an_interrupted_reading_is_continued(nano_copy, monkeypatch):
    whole, read = verification.read_contents, []

    def counted(file, *arguments):
        read.append(file.name)
        if len(read) == 50:
            raise KeyboardInterrupt
        return whole(file, *arguments)

    monkeypatch.setattr(verification, "_NUM_THREADS", 1)
    monkeypatch.setattr(verification, "read_contents", counted)
    with pytest.raises(KeyboardInterrupt):
        verification.verify(nano_copy, deep=True)
    assert not (nano_copy / "SHA256SUMS").exists()
    monkeypatch.setattr(verification, "read_contents", whole)
    hashed = []

    def read_at(file, *arguments):
        hashed.append(file.name)
        tensor_file.read_at(file, *arguments)

    monkeypatch.setattr(contents, "read_at", read_at)
    assert "0 checksums compared, 146 added" in verification.verify(nano_copy, deep=True).notes[-1]
    assert not set(read[:49]) & set(hashed)
    assert len(set(hashed)) == 146 - 49
    assert sorted(os.listdir(nano_copy)) == ["SHA256SUMS", "ckpt-0", "config.json"]
    assert not list(private_directory().glob("verify-*"))


@pytest.mark.parametrize("change", ["nothing", "its time", "a copy"])
def test_what_changed_since_an_interruption_is_read_again(change, nano_copy):
    path = nano_copy / "ckpt-0" / file_name(6)
    file = verification._file(read_header(path))
    journal = contents.Journal(nano_copy / "SHA256SUMS")
    journal.add(file, contents.file_stamp(path.stat()), "0" * 64)
    assert journal._path is not None
    with journal._path.open("a") as lines:
        lines.write("123")  # cut off
    if change == "its time":
        os.utime(path, ns=(1, 1))
    elif change == "a copy":
        shutil.copy2(path, path.with_name(".copy"))
        path.with_name(".copy").replace(path)
    reading = contents.read_contents(
        verification._file(read_header(path)),
        contents.Journal(nano_copy / "SHA256SUMS"),
        lambda num_bytes: None,
    )
    assert (reading.digest == "0" * 64) == (change == "nothing")


@pytest.mark.parametrize("name", [".SHA256SUMS.partial", ".SHA256SUMS.journal", "SHA256SUMS"])
def test_nothing_is_written_through_a_link_in_the_checkpoint(name, nano_copy, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("")
    (nano_copy / name).symlink_to(mine)
    assert verification.verify(nano_copy, deep=True).is_good
    assert mine.read_text() == ""
    assert (nano_copy / name).is_symlink() == (name != "SHA256SUMS")
    assert not (nano_copy / "SHA256SUMS").is_symlink()
    assert len((nano_copy / "SHA256SUMS").read_text().splitlines()) == 146


def test_a_journal_that_came_with_the_checkpoint_counts_for_nothing(nano_copy):
    lines = []
    for index in range(146):
        status = (nano_copy / "ckpt-0" / file_name(index)).stat()
        stamp = contents.file_stamp(status)
        lines.append(f"{'0' * 64} {stamp} ckpt-0/{file_name(index)}\n")
    (nano_copy / ".SHA256SUMS.journal").write_text("".join(lines))
    verification.verify(nano_copy, deep=True)
    assert "0" * 64 not in (nano_copy / "SHA256SUMS").read_text()


def test_complete_sums_need_no_place_to_write(nano_copy, monkeypatch):
    verification.verify(nano_copy, deep=True)
    monkeypatch.setattr(contents.os, "access", lambda *arguments: False)
    assert verification.verify(nano_copy, deep=True).is_good
    (nano_copy / "SHA256SUMS").write_text("")
    with pytest.raises(CheckpointError, match="SHA256SUMS: cannot be written; give a place"):
        verification.verify(nano_copy, deep=True)


def test_sums_that_are_none_are_refused(nano_copy):
    (nano_copy / "SHA256SUMS").write_text("hello\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: line 1 is 'hello', expected a SHA-256"):
        verification.verify(nano_copy, deep=True)


def test_sums_of_other_files_are_compared_too(nano_copy):
    (nano_copy / "sub").mkdir()
    for name in "sub/a", "b":
        (nano_copy / name).write_bytes(b"")
    empty = hashlib.sha256(b"").hexdigest()
    lines = [f"{empty}  {name}\n" for name in ("sub/a", "./b", "config.json", "../c", "no")]
    (nano_copy / "SHA256SUMS").write_text("".join(lines))
    report = verification.verify(nano_copy, deep=True)
    ((path, problem, _, fetch),) = report.faults
    assert (path, fetch) == ("config.json", False)
    assert f"expected {empty} as in " in problem
    assert "SHA256SUMS: 2 of its names are of no file here, the first is '../c'" in report.notes[-2]
    assert "SHA256SUMS: 3 checksums compared, 146 added" in report.notes[-1]


@pytest.mark.parametrize("name", ["tensor00003_000", "grok-1/ckpt-0/tensor00003_000", "n" * 300])
def test_sums_of_no_file_here_are_refused_before_reading(name, nano_copy, monkeypatch):
    sums = nano_copy / "SHA256SUMS"
    sums.write_text(before := f"{'0' * 64}  {name}\n")
    monkeypatch.setattr(verification, "read_contents", None)
    with pytest.raises(CheckpointError, match="none of its 1 names is of a file here") as caught:
        verification.verify(nano_copy, deep=True)
    assert f"expected names relative to {nano_copy}, as ckpt-0/" in caught.value.problem
    assert sums.read_text() == before


def test_sums_of_files_that_are_bad_are_no_names_of_others(nano_copy):
    path = nano_copy / "ckpt-0" / file_name(3)
    (nano_copy / "SHA256SUMS").write_text(f"{'0' * 64}  ckpt-0/{path.name}\n")
    path.write_bytes(b"")
    assert list(faults_of(nano_copy, deep=True)) == [f"ckpt-0/{path.name}"]
    path.unlink()
    assert "missing" in faults_of(nano_copy, deep=True)[f"ckpt-0/{path.name}"]


def test_sums_that_nothing_would_be_compared_with_are_refused(nano_path, tmp_path):
    with pytest.raises(ValueError, match="sums_file is compared with what deep=True reads"):
        verification.verify(nano_path, sums_file=tmp_path / "sums")


@pytest.mark.parametrize("name", ["a\x1bb", "a\x00b", "a\x7f"])
def test_a_name_with_controls_among_sums_is_refused(name, nano_copy):
    (nano_copy / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS: line 1 is '0000") as caught:
        verification.verify(nano_copy, deep=True)
    assert name not in str(caught.value)


@pytest.mark.parametrize("place", ["file/sums", "closed/sums", "absent/sums"])
def test_sums_that_cannot_be_put_in_their_place_are_refused_before_reading(
    place, nano_copy, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "sums").write_text("")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: pathlib.Path(path).name != "closed" and access(path, mode)
    )
    monkeypatch.setattr(verification, "read_contents", None)
    with pytest.raises(
        CheckpointError, match=r"cannot be written; give a place .* --manifest FILE"
    ):
        verification.verify(nano_copy, deep=True, sums_file=tmp_path / place)


def test_a_disk_that_refuses_sums_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(contents, "replacing", full)
    message = "sums: cannot be written: No space left on device; give another place for the checks"
    with pytest.raises(CheckpointError, match=message) as caught:
        contents.write_sums(tmp_path / "sums", {"ckpt-0/a": "0" * 64})
    assert caught.value.kind == "unwritable"


def test_sums_that_nobody_may_read_are_refused(nano_copy, tmp_path, monkeypatch):
    stat = os.stat

    def closed(path, **options):
        if str(path).endswith("sums"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", closed)
    with pytest.raises(CheckpointError, match="sums: cannot be read: Permission denied; check"):
        verification.verify(nano_copy, deep=True, sums_file=tmp_path / "sums")
