"""The benchmark command: what it counts, what it reports, and how it refuses. No time is judged."""

import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok1
from benchmarks import (
    deep,
    figures,
    gpu_check,
    load_phases,
    machine,
    models,
    peers,
    report,
    serving,
    setting,
    workload,
)
from benchmarks.__main__ import cost, parse_arguments, plan
from benchmarks.device import copies_of, summed
from benchmarks.figures import interleave, ratio
from benchmarks.machine import BenchmarkError, Worker
from benchmarks.peers import DenseDecoder
from benchmarks.sections import four_bits, processes
from benchmarks.suite import Suite
from grok1.checkpoint.directory import open_tensors
from grok1.checkpoint.released import open_checkpoint
from grok1.checkpoint.storage import from_header
from grok1.nn.manifest import file_name, manifest
from grok1.offload import expert_store
from tests.helpers import slow

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


FIGURES = {
    "start": [
        "load",
        "compile, first process",
        "compile, second process",
        "time to first token",
        "peak memory",
    ],
    "load": ["load, files not in memory"],
    "decode": [
        f"{way}, batch {batch}"
        for batch in (1, 8)
        for way in ("decode", "sampled", "greedy with 5 logprobs")
    ],
    "prefill": ["prefill, 128 tokens"],
    "int4": ["int4, decode, batch 1", "int4, decode, batch 8", "int4, prefill, 128 tokens"],
    "offload": [
        f"int4, 64 layers out of core with 16 GB, from the {where}"
        for where in ("page cache", "disk")
    ],
    "serve": ["served, 8 in 16 out, 16 clients"],
    "pauses": ["longest pause, 600 tokens come in", "first token behind three prompts of 600"],
}


@slow
@pytest.mark.parametrize(
    "sections",
    [["load", "prefill", "offload"], [section for section in FIGURES if section != "offload"]],
    ids=",".join,
)
def test_quick_run_of_the_toy_reports_every_figure(sections, tmp_path, monkeypatch):
    # The kernels would be built anew for the figure of a first process.
    if "start" in sections:
        monkeypatch.setenv("GROK1_NATIVE", "0")
    result = run("--model", "toy", "--quick", "--threads", "1", "--json", "--output", str(tmp_path),
                 "--only", ",".join(sections))  # fmt: skip
    assert result.returncode == 0, result.stderr
    # With the same in 4 bits beside it.
    assert "benchmarks: toy: this takes 0.0098 GB of memory\n" in result.stderr
    found = json.loads(result.stdout)
    table = report.table(found).splitlines()
    [written] = tmp_path.iterdir()
    assert json.loads(written.read_text()) == found
    assert written.name.endswith(f"-{found['date']}.json")
    assert set(found) == {"date", "device", "arguments", "results", "failures"}
    assert found["failures"] == []
    assert set(found["device"]) == {"platform", "name", "memory_bytes", "versions"}
    assert found["device"]["versions"]["jax"] == jax.__version__
    by_name = {figure["measurement"]: figure for figure in found["results"]}
    assert list(by_name) == [name for section in sections for name in FIGURES[section]]
    for name, figure in by_name.items():
        assert set(figure) == {
            "model", "measurement", "value", "unit", "threads", "ratios", "rounds", "details",
        }  # fmt: skip
        assert figure["model"] == "toy"
        assert figure["threads"] == 1
        assert any(f" {name} " in row and " toy " in row for row in table)
    if "decode" in sections:
        assert set(by_name["decode, batch 1"]["ratios"]) == {"roofline", "dense"}
        assert set(by_name["decode, batch 8"]["ratios"]) == {"roofline"}
    for name in {"sampled, batch 8", "greedy with 5 logprobs, batch 1"} & by_name.keys():
        [(other, ratio)] = by_name[name]["ratios"].items()
        assert other == "greedy"
        [mine], [its] = by_name[name]["rounds"]["grok1"], by_name[name]["rounds"]["greedy"]
        assert ratio == pytest.approx(mine / its)
        assert 1 <= by_name[name]["details"]["spread"]["nucleus"] <= 1280
        assert any(
            f" {name} " in row and "of greedy decoding; most probable" in row for row in table
        )
    if "int4" in sections:
        assert set(by_name["int4, decode, batch 1"]["ratios"]) == {"roofline", "int8"}
        assert by_name["int4, decode, batch 8"]["details"]["bytes"]["experts"] > 0
        assert set(by_name["int4, prefill, 128 tokens"]["ratios"]) == {"int8"}
    if "offload" in sections:
        for figure in (by_name[name] for name in FIGURES["offload"]):
            [mine], [its] = figure["rounds"]["grok1"], figure["rounds"]["int8"]
            assert figure["ratios"] == {"int8's time": pytest.approx(mine / its)}
            [once] = figure["details"]["of_each_round"]["grok1"]
            assert 0 < once["held"][0] <= once["held"][1] == 64 * 8
    assert all(figure["value"] >= 0 for figure in by_name.values())
    loading = by_name["load, files not in memory"]
    assert loading["ratios"]["disk"] == pytest.approx(
        loading["value"] / loading["rounds"]["disk"][0]
    )
    assert loading["details"]["peak_memory_over_kept"][0] > 1
    rates = [name for name in by_name if name.startswith(("decode", "prefill"))]
    for figure in (by_name[name] for name in rates):
        assert "roofline" in figure["ratios"]
        assert figure["rounds"]["grok1"] == [figure["value"]]
        assert figure["ratios"]["roofline"] == pytest.approx(
            figure["value"] / figure["rounds"]["roofline"][0]
        )


