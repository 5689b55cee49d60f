"""Conversions: exact, resumable from any point, atomic, by one process, and clear when refused."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest

import grok1
from grok1 import __main__, bundled
from grok1.care import conversion, inspection, staging
from grok1.care.conversion import convert
from grok1.checkpoint.directory import open_tensors
from grok1.checkpoint.storage import read_matrix
from grok1.checkpoint.tensor_file import read_header, read_span, write_tensor
from grok1.files import CheckpointError
from tests.conftest import GOLDEN, TOY
from tests.helpers import dequantized, named_params, relative_error, slow

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


def tree(directory: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def staging_of(target: pathlib.Path) -> pathlib.Path | None:
    """The directory in which a target is put together."""
    return next(target.parent.glob(f".{target.name}.partial-*"), None)


def journal_of(target: pathlib.Path) -> bytes:
    staging = staging_of(target)
    with contextlib.suppress(FileNotFoundError):
        return (staging / "journal").read_bytes() if staging else b""
    return b""


def interrupted(target: pathlib.Path, num_pieces: int, to: str = "grok1") -> pathlib.Path:
    """Converts the toy as far as some pieces and returns the directory that is left."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, num_pieces)
        with pytest.raises(KeyboardInterrupt):
            convert(TOY, target, to=to, progress=False)
    staging = staging_of(target)
    assert staging is not None
    return staging


@pytest.fixture(scope="module")
def toy_safetensors(tmp_path_factory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("safetensors") / "toy"
    convert(TOY, target, to="safetensors", progress=False)
    return target


def released(directory: pathlib.Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(directory).items() if name.startswith("ckpt-0")}


# ------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("source", [TOY, GOLDEN / "nano"], ids=["toy", "nano"])
def test_to_safetensors_and_back_is_bit_identical(source, tmp_path):
    convert(source, tmp_path / "st", to="safetensors", progress=False)
    convert(tmp_path / "st", tmp_path / "back", to="grok1", progress=False)
    assert released(tmp_path / "back") == released(source)
    assert sorted(os.listdir(tmp_path)) == ["back", "st"]
    config = grok1.ModelConfig.load(source / "config.json")
    assert grok1.ModelConfig.load(tmp_path / "st" / "config.json") == config
    assert grok1.ModelConfig.load(tmp_path / "back" / "config.json") == config


@pytest.mark.parametrize("tokenizer", ["a link that leads nowhere", "damaged", "a directory"])
@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_a_tokenizer_that_cannot_be_read_is_an_error(to, tokenizer, tmp_path):
    pytest.importorskip(to)
    source = tmp_path / "toy"
    source.mkdir()
    (source / "ckpt-0").symlink_to(TOY / "ckpt-0")
    shutil.copy(TOY / "config.json", source)
    path = source / "tokenizer.model"
    if tokenizer == "damaged":
        path.write_bytes((TOY / "tokenizer.model").read_bytes()[:-100])
    elif tokenizer == "a directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "absent")
    with pytest.raises((ValueError, OSError), match=rf"^{path}: "):
        convert(source, tmp_path / "out", to=to, progress=False)
    assert os.listdir(tmp_path) == ["toy"]


def test_settings_of_numpy_are_not_the_conversions_business(tmp_path):
    pytest.importorskip("gguf")
    source = tmp_path / "toy"
    convert(TOY, source, to="grok1", progress=False)
    embedding = source / "ckpt-0" / "tensor00000_000"
    header = read_header(embedding)
    values = np.array(read_span(header, header.values))
    values[3, :] = 1e-30  # Nothing in float16, and its square nothing in float32.
    write_tensor(embedding, values)
    convert(source, tmp_path / "a", to="gguf", embedding="f16", progress=False)
    expected = inspection.inspect(source)
    with np.errstate(all="raise"):
        convert(source, tmp_path / "b", to="gguf", embedding="f16", progress=False)
        convert(source, tmp_path / "c", to="safetensors", dtype="bfloat16", progress=False)
        assert inspection.inspect(source) == expected
        assert set(np.geterr().values()) == {"raise"}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_loaders_of_other_libraries_are_told_the_model(toy_safetensors):
    found = json.loads((toy_safetensors / "config.json").read_text())
    assert found["architectures"] == ["Grok1ModelForCausalLM"]
    assert found["model_type"] == "grok-1"
    assert (found["hidden_size"], found["num_hidden_layers"]) == (128, 6)
    assert grok1.ModelConfig.load(toy_safetensors / "config.json") == grok1.TOY


def test_released_weights_get_the_tokenizer_that_load_takes(tmp_path, monkeypatch):
    source = tmp_path / "toy"
    source.mkdir()
    (source / "ckpt-0").symlink_to(TOY / "ckpt-0")
    shutil.copy(TOY / "config.json", source)
    monkeypatch.setattr("grok1.checkpoint.directory.GROK_1", grok1.TOY)
    convert(source, tmp_path / "out", to="grok1", progress=False)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == bundled.tokenizer().read_bytes()


def test_the_tokenizer_goes_along(toy_safetensors):
    assert (toy_safetensors / "tokenizer.model").read_bytes() == (
        TOY / "tokenizer.model"
    ).read_bytes()


@pytest.mark.parametrize("mesh", [(1, 1), (1, 8)])
def test_safetensors_load_as_the_same_parameters(mesh, toy_safetensors):
    loaded = grok1.load(toy_safetensors, mesh=mesh, progress=False)
    expected = grok1.load(TOY, mesh=mesh, progress=False)
    for found, leaf in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(expected.params), strict=True
    ):
        assert found.sharding == leaf.sharding
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(found, leaf)
    assert loaded.tensors == expected.tensors


