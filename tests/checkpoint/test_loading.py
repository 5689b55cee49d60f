"""Checkpoints to devices and back: every shard its slice, every byte returned."""

import gc
import io
import os
import pathlib
import re
import shutil
import sys
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest

import grok1
from grok1.checkpoint import carrying, loading, native
from grok1.checkpoint.tensor_file import read_header, read_span, write_tensor
from grok1.nn.manifest import file_name, manifest
from tests.helpers import covered_by_a_mesh, dequantized, named_params, relative_error, slow
from tests.one_device import within


@pytest.mark.parametrize(
    "mesh", [(1, 1), (2, 4), (1, 16)], ids=lambda mesh: "x".join(map(str, mesh))
)
def test_the_loaded_model_holds_exactly_the_files(mesh, nano_path, nano_config):
    model = grok1.load(nano_path, mesh=mesh, progress=False)
    named = named_params(model)
    for index, spec in enumerate(manifest(nano_config)):
        header = read_header(nano_path / "ckpt-0" / file_name(index))
        module, _, parameter = spec.name.rpartition("/")
        leaf = named[module][parameter]
        values = leaf if header.scales is None else leaf.values
        np.testing.assert_array_equal(values, read_span(header, header.values))
        if header.scales is not None:
            np.testing.assert_array_equal(leaf.scales, read_span(header, header.scales))


@pytest.mark.devices(8)
def test_each_device_holds_its_shard_only(nano_path):
    model = grok1.load(nano_path, mesh=(1, 8), progress=False)
    gate = model.params.layers.experts.gate.values
    assert gate.shape == (12, 8, 64, 128)
    assert {shard.data.shape for shard in gate.addressable_shards} == {(12, 8, 64, 16)}
    shards = [shard for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards]
    on_first = sum(s.data.nbytes for s in shards if s.device == model.mesh.devices[0, 0])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert on_first < whole / 8 * 1.1  # norms, routers and the scales of whole rows are on all


