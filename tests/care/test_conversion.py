"""Conversions: exact, atomic, and clear when refused."""

import io
import json
import os
import pathlib
import re
import shutil
import sys

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest

import grok1
from grok1 import __main__, bundled
from grok1.care import inspection, staging
from grok1.care.conversion import convert
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.checkpoint.storage import read_matrix
from grok1.checkpoint.tensor_file import DTYPES, read_header, read_span, write_tensor
from grok1.files import CheckpointError
from grok1.machine.cache_directory import private_directory
from tests.care.helpers import released
from tests.conftest import GOLDEN, TOY
from tests.helpers import dequantized, named_params, relative_error

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


def test_each_pass_over_the_files_is_shown_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    convert(TOY, tmp_path / "out", to="safetensors")
    ends = re.findall(r"(\w+): 100%[^\r]*?([\d.]+[kM])/\2 ", sys.stderr.getvalue())
    assert list(dict(ends)) == ["checking", "writing", "verifying"]
    sizes = dict(ends)
    assert sizes["checking"] != sizes["writing"] == sizes["verifying"]


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
    message = r"safetensors: the experts are bfloat16, and only quantised .* with offload='none'$"
    with pytest.raises(ValueError, match=message):
        grok1.load(tmp_path / "bf", mesh=(1, 1), offload="disk", progress=False)
    convert(tmp_path / "bf", tmp_path / "floats", to="grok1", progress=False)
    again = grok1.load(tmp_path / "floats", mesh=(1, 1), dtype="float32", progress=False)
    assert relative_error(again.logits(tokens), loaded.logits(tokens)) < 1e-5


EXPERTS = "transformer/decoder_layer_2/moe/linear_1/w"


def spoil(directory: pathlib.Path, name: str, part: str) -> pathlib.Path:
    """Makes the last element of a tensor's array no number; returns the file it is in."""
    stored = open_tensors(directory, load_config(directory))
    (tensor,) = (t for t, s in zip(stored.tensors, stored.specs, strict=True) if s.name == name)
    file, span = getattr(tensor, part).parts[-1]
    dtype = DTYPES[span.dtype]
    with open(file.path, "r+b") as opened:
        opened.seek(span.offset + span.nbytes - dtype.itemsize)
        opened.write(np.array(np.nan, dtype).tobytes())
    return file.path


@pytest.mark.parametrize(
    ("name", "part", "options"),
    [
        (EXPERTS, "scales", {"to": "grok1"}),
        (EXPERTS, "scales", {"to": "safetensors", "dtype": "bfloat16"}),
        (EXPERTS, "scales", {"to": "int4"}),
        (EXPERTS, "scales", {"to": "gguf"}),
        ("transformer/decoder_layer_0/multi_head_attention/key/w", "scales", {"to": "gguf"}),
        ("language_model/rms_norm/scale", "values", {"to": "gguf"}),
        ("transformer/decoder_layer_5/router/w", "values", {"to": "safetensors"}),
        ("language_model/in_out_embed/embeddings", "values", {"to": "int4"}),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value[-12:],
)
@pytest.mark.parametrize("source", ["grok1", "safetensors"])
def test_what_load_refuses_is_not_converted(source, name, part, options, toy_safetensors, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(toy_safetensors if source == "safetensors" else TOY, damaged)
    path = spoil(damaged, name, part)
    with pytest.raises(CheckpointError, match="are not finite") as refused:
        grok1.load(damaged, mesh=(1, 1), progress=False)
    with pytest.raises(CheckpointError) as caught:
        convert(damaged, tmp_path / "out", progress=False, **options)
    assert caught.value.path == path
    # How many there are is told of all that one has read at a time.
    problems = [re.sub(r"\d+ of \d+ ", "", error.value.problem) for error in (caught, refused)]
    assert problems[0] == problems[1]
    assert os.listdir(tmp_path) == ["damaged"]


@pytest.mark.parametrize(("made", "part"), [("bfloat16", "values"), ("int4", "scales")])
def test_experts_that_are_no_numbers_are_not_rounded(made, part, tmp_path):
    damaged = tmp_path / "damaged"
    options = {"to": "int4"} if made == "int4" else {"to": "safetensors", "dtype": made}
    convert(TOY, damaged, progress=False, **options)
    path = spoil(damaged, EXPERTS, part)
    to = {"to": "safetensors", "dtype": "bfloat16"} if made == "int4" else {"to": "int4"}
    with pytest.raises(CheckpointError, match=r"not finite.* is nan at \[7, \d+, \d+\]") as caught:
        convert(damaged, tmp_path / "out", progress=False, **to)
    assert caught.value.path == path
    assert not (tmp_path / "out").exists()


def test_too_small_a_disk_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointError, match=r"4,\d+,\d+ bytes are still to be written and the disk has 1,000 fr"
    ):
        convert(TOY, tmp_path / "new" / "out", to="grok1", progress=False)
    assert not os.listdir(tmp_path)


def test_names_that_are_not_utf_8_are_taken(tmp_path, capfd):
    odd = tmp_path / os.fsdecode(b"caf\xe9\nnew")
    try:
        convert(TOY, odd / "model", to="safetensors", progress=False)
    except OSError as error:  # a file system may know better
        pytest.skip(str(error))
    (odd / "model").rename(odd / os.fsdecode(b"\xff"))
    convert(odd / os.fsdecode(b"\xff"), odd / "a.gguf", to="gguf", progress=False)
    assert gguf.GGUFReader(odd / "a.gguf").fields["general.name"].contents() == "?"


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


def test_a_name_that_is_too_long_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        convert(TOY, tmp_path / ("n" * 256), to="grok1", progress=False)
    assert not os.listdir(tmp_path)


def test_a_current_directory_that_is_gone_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        convert(TOY, "out", to="grok1", progress=False)
    assert caught.value.filename == "out"
    assert caught.value.strerror == (
        "the current directory has been removed; give a path from the root"
    )


def test_where_a_disk_is_mounted_nothing_is_written_beside_it(own_cache, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    is_mount = os.path.ismount
    monkeypatch.setattr(
        os.path, "ismount", lambda path: path == tmp_path / "disk" or is_mount(path)
    )
    with pytest.raises(CheckpointError, match="disk: is where a disk is mounted"):
        convert(TOY, tmp_path / "disk", to="grok1", progress=False)
    assert os.listdir(tmp_path) == ["disk"]
    assert not list(private_directory().glob("convert-*")), "notes of nothing"


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


def test_a_float_source_cannot_be_int8(tmp_path):
    source = tmp_path / "floats"
    convert(TOY, tmp_path / "bf", to="safetensors", dtype="bfloat16", progress=False)
    convert(tmp_path / "bf", source, to="grok1", progress=False)
    assert read_header(source / "ckpt-0" / "tensor00002_000").scales is None
    with pytest.raises(CheckpointError, match="int8 was asked for; convert the released files"):
        convert(source, tmp_path / "out", to="safetensors", dtype="int8", progress=False)
    with pytest.raises(CheckpointError, match="its weights are bfloat16, and int8 was asked for"):
        convert(tmp_path / "bf", tmp_path / "out", to="safetensors", dtype="int8", progress=False)
