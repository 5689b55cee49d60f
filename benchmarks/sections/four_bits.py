"""Experts in 4 bits against the model as it is."""

import functools
from collections.abc import Callable, Iterator

from benchmarks import models
from benchmarks.figures import Result
from benchmarks.machine import Worker
from benchmarks.setting import Setting


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
