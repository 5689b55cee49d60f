"""A model's directory: its configuration, its tokenizer and its tensors, in either format."""

import contextlib
import os
import pathlib
import re
import stat
from collections.abc import Iterator

from grok1 import bundled
from grok1.checkpoint.released import download_advice, open_checkpoint
from grok1.checkpoint.safetensors_file import open_safetensors
from grok1.checkpoint.safetensors_layout import INDEX_NAME
from grok1.checkpoint.storage import StoredModel, from_header
from grok1.checkpoint.tensor_file import read_header
from grok1.config import GROK_1, ModelConfig
from grok1.files import CheckpointError, listed, open_file, unreadable
from grok1.nn.manifest import file_name, manifest

_EXPECTED = f"ckpt-0/ or {INDEX_NAME}"
_TENSOR_FILE = re.compile(r"tensor\d{5}_\d{3}")
_BESIDE_WEIGHTS = {"config.json", "tokenizer.model", "SHA256SUMS", "README.md"}
_MOST_LOOKED_AT = 200  # directories, where a model may lie below the one that was given


def located(path: str | os.PathLike[str], *, weights: bool = True) -> pathlib.Path:
    """Returns the directory of a model, with `~` and "toy" resolved; opens no file of it.

    Args:
      path: What a caller gave.
      weights: Whether there must be weights; otherwise `config.json` is enough.

    Raises:
      CheckpointError: If it is no model's directory; the message says what it is instead, and
        which directory to give.
      TypeError: If it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            "path must be that of a model's directory, a str or a pathlib.Path, found "
            f"{type(path).__name__}"
        )
    place = bundled.named(os.path.expanduser(path))
    if not _is_directory(place):
        raise _no_directory(place)
    if _holds_weights(place) or (not weights and os.path.lexists(place / "config.json")):
        return place
    raise _no_model(place)


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration of the model in a directory: `config.json`, else Grok-1's.

    Raises:
      CheckpointError: If it is no model's directory, or `config.json` cannot be read, is no JSON,
        is impossible, or missing where the weights are not those of Grok-1.
    """
    place = located(path, weights=False)
    if os.path.lexists(place / "config.json"):
        return ModelConfig.load(place / "config.json")
    _check_released(place)
    return GROK_1


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
    return not os.path.lexists(pathlib.Path(path, "ckpt-0")) and os.path.lexists(
        pathlib.Path(path, INDEX_NAME)
    )


def open_tensors(path: str | os.PathLike[str], config: ModelConfig) -> StoredModel:
    """Finds every tensor of a model on disk and checks it, before any payload is read.

    Args:
      path: A directory with `ckpt-0/`, or with a safetensors conversion.
      config: The model.

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
        spec._replace(dtype=tensor.dtype, scales_shape=tensor.scales and tensor.scales.shape)
        for spec, tensor in zip(expected, tensors, strict=True)
    ]
    return StoredModel(tensors, specs)


def _is_directory(place: pathlib.Path) -> bool:
    try:
        return stat.S_ISDIR(place.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of what is no path
        return False
    except OSError as error:
        raise unreadable(place, error) from error


def _holds_weights(place: pathlib.Path) -> bool:
    return os.path.lexists(place / "ckpt-0") or os.path.lexists(place / INDEX_NAME)


def _check_released(place: pathlib.Path) -> None:
    """Checks that a model without a configuration can be Grok-1."""
    problem = f"missing, expected beside {INDEX_NAME}"
    if not is_safetensors(place):
        first = place / "ckpt-0" / file_name(0)
        try:
            shape = read_header(first).values.shape
        except CheckpointError:
            return  # Which will be said with the other faults.
        if shape == (GROK_1.vocab_size, GROK_1.emb_size):
            return
        problem = f"missing, and the embedding {list(shape)} in {first.name} is not that of Grok-1"
    raise CheckpointError(
        place / "config.json", problem, "copy the one that belongs to these weights", "missing"
    )


def _no_directory(place: pathlib.Path) -> CheckpointError:
    if not os.path.lexists(place):
        return CheckpointError(
            place, "there is no such directory", download_advice(place), "missing"
        )
    above = next((parent for parent in list(place.parents)[:2] if _holds_weights(parent)), None)
    remedy = f"give the directory of a model, which holds {_EXPECTED}"
    if above is not None:
        remedy = f"give the directory above: {above}"
    problem = "is no directory"
    if _is_gguf(place):
        problem = "is a GGUF file, which llama.cpp reads and this library only writes"
        remedy = "give the directory that it was converted from"
    elif place.suffix == ".safetensors":
        problem = "is one file of a model"
        if above is None:
            remedy = f"give the directory above, which must hold {INDEX_NAME} as well"
    elif _TENSOR_FILE.fullmatch(place.name):
        problem = "is one tensor of a model"
    return CheckpointError(place, problem, remedy, "foreign")


def _no_model(place: pathlib.Path) -> CheckpointError:
    names = sorted(listed(place))
    if any(_TENSOR_FILE.fullmatch(name) for name in names):
        above = pathlib.Path(os.path.abspath(place)).parent
        problem, remedy = "holds the tensor files itself", f"give the directory above: {above}"
    elif below := list(_models_below(place, names)):
        more = f" (and {len(below) - 3} more)" if len(below) > 3 else ""
        problem = "holds no model itself"
        remedy = f"give the directory of one: {', '.join(map(str, below[:3]))}{more}"
    elif any(name.endswith(".gguf") for name in names):
        problem = "holds GGUF, which llama.cpp reads and this library only writes"
        remedy = "give the directory that it was converted from"
    elif any(name.endswith(".safetensors") for name in names):
        problem = f"holds safetensors files and no {INDEX_NAME}"
        remedy = "copy that file as well; only conversions of Grok-1 that have it are read"
    elif any(name not in _BESIDE_WEIGHTS and not name.startswith(".") for name in names):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        problem = f"holds no model, found {shown}"
        remedy = f"give the directory of one, which holds {_EXPECTED}"
    else:
        problem, remedy = "holds no weights", download_advice(place)
        return CheckpointError(place, problem, remedy, "missing")
    return CheckpointError(place, problem, remedy, "foreign")


def _models_below(place: pathlib.Path, names: list[str]) -> Iterator[pathlib.Path]:
    """Yields the directories of models one or two levels below, as far as it looks."""
    for name in names[:_MOST_LOOKED_AT]:
        child = place / name
        if name.startswith(".") or child.is_symlink() or not child.is_dir():
            continue
        if _holds_weights(child):
            yield child
            continue
        with contextlib.suppress(OSError):
            for other in sorted(os.listdir(child))[:_MOST_LOOKED_AT]:
                if (child / other).is_dir() and _holds_weights(child / other):
                    yield child / other


def _is_gguf(place: pathlib.Path) -> bool:
    if place.suffix == ".gguf":
        return True
    with contextlib.suppress(CheckpointError), open_file(place) as file:
        return file.read(4) == b"GGUF"
    return False
