"""Verification: every fault in one run, in seconds, on the real sizes; and by the weights."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from grok1 import __main__
from grok1.care import contents, verification
from grok1.care.conversion import convert
from grok1.checkpoint import tensor_file
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.checkpoint.safetensors_file import read_shard_header
from grok1.checkpoint.tensor_file import CheckpointError, read_header, read_span, write_tensor
from grok1.config import GROK_1, ModelConfig
from grok1.machine.cache_directory import private_directory
from grok1.nn.manifest import file_name, manifest
from tests.conftest import GOLDEN, TOY

SPECS = manifest(GROK_1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The journal of an interrupted run lies in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def frame_pieces() -> dict[tuple, list]:
    kinds = json.loads((GOLDEN / "frames.json").read_text())["kinds"]
    return {
        (tuple(kind["shape"]), kind["scales_shape"] and tuple(kind["scales_shape"])): kind["pieces"]
        for kind in kinds
    }


@pytest.fixture
def released(tmp_path) -> pathlib.Path:
    """All 770 files of the released checkpoint at their real sizes, sparse."""
    pieces = frame_pieces()
    (tmp_path / "ckpt-0").mkdir()
    for index, spec in enumerate(SPECS):
        with open(tmp_path / "ckpt-0" / file_name(index), "wb") as file:
            for piece in pieces[spec.shape, spec.scales_shape]:
                if isinstance(piece, int):
                    file.seek(piece, os.SEEK_CUR)
                else:
                    file.write(bytes.fromhex(piece))
    return tmp_path


@pytest.fixture
def nano_copy(nano_path, tmp_path) -> pathlib.Path:
    shutil.copytree(nano_path / "ckpt-0", tmp_path / "nano" / "ckpt-0")
    shutil.copy(nano_path / "config.json", tmp_path / "nano")
    for path in (tmp_path / "nano" / "ckpt-0").iterdir():
        path.chmod(0o644)
    return tmp_path / "nano"


def index_of(name: str) -> int:
    return next(i for i, spec in enumerate(SPECS) if spec.name == f"transformer/{name}")


def faults_of(directory, **options) -> dict[str, str]:
    report = verification.verify(directory, progress=False, **options)
    assert len({fault.path for fault in report.faults}) == len(report.faults)
    return {fault.path: f"{fault.problem}; {fault.remedy}" for fault in report.faults}


def test_the_complete_release_is_good_within_seconds(released):
    start = time.process_time()
    report = verification.verify(released)
    assert time.process_time() - start < 10
    assert report.lines() == [
        f"{released}: no fault; 770 tensors expected, 318,239,886,140 bytes are as they should be"
    ]


def test_twelve_faults_are_named_in_one_run(released, capsys):
    place = released / "ckpt-0"
    gate, key, router = (
        index_of(f"decoder_layer_{i}/{name}/w")
        for i, name in ((3, "moe/linear"), (5, "multi_head_attention/key"), (7, "router"))
    )
    norm = index_of("decoder_layer_8/rms_norm/scale")
    (place / file_name(10)).unlink()
    os.truncate(place / file_name(0), 1 << 30)
    os.truncate(place / file_name(20), 0)
    os.truncate(place / file_name(gate), (place / file_name(gate)).stat().st_size + 7)
    (place / "tensor00770_000").write_bytes(b"")
    (place / "notes.txt").write_text("")
    (place / file_name(30)).rename(place / "tensor00030_001")
    write_tensor(
        place / file_name(key),
        np.ones((1024, 6144), np.int8),
        np.ones((1, 6144), ml_dtypes.bfloat16),
    )
    write_tensor(place / file_name(router), np.ones((6144, 7), np.float32))
    write_tensor(
        place / file_name(norm), np.ones((1, 6144), np.int8), np.ones((1, 6144), "bfloat16")
    )
    write_tensor(
        place / file_name(key + 12),
        np.ones((6144, 1024), np.int8),
        np.ones((2, 1024), ml_dtypes.bfloat16),
    )
    (place / file_name(norm + 12)).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    expected = {
        file_name(10): "missing, expected ",
        file_name(
            0
        ): "short, 1,073,741,824 bytes, expected 3,221,225,637 (33 % is there); fetch it",
        file_name(20): "short, 0 bytes, expected ",
        file_name(gate): "long, 1,611,137,354 bytes, expected 1,611,137,347; fetch it again",
        "tensor00770_000": "foreign, a file beyond the 770 tensors, expected no such file; move it",
        "notes.txt": "foreign, expected no such file; move it away",
        "tensor00030_001": "misnamed, expected tensor00030_000; rename it to tensor00030_000",
        file_name(30): "missing, expected ",
        file_name(key): "key/w is int8[1024,6144], expected int8[6144,1024]; is this",
        file_name(router): "router/w is float32[6144,7], expected float32[6144,8]; is this",
        file_name(norm): "rms_norm/scale is int8[1,6144], expected float32[6144]; is this",
        file_name(key + 12): "with scales bfloat16[2,1024], expected int8[6144,1024] with scales "
        "bfloat16[1,1024] as in the other layers; the file is of another checkpoint",
        file_name(norm + 12): "hostile: ",
    }
    start = time.process_time()
    status = __main__.main(["verify", str(released)])
    assert time.process_time() - start < 10
    assert status == 1
    *lines, verdict, to_fetch, to_replace = capsys.readouterr().out.splitlines()
    found = dict(line.removeprefix("ckpt-0/").split(": ", 1) for line in lines)
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert text in found[name], name
    assert verdict.startswith(f"{released}: 13 faults; 770 tensors expected, ")
    missing = f"ckpt-0/{file_name(10)} ckpt-0/{file_name(30)}"
    assert to_fetch == (
        f"to fetch what is missing: `hf download xai-org/grok-1 {missing} --local-dir {released}`"
    )
    kept = {file_name(10), file_name(30), "tensor00770_000", "notes.txt", "tensor00030_001"}
    bad = " ".join(f"ckpt-0/{name}" for name in sorted(expected.keys() - kept))
    assert to_replace == (
        f"to fetch the bad files again: `hf download xai-org/grok-1 {bad} --force-download "
        f"--local-dir {released}`"
    )


def test_a_download_that_has_just_begun_is_resumed_as_a_whole(released):
    for index in range(100, 770):
        (released / "ckpt-0" / file_name(index)).unlink()
    report = verification.verify(released)
    assert len(report.faults) == 670
    assert report.advice == [
        "to resume the download: `hf download xai-org/grok-1 --include 'ckpt-0/*' --local-dir "
        f"{released}`"
    ]


def test_a_missing_directory_says_what_to_give(nano_copy):
    with pytest.raises(CheckpointError, match=r"absent: there is no such directory; Grok-1.*`hf"):
        verification.verify(nano_copy / "absent")
    with pytest.raises(CheckpointError, match="holds the tensor files itself; give the directory"):
        verification.verify(nano_copy / "ckpt-0")


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        (b"damaged", "not a SentencePiece model: found 7 bytes"),
        (b"", "not a SentencePiece model: found 0 bytes"),
        (None, "is a link to absent, which is not there"),
        (TOY / "tokenizer.model", "the tokenizer has 1280 pieces, the model's vocabulary "),
    ],
)
def test_a_tokenizer_that_is_none_is_listed_with_the_other_faults(tokenizer, problem, nano_copy):
    path = nano_copy / "tokenizer.model"
    if isinstance(tokenizer, pathlib.Path):
        shutil.copy(tokenizer, path)
    elif tokenizer is None:
        path.symlink_to("absent")
    else:
        path.write_bytes(tokenizer)
    os.truncate(nano_copy / "ckpt-0" / file_name(3), 100)
    found = faults_of(nano_copy)
    assert found["ckpt-0/tensor00003_000"].startswith("short, 100 bytes")
    assert problem in found["tokenizer.model"]
    path.unlink()
    assert "tokenizer.model" not in faults_of(nano_copy)


@pytest.mark.parametrize(
    "name", ["a\x1b]0;title\x07", "two\nlines: no fault", "\udcff", "\u202egnp"]
)
def test_names_of_files_are_shown_escaped(name, nano_copy, capsys):
    (nano_copy / "ckpt-0" / name).write_bytes(b"")
    assert __main__.main(["verify", str(nano_copy)]) == 1
    fault, verdict, *_ = capsys.readouterr().out.splitlines()
    assert fault.isprintable()
    assert fault.endswith(": foreign, expected no such file; move it away")
    assert verdict.startswith(f"{nano_copy}: 1 faults; 146 tensors expected, ")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "?"), ("cp1252", "?"), ("utf-8", "→")])
def test_what_an_output_cannot_spell_is_replaced(encoding, shown, nano_copy, monkeypatch):
    (nano_copy / "ckpt-0" / "→").write_bytes(b"")
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding=encoding, errors="strict"))
    assert __main__.main(["verify", str(nano_copy)]) == 1
    sys.stdout.flush()
    fault, verdict, *_ = data.getvalue().decode(encoding).splitlines()
    assert fault.startswith(f"ckpt-0/{shown}: foreign")
    assert ": 1 faults; " in verdict


def test_an_unreadable_file_is_not_fetched_but_opened(nano_copy, monkeypatch):
    path, whole = nano_copy / "ckpt-0" / file_name(3), os.open

    def refuse(opened, *arguments, **options):
        if opened == path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(opened, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    report = verification.verify(nano_copy)
    (fault,) = report.faults
    assert fault.path == "ckpt-0/tensor00003_000"
    assert fault.problem == "cannot be read: Permission denied"
    assert fault.remedy == "check the path and its permissions"
    assert not report.advice


def test_a_directory_in_a_files_place_is_described(nano_copy):
    path = nano_copy / "ckpt-0" / file_name(3)
    path.unlink()
    path.mkdir()
    assert faults_of(nano_copy) == {
        "ckpt-0/tensor00003_000": "not a regular file but a directory; move it away"
    }


def test_an_error_without_a_remedy_keeps_its_text():
    fault = verification._fault("b", CheckpointError("a/b", "ends at byte 7"))
    assert fault[1:3] == ("ends at byte 7", "fetch it again")


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
        file, contents.Journal(nano_copy / "SHA256SUMS"), lambda num_bytes: None
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


def test_complete_sums_need_no_place_to_write(nano_copy, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("name", ["a\x1bb", "a\x00b", "a\x7f"])
def test_a_name_with_controls_among_sums_is_refused(name, nano_copy):
    (nano_copy / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS: line 1 is '0000") as caught:
        verification.verify(nano_copy, deep=True)
    assert name not in str(caught.value)


def test_sums_without_a_place_are_refused_before_reading(nano_copy, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"cannot be written; give a place .* --manifest FILE"
    ):
        verification.verify(nano_copy, deep=True, sums_file=tmp_path / "absent" / "sums")


def test_a_safetensors_conversion_is_verified_too(nano_copy, tmp_path, nano_config: ModelConfig):
    convert(nano_copy, tmp_path / "st", to="safetensors", progress=False)
    report = verification.verify(tmp_path / "st", deep=True)
    assert report.is_good
    assert len((tmp_path / "st" / "SHA256SUMS").read_text().splitlines()) == 14
    shard = tmp_path / "st" / "model-00004-of-00013.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert "is damaged" in faults_of(tmp_path / "st")[shard.name]


@pytest.fixture(scope="module")
def nano_safetensors(nano_path, tmp_path_factory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("safetensors") / "nano"
    convert(nano_path, target, to="safetensors", progress=False)
    return target


@pytest.fixture
def safetensors_copy(nano_safetensors, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(nano_safetensors, tmp_path / "st"))


def change(path: pathlib.Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def test_every_fault_of_safetensors_is_named_in_one_run(safetensors_copy):
    shards = sorted(safetensors_copy.glob("model-*"))
    os.truncate(shards[2], shards[2].stat().st_size - 1)
    shards[4].unlink()
    (safetensors_copy / "other.safetensors").write_bytes(b"")
    change(shards[5], b"attn.q_proj", b"attn.x_proj")
    change(shards[6], b"[128,64]", b"[64,128]")
    found = [(path, problem) for path, problem, *_ in verification.verify(safetensors_copy).faults]
    for (path, problem), (expected_path, text) in zip(
        found,
        [
            (shards[2].name, "bytes long, expected "),
            (shards[4].name, "missing, expected as the index names it"),
            (shards[5].name, "lacks model.layers.4.attn.q_proj.weight, which"),
            (shards[5].name, "holds model.layers.4.attn.x_proj.weight, which"),
            (shards[6].name, "is int8[64,128], expected int8[128,64]"),
            ("other.safetensors", "foreign, expected no such file"),
        ],
        strict=True,
    ):
        assert path == expected_path
        assert text in problem


def refused_by_verify_and_load(directory) -> str:
    """The one message of a checkpoint that neither takes."""
    (fault,) = verification.verify(directory, deep=True, progress=False).faults
    with pytest.raises(CheckpointError) as caught:
        load_tensors(directory)
    assert str(caught.value) == f"{directory / fault.path}: {fault.problem}; {fault.remedy}"
    return str(caught.value)


def load_tensors(directory):
    return open_tensors(directory, load_config(directory))


HOSTILE_NAMES = ["a\nb", "a\x00b", "\x1b[31m", "\ud800"]


@pytest.mark.parametrize(
    ("where", "name"),
    [("tensor", name) for name in HOSTILE_NAMES]
    + [("file", name) for name in [*HOSTILE_NAMES, "..", "", 7, True, None]],
)
def test_a_weight_map_with_impossible_names_is_refused(where, name, safetensors_copy):
    index = safetensors_copy / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    first = next(iter(found["weight_map"]))
    if where == "file":
        if isinstance(name, str) and name:
            # What makes such a name dangerous is that there is such a file.
            with contextlib.suppress(OSError, ValueError):
                shutil.copy(safetensors_copy / found["weight_map"][first], safetensors_copy / name)
        found["weight_map"][first] = name
    else:
        found["weight_map"][name] = found["weight_map"][first]
    index.write_text(json.dumps(found))
    message = refused_by_verify_and_load(safetensors_copy)
    assert repr(name) in message
    assert "its weight_map has " in message
    assert not (safetensors_copy / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    "offsets",
    ["[0.0,%d.0]", "[false,%d]", "[null,%d]", '["0",%d]', "[0,%d,0]", "0", "[0,-%d]", "{}",
     f"[{'9' * 5000},%d]", '"0%d"'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_offsets_that_are_no_whole_numbers_are_refused(offsets, safetensors_copy):
    path = sorted(safetensors_copy.glob("model-*"))[1]
    spans = read_shard_header(path).spans.values()
    nbytes = min(spans, key=lambda span: span.offset).nbytes
    old, new = (text.replace("%d", str(nbytes)).encode() for text in ("[0,%d]", offsets))
    rewrite_header(path, lambda text: text.replace(old, new, 1))
    message = refused_by_verify_and_load(safetensors_copy)
    assert "its header is damaged: " in message
    assert ("is said to be at 0 to -" if "-" in offsets else "expected two whole n") in message


@pytest.mark.parametrize(
    ("pattern", "changed", "problem"),
    [
        (rb"\{[^{}]*\}", b"7", "is 7, expected dtype, shape and data_offsets"),
        (rb"\{[^{}]*\}", b"[1]", "is [1], expected dtype, shape and data_offsets"),
        (rb'"(I8|F32|BF16)"', b"[]", "has the dtype []"),
        (rb'"shape":\[[^]]*\]', b'"shape":8', "has the shape 8"),
        (rb'"shape":\[[^]]*\]', b'"shape":{"8":8}', "has the shape {'8': 8}"),
    ],
)
def test_a_tensor_that_is_none_is_named(pattern, changed, problem, safetensors_copy):
    path = sorted(safetensors_copy.glob("model-*"))[1]
    end = path.read_bytes().index(b'"model.layers')  # behind the metadata

    def change(text):
        return text[: end - 8] + re.sub(pattern, changed, text[end - 8 :], count=1)

    rewrite_header(path, change)
    assert f"its header is damaged: model.layers.0.{problem}" in re.sub(
        r"(model\.layers\.0\.)\S+ ", r"\1", refused_by_verify_and_load(safetensors_copy)
    )


@pytest.mark.parametrize("name", ["a\\nb", "\\u001b[31m", "\\ud800"])
def test_a_tensors_name_with_controls_is_refused_and_shown_escaped(name, safetensors_copy, capsys):
    path = sorted(safetensors_copy.glob("model-*"))[1]
    rewrite_header(path, lambda text: text.replace(b"attn.q_proj.weight", name.encode(), 1))
    message = refused_by_verify_and_load(safetensors_copy)
    assert "is no name of a tensor" in message
    assert __main__.main(["verify", str(safetensors_copy)]) == 1
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def rewrite_header(path: pathlib.Path, change_text) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change_text(data[8 : 8 + length])
    assert text != data[8 : 8 + length]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_deep_reads_the_weights_of_safetensors(safetensors_copy):
    first, second = sorted(safetensors_copy.glob("model-*"))[:2]
    for path, name, offset in (
        (first, "model.embed_tokens.weight", 4 * 71),
        (second, "model.layers.0.attn.q_proj.weight_scale", 6),
    ):
        span = read_shard_header(path).spans[name]
        data = bytearray(path.read_bytes())
        data[span.offset + offset : span.offset + offset + 4] = b"\xc0\x7f\xc0\x7f"
        path.write_bytes(data)
    assert verification.verify(safetensors_copy).is_good
    found = faults_of(safetensors_copy, deep=True)
    assert (
        "values of model.embed_tokens.weight are not finite, the first is nan at"
        in (found[first.name])
    )
    assert (
        "2 of 128 scales of model.layers.0.attn.q_proj.weight_scale are not finite"
        in (found[second.name])
    )
    sums = (safetensors_copy / "SHA256SUMS").read_text()
    assert len(sums.splitlines()) == 12
    assert first.name not in sums
