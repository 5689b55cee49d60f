"""`quantization.json`, which lies beside 4-bit experts and says how they were made."""

import contextlib
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from grok1.care.staging import Piece
from grok1.checkpoint.storage import StoredModel, StoredTensor
from grok1.config import ModelConfig
from grok1.files import open_file, unreadable
from grok1.nn.manifest import is_of_experts, with_int4_experts
from grok1.ops.int4 import BOOK, group_rows
from grok1.version import __version__

NAME = "quantization.json"

_SAMPLES = 64  # of each source file that its digest reads
_SAMPLE_BYTES = 4096


class Record:
    """What rounding has lost, matrix by matrix; kept in a file while a conversion is unfinished."""

    def __init__(self):
        self._path: pathlib.Path | None = None
        self._lines: dict[tuple[int, str, int], tuple[float, int | None, bool]] = {}

    def keep_in(self, directory: pathlib.Path) -> None:
        """Goes on with what a run before has noted in a directory."""
        self._path = directory / "record"
        if self._path.is_file():
            for line in self._path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # one that the process was killed in
                    layer, matrix, expert, *found = json.loads(line)
                    self._lines[layer, matrix, expert] = tuple(found)

    def add(
        self,
        layer: int,
        matrix: str,
        expert: int,
        error: float,
        tokens: int | None,
        by_inputs: bool,
    ) -> None:
        """Notes a matrix.

        Args:
          layer: Of it.
          matrix: Its name in files.
          expert: Of the layer.
          error: Relative, of the weights or of the products.
          tokens: That its inputs are from; None without calibration.
          by_inputs: Whether it was rounded for these.
        """
        assert self._path is not None
        # Six digits, so that the card's length is known beforehand.
        found = round(error, 6), tokens, by_inputs
        self._lines[layer, matrix, expert] = found
        with self._path.open("a") as file:
            # A line of its own, even behind one that was cut off.
            file.write("\n" + json.dumps([layer, matrix, expert, *found]))

    def errors(self) -> dict[str, list[float]]:
        """Returns of each matrix the mean over the experts of a layer, for each layer."""
        layers = 1 + max((layer for layer, _, _ in self._lines), default=-1)
        names = sorted({matrix for _, matrix, _ in self._lines})
        return {
            name: [
                round(float(np.mean(found)), 6)
                for layer in range(layers)
                if (
                    found := [
                        line[0]
                        for (one, matrix, _), line in self._lines.items()
                        if (one, matrix) == (layer, name)
                    ]
                )
            ]
            for name in names
        }

    def fallen_back(self) -> list[tuple[int, int, int]]:
        """Returns layer, expert and number of tokens where these were too few."""
        return sorted(
            {
                (layer, expert, tokens)
                for (layer, _, expert), (_, tokens, by_inputs) in self._lines.items()
                if tokens is not None and not by_inputs
            }
        )


def describe(
    source: pathlib.Path,
    config: ModelConfig,
    stored: StoredModel,
    record: Record,
    calibration: dict[str, Any] | None,
) -> Piece:
    """Returns the card, which is complete when all weights are.

    Args:
      source: The model that is rounded.
      config: Its architecture.
      stored: Its tensors, as they are in the source.
      record: Where the losses will be.
      calibration: What is to be said of the text, if there was one.
    """
    tensors, specs = stored
    blocks = {}
    for spec in with_int4_experts(specs):
        if is_of_experts(spec) and spec.scales_shape is not None:
            rows = spec.shape[-2] // spec.scales_shape[-2]
            blocks[spec.name.rpartition("/")[0].rpartition("/")[2]] = {
                "rows_of_block": rows,
                "rows_of_group": group_rows(rows),
            }
    card = {
        "format": "grok1-int4",
        "arrangement": "IQ4_XS",
        "book": BOOK.tolist(),
        "experts": blocks,
        "everything_else": "as in the source",
        "method": "scales of groups and blocks searched for the least squared error"
        + (", error feedback (GPTQ)" if calibration else ""),
        "calibration": calibration,
        "source": {
            "name": source.name,
            "experts": next(spec.dtype for spec in specs if is_of_experts(spec)),
            "layers": config.num_layers,
            "sha256_of_samples": _digests(tensors),
        },
        "grok1": __version__,
    }
    losses = "products" if calibration else "weights"
    layers, experts = range(config.num_layers), range(config.num_experts)

    def text(errors: dict[str, list[float]], fallen_back: list[Any]) -> str:
        measured = {
            f"relative_error_of_{losses}": errors,
            "fell_back_layer_expert_tokens": fallen_back,
        }
        return json.dumps(card | {"loss": measured}, indent=1)

    worst = {name: [0.123456 for _ in layers] for name in blocks}
    every = [(layer, expert, 10**9) for layer in layers for expert in experts if calibration]
    size = len(text(worst, every)) + 1

    def make() -> bytes:
        return text(record.errors(), record.fallen_back()).ljust(size - 1).encode() + b"\n"

    return Piece(size, make)


def _digests(tensors: list[StoredTensor]) -> dict[str, str]:
    """Of each file of the source the SHA-256 of its length and of samples over its length.

    That of all that is in them takes as long as reading them; `verify --deep` makes those.
    """
    files = {file.path: file for tensor in tensors for part in tensor.parts
             for file, _ in part.parts}  # fmt: skip
    digests = {}
    for path in sorted(files):
        size = files[path].file_size
        digest = hashlib.sha256(str(size).encode())
        with open_file(path) as opened:
            try:
                for number in range(_SAMPLES):
                    opened.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
            except OSError as error:
                raise unreadable(path, error) from error
        digests[path.name] = digest.hexdigest()
    return digests
