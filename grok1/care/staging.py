"""Large files written piece by piece: resumable, atomic, verified, by one process at a time.

Beside the target `NAME` lies `.NAME.partial-...` while it is written: the files, and a journal with
a line for each piece that is complete. The directory's name is random and only its user may enter
it, so that nobody can have prepared it; a note in the user's private directory says which it is,
and is locked meanwhile. Whatever ends the process, the same call continues with the pieces that the
journal lacks. At the end every piece is read back from the disk and the files are moved to their
place in one step.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from grok1.files import CheckpointError
from grok1.machine.cache_directory import private_directory
from grok1.machine.progress import progress_bar
from grok1.machine.safe_files import is_own_directory, move_new, new_directory, open_plain

_READ_BYTES = 1 << 26
_JOURNAL_LINE = re.compile(r"(\d{1,9}) (\d{1,10}) (.*)\n")


class Piece(NamedTuple):
    """A run of bytes of a file.

    Attributes:
      nbytes: Its length.
      make: Computes it, the same bytes at every call; an array stands for its bytes in C order.
    """

    nbytes: int
    make: Callable[[], bytes | np.ndarray]


class OutputFile(NamedTuple):
    """A file to write.

    Attributes:
      name: Path below the target; "" if the target is this one file.
      pieces: Its content.
    """

    name: str
    pieces: list[Piece]


def content(name: str, data: bytes) -> OutputFile:
    """Returns a small file whose content is known."""
    return OutputFile(name, [Piece(len(data), lambda: data)])


def write_files(
    target: str | os.PathLike[str],
    files: list[OutputFile],
    identity: dict[str, Any],
    check: Callable[[pathlib.Path], None],
    progress: bool,
) -> list[str]:
    """Writes files to a new directory, or one new file, whole or not at all.

    Args:
      target: The directory, absent or empty; or the file, absent, if `files` is one without a name.
      files: What to write.
      identity: What the content depends on; an unfinished target of another identity is refused.
      check: Called with the complete target under its temporary name; raises if it is not valid.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Returns:
      What there is to know about how it went, a sentence each.

    Raises:
      CheckpointError: If the target exists, another process writes it, the disk refuses or is too
        small, or does not return what was written; the message says how to go on.
    """
    place = pathlib.Path(os.path.abspath(target))
    total = sum(piece.nbytes for file in files for piece in file.pieces)
    staging = None
    try:
        with _noted(target, place) as note:
            staging = note.directory()
            if os.path.lexists(place) and not (files[0].name and _is_empty_directory(place)):
                if staging is not None and not os.path.lexists(_path(staging, "")):
                    note.remove()  # Of a run that was stopped after its last step.
                raise CheckpointError(
                    target,
                    "already exists",
                    "choose a new place, nothing was written",
                    "unwritable",
                )
            if staging is None:
                staging = note.new_directory()
            with _Journal(staging / "journal", identity) as journal:
                _check_names(staging, files)
                _check_space(target, staging, files, journal)
                _write(staging, files, journal, total, progress)
                _verify(staging, files, journal, total, progress)
            _check_names(staging, files)
            check(_path(staging, ""))
            _move(target, staging, place)
            _sync(place.parent)
            note.remove()
            return journal.notes
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "nothing of it is kept: free some space and run the same command again"
            if staging is not None and staging.is_dir():
                remedy = (
                    f"what is written is kept in {staging}: free some space and run the same "
                    "command to continue, or delete that directory"
                )
            raise CheckpointError(
                target, f"{error.strerror} while writing {total:,} bytes", remedy, "unwritable"
            ) from error
        raise CheckpointError(
            target,
            f"cannot be written: {error.strerror} ({error.filename or staging})",
            "choose a place that can be written, or run the same command to continue",
            "unwritable",
        ) from error


class _Journal:
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
        return self._done.get((name, number))

    def add(self, name: str, number: int, checksum: int) -> None:
        self._done[name, number] = checksum
        self._file.write(f"{number} {checksum} {name}\n")
        self._file.flush()


def _is_identity(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class _Note:
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
def _noted(target: Any, place: pathlib.Path) -> Iterator[_Note]:
    """Yields the note of a target, locked; without a private directory nothing outlives this."""
    # Not there on Windows, where the rest of the library is of use.
    import fcntl

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
        note = _Note(place, path, file)
        if not is_kept:
            stack.callback(note.remove)
        yield note


def _number(directory: pathlib.Path) -> list[int]:
    found = directory.lstat()
    return [found.st_dev, found.st_ino]


def _check_space(target, staging, files, journal) -> None:
    missing = sum(
        piece.nbytes
        for file in files
        for number, piece in enumerate(file.pieces)
        if journal.checksum(file.name, number) is None
    )
    free = shutil.disk_usage(staging).free
    if missing > free:
        raise CheckpointError(
            target,
            f"{missing:,} bytes are still to be written and the disk has {free:,} free",
            "free some space, or choose a place on another disk",
            "unwritable",
        )


def _write(staging, files, journal, total, progress) -> None:
    with _bar(total, "writing", progress) as bar:
        for file in files:
            path = _path(staging, file.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
            with open(descriptor, "r+b", buffering=0) as output:
                offset = 0
                for number, piece in enumerate(file.pieces):
                    if journal.checksum(file.name, number) is None:
                        _write_piece(output, offset, file.name, number, piece, journal)
                    offset += piece.nbytes
                    bar.update(piece.nbytes)
                os.ftruncate(output.fileno(), offset)
                os.fsync(output.fileno())


def _write_piece(output, offset, name, number, piece, journal) -> None:
    made = piece.make()
    if isinstance(made, np.ndarray):
        # As bytes, because bfloat16 has no buffer of its own to write from.
        made = np.ascontiguousarray(made).reshape(-1).view(np.uint8).data
    data = memoryview(made)
    assert len(data) == piece.nbytes, (name, number, len(data), piece.nbytes)
    checksum, rest = zlib.crc32(data), data
    while rest:
        written = os.pwrite(output.fileno(), rest, offset)
        rest, offset = rest[written:], offset + written
    journal.add(name, number, checksum)


def _verify(staging, files, journal, total, progress) -> None:
    """Reads back every piece; one that the disk has lost, in a power failure, is written again."""
    with _bar(total, "verifying", progress) as bar:
        for file in files:
            path = _path(staging, file.name)
            with open(open_plain(path, os.O_RDWR), "r+b", buffering=0) as output:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(output.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                offset = 0
                for number, piece in enumerate(file.pieces):
                    if _checksum(output, offset, piece.nbytes) != journal.checksum(
                        file.name, number
                    ):
                        _write_piece(output, offset, file.name, number, piece, journal)
                        os.fsync(output.fileno())
                        if _checksum(output, offset, piece.nbytes) != journal.checksum(
                            file.name, number
                        ):
                            raise CheckpointError(
                                path,
                                "the disk does not return what was written to it, at byte "
                                f"{offset}",
                                "use another disk",
                                "unwritable",
                            )
                    offset += piece.nbytes
                    bar.update(piece.nbytes)


def _checksum(file, offset: int, nbytes: int) -> int:
    checksum, end = 0, offset + nbytes
    while offset < end:
        data = os.pread(file.fileno(), min(end - offset, _READ_BYTES), offset)
        if not data:
            return -1
        checksum, offset = zlib.crc32(data, checksum), offset + len(data)
    return checksum


def _path(staging: pathlib.Path, name: str) -> pathlib.Path:
    return staging / "files" / name if name else staging / "files"


def _bar(total: int, what: str, progress: bool) -> tqdm:
    return progress_bar(total, what, progress)


def _sync(directory: pathlib.Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_empty_directory(place: pathlib.Path) -> bool:
    return place.is_dir() and not place.is_symlink() and not os.listdir(place)


def _move(target: Any, staging: pathlib.Path, place: pathlib.Path) -> None:
    try:
        move_new(_path(staging, ""), place)
    except FileExistsError as error:
        raise CheckpointError(
            target,
            "something has come there meanwhile",
            f"what is written is kept in {staging}: move the other away and run the same command "
            "to continue",
            "unwritable",
        ) from error


def _check_names(staging: pathlib.Path, files: list[OutputFile]) -> None:
    """Checks that the target will hold what was written, and nothing that came in between."""
    expected = {_path(staging, file.name) for file in files}
    top = _path(staging, "")
    for path in (top, *top.rglob("*")) if os.path.lexists(top) else ():
        if path not in expected and (path.is_symlink() or not path.is_dir()):
            raise CheckpointError(
                path,
                "is no file of this conversion",
                "move it away, and run the same command to continue",
                "foreign",
            )


def _remove_all(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
