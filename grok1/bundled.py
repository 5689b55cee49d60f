"""The files that come with the library: the toy checkpoint, and Grok-1's tokenizer."""

import os
import pathlib

_TOY = "toy"


def checkpoints() -> pathlib.Path:
    """Returns the directory of the bundled files.

    A wheel has it inside the package; in the source tree it is the one beside the package.
    """
    package = pathlib.Path(__file__).parent
    installed = package / "checkpoints"
    return installed if installed.is_dir() else package.parent / "checkpoints"


def toy() -> pathlib.Path:
    """Returns the directory of the toy, a trained model of 4.7 MB in the released format."""
    return checkpoints() / _TOY


def tokenizer() -> pathlib.Path:
    """Returns the file of Grok-1's tokenizer, as released."""
    return checkpoints() / "tokenizer.model"


def named(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the directory that a path means: "toy" is the bundled one, unless it is a file's."""
    path = pathlib.Path(path)
    return toy() if str(path) == _TOY and not path.exists() else path
