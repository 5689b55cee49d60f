"""Files of others: opened only if they are files, read up to a bound, and named when refused."""

import collections
import json
import os
import pathlib
import stat
from typing import Any, BinaryIO, Literal

Kind = Literal[
    "missing", "unreadable", "irregular", "damaged", "foreign", "hostile", "pointer", "unwritable"
]
"""What a `CheckpointError` is about, for programs that go on:

* missing: there is no such file or directory;
* unreadable: the system refuses it;
* irregular: it is a directory, a pipe or a device, and no file;
* damaged: it is cut off, changed underneath, or not valid by its format;
* foreign: it is valid and belongs to another model, or to none that this library reads;
* hostile: it asks for what no tensor file needs, and would run code where it is unpickled;
* pointer: it is a Git LFS pointer, which stands for the file;
* unwritable: a target exists already, or the system refuses to write it.
"""

LFS_PROBLEM = "is a Git LFS pointer, a few lines of text that stand for the file"
LFS_REMEDY = "fetch the files themselves: `git lfs pull` in that directory"

_BLOCK_BYTES = 1 << 20
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"
LFS_HEAD_BYTES = len(_LFS_HEAD)
"""Of the beginning of a file, which show a Git LFS pointer."""

_TYPES = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_FLAGS = (
    os.O_RDONLY
    # Where the file became a pipe after it was looked at, opening would wait for a writer.
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class CheckpointError(ValueError):
    """Files on disk are missing, damaged or not what the model expects; the message names them.

    Attributes:
      path: The file or directory; None where no single one is at fault.
      problem: What was found, and what was expected.
      remedy: What to do; "" if there is nothing to say.
      kind: Which sort of fault, see `Kind`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        problem: str,
        remedy: str = "",
        kind: Kind = "damaged",
    ):
        # As arguments of the exception, so that it can be pickled and copied.
        super().__init__(path, problem, remedy, kind)
        self.path = None if path is None else pathlib.Path(path)
        self.problem, self.remedy, self.kind = printable(problem), printable(remedy), kind

    def __str__(self) -> str:
        place = "" if self.path is None else f"{printable(str(self.path))}: "
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{place}{self.problem}{remedy}"


def printable(text: str) -> str:
    """Returns a text of others on one line that a terminal shows: what it would obey is escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def open_regular(path: str | os.PathLike[str]) -> int:
    """Opens a regular file, or a link to one, to be read, and returns its descriptor.

    Never waits for a pipe's writer and never opens a device.

    Raises:
      CheckpointError: If it is something else, or cannot be opened.
    """
    try:
        _check_type(path, os.stat(path).st_mode)
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        _check_type(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file as `open_regular` does, as an object with methods.

    Raises:
      CheckpointError: As `open_regular`.
    """
    return os.fdopen(open_regular(path), "rb")


def read_bounded(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Reads a whole regular file, and no more of it than `most_bytes`.

    Raises:
      CheckpointError: If it is longer, is a Git LFS pointer, is no regular file, or cannot be read.
    """
    data = b""
    with open_file(path) as file:
        try:
            # Python takes the memory of what is asked for, however little there is.
            size = min(os.fstat(file.fileno()).st_size, most_bytes) + 1
            while len(data) <= most_bytes and (block := file.read(size)):
                data, size = data + block, _BLOCK_BYTES
        except OSError as error:
            raise unreadable(path, error) from error
    if len(data) > most_bytes:
        raise CheckpointError(
            path,
            f"is longer than {most_bytes:,} bytes, which no such file is",
            "is it another file under this name?",
            "foreign",
        )
    if is_lfs_pointer(data):
        raise lfs_pointer(path)
    return data


def is_lfs_pointer(data: bytes | bytearray) -> bool:
    """Whether the content of a file, or its beginning, is that of a Git LFS pointer."""
    return data.startswith(_LFS_HEAD)


def lfs_pointer(path: str | os.PathLike[str]) -> CheckpointError:
    """Returns the error of a Git LFS pointer in a file's place."""
    return CheckpointError(path, LFS_PROBLEM, LFS_REMEDY, "pointer")


def unreadable(path: str | os.PathLike[str], error: OSError) -> CheckpointError:
    """Returns what an error of the system means for a file that should be read."""
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    problem, remedy = f"cannot be read: {error.strerror}", "check the path and its permissions"
    if is_missing and os.path.islink(path):
        problem = f"is a link to {os.readlink(path)}, which is not there"
        remedy = "put the file there, or remove the link"
    return CheckpointError(path, problem, remedy, "missing" if is_missing else "unreadable")


def listed(directory: str | os.PathLike[str]) -> list[str]:
    """Returns the names in a directory.

    Raises:
      CheckpointError: If it cannot be listed.
    """
    try:
        return os.listdir(directory)
    except OSError as error:
        raise unreadable(directory, error) from error


def json_object(text: bytes | str) -> dict[str, Any]:
    """Reads a JSON object in which no name occurs twice.

    An integer of very many digits, which Python takes long to read, comes as a `LongInteger`.

    Raises:
      ValueError: If the text is none; the message begins "is not JSON" or "must be".
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=unique_names, parse_int=_integer)
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deeply") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object, found {found!r:.80}")
    return found


class LongInteger(str):
    """The digits of an integer that is too long to be one that anybody meant."""

    def __repr__(self) -> str:
        return f"an integer of {len(self.lstrip('-')):,} digits"


_MOST_DIGITS = 40


def _integer(digits: str) -> int | LongInteger:
    return int(digits) if len(digits) <= _MOST_DIGITS else LongInteger(digits)


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dictionary of a JSON object's pairs: an `object_pairs_hook`.

    Raises:
      ValueError: If a name occurs twice, of which one value would be lost.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"must have each name once, found {name!r:.80} twice")
    return found


def _check_type(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = next((words for is_type, words in _TYPES if is_type(mode)), "something else")
        raise CheckpointError(path, f"not a regular file but {what}", "move it away", "irregular")
