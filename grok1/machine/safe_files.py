"""Files and directories written where someone else may have been first.

A checkpoint comes from elsewhere, and its directory may hold anything under any name: a link to a
file of the user's where a program would write. So nothing here opens a name that can be foretold:
what is written gets a random one, that nobody has prepared, and takes its place when it is whole.
"""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

# Controls, the line ends of Unicode, and halves of surrogate pairs.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
# What a file system says that knows no second name for a file.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


def is_plain(name: str) -> bool:
    """Whether a name from a file can be written in a line of text and shown on a terminal."""
    return not _CONTROL.search(name)


def absolute(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path from the root that leads where the system goes by this one.

    It goes through a link before it goes back by a `..` behind it.

    Raises:
      FileNotFoundError: If it leads from the current directory, which is no longer there.
    """
    try:
        return _absolute(pathlib.Path(path))
    except FileNotFoundError as error:
        words = "the current directory has been removed; give a path from the root"
        raise FileNotFoundError(errno.ENOENT, words, os.fspath(path)) from error


def _absolute(path: pathlib.Path) -> pathlib.Path:
    if ".." not in path.parts:
        return pathlib.Path(os.path.abspath(path))
    if path.name == "..":
        return pathlib.Path(os.path.realpath(path))
    # The last one is not followed: what takes its place takes that of a link.
    return pathlib.Path(os.path.realpath(path.parent)) / path.name


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a new file that takes the place of `path` once it is whole.

    A link at `path` is replaced, and what it points to is left alone. After an error nothing is
    left behind.

    Raises:
      OSError: If it cannot be written.
    """
    with _unfinished(absolute(path), os.replace) as file:
        yield file


@contextlib.contextmanager
def creating(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a new file that gets the name `path` once it is whole, if nothing has it by then.

    After an error nothing is left behind.

    Raises:
      FileExistsError: If there is anything at `path`, a link that leads nowhere included.
      OSError: If it cannot be written.
    """
    path = absolute(path)
    if os.path.lexists(path):
        raise _exists(path)
    with _unfinished(path, move_new) as file:
        yield file


@contextlib.contextmanager
def scratch_directory(beside: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a new directory on the file system of a place; it is removed at the end.

    Only this user may enter it, so that plain writing in it is safe.

    Args:
      beside: A directory, which holds the new one, or a path below one.

    Raises:
      OSError: If it cannot be made.
    """
    place = absolute(beside)
    parent = next(path for path in (place, *place.parents) if path.is_dir())
    directory = new_directory(parent, place.name)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def new_directory(parent: pathlib.Path, name: str) -> pathlib.Path:
    """Makes a directory `.NAME.partial-...` that only this user may enter, and returns it.

    Raises:
      OSError: If it cannot be made.
    """
    directory = parent / _random_name(name)
    directory.mkdir(mode=0o700)
    return directory


def is_own_directory(path: pathlib.Path) -> bool:
    """Whether there is a directory, no link to one, that only this user may enter."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        return False
    return not hasattr(os, "getuid") or (
        found.st_uid == os.getuid() and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    )


def open_plain(path: pathlib.Path, flags: int) -> int:
    """Opens a file and returns its descriptor; one that is made is as open as umask says.

    Raises:
      OSError: If it is a link, or no regular file, or has a second name, under which it may be a
        file that is not meant.
    """
    descriptor = os.open(path, flags | _NO_FOLLOW | _BINARY, 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file of its own, with one name", os.fspath(path))
    return descriptor


def move_new(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a file or a directory to a place on the same file system where nothing is.

    An empty directory counts as nothing where a directory is moved.

    Raises:
      FileExistsError: If something is there.
      OSError: If it cannot be moved.
    """
    is_directory = source.is_dir()
    try:
        if is_directory:
            source.rename(target)
            return
        # A rename would put the file in the place of another.
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        # Where a disk is mounted there is something that is no other's file.
        if os.path.lexists(target) and error.errno != errno.EBUSY:
            raise _exists(target) from error
        if is_directory or error.errno not in _NO_LINKS:
            raise
        source.rename(target)
        return
    source.unlink()


@contextlib.contextmanager
def _unfinished(
    path: pathlib.Path, finish: Callable[[pathlib.Path, pathlib.Path], object]
) -> Iterator[BinaryIO]:
    """Yields a new file beside `path`, and then lets `finish` give it that name."""
    unfinished = path.with_name(_random_name(path.name))
    descriptor = open_plain(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            # On the disk before it has its name, so that a power failure leaves it whole or absent.
            os.fsync(file.fileno())
        finish(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _exists(path: pathlib.Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))


def _random_name(name: str) -> str:
    # Cut, so that the longest name that a file may have leaves room for the rest.
    return f".{name[:40]}.partial-{secrets.token_hex(8)}"
