"""What is wrong with safetensors: named by verify, refused by load."""

import contextlib
import json
import os
import pathlib
import re
import shutil

import pytest

import grok1
from grok1 import __main__
from grok1.care import verification
from grok1.care.conversion import convert
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.checkpoint.safetensors_file import read_shard_header
from grok1.config import ModelConfig
from grok1.files import CheckpointError
from tests.care.helpers import faults_of, rewrite_header

pytestmark = pytest.mark.usefixtures("own_cache")


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


HOSTILE_NAMES = ["a\nb", "a\x00b", "\x1b[31m", "\ud800", "a" * 1001]


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
    assert repr(name)[:80] in message
    assert len(message) < 1000
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
        # Of these the product would take minutes, and the message megabytes.
        (rb'"shape":\[', b'"shape":[' + b"9" * 39 + b"," + b"7," * 10**5, "has the shape [999"),
        (rb'"shape":\[', b'"shape":[' + b"1," * 10**5, "has the shape [1, 1, 1, "),
        (rb'"shape":\[[^]]*\]', b'"shape":[9223372036854775808]', "has the shape [922"),
    ],
    ids=lambda value: str(value)[:30],
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


@pytest.mark.parametrize(
    "name",
    ["a\\nb", "\\u001b[31m", "\\ud800", "a" * 1001],
    ids=lambda name: name[:9],
)
def test_a_tensors_name_with_controls_is_refused_and_shown_escaped(name, safetensors_copy, capsys):
    path = sorted(safetensors_copy.glob("model-*"))[1]
    rewrite_header(path, lambda text: text.replace(b"attn.q_proj.weight", name.encode(), 1))
    message = refused_by_verify_and_load(safetensors_copy)
    assert "is no name of a tensor" in message
    assert __main__.main(["verify", str(safetensors_copy)]) == 1
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


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


def damaged(toy_safetensors, tmp_path, name, change) -> str:
    copy = tmp_path / "copy"
    shutil.copytree(toy_safetensors, copy)
    path = copy / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        grok1.load(copy, mesh=(1, 1), progress=False)
    assert str(caught.value).startswith(str(copy))
    return str(caught.value)


SHARD = "model-00002-of-00007.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (SHARD, lambda data: data[:-1], "bytes long, expected"),
        (SHARD, lambda data: data[:4], "is 4 bytes long and claims a header of"),
        (SHARD, lambda data: b"\xff" * 8 + data[8:], "claims a header of 18446744073709551615"),
        (SHARD, lambda data: data[:8] + b"[" * 1000 + data[1008:], "expected a JSON object"),
        (SHARD, lambda data: data.replace(b'"I8"', b'"U8"', 1), "is 4-bit and has no "),
        (SHARD, lambda data: data.replace(b'"I8"', b'"F4"', 1), "has 'F4' where a tensor's dtype"),
        (SHARD, lambda data: data.replace(b"q_proj", b"x_proj"), "lacks model.layers.0.attn.q_pr"),
        (
            SHARD,
            lambda data: data.replace(b"[128,128]", b"[64, 256]", 1),
            "is said to be at|is int8",
        ),
        (
            "model.safetensors.index.json",
            lambda data: data.replace(b'"model-00002-of', b'"../odel-00002-of'),
            "expected a weight_map from tensors to files beside it",
        ),
        ("model.safetensors.index.json", lambda data: data[:100], "expected a JSON object"),
        ("model.safetensors.index.json", lambda data: b"{}", "expected a weight_map"),
        (
            "config.json",
            lambda data: data.replace(b'_layers": 6', b'_layers": 7'),
            r"lacks model\.layers\.6\..* and 32 more; is its config.json the one",
        ),
    ],
)
def test_damaged_safetensors_are_refused(name, change, message, toy_safetensors, tmp_path):
    assert re.search(message, damaged(toy_safetensors, tmp_path, name, change))


def test_a_missing_shard_is_named(toy_safetensors, tmp_path):
    shutil.copytree(toy_safetensors, tmp_path / "copy")
    (tmp_path / "copy" / SHARD).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD}: cannot be read: No such file"):
        grok1.load(tmp_path / "copy", progress=False)


def test_the_released_files_come_first(toy_safetensors, tmp_path):
    shutil.copytree(toy_safetensors, tmp_path / "both")
    (tmp_path / "both" / "ckpt-0").mkdir()
    with pytest.raises(CheckpointError, match="ckpt-0: found 0 tensor files"):
        grok1.load(tmp_path / "both", progress=False)