def test_the_layout_is_that_of_the_ports_for_pytorch(toy_safetensors):
    safetensors = pytest.importorskip("safetensors")
    index = json.loads((toy_safetensors / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 7  # embedding and norm, then six layers
    assert len(index["weight_map"]) == 2 + 6 * (2 * (4 + 3 * 8) + 1 + 4)
    with safetensors.safe_open(toy_safetensors / "model-00003-of-00007.safetensors", "np") as file:
        down = file.get_tensor("model.layers.1.moe_block.experts.5.linear_1.weight")
        header = json.loads(
            (toy_safetensors / "model-00003-of-00007.safetensors").read_bytes()[8:].split(b"}}")[0]
            + b"}}"
        )
    tensors, specs = open_tensors(TOY, grok1.TOY)
    number = [s.name for s in specs].index("transformer/decoder_layer_1/moe/linear_1/w")
    np.testing.assert_array_equal(down, read_matrix(tensors[number].values, 5).T)
    entry = header["model.layers.1.moe_block.experts.5.linear_1.weight_scale"]
    assert (entry["dtype"], entry["shape"]) == ("BF16", [128, 8])


def test_bfloat16_is_rounded_once_and_loads(tmp_path, toy):
    notes = convert(TOY, tmp_path / "bf", to="safetensors", dtype="bfloat16", progress=False)
    assert notes == ["weights are rounded to bfloat16 once, from int8 times its scale"]
    loaded = grok1.load(tmp_path / "bf", mesh=(1, 2), dtype="float32", progress=False)
    expected = named_params(toy)
    for module, parameters in named_params(loaded).items():
        for name, found in parameters.items():
            exact = dequantized(expected[module][name])
            if "router" not in module and name == "w":
                exact = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(found, exact)
    tokens = toy.tokenizer.encode("The first argument is a string.")
    assert relative_error(loaded.logits(tokens), toy.logits(tokens)) < 0.02
    convert(tmp_path / "bf", tmp_path / "floats", to="grok1", progress=False)
    again = grok1.load(tmp_path / "floats", mesh=(1, 1), dtype="float32", progress=False)
    assert relative_error(again.logits(tokens), loaded.logits(tokens)) < 1e-5


# ---------------------------------------------------------------------------------- interruptions


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


def interrupt_after(monkeypatch, num_pieces: int, error: BaseException | None = None):
    whole, count = staging._write_piece, iter(range(num_pieces))

    def write(*arguments):
        if next(count, None) is None:
            raise error or KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(staging, "_write_piece", write)


# -------------------------------------------------------------------------------------- bad input


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


def test_too_small_a_disk_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"4,\d+,\d+ bytes are still to be written and the disk has 1,000 fr"
    ):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)