def test_what_fails_keeps_nothing_else_from_being_measured(monkeypatch):
    asked = []

    class Worker:
        def __init__(self, *_):
            pass

        def __enter__(self):
            asked.append("new process")
            return self

        def __exit__(self, *_):
            pass

        def call(self, command, **arguments):
            if command == "prefill":
                asked.append(arguments["tokens"])
                if arguments["tokens"] == 512:
                    raise BenchmarkError("out of memory")
            return 1.0

    monkeypatch.setattr(setting, "Worker", Worker)
    model = models.model_named("bench", 1)
    effort = dataclasses.replace(setting.FULL, repeats=1)
    running = Suite(model, None, ["prefill"], effort, None, None, lambda _: None).run()
    found = [
        result.reason if isinstance(result, figures.Failure) else result.measurement
        for result in running
    ]
    assert found == ["prefill, 128 tokens", "out of memory", "prefill, 2048 tokens"]
    assert asked == ["new process", 128, 128, 512, "new process", 2048, 2048]


def test_figures_of_one_day_and_device_are_kept_together(tmp_path):
    def document(measurement, value, **more):
        result = figures.Result("toy", measurement, value, "s", 1)
        device = {"name": "A CPU", "versions": {"jax": "1", **more}}
        return report.document(device, "2026-01-31", {}, [result], [])

    def values(path):
        return {r["measurement"]: r["value"] for r in json.loads(path.read_text())["results"]}

    report.write(document("load", 1.0, **{"llama.cpp": "b1"}), tmp_path)
    report.write(document("decode", 2.0), tmp_path)
    path = report.write(document("load", 3.0), tmp_path)
    assert values(path) == {"decode": 2.0, "load": 3.0}
    assert json.loads(path.read_text())["device"]["versions"] == {"jax": "1", "llama.cpp": "b1"}
    other = document("load", 4.0)
    other["device"]["versions"]["jax"] = "2"
    assert values(report.write(other, tmp_path)) == {"load": 4.0}


@slow
def test_errors_are_one_line():
    result = run("--gguf", "absent.gguf", "--llama-cpp", "tests")
    assert result.returncode == 1
    assert result.stderr == (
        "benchmarks: tests has no program llama-bench; --llama-cpp takes the directory of a "
        "build's programs, build/bin\n"
    )


