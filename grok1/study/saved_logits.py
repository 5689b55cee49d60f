"""Logits of a text in a file, `.npz` with their tokens or `.npy` alone, written and read.

Dimension key: T position, V vocabulary.
"""

import errno
import os
import pathlib
import tokenize
import zipfile
import zlib

import numpy as np

from grok1.files import printable
from grok1.machine.safe_files import creating
from grok1.study.recorded_run import RecordedRun


def check_new_file(path: pathlib.Path) -> None:
    """Checks that a path can be that of a new `.npz` file.

    Raises:
      ValueError, OSError: If it has another name, is there already, or its directory is not.
    """
    if path.suffix != ".npz":
        raise ValueError(f"saved logits are a .npz file, found {os.fspath(path)!r}")
    if os.path.lexists(path):
        raise _is_there(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}; make it first")


def _is_there(path: pathlib.Path) -> FileExistsError:
    return FileExistsError(f"{path} is there already; remove it, or name a new file")


def save_logits_of(run: RecordedRun, path: pathlib.Path) -> None:
    """Writes a run's logits and tokens to a new `.npz` file.

    Raises:
      OSError: If it cannot be written, or is there already; nothing is left behind.
    """
    try:
        with creating(path) as file:
            np.savez(file, logits=run.logits, tokens=np.asarray(run.tokens, np.int32))
    except FileExistsError:
        raise _is_there(path) from None
    except OSError as error:
        raise OSError(
            f"{path}: the logits cannot be written: {error.strerror}; nothing was left behind, "
            "name a file on another disk"
        ) from error


def open_saved(path: pathlib.Path, files: pathlib.Path) -> RecordedRun:
    """Opens saved logits, which stay on the disk.

    Args:
      path: A `.npz` or `.npy` file.
      files: A directory for what has to be unpacked.

    Raises:
      ValueError: If the file is none of these, or damaged.
    """
    logits, found = _arrays(path, files)
    tokens = None
    if found is not None:
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(
                f"{path}: tokens must be whole numbers [T], found {found.dtype}{list(found.shape)}"
            )
        tokens = found.tolist()
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating) or not logits.size:
        raise ValueError(
            f"{path}: logits must be floats [T, V], found {logits.dtype}{list(logits.shape)}"
        )
    if tokens is not None and len(tokens) != len(logits):
        raise ValueError(f"{path}: {len(tokens)} tokens, but logits of {len(logits)} positions")
    return RecordedRun(str(path), tokens, None, logits)


def _arrays(path: pathlib.Path, files: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The logits, left on the disk, and the tokens, if the file has any."""
    tokens, logits_path, names = None, path, {"logits.npy", "tokens.npy"}
    try:
        if path.suffix == ".npz":
            # An array inside the archive cannot be mapped; beside it, it can.
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
                if names >= {"logits.npy", "tokens.npy"}:
                    logits_path = pathlib.Path(archive.extract("logits.npy", files))
                    # Mapped, an array that is said to be huge takes no memory.
                    tokens = np.load(archive.extract("tokens.npy", files), mmap_mode="r")
        if "logits.npy" in names and "tokens.npy" in names:
            return np.load(logits_path, mmap_mode="r"), tokens
    # All that zipfile and NumPy make of bytes that are none of theirs.
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        SyntaxError,
        RuntimeError,
        tokenize.TokenError,
        OSError,
    ) as error:
        # Of the system's errors this one comes of a place that no file has.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(
            f"{path}: not a {path.suffix} file, or a damaged one: {printable(reason):.200}; save "
            "the logits again"
        ) from None
    listed = ", ".join(sorted(name.removesuffix(".npy") for name in names))
    raise ValueError(
        f"{path}: expected the arrays logits [T, V] and tokens [T], found {printable(listed):.200}"
    )
