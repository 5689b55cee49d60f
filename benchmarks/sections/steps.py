"""The steps of a model: decoding, prompts, draws."""

import functools
import statistics
from collections.abc import Callable, Iterator

from benchmarks.figures import Result, interleave
from benchmarks.machine import Worker
from benchmarks.setting import Setting

OTHER_WAYS = ("sampled", "greedy with 5 logprobs")
"""Of `workload.DECODING`, those that are measured beside greedy decoding."""


def decode(setting: Setting, worker: Worker, threads: int | None, batch: int) -> Iterator[Result]:
    """Steps of so many rows, greedily; then the other ways of drawing."""
    prompt, steps = setting.effort.prompts[batch], setting.effort.steps
    what = {"batch": batch, "prompt": prompt, "steps": steps}
    name = f"decode, batch {batch}"

    def say(text):
        setting.tell(f"{name}: {text}" + (f" (threads: {threads})" if threads else ""))

    say("compiling, counting experts")
    worker.call("decode", **what)
    ways = {way: functools.partial(worker.call, "decode", **what, how=way) for way in OTHER_WAYS}
    for way in ways.values():
        way()
    needed = worker.call("decode_bytes", **what)
    bytes_per_step = sum(needed["bytes"].values())
    contestants: dict[str, Callable[[], float]] = {
        "roofline": lambda: batch * worker.call("bandwidth") / bytes_per_step,
        "grok1": lambda: worker.call("decode", **what),
        **ways,
    }
    if batch == 1:
        say("compiling the dense reference")
        worker.call("dense", tokens=1)
        contestants["dense"] = lambda: worker.call("dense", tokens=setting.effort.dense_tokens)
    peer = setting.llama_cpp
    if peer and threads:
        contestants["llama.cpp"] = lambda: peer.decode(batch, prompt, steps, threads)
    rounds = interleave(contestants, setting.effort.repeats, say)
    bandwidth = statistics.median(rounds["roofline"]) * bytes_per_step / batch
    details = {**what, **needed, "bytes_per_second": bandwidth}
    of_ways = {way: rounds.pop(way) for way in ways}
    yield setting.rate(worker, name, threads, rounds, details)
    for way, rates in of_ways.items():
        pair = {"grok1": rates, "greedy": rounds["grok1"]}
        details = {**what, "spread": worker.call("spread", **what, how=way)}
        yield setting.rate(worker, f"{way}, batch {batch}", threads, pair, details)


def sampler(setting: Setting, worker: Worker, threads: int | None) -> Iterator[Result]:
    """Draws alone, of a vocabulary of Grok-1's size."""
    for shape in ("trained", "flat"):
        for batch, filtered in [(batch, batch) for batch in setting.effort.prompts] + [(32, 1)]:
            setting.tell(f"sampler: {shape} logits, {filtered} of {batch} rows")
            call = functools.partial(
                worker.call, "sampler", shape=shape, rows=batch, num_filtered=filtered
            )
            times = [1e3 * call() for _ in range(setting.effort.repeats)]
            name = f"draws, {shape} logits, {filtered} of {batch} rows"
            rounds = {"grok1": times}
            value = statistics.median(times)
            yield Result(setting.model.name, name, value, "ms", threads, {}, rounds)


def prefill(setting: Setting, worker: Worker, threads: int | None, length: int) -> Iterator[Result]:
    """One prompt of so many tokens."""
    name = f"prefill, {length} tokens"
    if length + 2 > setting.model.config.sequence_len:
        setting.tell(f"{name}: left out, the context is {setting.model.config.sequence_len}")
        return
    operations = worker.call("prefill_operations", tokens=length)
    setting.tell(f"{name}: compiling")
    worker.call("prefill", tokens=length)
    contestants: dict[str, Callable[[], float]] = {
        "roofline": lambda: length * worker.call("matmul") / operations,
        "grok1": lambda: worker.call("prefill", tokens=length),
    }
    peer = setting.llama_cpp
    if peer and threads:
        contestants["llama.cpp"] = lambda: peer.prefill(length, threads)
    rounds = interleave(
        contestants, setting.effort.repeats, lambda text: setting.tell(f"{name}: {text}")
    )
    rate = statistics.median(rounds["roofline"]) * operations / length
    details = {"tokens": length, "operations": operations, "operations_per_second": rate}
    yield setting.rate(worker, name, threads, rounds, details)
