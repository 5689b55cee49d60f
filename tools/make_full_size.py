"""Writes a checkpoint of the released model's real size that takes 8 GB of disk instead of 318.

    python -m tools.make_full_size /data/full
    python -m grok1 verify /data/full

The weights of one layer are random; its 12 files are hard-linked under the names of all layers.
What depends on sizes - reading, memory, speed - is as with the released files; the text is noise.
"""

import argparse
import dataclasses
import os
import pathlib
import re

import numpy as np

from grok1.checkpoint.tensor_file import DTYPES, write_tensor
from grok1.config import GROK_1, ModelConfig
from grok1.machine.safe_files import creating
from grok1.nn.manifest import TensorSpec, file_name, manifest

_LAYER = re.compile(r"decoder_layer_\d+/")
_DEVIATION = 127 / 3**0.5  # of uniform int8 values


def make_full_size(
    directory: pathlib.Path,
    config: ModelConfig = GROK_1,
    *,
    source: pathlib.Path | None = None,
    seed: int = 0,
) -> None:
    """Writes the checkpoint.

    Args:
      directory: Where it goes; must be on the disk of `source`, if that is given.
      config: The model.
      source: A checkpoint of the same model with one layer, whose files are linked too instead of
        being made.
      seed: Of the weights that are made.

    Raises:
      FileExistsError: If the directory has a checkpoint.
    """
    files = directory / "ckpt-0"
    files.mkdir(parents=True)
    with creating(directory / "config.json") as file:
        file.write(config.to_json().encode())
    one_layer = dataclasses.replace(config, num_layers=1)
    kinds = {_kind(spec.name): i for i, spec in enumerate(manifest(one_layer))}
    generator = np.random.default_rng(seed)
    first: dict[str, pathlib.Path] = {}
    for index, spec in enumerate(manifest(config)):
        path, kind = files / file_name(index), _kind(spec.name)
        if kind in first:
            os.link(first[kind], path)
        elif source is not None:
            os.link(source / "ckpt-0" / file_name(kinds[kind]), path)
        else:
            write_tensor(path, *_random_tensor(spec, generator))
        first.setdefault(kind, path)


def _kind(name: str) -> str:
    """A tensor's name without the number of its layer."""
    return _LAYER.sub("decoder_layer/", name)


def _random_tensor(
    spec: TensorSpec, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Values, and scales if it has them, with which activations keep their size."""
    if spec.scales_shape is None:
        values = generator.standard_normal(spec.shape, np.float32)
        if len(spec.shape) == 1:
            return 1 + values / 8, None
        # Rows of the embedding `[V, D]` get the norm 1, and so do columns of a router `[D, E]`.
        width = spec.shape[1] if "embed" in spec.name else spec.shape[0]
        return values / np.float32(width**0.5), None
    values = generator.integers(-127, 127, spec.shape, np.int8, endpoint=True)
    spread = generator.uniform(0.5, 1.5, spec.scales_shape)
    scales = spread / (_DEVIATION * spec.shape[-2] ** 0.5)
    return values, scales.astype(DTYPES["bfloat16"])


def main() -> None:
    """Runs the tool with the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of the real size.")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--source", type=pathlib.Path, help="one layer of it, to be linked")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_full_size(arguments.directory, source=arguments.source, seed=arguments.seed)


if __name__ == "__main__":
    main()
