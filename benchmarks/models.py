"""The models that are measured, and the files that they are loaded from.

Loaded and not made in memory: a load gives the weights memory in large pages, which random numbers
drawn by XLA do not get, and on a CPU the pages are a part of the speed.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence

import grok1
from benchmarks.machine import ROOT, BenchmarkError, Worker
from grok1.checkpoint.directory import load_config
from grok1.checkpoint.tensor_file import tensor_file_size
from grok1.nn.manifest import manifest

NAMES = ("toy", "bench", "grok1-layers")

BENCH = grok1.ModelConfig(
    vocab_size=32768,
    emb_size=2048,
    widening_factor=6,
    key_size=128,
    num_q_heads=16,
    num_kv_heads=8,
    num_layers=4,
    num_experts=8,
    num_selected_experts=2,
    sequence_len=8192,
)
"""The released architecture in 1.9 GB: too large for any cache, small enough for any machine."""


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """One model to measure.

    Attributes:
      name: What the report calls it.
      config: Its architecture.
      bundled: Where its files are, if they come with the repository.
    """

    name: str
    config: grok1.ModelConfig
    bundled: pathlib.Path | None = None

    @property
    def num_bytes(self) -> int:
        """Length of its files, which is what its weights take in memory, bar a few headers."""
        return sum(tensor_file_size(spec) for spec in manifest(self.config))

    def needed_bytes(self, sections: Sequence[str]) -> float:
        """Bytes that these sections keep, on disk as in memory.

        For "int4" and "offload" at most 0.61 of `num_bytes` more: experts in 4.25 bits, and the
        rest again.
        """
        return self.num_bytes * (1 if {"int4", "offload"}.isdisjoint(sections) else 1.61)

    @property
    def num_parameters(self) -> int:
        """Number of its weights, scales not counted."""
        sizes = [1] * len(manifest(self.config))
        for i, spec in enumerate(manifest(self.config)):
            for size in spec.shape:
                sizes[i] *= size
        return sum(sizes)


def model_named(name: str, num_layers: int) -> BenchModel:
    """Returns the model of this name.

    Args:
      name: One of `NAMES`.
      num_layers: Layers of "grok1-layers", which is Grok-1 in all else.

    Raises:
      BenchmarkError: If there is no such model.
    """
    if name == "toy":
        return BenchModel("toy", grok1.TOY, ROOT / "checkpoints" / "toy")
    if name == "bench":
        return BenchModel("bench", BENCH)
    if name == "grok1-layers":
        config = dataclasses.replace(grok1.GROK_1, num_layers=num_layers)
        return BenchModel(f"grok1-{num_layers}-layer{'s' * (num_layers > 1)}", config)
    raise BenchmarkError(f"there is no model {name!r}; choose from {', '.join(NAMES)}")


def check_memory(model: BenchModel, device: dict, sections: Sequence[str] = ()) -> None:
    """Checks that the weights fit the device, so that nothing is written in vain.

    Args:
      model: The model.
      device: As `worker.Session.describe` says.
      sections: What is measured.

    Raises:
      BenchmarkError: If they do not.
    """
    available = device["memory_bytes"]
    needed = model.needed_bytes(sections)
    if available is not None and needed > 0.95 * available:
        raise BenchmarkError(
            f"{model.name} takes {needed / 1e9:.1f} GB and {device['name']} has "
            f"{available / 1e9:.1f} GB of memory; choose fewer --layers or another --model"
        )


def checkpoint(model: BenchModel, scratch: pathlib.Path) -> pathlib.Path:
    """Returns the directory with the model's files, made in `scratch` if they are not there.

    Args:
      model: The model.
      scratch: An existing directory.

    Raises:
      BenchmarkError: If the directory holds another model, or the disk has no room.
    """
    if model.bundled is not None:
        return model.bundled
    path = scratch / model.name
    if path.exists() and os.listdir(path):
        config_path = path / "config.json"
        if not config_path.exists() or grok1.ModelConfig.load(config_path) != model.config:
            raise BenchmarkError(
                f"{path} holds something else than the model {model.name}; remove it, or choose "
                "another --scratch"
            )
        return path
    free = shutil.disk_usage(scratch).free
    if free < model.num_bytes:
        raise BenchmarkError(
            f"{scratch} has {free / 1e9:.1f} GB free and the files of {model.name} take "
            f"{model.num_bytes / 1e9:.1f} GB; give --scratch a directory with more room"
        )
    with Worker() as worker:
        worker.call("make", config=model.config.to_json(), path=str(path))
    return path


def in_four_bits(model: BenchModel, path: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """Returns the directory with the model's files in which experts have 4 bits.

    Args:
      model: The model.
      path: Its files.
      scratch: An existing directory; what an interrupted run left there is gone on with.

    Raises:
      BenchmarkError: If the directory holds another model, or the files cannot be made.
    """
    converted = scratch / f"{model.name}-int4"
    if (converted / "quantization.json").exists():
        if load_config(converted) != model.config:
            raise BenchmarkError(
                f"{converted} holds something else than the model {model.name} in 4 bits; remove "
                "it, or choose another --scratch"
            )
        return converted
    with Worker() as worker:
        worker.call("convert", source=str(path), target=str(converted), to="int4")
    return converted
