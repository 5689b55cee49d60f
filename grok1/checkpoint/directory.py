"""A model's directory: its configuration, its tokenizer and its tensors, in either format."""

import os
import pathlib

from grok1 import bundled
from grok1.checkpoint.released import open_checkpoint
from grok1.checkpoint.safetensors_file import INDEX_NAME, open_safetensors
from grok1.checkpoint.storage import StoredTensor, from_header
from grok1.config import GROK_1, ModelConfig
from grok1.nn.manifest import TensorSpec, manifest


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration of the model in a directory: `config.json`, else Grok-1's.

    Raises:
      ValueError: If the configuration is impossible or no JSON; the message names the file.
    """
    config_path = pathlib.Path(path, "config.json")
    return ModelConfig.load(config_path) if config_path.exists() else GROK_1


def tokenizer_path(path: str | os.PathLike[str], config: ModelConfig) -> pathlib.Path | None:
    """Returns the file of a model's tokenizer; None if it has none.

    The released weights are downloaded without one; where the configuration is Grok-1's, it is the
    one that comes with the library.
    """
    own = pathlib.Path(path, "tokenizer.model")
    # A link that leads nowhere is the model's own too, and an error when it is read.
    if os.path.lexists(own):
        return own
    as_released = (GROK_1.vocab_size, GROK_1.emb_size, GROK_1.num_experts)
    is_grok_1 = (config.vocab_size, config.emb_size, config.num_experts) == as_released
    return bundled.tokenizer() if is_grok_1 else None


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a model in safetensors rather than in Grok-1's own format."""
    return not pathlib.Path(path, "ckpt-0").exists() and pathlib.Path(path, INDEX_NAME).exists()


def open_tensors(
    path: str | os.PathLike[str], config: ModelConfig
) -> tuple[list[StoredTensor], list[TensorSpec]]:
    """Finds every tensor of a model on disk and checks it, before any payload is read.

    Args:
      path: A directory with `ckpt-0/`, or with a safetensors conversion.
      config: The model.

    Returns:
      The tensors in manifest order, and the manifest with the types and scale grouping that the
      files have.

    Raises:
      CheckpointError: As `released.open_checkpoint` and `safetensors_file.open_safetensors`.
    """
    expected = manifest(config)
    if is_safetensors(path):
        tensors = open_safetensors(path, expected)
    else:
        headers = open_checkpoint(pathlib.Path(path, "ckpt-0"), expected)
        tensors = [from_header(header) for header in headers]
    specs = [
        spec._replace(dtype=tensor.values.dtype, scales_shape=tensor.scales and tensor.scales.shape)
        for spec, tensor in zip(expected, tensors, strict=True)
    ]
    return tensors, specs
