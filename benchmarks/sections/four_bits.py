"""Experts in 4 bits against the model as it is."""

import functools
import statistics
from collections.abc import Callable, Iterator

from benchmarks import machine, models
from benchmarks.figures import Result, ratio
from benchmarks.machine import Worker
from benchmarks.setting import Setting
from grok1 import GROK_1

NUM_LAYERS = GROK_1.num_layers
MEMORY = 16
"""GB that a process may take that runs out of core."""


def in_memory(setting: Setting, threads: int | None) -> Iterator[Result]:
    """Decoding and a prompt, both models in memory, in turns."""
    assert setting.path
    assert setting.scratch
    setting.tell("converting to 4 bits, if that is to be done")
    path = models.in_four_bits(setting.model, setting.path, setting.scratch)
    # The first would take most of an accelerator's memory.
    sharing = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with (
        setting.worker(threads, setting.path, sharing) as int8,
        setting.worker(threads, path, sharing) as int4,
    ):
        for batch, prompt in setting.effort.prompts.items():
            yield _decode(setting, int4, int8, threads, batch, prompt)
        length = setting.effort.prefills[:2][-1]
        contestants = {
            "grok1": functools.partial(int4.call, "prefill", tokens=length),
            "int8": functools.partial(int8.call, "prefill", tokens=length),
        }
        yield setting.in_turns(int4, f"int4, prefill, {length} tokens", threads, contestants)


def _decode(
    setting: Setting, int4: Worker, int8: Worker, threads: int | None, batch: int, prompt: int
) -> Result:
    what = {"batch": batch, "prompt": prompt, "steps": setting.effort.steps}
    int4.call("decode", **what)
    needed = int4.call("decode_bytes", **what)
    size = sum(needed["bytes"].values())
    contestants: dict[str, Callable[[], float]] = {
        "roofline": lambda: batch * int4.call("bandwidth") / size,
        "grok1": functools.partial(int4.call, "decode", **what),
        "int8": functools.partial(int8.call, "decode", **what),
    }
    peer = setting.llama_cpp
    if peer and threads:
        contestants["llama.cpp"] = lambda: peer.decode(batch, prompt, what["steps"], threads)
    name = f"int4, decode, batch {batch}"
    return setting.in_turns(int4, name, threads, contestants, {**what, **needed})


def out_of_core(setting: Setting, threads: int | None) -> Iterator[Result]:
    """As many layers as Grok-1 has, experts on disk, by processes that take turns with memory."""
    assert setting.path
    assert setting.scratch
    setting.tell("converting to 4 bits, if that is to be done")
    converted = models.in_four_bits(setting.model, setting.path, setting.scratch)
    files = {"grok1": (converted, converted), "int8": (setting.path, setting.path / "ckpt-0")}
    num_untimed, num_cached, num_from_disk = setting.effort.offloaded
    # What brings the pages is a token of its own, after which those are dropped for each expert.
    ways = {"page cache": (num_untimed, num_cached, True), "disk": (1, num_from_disk, False)}
    found = {way: {name: [] for name in files} for way in ways}
    for i in range(setting.effort.repeats):
        for name, (path, of_experts) in files.items():
            setting.tell(f"out of core: round {i + 1} of {setting.effort.repeats}, {name}")
            with Worker(threads) as worker:
                machine.forget_files(of_experts)
                worker.call("load_deep", path=str(path), layers=NUM_LAYERS, memory=MEMORY)
                for way, (untimed, timed, cached) in ways.items():
                    once = worker.call("decode_deep", untimed=untimed, timed=timed, cached=cached)
                    found[way][name].append(once)
                    setting.tell(f"{name}, from the {way}: {once['seconds']:.2f} s a token")
    for way, of_each in found.items():
        rounds = {name: [once["seconds"] for once in all] for name, all in of_each.items()}
        yield Result(
            setting.model.name,
            f"int4, {NUM_LAYERS} layers out of core with {MEMORY} GB, from the {way}",
            statistics.median(rounds["grok1"]),
            "s a token",
            threads,
            {"int8's time": ratio(rounds, "grok1", "int8")},
            rounds,
            {"tokens": ways[way][1], "of_each_round": of_each},
        )
