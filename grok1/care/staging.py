"""Large files written piece by piece: resumable, atomic, verified, by one process at a time.

Beside the target `NAME` lies `.NAME.partial` while it is written: the files, a lock that dies with
its process, and a journal with a line for each piece that is complete. Whatever ends the process,
the same call continues with the pieces that the journal lacks. At the end every piece is read back
from the disk and the files are moved to their place in one step.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from grok1.files import CheckpointError

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


def write_files(
    target: str | os.PathLike[str],
    files: list[OutputFile],
    identity: dict[str, Any],
    check: Callable[[pathlib.Path], None],
    progress: bool,
) -> None:
    """Writes files to a new directory, or one new file, whole or not at all.

    Args:
      target: The directory, absent or empty; or the file, absent, if `files` is one without a name.
      files: What to write.
      identity: What the content depends on; an unfinished target of another identity is refused.
      check: Called with the complete target under its temporary name; raises if it is not valid.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Raises:
      CheckpointError: If the target exists, another process writes it, the disk refuses or is too
        small, or does not return what was written; the message says how to go on.
    """
    place = pathlib.Path(os.path.abspath(target))
    staging = place.with_name(f".{place.name}.partial")
    total = sum(piece.nbytes for file in files for piece in file.pieces)
    try:
        with _locked(target, staging):
            if place.exists() and not (place.is_dir() and files[0].name and not os.listdir(place)):
                if not _path(staging, "").exists():
                    _remove(staging)  # Of a run that was stopped after its last step.
                raise CheckpointError(
                    target,
                    "already exists",
                    "choose a new place, nothing was written",
                    "unwritable",
                )
            with _Journal(staging / "journal", identity) as journal:
                _check_space(target, staging, files, journal)
                _write(staging, files, journal, total, progress)
                _verify(staging, files, journal, total, progress)
            check(_path(staging, ""))
            _path(staging, "").replace(place)
            _sync(place.parent)
            _remove(staging)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                target,
                f"{error.strerror} while writing {total:,} bytes",
                f"what is written is kept in {staging}: free some space and run the same command "
                "to continue, or delete that directory",
                "unwritable",
            ) from error
        raise CheckpointError(
            target,
            f"cannot be written: {error.strerror} ({error.filename or staging})",
            "choose a place that can be written, or run the same command to continue",
            "unwritable",
        ) from error


class _Journal:
    """The checksums of the pieces that are complete, one line each behind the identity."""

    def __init__(self, path: pathlib.Path, identity: dict[str, Any]):
        first = json.dumps(identity, sort_keys=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # The process was killed while it wrote this line.
        if lines and lines[0] != first + "\n":
            raise CheckpointError(
                path.parent,
                "holds an unfinished conversion with other sources or options "
                f"({lines[0].strip()[:200]})",
                "finish that one, or delete this directory to start anew",
                "unwritable",
            )
        if not lines:
            shutil.rmtree(path.parent / "files", ignore_errors=True)
            (path.parent / "files").unlink(missing_ok=True)
        self._done: dict[tuple[str, int], int] = {}
        for line in lines[1:]:
            number, checksum, name = line.rstrip("\n").split(" ", 2)
            self._done[name, int(number)] = int(checksum)
        path.write_text("".join(lines) or first + "\n")
        self._file = path.open("a")

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


@contextlib.contextmanager
def _locked(target: Any, staging: pathlib.Path) -> Iterator[None]:
    staging.mkdir(parents=True, exist_ok=True)
    with open(staging / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder may have finished, and removed this file, since it was opened.
            is_current = os.path.samestat(os.fstat(lock.fileno()), os.stat(staging / "lock"))
        except (BlockingIOError, FileNotFoundError):
            is_current = False
        if not is_current:
            raise CheckpointError(
                target,
                "another process is writing it now",
                "wait for that one, or choose another place",
                "unwritable",
            )
        yield


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
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as output:
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
            with open(path, "r+b", buffering=0) as output:
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
    # disable=None is quiet when stderr is no terminal.
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, disable=None if progress else True
    )


def _sync(directory: pathlib.Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(staging: pathlib.Path) -> None:
    for name in ("journal", "lock"):
        (staging / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        staging.rmdir()
