"""Verification by headers: every fault in one run, in seconds, on the real sizes."""

import errno
import io
import json
import os
import pathlib
import shutil
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from grok1 import __main__
from grok1.care import verification
from grok1.checkpoint.tensor_file import write_tensor
from grok1.config import GROK_1
from grok1.files import CheckpointError
from grok1.nn.manifest import file_name, manifest
from tests.care.helpers import faults_of
from tests.conftest import GOLDEN, TOY

pytestmark = pytest.mark.usefixtures("own_cache")

SPECS = manifest(GROK_1)


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


def index_of(name: str) -> int:
    return next(i for i, spec in enumerate(SPECS) if spec.name == f"transformer/{name}")


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


def test_what_a_file_browser_leaves_is_no_fault(nano_copy):
    (nano_copy / "ckpt-0" / ".DS_Store").write_bytes(b"x")
    assert verification.verify(nano_copy).is_good


def test_a_file_in_the_directorys_place_is_told_how_to_fetch_it(tmp_path):
    (tmp_path / "ckpt-0").write_bytes(b"")
    message = (
        "ckpt-0: cannot be read: Not a directory; .* are fetched with `hf download xai-org/grok-1"
    )
    with pytest.raises(CheckpointError, match=message):
        verification.verify(tmp_path)


def test_an_error_without_a_remedy_keeps_its_text():
    fault = verification._fault("b", CheckpointError("a/b", "ends at byte 7"))
    assert fault[1:3] == ("ends at byte 7", "fetch it again")
