"""What each section measures, in which order and by which processes."""

import contextlib
import dataclasses
import pathlib
import types

from benchmarks import figures, machine, models, report, setting
from benchmarks.machine import BenchmarkError
from benchmarks.sections import four_bits, processes
from benchmarks.suite import Suite


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


def test_times_that_differ_by_nothing_are_no_compilation(monkeypatch):
    tokens = {"prompt": 128, "cold": 1.0, "warm": 0.5, "compiled": 1.2}
    answers = {"build_kernels": {"available": False}, "first_tokens": tokens, "peak_memory": 2}
    answers["load"] = {"seconds": 1.0, "file_bytes": 1}
    worker = types.SimpleNamespace(call=lambda command, **_: answers[command])
    monkeypatch.setattr(processes, "Worker", lambda *_: contextlib.nullcontext(worker))
    model = models.model_named("toy", 1)
    running = Suite(model, machine.ROOT, ["start"], setting.QUICK, None, None, lambda _: None).run()
    compiled = [result for result in running if "compile" in result.measurement]
    assert [(result.value, result.ratios) for result in compiled] == [(0, {}), (0, {})]


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