@pytest.mark.parametrize(
    ("platform", "arguments", "message"),
    [
        ("cpu", "--model grok2", "there is no model 'grok2'; choose from toy, bench, grok1-layers"),
        ("cpu", "--only sleep", "there is nothing called 'sleep' to measure; choose from start"),
        ("cpu", "--threads 0", "--threads 0: this process may use 1 to"),
        ("cpu", "--repeats 0", "--repeats must be above 0, found 0"),
        ("cpu", "--layers 65", "--layers must be 1 to 64, as Grok-1 has, found 65"),
        ("cpu", "--llama-cpp .", "--llama-cpp needs the model as a file too; give --gguf"),
        ("gpu", "--gguf a", "--gguf is for CPUs, and this is a device"),
        ("gpu", "--threads 1", "--threads is for CPUs, and this is a device"),
        ("gpu", "", "grok1-8-layers takes 42.6 GB and a device has 30.0 GB of memory; choose"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(platform, arguments, message):
    device = {"platform": platform, "name": "a device", "memory_bytes": 30 * 10**9}
    with pytest.raises(BenchmarkError) as refusal:
        plan(parse_arguments(arguments.split()), device)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("platform", "found"),
    [
        ("cpu", ["toy", "bench"]),
        ("gpu", ["grok1-8-layers"]),
    ],
)
def test_defaults_are_those_of_the_device(platform, found):
    device = {"platform": platform, "name": "a device", "memory_bytes": 10**11}
    arguments = parse_arguments([])
    assert [model.name for model in plan(arguments, device)] == found
    assert Suite.needs_files(arguments.only) == (platform == "cpu")
    assert (arguments.threads is None) == (platform == "gpu")


def test_interleaved_ratios_are_medians_of_rounds():
    order = []
    rates = {"a": iter([10, 1, 6]), "b": iter([5, 1, 1])}

    def contestant(name):
        def measure():
            order.append(name)
            return next(rates[name])

        return measure

    said = []
    rounds = interleave({name: contestant(name) for name in rates}, 3, said.append)
    assert order == ["a", "b"] * 3
    assert said == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert ratio(rounds, "a", "b") == 2


def test_a_bound_is_the_larger_of_what_stands_on_both_sides():
    rates = {"roofline": iter([5.0, 20.0, 10.0]), "grok1": iter([7.0, 9.0])}
    rounds = interleave({name: lambda it=it: next(it) for name, it in rates.items()}, 2, print)
    assert rounds == {"roofline": [20.0, 20.0], "grok1": [7.0, 9.0]}


def test_what_is_faster_than_its_bound_is_shown_as_doubtful():
    result = figures.Result("toy", "decode", 9.0, "tokens/s", 1, {"roofline": 1.4, "dense": 2})
    device = {"name": "A CPU", "versions": {}}
    table = report.table(report.document(device, "2026-01-31", {}, [result], []))
    assert "1.40" not in table
    assert "| ?           | 2.00    |" in table
    assert "?: faster than its bound" in table
    assert report.line(result) == "toy: decode: 9 tokens/s, ? of roofline, 2.00 x dense"


def test_times_that_differ_by_nothing_are_no_compilation(monkeypatch):
    tokens = {"prompt": 128, "cold": 1.0, "warm": 0.5, "compiled": 1.2}
    answers = {"build_kernels": {"available": False}, "first_tokens": tokens, "peak_memory": 2}
    answers["load"] = {"seconds": 1.0, "file_bytes": 1}
    worker = types.SimpleNamespace(call=lambda command, **_: answers[command])
    monkeypatch.setattr(processes, "Worker", lambda *_: contextlib.nullcontext(worker))
    model = models.model_named("toy", 1)
    running = Suite(model, ROOT, ["start"], setting.QUICK, None, None, lambda _: None).run()
    compiled = [result for result in running if "compile" in result.measurement]
    assert [(result.value, result.ratios) for result in compiled] == [(0, {}), (0, {})]


def test_what_a_run_takes_is_said_before_it_starts():
    arguments = parse_arguments(["--quick"])
    device = {"platform": "cpu", "name": "a device", "memory_bytes": 10**11}
    said = cost(plan(arguments, device), arguments, True, pathlib.Path("somewhere"))
    assert said == (
        "toy, bench: this takes about 4 minutes, 2.5 GB of memory, 1.9 GB of disk in somewhere"
    )


def test_draws_alone_are_timed_for_every_shape_and_number_of_filtered_rows(toy, monkeypatch):
    monkeypatch.setattr(workload, "_SECONDS", 0.01)
    sampler = workload.Sampler(toy, "The first argument is a list of all names. " * 3, size=4000)
    drawn = []
    monkeypatch.setattr(sampler, "_sample", lambda *given: drawn.append(given) or given[0])
    for shape in ("trained", "flat"):
        assert sampler(shape, 33, 2) > 0
        logits, allowed, state, _ = drawn[-1]
        assert logits.shape == (33, 4000)
        assert allowed.all()
        assert np.flatnonzero(state.temperature).tolist() == [0, 1]
        assert np.all(np.asarray(state.top_p) == np.float32(0.95))
    # What is trained has favourites.
    trained, flat = (np.asarray(sampler._logits[shape]) for shape in ("trained", "flat"))
    assert trained.std(axis=-1).mean() > 4 * flat.std(axis=-1).mean()


def test_the_spread_of_a_model_is_that_of_its_logits(toy):
    tokens = np.arange(1, 17)
    logits = np.asarray(toy.logits(tokens), np.float64) / 0.7
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    found = workload.spread(toy, tokens)
    assert found["most probable"] == pytest.approx(probs.max(axis=-1).mean())
    sizes = [np.searchsorted(np.cumsum(np.sort(row)[::-1]), 0.95) + 1 for row in probs]
    assert found["nucleus"] == np.median(sizes)


def test_workload_generates_what_generate_does(toy):
    prompts = workload.random_prompts(toy.config.vocab_size, 2, 5)
    timing = workload.run(toy, prompts, 4)
    expected = toy.generate(prompts.tolist(), max_new_tokens=4, temperature=0, ignore_eos=True)
    np.testing.assert_array_equal(timing.sequences[:, :5], prompts)
    assert timing.sequences[:, 5:].tolist() == [completion.tokens for completion in expected]
    assert timing.first > 0
    assert timing.steps > 0


@slow
def test_dense_reference_draws_the_same_tokens(toy):
    prompt = toy.tokenizer.encode("The first argument")
    expected = toy.generate(prompt, max_new_tokens=8, temperature=0, ignore_eos=True).tokens
    decoder = DenseDecoder(toy)
    found = [decoder.next_token(token) for token in [*prompt, *expected[:-1]]]
    assert found[len(prompt) - 1 :] == expected


@slow
def test_experts_read_are_those_that_the_router_chose(toy):
    sequences = np.asarray(workload.random_prompts(toy.config.vocab_size, 3, 24))
    distinct = 0
    for position in range(20, 23):
        chosen = [set() for _ in range(toy.config.num_layers)]
        for row in sequences:
            state = toy.engine.new_state(np.pad(row[None], ((0, 0), (0, 256 - 24))))
            _, _, captured = toy.engine.score(state, np.array([23]), 64, ("expert_indices",))
            for layer, indices in enumerate(np.asarray(captured["expert_indices"])):
                chosen[layer] |= set(indices[position].tolist())
        distinct += sum(map(len, chosen))
    assert workload.experts_read(toy, sequences, 20) == distinct / 3
    assert workload.experts_read(toy, sequences[:1], 5) == 2 * toy.config.num_layers


def test_decode_bytes_of_all_experts_are_the_whole_model_and_the_filled_cache(toy):
    all_experts = toy.config.num_layers * toy.config.num_experts
    parts = workload.decode_bytes(toy, 2, 10, 3, all_experts)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(toy.params))
    if toy.engine.screening_table is not None:  # read instead of the embedding
        table = sum(leaf.nbytes for leaf in jax.tree.leaves(toy.engine.screening_table))
        weights += table - toy.params.embedding.nbytes
    assert parts["layers"] + parts["experts"] + parts["head"] == weights
    row = 2 * toy.config.num_layers * toy.config.num_kv_heads * toy.config.key_size * 4
    assert parts["cache"] == 2 * row * (11 + 12 + 13) / 3
    chosen = workload.decode_bytes(toy, 2, 10, 3, all_experts / 4)
    assert chosen["experts"] == parts["experts"] / 4


def test_prefill_operations_are_those_of_the_products():
    config = grok1.TOY
    one = workload.prefill_operations(config, 1)
    # From the checkpoint: 2 for each weight that a token meets, and attention to itself.
    attention = 2 * 128 * 128 + 2 * 128 * 64
    experts = 2 * 3 * 128 * config.ffn_size + 128 * 8
    assert one == 2 * 6 * (attention + experts + 2 * 128)
    assert workload.prefill_operations(config, 3) == 3 * one + 2 * 6 * 2 * 128 * (0 + 1 + 2)


def test_copies_of_weights_are_found_in_a_compiled_program():
    stack = jax.ShapeDtypeStruct((3, 40, 24), jnp.int8)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    for work, array in (
        (lambda w, i: w[i].astype(jnp.float32) * 2, "f32[40,24]"),
        (lambda w, i: w[i], "s8[40,24]"),
    ):
        program = jax.jit(work).lower(stack, layer).compile().as_text()
        assert any(array in found for found in copies_of(program, [(40, 24)]))
        assert not copies_of(program, [(24, 40), (240, 24)])


def test_kernels_of_a_profile_are_summed_and_the_short_ones_are_one():
    runs = [("short", 1.0), *((f"kernel {i}", 10.0 + i) for i in range(15)), ("kernel 3", 5.0)]
    found = summed(runs)
    assert next(iter(found.items())) == ("kernel 14", (1, 24.0))
    assert found["kernel 3"] == (2, 18.0)
    assert found["others"] == (1, 1.0)
    assert sum(seconds for _, seconds in found.values()) == sum(seconds for _, seconds in runs)


def test_copies_inside_a_fusion_take_no_memory():
    program = """HloModule step

%fused_dot (param_0: s8[2,40,24]) -> bf16[24] {
  %param_0 = s8[2,40,24]{2,1,0} parameter(0)
  %convert.1 = bf16[2,40,24]{2,1,0} convert(%param_0)
  ROOT %reduce.1 = bf16[24]{0} reduce(%convert.1), dimensions={0,1}
}

ENTRY %main (w: s8[2,40,24], f: f32[40,24]) -> (bf16[24], bf16[8,10,24]) {
  %w = s8[2,40,24]{2,1,0} parameter(0)
  %f = f32[40,24]{1,0} parameter(1)
  %fusion.1 = bf16[24]{0} fusion(%w), kind=kInput, calls=%fused_dot
  %fusion.2 = (bf16[8,10,24]{2,1,0:T(8,128)}, s32[]) fusion(%w), kind=kLoop, calls=%fused_pair
  ROOT %tuple.1 = (bf16[24]{0}, bf16[8,10,24]{2,1,0}) tuple(%fusion.1, %fusion.2)
}
"""
    assert copies_of(program, [(40, 24)]) == ["%fusion.2 = bf16[8,10,24] fusion"]


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


def test_four_bits_are_measured_in_turns_with_eight_by_processes_that_share_memory(monkeypatch):
    rates, environments = {"int8": 10.0, "int4": 15.0}, []

    class Worker:
        def __init__(self, threads, environment):
            environments.append(environment)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, command, **arguments):
            if command == "load":
                self.model = "int4" if arguments["path"].endswith("-int4") else "int8"
            if command == "decode_bytes":
                assert self.model == "int4"
                return {"bytes": {"experts": 1.0}}
            return 1000.0 if command == "bandwidth" else rates.get(getattr(self, "model", ""))

    monkeypatch.setattr(setting, "Worker", Worker)
    monkeypatch.setattr(models, "in_four_bits", lambda *_: pathlib.Path("bench-int4"))
    effort = dataclasses.replace(setting.FULL, repeats=2, prompts={1: 1})
    model, here = models.model_named("bench", 1), pathlib.Path("bench")
    measured = Suite(model, here, ["int4"], effort, [2], None, lambda _: None, here).run()
    decode, prefill = measured
    assert (decode.measurement, decode.value) == ("int4, decode, batch 1", 15)
    assert decode.ratios == {"roofline": 0.015, "int8": 1.5}
    assert (prefill.measurement, prefill.ratios) == ("int4, prefill, 512 tokens", {"int8": 1.5})
    assert environments == 2 * [{"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}]


def test_out_of_core_every_turn_has_a_process_of_its_own_that_begins_without_pages(monkeypatch):
    asked, seconds = [], {"bench": {True: 4.0, False: 10.0}, "bench-int4": {True: 3.0, False: 4.0}}

    class Worker:
        def __init__(self, threads):
            asked.append(threads)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, command, **arguments):
            if command == "load_deep":
                self.model = arguments["path"]
                asked.append((self.model, arguments["layers"], arguments["memory"]))
                return None
            asked.append((command, arguments["timed"]))
            return {"seconds": seconds[self.model][arguments["cached"]]}

    monkeypatch.setattr(four_bits, "Worker", Worker)
    monkeypatch.setattr(machine, "forget_files", lambda path: asked.append(str(path)))
    monkeypatch.setattr(models, "in_four_bits", lambda *_: pathlib.Path("bench-int4"))
    effort = dataclasses.replace(setting.FULL, repeats=2, offloaded=(1, 8, 2))
    model, here = models.model_named("bench", 1), pathlib.Path("bench")
    measured = Suite(model, here, ["offload"], effort, [2], None, lambda _: None, here).run()
    cached, from_disk = measured
    assert (cached.value, cached.unit, cached.ratios) == (3, "s a token", {"int8's time": 0.75})
    assert (from_disk.value, from_disk.ratios) == (4, {"int8's time": 0.4})
    assert report.line(from_disk).endswith("4 s a token, 0.40 int8's time")
    decoded = [("decode_deep", 8), ("decode_deep", 2)]
    turns = [2, "bench-int4", ("bench-int4", 64, 16), *decoded]
    turns += [2, "bench/ckpt-0", ("bench", 64, 16), *decoded]
    assert asked == 2 * turns


def test_more_layers_than_files_are_those_of_links(tmp_path, nano_path, nano_config):
    config = dataclasses.replace(nano_config, num_layers=2 * nano_config.num_layers + 1)
    numbers = {spec.name: number for number, spec in enumerate(manifest(nano_config))}
    for number, spec in enumerate(manifest(config)):
        own = spec.name
        for layer in range(nano_config.num_layers, config.num_layers):
            of_file = f"decoder_layer_{layer % nano_config.num_layers}/"
            own = own.replace(f"decoder_layer_{layer}/", of_file)
        source = nano_path / "ckpt-0" / file_name(numbers[own])
        (tmp_path / file_name(number)).symlink_to(source)
    linked = [from_header(header) for header in open_checkpoint(tmp_path, manifest(config))]
    found = deep.repeated(open_tensors(nano_path, nano_config), nano_config, config)
    assert [spec.name for spec in found.specs] == [spec.name for spec in manifest(config)]
    for tensor, link in zip(found.tensors, linked, strict=True):
        [(file, span)], [(of_link, span_of_link)] = tensor.values.parts, link.values.parts
        assert (file.path, span) == (of_link.path.resolve(), span_of_link)


def test_pages_are_forgotten_before_each_part_of_a_file_is_mapped(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 256)
    forgotten = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *what: forgotten.append(what))
    file = types.SimpleNamespace(path=path, file_size=1 << 16)
    with deep.from_disk():
        window = expert_store.Window(file, 5000, 300)
    assert forgotten == [(5000, 300, os.POSIX_FADV_DONTNEED)]
    np.testing.assert_array_equal(window.bytes().view(np.uint8), np.arange(5000, 5300) % 256)
    window.close()
    expert_store.Window(file, 0, 8).close()
    assert len(forgotten) == 1