@pytest.mark.parametrize("is_pinned", [True, False])
def test_building_the_shard_on_the_device_gives_the_same(is_pinned, nano_path, nano, monkeypatch):
    monkeypatch.setattr(loading, "copier_of", lambda device: None)
    monkeypatch.setattr(carrying, "has_pinned_memory", lambda device: is_pinned)
    monkeypatch.setattr(loading, "_adopts_memory", lambda device: False)
    monkeypatch.setattr(loading, "_MOST_IN_HOST", 1 << 12)  # norms alone
    monkeypatch.setattr(carrying, "_STAGING_BYTES", 1 << 17)  # several pieces a layer
    built = grok1.load(nano_path, mesh=within((1, 2)), progress=False)
    for found, expected in zip(
        jax.tree.leaves(named_params(built)), jax.tree.leaves(named_params(nano)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_arrays_are_filled_where_they_were_first_made(nano_path, monkeypatch):
    # Else a device needs room for two of an array, for a while: on eight devices the embedding is
    # by far the largest.
    made, compiled = set(), carrying.compiled_empty

    def watched(*arguments):
        program = compiled(*arguments)

        def empty():
            array = program()
            made.add(array.unsafe_buffer_pointer())
            return array

        return empty

    monkeypatch.setattr(carrying, "compiled_empty", watched)
    monkeypatch.setattr(loading, "_adopts_memory", lambda device: False)
    monkeypatch.setattr(loading, "_MOST_IN_HOST", 1 << 12)
    model = grok1.load(nano_path, mesh=within((1, 2)), progress=False)
    leaves = [leaf for leaf in jax.tree.leaves(model.params) if leaf.nbytes > 1 << 13]
    carried = [leaf for leaf in leaves if leaf.dtype in (np.int8, np.float32)]
    assert any(leaf is model.params.embedding for leaf in carried)
    for leaf in carried:
        for shard in leaf.addressable_shards:
            assert shard.data.unsafe_buffer_pointer() in made, leaf.shape


def test_some_layers_are_the_first_ones(nano, nano_path):
    model = grok1.load(nano_path, mesh=within((1, 2)), progress=False, layers=11)
    assert model.config.num_layers == 11
    found, expected = named_params(model), named_params(nano)
    # By name: as text, layer 10 comes before layer 2.
    assert found.keys() == {name for name in expected if "layer_11" not in name}
    for name, module in found.items():
        for part, whole in zip(
            jax.tree.leaves(module), jax.tree.leaves(expected[name]), strict=True
        ):
            np.testing.assert_array_equal(part, whole)
    assert np.isfinite(model.logits([1, 2, 3])).all()
    with pytest.raises(ValueError, match="layers must be from 1 to 12, found 13"):
        grok1.load(nano_path, layers=13)


def test_a_file_that_vanishes_while_loading_is_an_error(nano_path, tmp_path, monkeypatch):
    shutil.copytree(nano_path, tmp_path / "nano")
    fill = loading._fill_host

    def remove_and_fill(*arguments):
        (tmp_path / "nano" / "ckpt-0" / file_name(50)).unlink(missing_ok=True)
        return fill(*arguments)

    monkeypatch.setattr(loading, "_fill_host", remove_and_fill)
    with pytest.raises(grok1.CheckpointError, match="tensor00050_000: cannot be read: No such"):
        grok1.load(tmp_path / "nano", mesh=within((1, 2)), progress=False)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_load_that_fails_leaves_no_buffers_to_its_traceback(error, nano_path, monkeypatch):
    aligned, preadv, held = loading._aligned, os.preadv, []

    def watched(*arguments):
        buffer = aligned(*arguments)
        held.append(weakref.ref(buffer.base))
        return buffer

    def fail(*arguments):
        if len(held) > 5:
            raise error(5, "failed")
        return preadv(*arguments)

    monkeypatch.setattr(loading, "_aligned", watched)
    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(native, "is_available", lambda: False)
    with pytest.raises((grok1.CheckpointError, KeyboardInterrupt)) as caught:
        grok1.load(nano_path, mesh=within((1, 2)), progress=False)
    gc.collect()
    assert caught.tb is not None
    assert held
    assert [reference for reference in held if reference() is not None] == []


def test_saving_returns_every_file_byte_for_byte(nano_path, nano_config, tmp_path):
    # 16 devices: the scale groups in memory are finer than the file's.
    model = grok1.load(nano_path, mesh=within((1, 16)), progress=False)
    grok1.save(model, tmp_path / "copy")
    for index in range(len(manifest(nano_config))):
        copied = tmp_path / "copy" / "ckpt-0" / file_name(index)
        assert copied.read_bytes() == (nano_path / "ckpt-0" / file_name(index)).read_bytes()
    assert grok1.ModelConfig.load(tmp_path / "copy" / "config.json") == nano_config


def test_float_weights_load_and_run(nano, nano_path, nano_reference, tmp_path):
    (tmp_path / "ckpt-0").mkdir()
    shutil.copy(nano_path / "config.json", tmp_path)
    named = named_params(nano)
    for index, spec in enumerate(nano.tensors):
        module, _, parameter = spec.name.rpartition("/")
        values = dequantized(named[module][parameter])
        write_tensor(tmp_path / "ckpt-0" / file_name(index), values)
    model = grok1.load(tmp_path, mesh=within((1, 2)), dtype="float32", progress=False)
    logits = model.logits(nano_reference["tokens"])
    assert relative_error(logits, nano_reference["logits_f64"]) <= 2e-5


def spoil(nano_path, tmp_path, name, value) -> pathlib.Path:
    """A checkpoint by links, but for the last element of one tensor or of its scales."""
    (tmp_path / "ckpt-0").mkdir()
    for path in (nano_path / "ckpt-0").iterdir():
        (tmp_path / "ckpt-0" / path.name).symlink_to(path)
    shutil.copy(nano_path / "config.json", tmp_path)
    specs = manifest(grok1.ModelConfig.load(nano_path / "config.json"))
    index = next(i for i, spec in enumerate(specs) if spec.name.endswith(name))
    path = tmp_path / "ckpt-0" / file_name(index)
    header = read_header(path)
    values, scales = read_span(header, header.values), None
    if header.scales is None:
        values.reshape(-1)[-1] = float(value)
    else:
        scales = read_span(header, header.scales)
        scales.reshape(-1)[-1] = float(value)
    path.unlink()
    write_tensor(path, values, scales)
    return path


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "layer_3/rms_norm_2/scale",
            "nan",
            "NAME: 1 of 64 values are not finite, the first is",
        ),
        (
            "language_model/rms_norm/scale",
            "inf",
            r"NAME: 1 of 64 values are .* is inf at \[63\]",
        ),
        ("layer_7/router/w", "-inf", r"NAME: 1 of \d+ values are not finite, .* -inf at \[63, 7\]"),
        ("embeddings", "nan", r"NAME: 1 of \d+ values are not finite, .* nan at \[127, 63\]"),
        (
            "layer_2/moe/linear_1/w",
            "nan",
            "1 of .* scales are not finite, or .* the first is nan at",
        ),
        (
            "layer_2/multi_head_attention/key/w",
            "inf",
            "1 of .* scales are not finite, or above",
        ),
        ("layer_0/moe/linear/w", "1e29", "1 of .* scales are not finite, or above 1,048,576, the"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=slow), {"mesh": within((2, 4)), "embedding_dtype": "bfloat16"}],
)
def test_weights_that_are_not_finite_are_named(name, value, message, options, nano_path, tmp_path):
    path = spoil(nano_path, tmp_path, name, value)
    message = message.replace("NAME", rf"\S*{name}")
    with pytest.raises(grok1.CheckpointError, match=f"^{path}: {message}"):
        grok1.load(tmp_path, progress=False, **({"mesh": (1, 1)} | options))


