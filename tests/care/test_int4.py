"""A model with 4-bit experts: made, checked, loaded on meshes and out of core, or refused."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from grok1.care import inspection, int4_card, rounding, verification
from grok1.care.conversion import convert
from grok1.care.rounding import Calibrated, Rounding
from grok1.checkpoint import mapping
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.checkpoint.safetensors_file import read_shard_header
from grok1.checkpoint.storage import matrix_as_float32
from grok1.command.main import main
from grok1.files import CheckpointError
from grok1.nn.manifest import with_int4_experts
from grok1.nn.sharding import abstract_mesh
from grok1.nn.transformer import forward
from grok1.planning.memory import abstract_engine, one_layer, released_weights, shard_bytes
from tests.care.helpers import rewrite_header
from tests.helpers import relative_error, slow

pytest.importorskip("safetensors")
TOKENS = np.arange(1, 40) * 7 % 128


@pytest.fixture(scope="module")
def int4_path(nano_path, tmp_path_factory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("int4") / "nano"
    assert convert(nano_path, target, to="int4", progress=False) == []
    return target


@pytest.fixture(scope="module")
def three_layers(nano_path, tmp_path_factory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("three") / "nano"
    grok1.save(grok1.load(nano_path, layers=3, mesh=(1, 1), progress=False), target)
    return target


@pytest.fixture(scope="module")
def logits(int4_path) -> np.ndarray:
    return grok1.load(int4_path, mesh=(1, 1), progress=False).logits(TOKENS)


def test_what_is_written_is_near_the_source_and_described(int4_path, nano_path):
    config = load_config(nano_path)
    before, after = open_tensors(nano_path, config), open_tensors(int4_path, config)
    for tensor, rounded, spec in zip(before.tensors, after.tensors, after.specs, strict=True):
        if len(spec.shape) < 3:
            assert spec.dtype in ("float32", "int8")
            continue
        assert spec.dtype == "int4"
        error = relative_error(matrix_as_float32(rounded, 5), matrix_as_float32(tensor, 5))
        assert 0.03 < error < 0.09
    card = json.loads((int4_path / "quantization.json").read_text())
    assert card["format"] == "grok1-int4"
    assert card["experts"]["linear"] == {"rows_of_block": 64, "rows_of_group": 32}
    assert card["source"]["experts"] == "int8"
    assert len(card["source"]["sha256_of_samples"]) == len(before.tensors)


def test_verify_and_inspect(int4_path, nano_path):
    assert verification.verify(int4_path, deep=True, progress=False).is_good
    rounded, before = (inspection.inspect(path, full=True) for path in (int4_path, nano_path))
    for one, other in zip(rounded.tensors, before.tensors, strict=True):
        assert one.rms == pytest.approx(other.rms, rel=0.01)
        assert (one.dtype == "int4") == (len(one.shape) == 3)
    assert sum(rounded.num_bytes.values()) < sum(before.num_bytes.values())
    sampled = inspection.inspect(int4_path, layer=3)
    for one in sampled.tensors:
        assert one.rms == pytest.approx(
            next(t.rms for t in rounded.tensors if t.name == one.name), rel=0.2
        )


def test_the_model_is_that_of_the_weights_that_it_stands_for(int4_path):
    model = grok1.load(int4_path, mesh=(1, 1), layers=2, progress=False)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], model.params.layers) for i in range(2)]
    compiled = jax.jit(forward, static_argnames="config")
    expected, _ = compiled(
        model.params._replace(layers=layers), model.config, jnp.asarray(TOKENS[None])
    )
    assert relative_error(model.logits(TOKENS), expected[0]) < 1e-5


@pytest.mark.parametrize(
    ("part", "old", "new", "found"),
    [
        ("", "[32,128]", "[128,32]", "uint8[128,32], expected uint8[32,128]"),
        ("_subscale", "[6,128]", "[3,256]", "uint8[3,256], expected uint8[6,128]"),
        ("_scale", "[1,128]", "[128,1]", "float16[128,1], expected float16[B,128]"),
        ("_scale", "F16", "BF16", "bfloat16[1,128], expected float16[B,128]"),
    ],
)
def test_a_part_of_another_shape_or_type_is_named(part, old, new, found, int4_path, tmp_path):
    copy = pathlib.Path(shutil.copytree(int4_path, tmp_path / "copy"))
    shard = sorted(copy.glob("model-*"))[2]
    name = b"model.layers.1.moe_block.experts.5.linear.weight"

    def change(text):
        own = re.search(rb'"%s":\{[^}]*\}' % (name + part.encode()), text)[0]
        return text.replace(own, own.replace(old.encode(), new.encode()))

    rewrite_header(shard, change)
    (fault,) = verification.verify(copy, progress=False).faults
    assert fault.path == shard.name
    assert f"linear.weight{part} is {found} for 4-bit weights of 64 rows" in fault.problem
    with pytest.raises(grok1.CheckpointError, match=rf"{shard.name}: .*{re.escape(found)}"):
        grok1.load(copy, mesh=(1, 1), progress=False)


@pytest.mark.parametrize("mesh", [(1, 8), pytest.param((2, 2), marks=slow)])
def test_meshes(mesh, int4_path, logits):
    found = grok1.load(int4_path, mesh=mesh, progress=False).logits(TOKENS)
    assert relative_error(found, logits) < 1e-4


def test_experts_that_stay_on_disk(int4_path, logits):
    model = grok1.load(int4_path, mesh=(1, 1), offload="disk", memory="4GB", progress=False)
    assert relative_error(model.logits(TOKENS), logits) < 1e-6
    stats = model.offload_stats
    assert stats is not None
    assert stats.prompt.bytes_read > 0
    assert len(model.generate(TOKENS[:4].tolist(), max_new_tokens=3, ignore_eos=True).tokens) == 3


def test_converted_again_and_to_other_formats(int4_path, tmp_path):
    convert(int4_path, tmp_path / "st", to="safetensors", progress=False)
    for name in ("model-00003-of-00013.safetensors", "config.json"):
        assert (tmp_path / "st" / name).read_bytes() == (int4_path / name).read_bytes()
    with pytest.raises(grok1.CheckpointError, match="its experts are 4-bit, which Grok-1's own"):
        convert(int4_path, tmp_path / "own", to="grok1", progress=False)
    with pytest.raises(grok1.CheckpointError, match="its experts are 4-bit already"):
        convert(int4_path, tmp_path / "again", to="int4", progress=False)
    with pytest.raises(ValueError, match="int4 says what the experts become"):
        convert(int4_path, tmp_path / "again", to="int4", dtype="int8", progress=False)
    model = grok1.load(int4_path, layers=1, mesh=(1, 1), progress=False)
    with pytest.raises(ValueError, match="has no 4-bit experts; copy the model's files"):
        grok1.save(model, tmp_path / "saved")


@pytest.mark.parametrize("fault", ["scale", "type", "hole"])
def test_what_is_wrong_is_said(fault, int4_path, tmp_path):
    for path in int4_path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    shard = tmp_path / "model-00002-of-00013.safetensors"
    data = bytearray(shard.read_bytes())
    name = "model.layers.0.moe_block.experts.2.linear_1.weight"
    spans = read_shard_header(shard).spans
    if fault == "scale":
        offset = spans[f"{name}_scale"].offset
        data[offset + 20 : offset + 22] = np.float16("inf").tobytes()
        said = f"scales of {name}_scale are not finite"
    elif fault == "hole":
        span = spans[name]
        data[span.offset : span.offset + span.nbytes] = bytes(span.nbytes)
        said = "in whole blocks are zero"
    else:
        data = data.replace(b'"dtype":"F16"', b'"dtype":"U16"', 1)
        said = "its header has 'U16'"
    shard.unlink()
    shard.write_bytes(data)
    report = verification.verify(tmp_path, deep=True, sums_file=tmp_path / "s", progress=False)
    if fault == "hole":  # smaller than a block that a download leaves out
        assert report.is_good
        return
    assert [said in each.problem for each in report.faults] == [True]


@pytest.mark.parametrize("is_mapped", [True, False])
def test_a_scale_that_is_no_number_is_an_error_where_experts_stay_on_disk(
    is_mapped, int4_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(mapping, "is_available", lambda: is_mapped)
    shutil.copytree(int4_path, tmp_path / "model")
    path = tmp_path / "model" / "model-00002-of-00013.safetensors"
    name = "model.layers.0.moe_block.experts.2.linear_1.weight_scale"
    offset = read_shard_header(path).spans[name].offset
    data = bytearray(path.read_bytes())
    data[offset + 20 : offset + 22] = np.float16("nan").tobytes()
    path.write_bytes(data)
    for room in "disk", "host":
        model = grok1.load(tmp_path / "model", mesh=(1, 1), offload=room, progress=False)
        for _ in range(2):
            with pytest.raises(CheckpointError) as caught:
                model.logits(TOKENS)
            assert caught.value.path == path
            assert "scales are not finite" in caught.value.problem
            assert caught.value.problem.endswith("the first is nan at [2, 0, 10]")


@pytest.mark.parametrize(("count", "each"), [(4, 43.6e9), (2, 87e9)])
def test_the_released_model_takes_174_gb_on_four_devices_and_on_two(count, each):
    specs = with_int4_experts(one_layer(grok1.GROK_1))
    weights = released_weights(grok1.GROK_1, specs)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights)) <= 174e9
    engine = abstract_engine(weights, grok1.GROK_1, abstract_mesh((1, count)), "bfloat16")
    assert shard_bytes(engine.params) <= each


def test_plan_says_what_weights_there_are():
    with pytest.raises(ValueError, match="weights must be one of int8, int4, found 'int3'"):
        grok1.plan(grok1.TOY, devices=1, device="cpu", memory=1, weights="int3")


@pytest.mark.parametrize("text", [None, np.random.default_rng(3).integers(0, 128, 200).tolist()])
def test_an_interrupted_conversion_ends_with_the_same_bytes(
    text, three_layers, tmp_path, monkeypatch
):
    options: dict = {"to": "int4" if text is None else Calibrated(text), "progress": False}
    source = three_layers
    notes = convert(source, tmp_path / "whole", **options)
    assert (len(notes) == 1) == (text is not None)
    made = Rounding._make

    def stop_after(count):
        left = iter(range(count))

        def make(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return made(*arguments)

        monkeypatch.setattr(Rounding, "_make", make)

    for count in (0, 7, 30):
        stop_after(count)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "stopped", **options)
    stop_after(1000)
    assert convert(source, tmp_path / "stopped", **options) == notes
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "stopped").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "stopped" / name
        ).read_bytes()
    card = json.loads((tmp_path / "whole" / "quantization.json").read_text())
    if text is None:
        assert notes == []
        errors = card["loss"]["relative_error_of_weights"]
        assert all(0.05 < error < 0.08 for of_layer in errors.values() for error in of_layer)
        return
    # The places of 200 tokens, two each, are not 64 for each of eight experts.
    few = card["loss"]["fell_back_layer_expert_tokens"]
    assert f"{len(few)} experts were rounded without the text" in notes[0]
    assert 0 < len(few) < 24
    assert all(tokens < 64 for _, _, tokens in few)
    assert card["calibration"]["tokens"] == 200
    assert {len(of_layer) for of_layer in card["loss"]["relative_error_of_products"].values()} == {
        3
    }


def test_calibration_loses_less_of_its_text(nano_path, tmp_path):
    text = np.random.default_rng(3).integers(1, 128, 3000).tolist()
    model = grok1.load(nano_path, layers=1, mesh=(1, 1), progress=False)
    grok1.save(model, tmp_path / "one")
    exact = model.logits(text[:90])
    losses = []
    for name, to in (("plain", "int4"), ("calibrated", Calibrated(text))):
        convert(tmp_path / "one", tmp_path / name, to=to, progress=False)
        rounded = grok1.load(tmp_path / name, mesh=(1, 1), progress=False)
        losses.append(relative_error(rounded.logits(text[:90]), exact))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("calibrate", "said"),
    [
        ([], "the text to calibrate with has no tokens"),
        ([5, 128], "token ids must be from 0 to 127, found 5 to 128"),
        ("words", "there is no tokenizer.model to read the text with"),
    ],
)
def test_a_text_that_cannot_calibrate(calibrate, said, nano_path, tmp_path):
    with pytest.raises(ValueError, match=said):
        convert(nano_path, tmp_path / "a", to=Calibrated(calibrate), progress=False)


def test_calibration_that_does_not_fit(nano_path, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "host_bytes_available", lambda: 10**6)
    with pytest.raises(ValueError, match=r"with 600 tokens takes .* are available; give a shorter"):
        convert(nano_path, tmp_path / "a", to=Calibrated([1, 2, 3] * 200), progress=False)


def test_only_int4_is_calibrated(nano_path, tmp_path, capsys):
    options = "--to", "safetensors", "--calibrate", str(tmp_path / "text")
    assert main(["convert", str(nano_path), str(tmp_path / "a"), *options]) == 1
    assert "--calibrate is for --to int4" in capsys.readouterr().err


@pytest.mark.skipif(not pathlib.Path("/proc/self/mem").exists(), reason="no /proc/self/mem here")
def test_a_source_that_cannot_be_read_is_named(nano_copy):
    tensors, _ = open_tensors(nano_copy, load_config(nano_copy))
    path = nano_copy / "ckpt-0" / "tensor00002_000"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # nothing is mapped at its beginning
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as caught:
        int4_card._digests(tensors)
    assert caught.value.path == path


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path):
    record = int4_card.Record()
    record.keep_in(tmp_path)
    record.add(0, "linear", 0, 0.07, None, False)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '\n[0, "linear", 1, 0.0')
    for expert, error in ((1, 0.09), (2, 0.08)):
        again = int4_card.Record()
        again.keep_in(tmp_path)
        again.add(0, "linear", expert, error, None, False)
    last = int4_card.Record()
    last.keep_in(tmp_path)
    assert last.errors() == {"linear": [0.08]}
