"""Standard input, output and error as they are found: closed, piped, or in another encoding."""

import codecs
import io
import json
import math
import os
import pathlib
import select
import stat
import sys
from typing import Any

from grok1.machine.output import on_descriptor

_LONGEST_TEXT = 1 << 26  # bytes, of which no context holds a hundredth
_PATIENCE = 3.0  # seconds that standard input may stay silent before it is left alone


def prepare() -> None:
    """Makes the standard streams ones that can be written to, whatever the caller has left open."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Else the next file that is opened takes its number, and messages go into it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    if type(sys.stdout) is io.TextIOWrapper and sys.stdout is sys.__stdout__:
        sys.stdout = on_descriptor(sys.stdout, sys.stdout.fileno())
    for stream in (sys.stdout, sys.stderr):
        errors = getattr(stream, "errors", "")
        # The second is Python's choice for LC_ALL=C: bytes as they are, letters not at all.
        fails = errors == "strict" or (errors == "surrogateescape" and not _is_utf8(stream))
        if fails and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    if type(sys.stdin) is io.TextIOWrapper and sys.stdin.errors == "strict":
        # Who takes the line says what is wrong with it, and goes on to the next.
        sys.stdin.reconfigure(errors="surrogateescape")


def hush() -> None:
    """Lets what is still to be written go nowhere: Python flushes once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def read_text(path: str) -> str:
    """Returns the text of a file, or of standard input if it is "-", without a byte-order mark.

    Raises:
      OSError: If it cannot be read.
      ValueError: If it is not UTF-8, or longer than any prompt; the message names the file.
    """
    if path == "-":
        return _text(sys.stdin.buffer.read(_LONGEST_TEXT + 1), "standard input")
    with pathlib.Path(os.path.expanduser(path)).open("rb") as file:
        return _text(file.read(_LONGEST_TEXT + 1), path)


def piped_text() -> str | None:
    """Returns what is piped into the program, or redirected; None if nothing is.

    A pipe that stays open and silent, as a service may have inherited, is left alone.
    """
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return None
    if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
        return None
    if stat.S_ISFIFO(kind) and os.name == "posix":
        ready, _, _ = select.select([sys.stdin], [], [], _PATIENCE)
        if not ready:
            print(
                f"grok1: nothing came from standard input for {_PATIENCE:.0f} s, which is no "
                "longer waited for; give --prompt-file - to wait",
                file=sys.stderr,
                flush=True,
            )
            return None
    return read_text("-") or None


def print_json(value: Any) -> None:
    """Prints a line of JSON: letters as they are where the output can hold them, no infinities."""
    ascii = not _is_utf8(sys.stdout)
    print(json.dumps(_finite(value), ensure_ascii=ascii, allow_nan=False), flush=True)


def _is_utf8(stream: Any) -> bool:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name.startswith("utf")


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _text(data: bytes, name: str) -> str:
    if len(data) > _LONGEST_TEXT:
        raise ValueError(f"{name}: more than {_LONGEST_TEXT >> 20} MB; give a text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        other = "UTF-16" if is_utf16 else "ISO-8859-1"
        raise ValueError(
            f"{name}: not UTF-8: byte 0x{data[error.start]:02x} at {error.start}; convert it, for "
            f"instance with: iconv -f {other} -t UTF-8"
        ) from None