def test_tokens_out_of_core_are_counted_alone(nano_path, nano_config):
    layers = nano_config.num_layers + 1
    model = deep.load(nano_path, layers, 4)
    first = deep.decode(model, 1, 3, cached=True)
    assert first["seconds"] > 0
    assert first["held"][1] == layers * nano_config.num_experts
    assert 0 < first["hit_rate"] <= 1  # all that was read once is held
    assert deep.decode(model, 3, 1, cached=False)["bytes_read"] == 0


def test_number_of_parameters_is_what_llama_cpp_counts():
    assert models.BenchModel("bench", models.BENCH).num_parameters == 1_728_153_600


def test_worker_reports_a_refusal_and_its_own_end():
    with Worker() as worker:
        with pytest.raises(BenchmarkError, match="there is no such directory"):
            worker.call("load", path="absent")
        with pytest.raises(BenchmarkError, match="ended with status 1 in 'decode'"):
            worker.call("decode", batch=1, prompt=1, steps=1)  # no model: a fault of the caller


def fake_llama_cpp(directory: pathlib.Path, bench: str, batched: str) -> pathlib.Path:
    for name, output in (("llama-bench", bench), ("llama-batched-bench", batched)):
        program = directory / name
        program.write_text(f'#!/bin/sh\necho "$0 $@" >> {directory}/calls\n{output}\n')
        program.chmod(0o755)
    gguf = directory / "model.gguf"
    gguf.touch()
    return gguf