def test_two_processes_to_one_place_the_second_is_refused(tmp_path, slow_conversions):
    first = slow_conversions.start(tmp_path / "out", "grok1")
    while not journal_of(tmp_path / "out"):
        os.kill(first, 0)
        time.sleep(0.002)
    with pytest.raises(CheckpointError, match="out: another process is writing it now; wait for"):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert slow_conversions.wait() == 0
    assert released(tmp_path / "out") == released(TOY)


def test_an_existing_target_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="out: already exists; choose a new place, nothing"):
        convert(TOY, tmp_path / "out", to="grok1", progress=False)
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "out" / "mine").unlink()
    convert(TOY, tmp_path / "out", to="grok1", progress=False)


@pytest.mark.parametrize("to", ["grok1", "safetensors"])
def test_a_source_that_shrinks_is_an_error_and_no_crash(to, tmp_path, monkeypatch):
    source = tmp_path / "toy"
    shutil.copytree(TOY, source)
    path = source / "ckpt-0" / "tensor00040_000"
    path.chmod(0o644)
    whole, shrunk = staging._write_piece, []

    def write(*arguments):
        if not shrunk:
            os.truncate(path, 1000)
            shrunk.append(True)
        whole(*arguments)

    monkeypatch.setattr(staging, "_write_piece", write)
    with pytest.raises(CheckpointError, match=r"tensor00040_000: has 1000 bytes, expected the"):
        convert(source, tmp_path / "out", to=to, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        convert(TOY, tmp_path / "file" / "out", to="grok1", progress=False)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            convert(TOY, tmp_path / "closed" / "out", to="grok1", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "to must be one of grok1, safetensors, int4, gguf, found 'onnx'"),
        ({"to": "grok1", "dtype": "bfloat16"}, "own format has no bfloat16 weights"),
        ({"to": "safetensors", "embedding": "q8_0"}, "can be chosen for gguf only"),
        ({"to": "gguf", "embedding": "q4"}, "the embedding must be one of f32, f16, bf16, q8_0"),
        ({"to": "safetensors", "dtype": "float64"}, 'dtype must be "int8" or "bfloat16"'),
    ],
)
def test_impossible_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(TOY, tmp_path / "out", progress=False, **options)


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_a_missing_package_is_said_with_the_extra(to, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, to, None)
    assert __main__.main(["convert", str(TOY), str(tmp_path / "out"), "--to", to]) == 1
    assert capsys.readouterr().err == (
        f"grok1: converting to {to} needs the package {to}: pip install 'grok1[convert]'\n"
    )


def test_the_command_says_what_it_made(tmp_path, capsys):
    assert __main__.main(["convert", str(TOY), str(tmp_path / "o"), "--to", "safetensors"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/o: written and read back\n"


# ---------------------------------------------------------------------------- damaged safetensors


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


def test_a_float_source_cannot_be_int8(tmp_path):
    source = tmp_path / "floats"
    convert(TOY, tmp_path / "bf", to="safetensors", dtype="bfloat16", progress=False)
    convert(tmp_path / "bf", source, to="grok1", progress=False)
    assert read_header(source / "ckpt-0" / "tensor00002_000").scales is None
    with pytest.raises(CheckpointError, match="int8 was asked for; convert the released files"):
        convert(source, tmp_path / "out", to="safetensors", dtype="int8", progress=False)
    with pytest.raises(CheckpointError, match="its weights are bfloat16, and int8 was asked for"):
        convert(tmp_path / "bf", tmp_path / "out", to="safetensors", dtype="int8", progress=False)
