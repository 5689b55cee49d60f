"""As many layers as Grok-1 has, out of core, from the files of a few.

A converted model's files hold the names of their tensors, so that they cannot be linked under the
names of other layers as `tools.make_full_size` does. Here the tensors of each layer are found under
the names of several: different experts to all that counts, keeps and reads them, the same bytes on
disk. The page cache has these once for all layers; `from_disk` lets go of them before each use, as
many more layers than memory holds would.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import grok1
from benchmarks import workload
from benchmarks.machine import BenchmarkError
from grok1 import factory
from grok1.checkpoint.directory import load_config, open_tensors
from grok1.checkpoint.mapping import Window
from grok1.checkpoint.storage import StoredModel
from grok1.checkpoint.tensor_file import DataFile, open_unchanged
from grok1.generate.requests import Batch
from grok1.nn.manifest import manifest
from grok1.offload import expert_store
from grok1.offload.runner import Streamed

_LAYER = re.compile(r"decoder_layer_(\d+)/")


def load(path: pathlib.Path, num_layers: int, memory: float) -> grok1.Model:
    """Loads a model with its experts on disk as if it had more layers, its own in turn.

    Args:
      path: The model.
      num_layers: How many.
      memory: What the process may take, in GB.

    Raises:
      BenchmarkError: If files are not mapped here: on an accelerator, or an old system.
    """
    own = load_config(path)
    config = dataclasses.replace(own, num_layers=num_layers)

    def opened(place: pathlib.Path, _: grok1.ModelConfig) -> StoredModel:
        return repeated(open_tensors(place, own), own, config)

    with (
        mock.patch.object(factory, "load_config", return_value=config),
        mock.patch.object(factory, "open_tensors", opened),
    ):
        model = grok1.load(path, mesh=(1, 1), offload="disk", memory=memory, progress=False)
    if not _streamed(model).store.is_mapped:
        raise BenchmarkError("files are not mapped here, so this says nothing; leave out `offload`")
    return model


def repeated(stored: StoredModel, own: grok1.ModelConfig, config: grok1.ModelConfig) -> StoredModel:
    """Returns the tensors of a model with more layers, each of them one of the model's own.

    Args:
      stored: The model's tensors.
      own: Its configuration.
      config: The same with more layers.
    """
    places = {spec.name: number for number, spec in enumerate(stored.specs)}

    def of_own(match: re.Match) -> str:
        return f"decoder_layer_{int(match[1]) % own.num_layers}/"

    names = [spec.name for spec in manifest(config)]
    chosen = [places[_LAYER.sub(of_own, name)] for name in names]
    specs = [
        stored.specs[number]._replace(name=name) for number, name in zip(chosen, names, strict=True)
    ]
    return StoredModel([stored.tensors[number] for number in chosen], specs)


@contextlib.contextmanager
def from_disk() -> Iterator[None]:
    """Has the page cache forget each part of a file before an expert is read from it."""

    class Forgotten(Window):
        def __init__(self, file: DataFile, offset: int, nbytes: int):
            with open_unchanged(file) as descriptor:
                os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
            super().__init__(file, offset, nbytes)

    with mock.patch.object(expert_store, "Window", Forgotten):
        yield


def decode(model: grok1.Model, num_untimed: int, num_timed: int, cached: bool) -> dict[str, Any]:
    """Draws tokens greedily, one row of them after a random one, and times the last ones.

    Args:
      model: As `load` returns it.
      num_untimed: Tokens before; they bring what is asked for into the page cache.
      num_timed: Tokens to time.
      cached: Whether experts may come from the page cache.

    Returns:
      For a token: its "seconds", the "bytes_read" of experts that were not held in memory, the
      "disk_bytes" of them that came from the disk, None where the system does not say; and the
      "hit_rate", the share of experts that were held, and how many of how many are in the end.
    """
    num_tokens = num_untimed + num_timed
    options = grok1.GenerationOptions(max_new_tokens=num_tokens, ignore_eos=True, temperature=0)
    prompt = workload.random_prompts(model.config.vocab_size, 1, 1)
    steps = Batch(model.engine, model.tokenizer, prompt.tolist(), options).run()
    for _ in range(num_untimed):
        next(steps)
    streamed = _streamed(model)
    before, from_device = dataclasses.replace(streamed.stats.decode), _disk_bytes()
    start = time.perf_counter()
    with contextlib.nullcontext() if cached else from_disk():
        for _ in steps:
            pass
    seconds = time.perf_counter() - start
    until, after = _disk_bytes(), streamed.stats
    used = after.decode.num_used - before.num_used
    return {
        "seconds": seconds / num_timed,
        "bytes_read": (after.decode.bytes_read - before.bytes_read) / num_timed,
        "disk_bytes": None if until is None else (until - (from_device or 0)) / num_timed,
        "hit_rate": (after.decode.num_held - before.num_held) / used,
        "held": [after.num_held, after.num_experts],
    }


def _streamed(model: grok1.Model) -> Streamed:
    runner = model.engine.runner
    assert isinstance(runner, Streamed)
    return runner


def _disk_bytes() -> int | None:
    """Bytes that this process had read from disks so far."""
    with contextlib.suppress(OSError), open("/proc/self/io") as file:
        for line in file:
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None
