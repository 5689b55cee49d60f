"""Which directory is a model's: all else is refused, with what to give instead."""

import dataclasses
import errno
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest

import grok1
from grok1 import bundled
from grok1.__main__ import main
from grok1.care import conversion, inspection, verification
from grok1.checkpoint.directory import load_config, located, tokenizer_path
from grok1.checkpoint.fingerprint import fingerprint
from grok1.command import streams
from grok1.config import GROK_1, TOY
from grok1.files import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 12345\n" % (b"0" * 64)

CPU: Any = {"devices": 1, "device": "cpu", "memory": 1, "bandwidth": 9, "disk": 1}

# Everything that is given a model's directory.
DOORS = {
    "load": lambda path: grok1.load(path, progress=False),
    "verify": lambda path: verification.verify(path, progress=False),
    "inspect": lambda path: inspection.inspect(path),
    "convert": lambda path: conversion.convert(path, f"{path}-out", to="grok1", progress=False),
    "plan": lambda path: grok1.plan(checkpoint=path, **CPU),
}


@pytest.fixture(scope="module")
def house(nano_path, tmp_path_factory) -> pathlib.Path:
    """A directory of directories, of which one is a model's, by name at least."""
    root = tmp_path_factory.mktemp("house")
    (root / "models" / "nano").mkdir(parents=True)
    (root / "models" / "nano" / "ckpt-0").symlink_to(nano_path / "ckpt-0")
    shutil.copy(nano_path / "config.json", root / "models" / "nano")
    (root / "models" / "nano" / "readme.txt").write_text("")
    (root / "one-file").mkdir()
    (root / "one-file" / "model.safetensors").write_bytes(b"")
    (root / "gguf").mkdir()
    (root / "gguf" / "grok.gguf").write_bytes(b"GGUF")
    (root / "gguf" / "renamed.bin").write_bytes(b"GGUF")
    (root / "photos").mkdir()
    (root / "photos" / "a.jpg").write_bytes(b"")
    (root / "empty").mkdir()
    (root / "begun").mkdir()
    (root / "begun" / "tokenizer.model").write_bytes(b"")
    return root


_ABOVE = "give the directory above: ROOT/models/nano"
_GGUF = (
    "GGUF, which llama.cpp reads and this library only writes; give the directory that it was "
    "converted from"
)
_INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("models/nano/ckpt-0", f"holds the tensor files itself; {_ABOVE}"),
        ("models/nano/ckpt-0/tensor00000_000", f"is one tensor of a model; {_ABOVE}"),
        ("models/nano/config.json", f"is no directory; {_ABOVE}"),
        ("models", "holds no model itself; give the directory of one: ROOT/models/nano"),
        ("", "holds no model itself; give the directory of one: ROOT/models/nano"),
        (
            "one-file/model.safetensors",
            f"is one file of a model; give the directory above, which must hold {_INDEX} as well",
        ),
        (
            "one-file",
            f"holds safetensors files and no {_INDEX}; copy that file as well; only conversions of "
            "Grok-1 that have it are read",
        ),
        ("gguf/grok.gguf", f"is a {_GGUF.replace('GGUF,', 'GGUF file,')}"),
        ("gguf/renamed.bin", f"is a {_GGUF.replace('GGUF,', 'GGUF file,')}"),
        ("gguf", f"holds {_GGUF}"),
        (
            "photos",
            f"holds no model, found a.jpg; give the directory of one, which holds ckpt-0/ or "
            f"{_INDEX}",
        ),
    ],
)
def test_what_is_no_models_directory_says_what_to_give(door, given, message, house):
    path = house / given if given else house
    with pytest.raises(CheckpointError) as caught:
        DOORS[door](path)
    assert str(caught.value) == f"{path}: {message.replace('ROOT', str(house))}"
    assert caught.value.kind == "foreign"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("given", "problem"),
    [("absent", "there is no such directory"), ("empty", "holds no weights"),
     ("begun", "holds no weights")],
)  # fmt: skip
def test_where_nothing_is_the_download_is_named(door, given, problem, house):
    with pytest.raises(CheckpointError) as caught:
        DOORS[door](house / given)
    assert str(caught.value).startswith(f"{house / given}: {problem}; Grok-1's weights (318 GB)")
    assert f"--local-dir {house / given}`" in str(caught.value)
    assert caught.value.kind == "missing"


