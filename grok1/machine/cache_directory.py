"""Where machine code made on this computer is kept between processes: one private directory.

It is `$XDG_CACHE_HOME/grok1`, or `~/.cache/grok1`, with mode 700. A checkpoint's directory is never
written to.
"""

import os
import pathlib
import stat
import tempfile


def private_directory() -> pathlib.Path:
    """Returns the directory, made if missing; nobody else may write to it: its files are executed.

    Raises:
      PermissionError: If it is someone else's, a link, or open to others.
      OSError: If it cannot be made.
      RuntimeError: If the user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    directory = root / "grok1"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{directory} is not private; make it a directory of yours, mode 700")
    return directory


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that other processes see either whole or not at all.

    Raises:
      OSError: If it cannot be written; nothing is left behind.
    """
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(unfinished, path)
    finally:
        pathlib.Path(unfinished).unlink(missing_ok=True)
