"""What is kept of files that are not finished: which pieces are whole, and where they lie.

The directory they are put together in is found again by a note in the user's private directory,
locked while a process writes; the journal in it has a line for each piece that is complete.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, TextIO

from grok1.files import CheckpointError
from grok1.machine.cache_directory import private_directory
from grok1.machine.safe_files import is_own_directory, new_directory, open_plain

try:
    import fcntl
except ModuleNotFoundError:  # on Windows, where no note outlives its process
    fcntl = None

_JOURNAL_LINE = re.compile(r"(\d{1,9}) (\d{1,10}) (.*)\n")


class Journal:
    """The checksums of the pieces that are complete, one line each behind the identity.

    Attributes:
      notes: What was wrong with the journal of the run before.
    """

    def __init__(self, path: pathlib.Path, identity: dict[str, Any]):
        first = json.dumps(identity, sort_keys=True) + "\n"
        self.notes: list[str] = []
        self._done: dict[tuple[str, int], int] = {}
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        self._file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        lines = list(self._file)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # The process was killed while it wrote this line.
        if lines and lines[0] != first and _is_identity(lines[0]):
            self._file.close()
            raise CheckpointError(
                path.parent,
                "holds an unfinished conversion with other sources or options "
                f"({lines[0].strip()[:200]})",
                "finish that one, or delete this directory to start anew",
                "unwritable",
            )
        for number, line in enumerate(lines):
            found = _JOURNAL_LINE.fullmatch(line)
            if number and found:
                self._done[found[3], int(found[1])] = int(found[2])
            elif number or line != first:
                self.notes.append(
                    f"{path}: line {number + 1} was damaged, found {line!r:.80}; the conversion "
                    "was begun anew"
                )
                lines.clear()
                self._done.clear()
                break
        if not lines:
            _remove_all(path.parent / "files")
        self._file.seek(0)
        self._file.truncate()
        self._file.write("".join(lines) or first)
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def checksum(self, name: str, number: int) -> int | None:
        """Returns the CRC-32 of a piece of a file; None for one that is not complete."""
        return self._done.get((name, number))

    def add(self, name: str, number: int, checksum: int) -> None:
        """Notes a piece that is complete."""
        self._done[name, number] = checksum
        self._file.write(f"{number} {checksum} {name}\n")
        self._file.flush()


def _is_identity(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class Note:
    """Says, in the user's private directory, where an unfinished target is put together.

    The directory is told by its number on the disk, not by its name alone, so that another that
    has come in its place is not taken for it.
    """

    def __init__(self, place: pathlib.Path, path: pathlib.Path, file: TextIO):
        self._place, self._path, self._file = place, path, file

    def directory(self) -> pathlib.Path | None:
        """Returns the directory of the run before, if it is still there."""
        self._file.seek(0)
        with contextlib.suppress(ValueError, TypeError):
            name, *number = json.loads(self._file.read())
            directory = self._place.with_name(name)
            if is_own_directory(directory) and _number(directory) == number:
                return directory
        return None

    def new_directory(self) -> pathlib.Path:
        """Makes a directory and notes it."""
        self._place.parent.mkdir(parents=True, exist_ok=True)
        directory = new_directory(self._place.parent, self._place.name)
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps([directory.name, *_number(directory)]))
        self._file.flush()
        return directory

    def remove(self) -> None:
        """Removes the directory and the note."""
        directory = self.directory()
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def noted(target: Any, place: pathlib.Path) -> Iterator[Note]:
    """Yields the note of a target, locked; without a private directory nothing outlives this."""
    with contextlib.ExitStack() as stack:
        is_kept = True
        try:
            private = private_directory()
        except (OSError, RuntimeError):
            is_kept = False
            private = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name = hashlib.sha256(os.fsencode(place)).hexdigest()
        path = private / f"convert-{name}"
        file = stack.enter_context(open(open_plain(path, os.O_RDWR | os.O_CREAT), "r+"))
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder may have finished, and removed this file, since it was opened.
            is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            is_current = False
        if not is_current:
            raise CheckpointError(
                target,
                "another process is writing it now",
                "wait for that one, or choose another place",
                "unwritable",
            )
        note = Note(place, path, file)
        if not is_kept:
            stack.callback(note.remove)
        try:
            yield note
        finally:
            # Where nothing was begun, nothing is to be found again.
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _number(directory: pathlib.Path) -> list[int]:
    found = directory.lstat()
    return [found.st_dev, found.st_ino]


def _remove_all(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
