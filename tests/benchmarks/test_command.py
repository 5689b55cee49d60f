"""The benchmark command: what it reports, and how it refuses. No time is judged."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks import report
from benchmarks.__main__ import cost, main, parse_arguments, plan
from benchmarks.machine import ROOT, BenchmarkError
from benchmarks.suite import Suite
from tests.helpers import slow


def run(*arguments: str) -> subprocess.CompletedProcess:
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
        ("gpu", "--probe a.so", "--probe is measured by --check; give both"),
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


def test_a_probe_that_is_not_there_is_refused_before_anything_is_checked(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--check", "--probe", "none.so"])
    with pytest.raises(BenchmarkError, match=r"^--probe none\.so: there is no such file; give the"):
        main()


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


def test_what_a_run_takes_is_said_before_it_starts():
    arguments = parse_arguments(["--quick"])
    device = {"platform": "cpu", "name": "a device", "memory_bytes": 10**11}
    said = cost(plan(arguments, device), arguments, True, pathlib.Path("somewhere"))
    assert said == (
        "toy, bench: this takes about 4 minutes, 2.5 GB of memory, 1.9 GB of disk in somewhere"
    )