def test_llama_cpp_is_asked_for_the_same_work(tmp_path):
    counted = {
        "build_commit": "abc", "model_type": "grok", "model_n_params": 1050, "avg_ts": 12.5,
    }  # fmt: skip
    bench = f"echo '{json.dumps([counted])}'"
    batched = "echo 'log'; echo '{\"speed_tg\": 49.5, \"speed_pp\": 9}'"
    peer = peers.LlamaCpp(tmp_path, fake_llama_cpp(tmp_path, bench, batched))
    assert peer.version == "abc, grok"
    assert peer.is_model_of(1000)
    assert not peer.is_model_of(2000)
    assert peer.decode(1, 1, 64, 1) == 12.5
    assert peer.decode(8, 128, 64, 1) == 49.5
    assert peer.prefill(512, 1) == 12.5
    _, one, eight, prefill = (tmp_path / "calls").read_text().splitlines()
    assert "-ngl 0 -t 1 -n 64 -p 0 -r 1" in one
    assert "-ngl 0 -t 1 -c 1536 -npp 128 -ntg 64 -npl 8" in eight
    assert "-t 1 -n 0 -p 512 -r 1" in prefill


class Completions(http.server.BaseHTTPRequestHandler):
    """Answers with the number of tokens that was asked for, or with four."""

    protocol_version = "HTTP/1.1"
    asked: typing.ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["prompt"])
        answer = json.dumps({"usage": {"completion_tokens": min(4, body["max_tokens"])}}).encode()
        self.send_response(200 if body["prompt"] != [9] else 503)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_clients_ask_once_for_each_prompt_and_count_the_tokens():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        Completions.asked.clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prompts = [[n, 5] for n in range(7)]
        assert serving.tokens_per_second(server.server_port, prompts, 4, clients=3) > 0
        assert sorted(Completions.asked) == prompts
        with pytest.raises(BenchmarkError, match="5 tokens were asked for, and 4 came"):
            serving.tokens_per_second(server.server_port, prompts, 5, clients=2)
        with pytest.raises(BenchmarkError, match=r"port \d+ failed: status 503"):
            serving.tokens_per_second(server.server_port, [[9]], 4, clients=1)
        server.shutdown()


