"""Inspection: the table, its totals and its statistics."""

import json

import numpy as np
import pytest

from grok1 import __main__, inspection
from grok1.conversion import convert
from grok1.quantization import dequantize
from tests.helpers import named_params


def test_statistics_are_those_of_the_weights(nano_path, nano):
    report = inspection.inspect(nano_path, full=True)
    assert len(report.tensors) == 146
    named = named_params(nano)
    for tensor in report.tensors:
        module, _, parameter = tensor.name.rpartition("/")
        leaf = named[module][parameter]
        exact = np.asarray(dequantize(leaf), np.float64)
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
    assert len(lines) == 1 + 12 + 1
    assert "tensor00026_000  transformer/decoder_layer_10/moe/linear/w" in lines[1]
    assert "int8[8,64,128]" in lines[1]
    assert lines[-1].startswith("12 tensors, ")


def test_json_is_the_same(nano_path, capsys):
    assert __main__.main(["inspect", str(nano_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_sample"] is True
    assert found["tensors"][0]["name"] == "language_model/in_out_embed/embeddings"
    assert len(found["tensors"]) == 146


def test_a_layer_that_is_not_there_is_refused(nano_path, capsys):
    assert __main__.main(["inspect", str(nano_path), "--layer", "12"]) == 1
    assert capsys.readouterr().err == "grok1: layer must be in [0, 12), found 12\n"
