"""Large files written piece by piece: resumable, atomic, verified, by one process at a time.

Beside the target `NAME` lies `.NAME.partial-...` while it is written: the files, and a journal with
a line for each piece that is complete. The directory's name is random and only its user may enter
it, so that nobody can have prepared it; a note in the user's private directory says which it is,
and is locked meanwhile. Whatever ends the process, the same call continues with the pieces that the
journal lacks. At the end every piece is read back from the disk and the files are moved to their
place in one step.
"""

import errno
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from grok1.care.unfinished import Journal, noted
from grok1.files import CheckpointError
from grok1.machine.progress import progress_bar
from grok1.machine.safe_files import absolute, move_new, open_plain

_READ_BYTES = 1 << 26


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


class Checks(NamedTuple):
    """What is looked at before files are written and after; both raise if something is wrong.

    Attributes:
      source: Called when the target can be written, and before anything is made.
      target: Called with the complete target under its temporary name.
    """

    source: Callable[[], None]
    target: Callable[[pathlib.Path], None]


def write_files(
    target: str | os.PathLike[str],
    files: list[OutputFile],
    identity: dict[str, Any],
    checks: Checks,
    progress: bool,
    keep_in: Callable[[pathlib.Path], None] = lambda directory: None,
) -> list[str]:
    """Writes files to a new directory, or one new file, whole or not at all.

    Args:
      target: The directory, absent or empty; or the file, absent, if `files` is one without a name.
      files: What to write.
      identity: What the content depends on; an unfinished target of another identity is refused.
      checks: What may refuse it.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.
      keep_in: Told, before anything is made, a directory for what making it has to keep until all
        is written; of an unfinished target it is the same as before.

    Returns:
      What there is to know about how it went, a sentence each.

    Raises:
      CheckpointError: If the target exists, another process writes it, the disk refuses or is too
        small, or does not return what was written; the message says how to go on.
    """
    place = absolute(target)
    total = sum(piece.nbytes for file in files for piece in file.pieces)
    staging = None
    try:
        with noted(target, place) as note:
            staging = note.directory()
            is_free = not _is_there(place) or (files[0].name and _is_empty_directory(place))
            if is_free and os.path.ismount(place):
                raise CheckpointError(
                    target,
                    "is where a disk is mounted, and a directory is put in its place as a whole",
                    "give a new directory on that disk, nothing was written",
                    "unwritable",
                )
            if not is_free:
                if staging is not None and not os.path.lexists(_path(staging, "")):
                    note.remove()  # Of a run that was stopped after its last step.
                raise CheckpointError(
                    target,
                    "already exists",
                    "choose a new place, nothing was written",
                    "unwritable",
                )
            checks.source()
            if staging is None:
                # Before there is a directory, which would stay where no room was.
                _check_space(target, next(path for path in place.parents if path.is_dir()), total)
                staging = note.new_directory()
            with Journal(staging / "journal", identity) as journal:
                _check_names(staging, files)
                _check_space(target, staging, _missing(files, journal))
                keep_in(staging)
                _write(staging, files, journal, total, progress)
                _verify(staging, files, journal, total, progress)
            _check_names(staging, files)
            checks.target(_path(staging, ""))
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


def _missing(files: list[OutputFile], journal: Journal) -> int:
    """Bytes of the pieces that are not complete."""
    return sum(
        piece.nbytes
        for file in files
        for number, piece in enumerate(file.pieces)
        if journal.checksum(file.name, number) is None
    )


def _check_space(target: Any, directory: pathlib.Path, missing: int) -> None:
    free = shutil.disk_usage(directory).free
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
        output.seek(offset)
        written = output.write(rest)
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
        file.seek(offset)
        data = file.read(min(end - offset, _READ_BYTES))
        if not data:
            return -1
        checksum, offset = zlib.crc32(data, checksum), offset + len(data)
    return checksum


def _path(staging: pathlib.Path, name: str) -> pathlib.Path:
    return staging / "files" / name if name else staging / "files"


def _bar(total: int, what: str, progress: bool) -> tqdm:
    return progress_bar(total, what, progress)


def _sync(directory: pathlib.Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # on Windows a directory cannot be opened
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_there(place: pathlib.Path) -> bool:
    """As `os.path.lexists`, which says no to names that are too long to become a file's.

    Raises:
      OSError: If there can be nothing, or nobody can say.
    """
    try:
        place.lstat()
    except FileNotFoundError:
        return False
    return True


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
