"""The models that are measured, and their files."""

import contextlib
import pathlib
import shutil
import types

import pytest

import grok1
from benchmarks import models
from benchmarks.machine import BenchmarkError
from tests.helpers import slow


@slow
def test_checkpoint_is_made_once_and_nothing_else_is_touched(tmp_path, nano_config):
    config = nano_config.first_layers(1)
    model = models.BenchModel("nano", config)
    path = models.checkpoint(model, tmp_path)
    assert grok1.load(path, mesh=(1, 1), progress=False).config == config
    written = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert models.checkpoint(model, tmp_path) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == written
    other = models.BenchModel("nano", grok1.TOY)
    with pytest.raises(BenchmarkError, match="holds something else than the model nano; remove it"):
        models.checkpoint(other, tmp_path)


def test_full_disk_is_said_before_anything_is_made(tmp_path, monkeypatch):
    full = models.BenchModel("full", grok1.GROK_1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**11))
    message = r"has 100.0 GB free and the files of full take 318\.\d GB; give --scratch"
    with pytest.raises(BenchmarkError, match=message):
        models.checkpoint(full, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_in_four_bits_is_made_once_and_no_other_is_taken_for_it(tmp_path, monkeypatch):
    made = []

    class Worker(contextlib.nullcontext):
        def call(self, command, source, target, to):
            made.append((command, source, to))
            pathlib.Path(target).mkdir()
            shutil.copy(pathlib.Path(source, "config.json"), target)
            pathlib.Path(target, "quantization.json").touch()

        def __enter__(self):
            return self

    monkeypatch.setattr(models, "Worker", Worker)
    toy = models.model_named("toy", 1)
    path = models.in_four_bits(toy, toy.bundled, tmp_path)
    assert models.in_four_bits(toy, toy.bundled, tmp_path) == path == tmp_path / "toy-int4"
    assert made == [("convert", str(toy.bundled), "int4")]
    other = models.BenchModel("toy", models.BENCH)
    with pytest.raises(BenchmarkError, match="else than the model toy in 4 bits; remove it, or"):
        models.in_four_bits(other, toy.bundled, tmp_path)


def test_both_models_have_to_fit_where_one_is_measured_beside_the_other():
    device = {"name": "a GPU", "memory_bytes": 2_500_000_000}
    bench = models.model_named("bench", 1)
    models.check_memory(bench, device)
    with pytest.raises(BenchmarkError, match=r"bench takes 3\.1 GB and a GPU has 2\.5 GB"):
        models.check_memory(bench, device, ["int4"])


def test_number_of_parameters_is_what_llama_cpp_counts():
    assert models.BenchModel("bench", models.BENCH).num_parameters == 1_728_153_600