def test_the_configuration_alone_is_enough_to_plan_and_not_to_load(house, tmp_path):
    shutil.copy(house / "models" / "nano" / "config.json", tmp_path)
    assert located(tmp_path, weights=False) == tmp_path
    assert load_config(tmp_path).emb_size == 64
    with pytest.raises(CheckpointError, match="holds no weights"):
        located(tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_weights_without_a_configuration_are_taken_for_no_other_models(door, house, tmp_path):
    (tmp_path / "ckpt-0").symlink_to(house / "models" / "nano" / "ckpt-0")
    with pytest.raises(
        CheckpointError,
        match=r"config.json: missing, and the embedding \[128, 64\] in tensor00000_000 is not that",
    ):
        DOORS[door](tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_the_system_refuses_is_told(door, tmp_path):
    def refused(path):
        with pytest.raises(CheckpointError, match="cannot be read: ") as caught:
            DOORS[door](path)
        assert caught.value.kind == "unreadable"
        assert caught.value.path == path

    refused(tmp_path / ("n" * 256))
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop" / "nano")


@pytest.mark.parametrize("path", [None, 7, b"/tmp", ["a"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(TypeError, match=r"^path must be that of a model's directory, a str or a"):
        grok1.load(path)


def test_home_and_the_bundled_toy_have_names(house, monkeypatch):
    monkeypatch.setenv("HOME", str(house))
    assert located("~/models/nano") == house / "models" / "nano"
    assert load_config(pathlib.Path("~/models/nano")).emb_size == 64
    assert located("toy") == bundled.toy()
    assert load_config("toy") == TOY
    shutil.copy(bundled.toy() / "tokenizer.model", house / "own.model")
    assert grok1.Tokenizer.load("~/own.model").vocab_size == 1280
    (house / "own.model").unlink()


def test_home_has_its_name_where_something_is_written(house, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    conversion.convert(house / "models" / "nano", "~/new", to="grok1", progress=False)
    assert grok1.ModelConfig.load("~/new/config.json").emb_size == 64
    assert verification.verify("~/new", deep=True, sums_file="~/sums", progress=False).is_good
    assert (tmp_path / "sums").exists()
    # As a shell hands on what stands behind an equals sign.
    assert main(["verify", "~/new", "--manifest=~/sums", "--deep"]) == 0
    (tmp_path / "text").write_text("text")
    assert streams.read_text("~/text") == "text"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/absent.npz: there is no")):
        grok1.compare("~/absent.npz", "~/new")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/no: there is no")):
        grok1.compare(house / "models" / "nano", "~/no", "text")


def test_a_wrong_directory_is_told_without_starting_a_device(tmp_path):
    program = (
        "import time, grok1\n"
        "from jax._src import xla_bridge\n"
        "grok1.load\n"
        "start = time.process_time()\n"
        "try:\n"
        "    grok1.load('absent')\n"
        "except grok1.CheckpointError as error:\n"
        "    assert 'there is no such directory' in str(error)\n"
        "assert time.process_time() - start < 0.1\n"
        "assert not xla_bridge._backends\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


_WINDOWS = """
import os, shutil, sys
shutil._use_fd_functions = False  # as it is there
for name in ("fcntl", "termios", "resource", "readline"):
    sys.modules[name] = None
for name in ("preadv", "pread", "pwrite", "posix_fadvise", "sched_getaffinity", "O_NONBLOCK",
             "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "mkfifo", "fork"):
    if hasattr(os, name):
        delattr(os, name)
import grok1
from grok1.care import conversion, inspection, verification
from grok1.checkpoint.fingerprint import fingerprint
from grok1.planning import planning
path, target = sys.argv[1:]
print(verification.verify(path, progress=False).is_good)
print(len(inspection.inspect(path).tensors))
cpu = {"devices": 1, "device": "cpu", "memory": 1, "bandwidth": 9, "disk": 1}
# What compiles is a process of its own, in which all is there.
planning._compile = lambda *_: {"working": 1, "largest_batch": 32, "largest_context": 96}
print(len(grok1.plan(checkpoint=path, **cpu).lines()))
conversion.convert(path, target, to="grok1", progress=False)
print(fingerprint(target) == fingerprint(path))
print(float(grok1.load(target, mesh=(1, 1), progress=False).params.final_norm.sum()))
"""


def test_what_only_unix_has_is_not_needed_to_look_convert_and_load(nano_path, nano, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WINDOWS, str(nano_path), str(tmp_path / "copy")],
        env={**os.environ, "GROK1_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    is_good, num_tensors, num_lines, is_same, total = done.stdout.split()
    assert (is_good, num_tensors, is_same) == ("True", "146", "True")
    assert int(num_lines) > 3
    assert float(total) == float(nano.params.final_norm.sum())


# ------------------------------------------------------------------------------------- files


@pytest.mark.skipif(not pathlib.Path("/proc/self/mem").exists(), reason="no /proc/self/mem here")
def test_a_file_that_cannot_be_read_has_no_fingerprint(tmp_path):
    path = tmp_path / "ckpt-0" / "tensor00000_000"
    path.parent.mkdir()
    path.symlink_to("/proc/self/mem")  # nothing is mapped at its beginning
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as caught:
        fingerprint(tmp_path)
    assert caught.value.path == path


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
@pytest.mark.parametrize("name", ["config.json", "ckpt-0/tensor00003_000"])
def test_what_is_no_file_is_refused_by_every_door(door, kind, name, house, tmp_path):
    if door in ("plan", "verify") and name != "config.json":
        return  # `plan` needs no tensors, and `verify` lists them
    model = copied(house, tmp_path)
    make(kind, model / name)
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(model / name))}: not a regular file but a {kind}"
    ):
        DOORS[door](model)
    assert time.monotonic() - start < 30  # and does not wait


@pytest.mark.parametrize("door", DOORS)
def test_files_that_nobody_may_list_are_told(door, house, tmp_path, monkeypatch, capsys):
    model, listdir = copied(house, tmp_path), os.listdir

    def closed(path="."):
        if str(path).endswith("ckpt-0"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", closed)
    said = "ckpt-0: cannot be read: Permission denied; check the path and its permissions"
    if door == "plan":  # needs no tensors
        DOORS[door](model)
        assert said in capsys.readouterr().err
        return
    with pytest.raises(CheckpointError, match=said) as caught:
        DOORS[door](model)
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_checksums_that_are_no_file_are_refused(kind, house, tmp_path):
    model = copied(house, tmp_path)
    make(kind, model / "SHA256SUMS")
    with pytest.raises(CheckpointError, match=f"SHA256SUMS: not a regular file but a {kind}"):
        verification.verify(model, deep=True, progress=False)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_verify_lists_what_is_no_file(kind, house, tmp_path):
    model = copied(house, tmp_path)
    make(kind, model / "ckpt-0" / "tensor00003_000")
    (fault,) = verification.verify(model, progress=False).faults
    assert fault.path == "ckpt-0/tensor00003_000"
    assert fault.problem == f"not a regular file but a {kind}"
    shutil.rmtree(model / "ckpt-0")
    make(kind, model / "model.safetensors.index.json")
    (fault,) = verification.verify(model, progress=False).faults
    assert fault.problem == f"not a regular file but a {kind}"


def test_verify_says_once_that_files_are_pointers(house, tmp_path):
    model = copied(house, tmp_path)
    for path in (model / "ckpt-0").iterdir():
        make("LFS pointer", path)
    report = verification.verify(model, progress=False)
    assert [line for line in report.lines() if "pointer" in line] == [
        "ckpt-0/tensor00000_000: is a Git LFS pointer, a few lines of text that stand for the "
        "file, and so are 145 more; fetch the files themselves: `git lfs pull` in that directory"
    ]
    assert (len(report.faults), report.advice) == (1, [])


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "dangling link", "LFS pointer"])
def test_a_tokenizer_that_cannot_be_read_is_an_error(kind, house, tmp_path):
    model = copied(house, tmp_path)
    path = model / "tokenizer.model"
    make(kind, path)
    said = {
        "dangling link": "is a link to nowhere, which is not there; put the file there, or remove",
        "LFS pointer": "is a Git LFS pointer, .*`git lfs pull`",
    }.get(kind, f"not a regular file but a {kind}")
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: {said}"):
        grok1.load(model, progress=False)


@pytest.mark.parametrize("name", ["config.json", "ckpt-0/tensor00003_000"])
def test_pointers_of_git_lfs_are_told(name, house, tmp_path):
    model = copied(house, tmp_path)
    make("LFS pointer", model / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a Git LFS pointer, ") as caught:
        grok1.load(model, progress=False)
    assert caught.value.kind == "pointer"


def test_a_tokenizer_of_another_size_is_refused_before_any_tensor_is_opened(house, tmp_path):
    model = copied(house, tmp_path)
    make("pipe", model / "ckpt-0" / "tensor00003_000")
    shutil.copy(bundled.tokenizer(), model / "tokenizer.model")
    for options in (
        {},
        {"tokenizer": bundled.tokenizer()},
        {"tokenizer": grok1.Tokenizer.load(bundled.tokenizer())},
    ):
        with pytest.raises(
            ValueError, match="the tokenizer has 131072 pieces, the model's vocabulary 128"
        ):
            grok1.load(model, progress=False, **options)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"num_layers": 2}, True),
        ({"vocab_size": 1280}, False),
        ({"emb_size": 64}, False),
    ],
)
def test_released_weights_take_the_tokenizer_of_the_library(change, found, tmp_path):
    config = dataclasses.replace(GROK_1, **change)
    assert tokenizer_path(tmp_path, config) == (bundled.tokenizer() if found else None)
    (tmp_path / "tokenizer.model").symlink_to("nowhere")
    assert tokenizer_path(tmp_path, config) == tmp_path / "tokenizer.model"


@pytest.mark.parametrize("mesh", [8, 1.5, "8", (8,), {1: 2}])
def test_a_mesh_that_is_none_is_refused(mesh, house):
    with pytest.raises(
        ValueError, match=r"^mesh must be two sizes above 0, \(data, model\), as 1x8"
    ):
        grok1.load(house / "models" / "nano", mesh=mesh, progress=False)


@pytest.mark.parametrize("config", [{}, None, "toy"])
def test_a_configuration_that_is_none_is_refused(config):
    with pytest.raises(TypeError, match=r"^config must be a ModelConfig, such as grok1.TOY, found"):
        grok1.random_model(config)


def copied(house: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The nano checkpoint by links, to change some."""
    model = tmp_path / "model"
    (model / "ckpt-0").mkdir(parents=True)
    source = (house / "models" / "nano" / "ckpt-0").resolve()
    for name in os.listdir(source):
        (model / "ckpt-0" / name).symlink_to(source / name)
    shutil.copy(house / "models" / "nano" / "config.json", model)
    return model


def make(kind: str, path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "dangling link":
            path.symlink_to("nowhere")
        case "LFS pointer":
            path.write_bytes(POINTER)
