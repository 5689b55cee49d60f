"""Inspection: the table, its totals and its statistics."""

import json
import subprocess
import sys

import numpy as np
import pytest

from grok1 import __main__
from grok1.care import inspection
from grok1.care.conversion import convert
from grok1.ops.quantized import QuantizedArray
from tests.helpers import dequantized, named_params


def test_statistics_are_those_of_the_weights(nano_path, nano):
    report = inspection.inspect(nano_path, full=True)
    assert len(report.tensors) == 146
    named = named_params(nano)
    for tensor in report.tensors:
        module, _, parameter = tensor.name.rpartition("/")
        leaf = named[module][parameter]
        exact = np.asarray(dequantized(leaf), np.float64)
        assert tensor.rms == pytest.approx(np.sqrt(np.mean(exact**2)), rel=1e-9)
        if tensor.scales_shape:
            assert tensor.smallest_scale == float(leaf.scales.min())
            assert tensor.largest_scale == float(leaf.scales.max())
    assert report.num_weights == sum(np.prod(tensor.shape) for tensor in report.tensors)
    assert sum(report.num_bytes.values()) == sum(tensor.num_bytes for tensor in report.tensors)


def test_a_sample_is_near_and_the_same_for_both_formats(nano_path, tmp_path):
    convert(nano_path, tmp_path / "st", to="safetensors", progress=False)
    full = inspection.inspect(nano_path, full=True).tensors
    sampled = inspection.inspect(nano_path).tensors
    transposed = inspection.inspect(tmp_path / "st", full=True).tensors
    for exact, near, other in zip(full, sampled, transposed, strict=True):
        assert near.rms == pytest.approx(exact.rms, rel=0.3)
        assert other.rms == pytest.approx(exact.rms, rel=1e-9)


def test_the_command_shows_one_layer(nano_path, capsys):
    assert __main__.main(["inspect", str(nano_path), "--layer", "10", "--full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 12 + 1 + 2
    assert "tensor00026_000  transformer/decoder_layer_10/moe/linear/w" in lines[1]
    assert "int8[8,64,128]" in lines[1]
    assert lines[13].startswith("12 tensors, ")
    assert lines[14].split() == ["layer", "attention", "experts", "router", "scale", "range"]
    assert lines[15].split()[0] == "10"


def test_layers_have_a_line_each_in_their_order(nano_path, nano):
    report = inspection.inspect(nano_path, full=True)
    lines = report.lines()[-12:]
    assert [int(line.split()[0]) for line in lines] == list(range(12))
    assert [layer["layer"] for layer in report.to_dict()["layers"]] == list(range(12))
    named, layer = named_params(nano), report.layers[11]
    attention = named_params_of(named, "transformer/decoder_layer_11/multi_head_attention/")
    joined = np.concatenate([np.ravel(dequantized(leaf)) for leaf in attention]).astype(np.float64)
    assert layer.attention_rms == pytest.approx(np.sqrt(np.mean(joined**2)), rel=1e-6)
    scales = [
        np.asarray(leaf.scales, np.float32)
        for leaf in named_params_of(named, "transformer/decoder_layer_11/")
        if isinstance(leaf, QuantizedArray)
    ]
    assert layer.smallest_scale == min(part.min() for part in scales)
    assert layer.largest_scale == max(part.max() for part in scales)
    experts = [t.rms for t in report.tensors if "decoder_layer_11/moe/" in t.name]
    assert (layer.smallest_expert_rms, layer.largest_expert_rms) == (min(experts), max(experts))
    (router,) = named_params_of(named, "transformer/decoder_layer_11/router")
    assert layer.router_rms == pytest.approx(float(np.sqrt(np.mean(np.square(router)))), rel=1e-6)


def named_params_of(named: dict, prefix: str) -> list:
    return [
        leaf
        for module, leaves in named.items()
        if module.startswith(prefix)
        for leaf in leaves.values()
    ]


def test_a_reader_that_goes_away_is_no_error(nano_path):
    command = [sys.executable, "-m", "grok1", "inspect", str(nano_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == 141


def test_json_is_the_same(nano_path, capsys):
    assert __main__.main(["inspect", str(nano_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_sample"] is True
    assert found["tensors"][0]["name"] == "language_model/in_out_embed/embeddings"
    assert len(found["tensors"]) == 146


def test_a_layer_that_is_not_there_is_refused(nano_path, capsys):
    assert __main__.main(["inspect", str(nano_path), "--layer", "12"]) == 1
    assert capsys.readouterr().err == "grok1: --layer must be in [0, 12), found 12\n"
