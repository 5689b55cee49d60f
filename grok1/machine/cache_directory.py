"""Where machine code and notes of this user are kept between processes: one private directory.

It is `$XDG_CACHE_HOME/grok1`, or `~/.cache/grok1`, with mode 700. A checkpoint's directory is never
written to.

What lies there is executed, so the directory is opened once, looked at, and held: its files are
reached through it and not by their path, of which another user may be able to change a part between
a look and a use.
"""

import contextlib
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator

_DESCRIPTORS = pathlib.Path("/proc/self/fd")
_ELSEWHERE = "set XDG_CACHE_HOME to a directory that you can write to"


class PrivateDirectory:
    """A directory of this user's that is held open; nobody else can write to what it holds.

    Attributes:
      path: Where it was found, for messages.
    """

    def __init__(self, path: pathlib.Path, descriptor: int):
        self.path, self._descriptor = path, descriptor

    def names(self) -> list[str]:
        """Returns the names of its files, sorted."""
        return sorted(os.listdir(self._descriptor))

    def read(self, name: str) -> bytes | None:
        """Returns what a file holds; None if there is no regular file of this user's own.

        Raises:
          OSError: If it cannot be read.
        """
        # Without waiting, for a pipe that nobody writes to.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = open(os.open(name, flags, dir_fd=self._descriptor), "rb")  # noqa: SIM115
        except OSError:
            return None
        with file:
            found = os.fstat(file.fileno())
            is_own = found.st_uid == os.getuid() and not found.st_mode & 0o022
            return file.read() if stat.S_ISREG(found.st_mode) and is_own else None

    @contextlib.contextmanager
    def new_file(self, data: bytes) -> Iterator[str]:
        """Writes a file, to the disk itself, which is gone after the block unless it is renamed.

        Yields:
          Its name, which nobody can foretell.

        Raises:
          OSError: If it cannot be written; nothing is left behind.
        """
        name = f"unfinished-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield name
        finally:
            self.remove(name)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file that other processes see either whole or not at all.

        Raises:
          OSError: If it cannot be written; nothing is left behind.
        """
        with self.new_file(data) as unfinished:
            self.rename(unfinished, name)

    def rename(self, name: str, new_name: str) -> None:
        """Gives a file another name, in place of what had it.

        Raises:
          OSError: If that cannot be done.
        """
        os.replace(name, new_name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there.

        Raises:
          OSError: If that cannot be done.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def touch(self, name: str) -> None:
        """Notes that a file was used.

        Raises:
          OSError: If that cannot be done.
        """
        os.utime(name, dir_fd=self._descriptor)

    def last_use(self, name: str) -> float:
        """Returns when a file was used or written; 0 if another process has removed it."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return 0

    @property
    def is_executable(self) -> bool:
        """Whether libraries can be loaded from its file system."""
        return not os.fstatvfs(self._descriptor).f_flag & getattr(os, "ST_NOEXEC", 0)

    def path_of(self, name: str) -> str:
        """Returns a path for what takes no descriptor; it leads to this directory, and no other.

        Raises:
          PermissionError: Where the system has no such paths, if another user can change where the
            directory's own path leads.
        """
        held = _DESCRIPTORS / str(self._descriptor)
        if held.exists():
            return str(held / name)
        path = self.path.resolve()
        for parent in path.parents:
            found = parent.stat()
            # In a directory such as /tmp an entry is its owner's alone.
            is_open = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
            if is_open or found.st_uid not in (0, os.getuid()):
                raise PermissionError(
                    f"{self.path}: {parent}, above it, can be changed by others; set "
                    "XDG_CACHE_HOME to a directory below ones that only you and root can change"
                )
        return str(path / name)


@contextlib.contextmanager
def held_directory() -> Iterator[PrivateDirectory]:
    """Opens the directory, made if missing; nobody else may write to it: its files are executed.

    Raises:
      PermissionError: If it is someone else's, a link, or open to others.
      OSError: If it cannot be made, or the system has no such directories.
      RuntimeError: If the user has no home directory.
    """
    if not hasattr(os, "O_DIRECTORY"):
        raise OSError("a directory that is no one else's can be held open on Unix alone")
    path = _place()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be made: {error.strerror}; {_ELSEWHERE}") from error
    advice = f"{path} is not private; make it a directory of yours, mode 700"
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except OSError as error:
        raise PermissionError(advice) from error
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(advice)
        yield PrivateDirectory(path, descriptor)
    finally:
        os.close(descriptor)


def _place() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if os.path.isabs(base):
        return pathlib.Path(base) / "grok1"
    try:
        return pathlib.Path.home() / ".cache" / "grok1"
    except RuntimeError as error:
        raise RuntimeError(f"this user has no home directory; {_ELSEWHERE}") from error


def private_directory() -> pathlib.Path:
    """Returns the path of the directory, made if missing, for what is not executed.

    Raises:
      PermissionError: If it is someone else's, a link, or open to others.
      OSError: If it cannot be made.
      RuntimeError: If the user has no home directory.
    """
    with held_directory() as directory:
        return directory.path
