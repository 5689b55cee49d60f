"""Python's standard output on another descriptor, or with errors that name it."""

import io
from typing import Any, TypeGuard


class _Output(io.FileIO):
    """Standard output, whose errors say so: as Python raises them they name no file."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


def on_descriptor(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    """Returns a stream that writes as this one does, to a descriptor, and names itself in errors.

    Args:
      stream: It is flushed, and stays open.
      descriptor: An open one; closing the result leaves it open.
    """
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def writes_to(stream: Any, descriptor: int) -> TypeGuard[io.TextIOWrapper]:
    """Whether a stream is one of Python's own that writes to this descriptor."""
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    except (OSError, ValueError):  # a text in memory, or closed
        return False
