"""The check of a GPU: what it keeps, counts and leaves out."""

import dataclasses
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from benchmarks import gpu_check, gpu_int4, gpu_probe, gpu_timing, workload
from grok1.ops import forms
from grok1.ops.experts import experts
from grok1.ops.quantized import QuantizedArray, dequantize, project
from grok1.ops.routing import choose_experts
from tests.helpers import slow


@slow
def test_the_check_of_a_gpu_keeps_every_figure_and_goes_on_after_a_failure(tmp_path, monkeypatch):
    def fails(operation):
        raise RuntimeError("no device\nand more")
        yield

    monkeypatch.setattr(gpu_check.comparison, "differences", fails)
    figures = gpu_check.run(tmp_path, only=("kernels", "nano in float32"))
    named = {figure.name: figure for figure in figures}
    assert named["kernels"].value is None
    assert named["kernels"].details == {"RuntimeError": "no device"}
    assert not named["kernels"].holds
    assert named["nano in float32, logits"].holds
    assert named["nano in float32, greedy tokens that differ of 32"].value == 0
    (path,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["name"] for line in lines] == [figure.name for figure in figures]


@slow
def test_the_check_of_a_gpu_times_draws_of_a_model_without_a_tokenizer(tmp_path):
    config = dataclasses.replace(grok1.TOY, num_layers=1, sequence_len=128)
    *timed, _ = gpu_check.run(tmp_path, config, only=("sampling",))
    assert [figure.unit for figure in timed] == ["ms", "ms", "ms"]
    assert all(isinstance(figure.value, float) for figure in timed)


@slow
def test_the_check_of_a_gpu_times_experts_in_four_bits_beside_int8():
    config = dataclasses.replace(grok1.TOY, num_layers=1, sequence_len=128)
    model = grok1.random_model(config, mesh=(1, 1))
    one, several = gpu_int4.decode(model, {1: 1.5, 8: None}, 4)
    assert (one.bound, several.bound) == (1.5, None)
    assert one.value
    assert several.value
    assert sorted(one.details) == ["ms a step of int4", "ms a step of int8"]


def test_a_model_in_random_bits_spreads_as_its_weights_should():
    model = grok1.random_model(grok1.TOY, mesh=(1, 1), dtype="float32")
    made = gpu_int4.in_four_bits(model)
    for weight, of in zip(made.params.layers.experts, model.params.layers.experts, strict=True):
        assert weight.shape == of.shape
        values = np.asarray(dequantize(weight)[0])
        expected = of.shape[-2] ** -0.5
        assert abs(values.std() / expected - 1) < 0.1
        assert abs(values.mean()) < 0.1 * expected
        assert abs(np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]) < 0.05
    assert np.isfinite(made.logits([1, 2, 3])).all()


@slow
def test_the_share_of_a_device_is_timed_with_its_layers_in_a_loop_and_unrolled(monkeypatch):
    settings, decode = [], workload.decode

    def noted(*arguments):
        settings.append(os.environ.get("GROK1_CUDA_GRAPHS"))
        return decode(*arguments)

    monkeypatch.setattr(workload, "decode", noted)
    monkeypatch.setattr(gpu_timing, "bandwidth", lambda: 1e9)
    config = dataclasses.replace(grok1.TOY, num_layers=1, sequence_len=128)
    as_it_is, unrolled, differ = gpu_timing.Timed(config).alone()
    assert settings == [None] * 3 + ["unrolled"] * 3
    assert "GROK1_CUDA_GRAPHS" not in os.environ
    assert as_it_is.bound is not None
    assert as_it_is.name != unrolled.name
    assert as_it_is.value
    assert unrolled.value
    assert (differ.value, differ.bound) == (0, 0)


def test_what_is_timed_is_run_before_by_threads(monkeypatch):
    run = []

    def rate(timed, *what):
        run.append(what)
        return 1.0, {"ms a step": "1.0"}

    def prefill(model, length):
        run.append(length)
        return 1.0

    monkeypatch.setattr(gpu_timing.Timed, "_rate", rate)
    monkeypatch.setattr(workload, "prefill", prefill)
    config = dataclasses.replace(grok1.TOY, num_layers=1)
    timed = gpu_timing.Timed(config)
    (figure,) = timed.programs()
    assert figure.value
    before, run = run[:], []
    shares = [figure.bound for figure in timed.decode()]
    assert shares == [0.80, 0.75, 0.70]
    assert len([*timed.long_context(), *timed.prefill()]) == 1 + 1 + 2
    assert (
        {128, 512, (1, 16, 64), (8, 16, 64), (32, 16, 64), (1, 984, 24)} <= set(run) <= set(before)
    )