def test_what_is_not_finite_in_a_piece_is_named_by_its_place_in_the_tensor(
    nano_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "_adopts_memory", lambda device: False)
    monkeypatch.setattr(loading, "_MOST_IN_HOST", 0)
    monkeypatch.setattr(carrying, "_STAGING_BYTES", 1 << 16)
    path = spoil(nano_path, tmp_path, "embeddings", "nan")
    with pytest.raises(grok1.CheckpointError, match=rf"^{path}: .* nan at \[127, 63\]"):
        grok1.load(tmp_path, progress=False, mesh=within((1, 2)))


@pytest.mark.parametrize("name", ["layer_3/rms_norm_2/scale", "layer_7/router/w", "embeddings"])
def test_weights_that_are_not_finite_are_named_where_experts_stay_on_disk(
    name, nano_path, tmp_path
):
    path = spoil(nano_path, tmp_path, name, "nan")
    with pytest.raises(grok1.CheckpointError, match=rf"^{path}: \S*{name}: 1 of"):
        grok1.load(tmp_path, mesh=(1, 1), offload="disk", progress=False)


def test_no_config_means_grok_1(nano_path, tmp_path):
    shutil.copytree(nano_path / "ckpt-0", tmp_path / "ckpt-0")
    with pytest.raises(grok1.CheckpointError, match=r"config\.json"):
        grok1.load(tmp_path, progress=False)


def test_a_missing_checkpoint_says_where_to_get_it(tmp_path):
    with pytest.raises(grok1.CheckpointError, match=r"xai-org/grok-1.*ckpt-0.*bundled \"toy\""):
        grok1.load(tmp_path, progress=False)


def test_progress_is_quiet_when_stderr_is_no_terminal(nano_path, capfd):
    grok1.load(nano_path, mesh=(1, 1))
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_bytes_rate_and_time(nano_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    grok1.load(nano_path, mesh=(1, 1))
    last = sys.stderr.getvalue().split("\r")[-1]
    assert re.search(r"loading: 100%.* 2\.89M/2\.89M \[00:\d\d<00:\d\d, .*B/s\]", last)


@pytest.mark.parametrize("mesh", [pytest.param((1, 1), marks=covered_by_a_mesh), (2, 4)])
def test_the_embedding_is_halved_if_asked(mesh, nano, nano_path, nano_reference, tmp_path):
    model = grok1.load(
        nano_path, mesh=mesh, dtype="float32", embedding_dtype="bfloat16", progress=False
    )
    embedding = np.asarray(nano.params.embedding)
    rounded = embedding.astype(ml_dtypes.bfloat16)
    assert np.array_equal(np.asarray(model.params.embedding), rounded)

    table = jax.device_put(rounded.astype(np.float32), nano.params.embedding.sharding)
    float_params = nano.params._replace(embedding=table)
    expected = grok1.Model(float_params, nano.config, nano.mesh, "float32", nano.tensors)
    tokens = nano_reference["tokens"]
    assert relative_error(model.logits(tokens), expected.logits(tokens)) <= 2e-5
    if mesh == (1, 1):
        options = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        wanted = expected.generate([1, 2, 3, 4], **options)
        assert model.generate([1, 2, 3, 4], **options).tokens == wanted.tokens

        grok1.save(model, tmp_path / "saved")
        again = grok1.load(tmp_path / "saved", mesh=(1, 1), progress=False)
        assert np.array_equal(np.asarray(again.params.embedding), rounded.astype(np.float32))


def test_an_embedding_of_another_type_is_refused(nano_path):
    with pytest.raises(ValueError, match='embedding_dtype must be "float32" or "bfloat16"'):
        grok1.load(nano_path, embedding_dtype="int8", progress=False)
