"""`quantization.json`, which lies beside 4-bit experts and says how they were made."""

import hashlib
import json
import pathlib

from grok1.checkpoint.storage import StoredTensor
from grok1.config import ModelConfig
from grok1.nn.manifest import TensorSpec, is_of_experts, with_int4_experts
from grok1.ops.int4 import BOOK, group_rows
from grok1.version import __version__

NAME = "quantization.json"

_SAMPLES = 64  # of each source file that its digest reads
_SAMPLE_BYTES = 4096


def describe(
    source: pathlib.Path, config: ModelConfig, tensors: list[StoredTensor], specs: list[TensorSpec]
) -> bytes:
    """Returns the content of the card.

    Args:
      source: The model that is rounded.
      config: Its architecture.
      tensors: Its tensors.
      specs: As they are in the source.
    """
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
        "method": "scales of groups and blocks searched for the least squared error",
        "source": {
            "name": source.name,
            "experts": next(spec.dtype for spec in specs if is_of_experts(spec)),
            "layers": config.num_layers,
            "sha256_of_samples": _digests(tensors),
        },
        "grok1": __version__,
    }
    return (json.dumps(card, indent=2) + "\n").encode()


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
        with open(path, "rb") as opened:
            for number in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
        digests[path.name] = digest.hexdigest()
    return digests
