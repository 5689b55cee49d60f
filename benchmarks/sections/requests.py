"""Requests side by side: a server and its clients, and who waits for whom."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks import serving
from benchmarks.figures import Result, interleave
from benchmarks.machine import Worker
from benchmarks.setting import Setting

CLIENTS = 16
MAX_STALL = 5.0
"""Seconds of `Server` where the rate is measured: long chunks, as for work that nobody watches."""


def serve(setting: Setting, worker: Worker, threads: int | None) -> Iterator[Result]:
    """Clients of a server side by side, one after the other, and what has no server."""
    setting.tell("starting a server")
    most = min(1024, setting.model.config.sequence_len)  # chunks are half as long at most
    started = worker.call("serve", slots=CLIENTS, capacity=most, max_stall=MAX_STALL)
    with contextlib.ExitStack() as stack:
        other = None
        if setting.llama_cpp and threads:
            other = stack.enter_context(setting.llama_cpp.serving(CLIENTS, most, threads))
        vocab_size, seeds = setting.model.config.vocab_size, itertools.count()
        for prompt, tokens, number in setting.effort.loads:

            def prompts(count, prompt=prompt):
                # Others each time: a server finds again what it was asked before.
                one = np.random.default_rng(next(seeds))
                return one.integers(vocab_size, size=(count, prompt)).tolist()

            def ask(port, clients, count, prompts=prompts, tokens=tokens):
                return serving.tokens_per_second(port, prompts(count), tokens, clients)

            def without(prompts=prompts, tokens=tokens, number=number):
                return worker.call("scheduler", prompts=prompts(number), tokens=tokens)

            contestants: dict[str, Callable[[], float]] = {
                "grok1": functools.partial(ask, started["port"], CLIENTS, number),
                "one by one": functools.partial(ask, started["port"], 1, 2),
                "scheduler": without,
            }
            if other is not None:
                contestants["llama.cpp server"] = functools.partial(ask, other, CLIENTS, number)
            name = f"served, {prompt} in {tokens} out, {CLIENTS} clients"
            rounds = interleave(
                contestants,
                setting.effort.repeats,
                lambda text, n=name: setting.tell(f"{n}: {text}"),
            )
            details = {"requests": number, "max_stall": MAX_STALL, **started["sizes"]}
            yield setting.rate(worker, name, threads, rounds, details)


def pauses(setting: Setting, worker: Worker, threads: int | None) -> Iterator[Result]:
    """A long prompt beside requests that run, and a short one behind three long ones."""
    longest = setting.model.config.sequence_len - 192
    length, max_stall = min(setting.effort.long_prompt, longest), 0.5
    setting.tell(f"a prompt of {length:,} tokens beside two that run")
    found = worker.call("pauses", length=length, max_stall=max_stall)
    name = f"longest pause, {length} tokens come in"
    of_stall = {"max_stall": found["longest"] / max_stall}
    yield Result(setting.model.name, name, found["longest"], "s", threads, of_stall, details=found)
    name = f"first token behind three prompts of {length}"
    yield Result(setting.model.name, name, found["first"], "s", threads, details=found)