def test_the_server_of_llama_cpp_runs_as_long_as_it_is_asked(tmp_path):
    counted = {"build_commit": "a", "model_type": "b", "model_n_params": 1, "avg_ts": 1}
    peer = peers.LlamaCpp(tmp_path, fake_llama_cpp(tmp_path, f"echo '{json.dumps([counted])}'", ""))
    with pytest.raises(BenchmarkError, match="has no program llama-server"):
        peer.serving(2, 64, 1).__enter__()
    program = tmp_path / "llama-server"
    program.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/calls; exit 3\n")
    program.chmod(0o755)
    with pytest.raises(BenchmarkError, match="ended with status 3"):
        peer.serving(2, 64, 1).__enter__()
    assert "-ngl 0 -t 1 -np 2 -c 128 --port" in (tmp_path / "calls").read_text()
    program.write_text(
        f"#!{sys.executable}\nimport http.server, sys\n"
        "class Fine(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[-1])), Fine).serve_forever()\n"
    )
    with peer.serving(2, 64, 1) as port:
        assert peers._is_healthy(port)
    assert not peers._is_healthy(port)


def test_llama_cpp_that_fails_is_quoted(tmp_path):
    gguf = fake_llama_cpp(tmp_path, "echo 'error: unknown architecture' >&2; exit 1", "true")
    with pytest.raises(BenchmarkError, match="failed: error: unknown architecture"):
        peers.LlamaCpp(tmp_path, gguf)
    gguf = fake_llama_cpp(tmp_path, "echo nothing", "true")
    with pytest.raises(BenchmarkError, match="printed no result: 'nothing'"):
        peers.LlamaCpp(tmp_path, gguf)
    with pytest.raises(BenchmarkError, match=r"absent: no such file; --gguf takes"):
        peers.LlamaCpp(tmp_path, tmp_path / "absent")