def test_the_probe_takes_the_place_of_products_with_weights(monkeypatch):
    gpu_probe.register_forms()
    model = grok1.random_model(grok1.TOY, mesh=(1, 1))
    layers = model.params.layers
    width, hidden = 6144, 32768
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    weights = type(layers.experts)(**{name: stack(8, *size) for name, size in sizes.items()})
    x = jax.ShapeDtypeStruct((1, width), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((1, 8), jnp.float32)

    def of_experts(x, weights, logits, layer):
        routing = choose_experts(logits, 2)
        return experts(x, weights, (layer,), routing, jnp.ones(1, bool), gpu_probe.NAME)

    def of_attention(x, weights, layer):
        return project(x.astype(jnp.float32), weights, [(layer,)] * 3, jnp.bfloat16, gpu_probe.NAME)

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    three = [stack(width, columns) for columns in (6144, 1024, 1024)]
    for run, arguments, target, outputs in (
        (of_experts, (x, weights, logits, layer), "experts_probe", (1, width)),
        (of_attention, (x, three, layer), "matvec_probe", [(1, 6144), (1, 1024), (1, 1024)]),
    ):
        shapes = jax.tree.map(lambda of: of.shape, jax.eval_shape(run, *arguments))
        assert shapes == outputs
        lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
        assert f"@{target}(" in lowered.as_text()
    # Nothing else chooses them, and where they cannot run nothing is measured.
    assert forms.chosen("experts", "cuda", x, weights, (0,), None, None) != gpu_probe.NAME
    missing = functools.partial(gpu_probe.decode, model, pathlib.Path("none.so"))
    (failed,) = gpu_check.attempted("probe", missing)
    assert failed.details == {"ValueError": "the probe's kernels are CUDA's, and this is a cpu"}
    monkeypatch.setattr(gpu_probe.jax, "default_backend", lambda: "gpu")
    (failed,) = gpu_check.attempted("probe", missing)
    assert "none.so" in failed.details["OSError"]


def stack(*shape):
    *lead, rows, columns = shape
    values = jax.ShapeDtypeStruct((2, *lead, rows, columns), jnp.int8)
    return QuantizedArray(values, jax.ShapeDtypeStruct((2, *lead, 1, columns), jnp.bfloat16))


def test_the_kernels_of_the_layers_are_seen_once_a_step():
    kernels = {"head": (4, 4.0), "grok1_down_1": (4, 2.0), "grok1_norm_1": (8, 1.0), "fill": (1, 9)}
    count, seconds = gpu_timing.of_step(kernels, steps=4, layers=3)
    assert (count, seconds) == (1 + 3 + 6, 1.0 + 3 * 0.5 + 6 * 0.125)
    # Of layers one after the other it sees all.
    unrolled = {"head": (4, 4.0), "grok1_norm_1": (24, 3.0)}
    assert gpu_timing.of_step(unrolled, steps=4, layers=1) == (1 + 6, 1.0 + 6 * 0.125)
    # Of the library's own kernels those of the head are no layer's.
    head = {"grok1_screen_digits_1": (4, 4.0), "grok1_screen_1": (4, 2.0), "grok1_choose_1": (4, 1)}
    assert gpu_timing.of_step(head, steps=4, layers=3) == (3, 1.75)


def test_a_model_decodes_without_its_copy_of_the_head_and_then_with_it():
    model = grok1.random_model(grok1.TOY, mesh=(1, 1))
    table = model.engine.screening_table
    with workload.without_head_copy(model):
        assert model.engine.screening_table is None
    assert model.engine.screening_table is table


def test_how_long_the_host_waits_for_each_call_is_noted_and_then_no_more():
    model = grok1.random_model(grok1.TOY, mesh=(1, 1))
    with workload.waits() as waits:
        seconds = workload.decode(model, 1, 4, 6).steps
    assert waits
    assert 0 < sum(waits[1:]) <= seconds
    count = len(waits)
    workload.decode(model, 1, 4, 2)
    assert len(waits) == count


def test_the_share_of_a_device_has_its_part_of_everything_but_the_width():
    share = gpu_timing.share_of_several(grok1.GROK_1)
    assert (share.ffn_size, share.num_q_heads, share.num_kv_heads) == (4096, 6, 1)
    assert (share.emb_size, share.vocab_size, share.num_experts) == (6144, 16384, 8)
    assert share.num_layers == 8 * grok1.GROK_1.num_layers  # of an eighth of their width


@slow
def test_the_check_of_a_gpu_loads_and_offloads_in_a_process_of_its_own(tmp_path):
    config = dataclasses.replace(grok1.TOY, num_layers=1, sequence_len=128)
    *measured, _ = gpu_check.run(tmp_path, config, only=("load and offload",))
    values = {figure.name: figure.value for figure in measured}
    assert None not in values.values(), values
    shares = [value for name, value in values.items() if name.endswith("share of the copy")]
    assert len(shares) == 3
    assert all(share is not None and share > 0 for share in shares)
    differ = [value for name, value in values.items() if name.startswith("offloaded against")]
    assert differ == [0, 0]


def test_a_process_that_takes_too_long_is_ended_and_keeps_its_figures(tmp_path, monkeypatch):
    program = """import time; print('{"name": "a", "value": 1.0}', flush=True); time.sleep(99)"""
    (tmp_path / "slow.py").write_text(program)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "_PROCESS_SECONDS", 1.0)
    first, failed = gpu_check.attempted("part", lambda: gpu_check._figures_of_process("slow"))
    assert first == gpu_check.Figure("a", 1.0)
    message = "python -m slow ended with status -9; it has 1 s"
    assert failed == gpu_check.Figure("part", None, details={"RuntimeError": message})


def test_a_check_that_takes_too_long_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SECONDS", 0.0)
    figures = gpu_check.run(tmp_path)
    assert {figure.value for figure in figures[:-1]} == {None}
    assert figures[0].line().startswith("device: -  <-- NO  [left out after")