def test_memory_that_cannot_be_used_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"1")
    monkeypatch.setattr(machine, "host_bytes_available", lambda: None)
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=-9)
    )
    with pytest.raises(BenchmarkError, match=r"could not use 0\.0 GB .*status -9.*leave out"):
        machine.use_memory(tmp_path)


@slow
def test_the_check_of_a_gpu_keeps_every_figure_and_goes_on_after_a_failure(tmp_path, monkeypatch):
    def fails(operation):
        raise RuntimeError("no device\nand more")
        yield

    monkeypatch.setattr(gpu_check.check, "differences", fails)
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
    assert [figure.unit for figure in timed] == ["ms", "ms"]
    assert all(isinstance(figure.value, float) for figure in timed)


def test_the_kernels_of_the_layers_are_seen_once_a_step():
    kernels = {"head": (4, 4.0), "grok1_down_1": (4, 2.0), "grok1_norm_1": (8, 1.0), "fill": (1, 9)}
    count, seconds = gpu_check.of_step(kernels, steps=4, layers=3)
    assert (count, seconds) == (1 + 3 + 6, 1.0 + 3 * 0.5 + 6 * 0.125)


def test_the_share_of_a_device_has_its_part_of_everything_but_the_width():
    share = gpu_check.share_of_several(grok1.GROK_1)
    assert (share.ffn_size, share.num_q_heads, share.num_kv_heads) == (4096, 6, 1)
    assert (share.emb_size, share.vocab_size, share.num_experts) == (6144, 16384, 8)


def test_the_phases_of_a_load_are_all_of_it(nano_path):
    phases = load_phases.Phases()
    with phases.watched():
        grok1.load(nano_path, mesh=(1, 1), progress=False)
    assert all(phases.steps[name] > 0 for name in ("headers", "weights", "engine"))
    details = phases.details()
    assert int(details.pop("number of blocks")) >= 146
    found = {name: float(value) / 1e3 for name, value in details.items()}
    assert found["threads in Python, ms"] >= 0
    parts = [value for name, value in found.items() if not name.startswith("threads")]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(phases.seconds, abs=1e-3)
    # Nothing goes on being watched.
    blocks = len(phases.blocks)
    grok1.load(nano_path, mesh=(1, 1), progress=False)
    assert len(phases.blocks) == blocks


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
