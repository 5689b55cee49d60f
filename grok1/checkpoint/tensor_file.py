"""One tensor file: a pickle that is read without unpickling it, and written byte for byte.

A file holds one pickle (protocol 4) of a float32 `numpy.ndarray`, or of a `QuantizedWeight8bit`
with an int8 `weight` and bfloat16 `scales`. Unpickling runs whatever a file names, so nothing here
does: a small stack machine notes which objects the opcodes would create, and the notes must be
exactly those of a valid file. The payload (up to 3 GB) is skipped, and read later.

Opcodes and frames: Python's `pickletools` and PEP 3154.
"""

import contextlib
import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from grok1.checkpoint.symbolic_pickle import (
    Bytes,
    Global,
    Object,
    PickleRefusedError,
    describe,
    read_notes,
    write_notes,
)
from grok1.files import (
    LFS_HEAD_BYTES,
    CheckpointError,
    is_lfs_pointer,
    lfs_pointer,
    open_file,
    open_regular,
    unreadable,
)
from grok1.nn.manifest import TensorSpec

DTYPES = {
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "uint8": np.dtype(np.uint8),
    "float16": np.dtype(np.float16),
}
"""The types of stored arrays, by name."""

CHANGED = "do not change a checkpoint that is in use; load it again"
"""The remedy where a file is not as it was."""


class ArraySpan(NamedTuple):
    """Where the elements of one array lie in a file, in C order, little-endian.

    Attributes:
      offset: Bytes from the start of the file to the first element.
      shape: Shape of the array, each dimension at least 1.
      dtype: "float32", "int8" or "bfloat16".
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class DataFile(Protocol):
    """A file with arrays in it, as it was when its header was read."""

    @property
    def path(self) -> pathlib.Path:
        """The file."""
        ...

    @property
    def file_size(self) -> int:
        """Its length in bytes when it was read."""
        ...

    @property
    def modified(self) -> int:
        """When it had been written to last, in nanoseconds, as its file system says."""
        ...


class TensorHeader(NamedTuple):
    """What one tensor file holds.

    Attributes:
      path: The file.
      file_size: Its length in bytes when it was read.
      modified: When it had been written to last, in nanoseconds.
      values: The float32 or int8 elements.
      scales: The bfloat16 scales of an int8 tensor, else None.
    """

    path: pathlib.Path
    file_size: int
    modified: int
    values: ArraySpan
    scales: ArraySpan | None


def read_header(path: str | os.PathLike[str]) -> TensorHeader:
    """Finds the arrays in a tensor file; executes, imports and unpickles nothing.

    Bounded work whatever the file holds: a few hundred opcodes, and no payload.

    Raises:
      CheckpointError: If the file cannot be read, or is not byte for byte a valid tensor file;
        the message gives the byte offset, what was found, what was expected and what to do.
    """
    path = pathlib.Path(path)
    with open_file(path) as file:
        try:
            found = os.fstat(file.fileno())
            return _header(path, found, read_notes(file, found.st_size, _ALLOWED))
        except PickleRefusedError as error:
            problem = f"byte {error.offset}: {error.problem}"
            if error.hostile:
                raise CheckpointError(path, problem, _DISTRUST, "hostile") from None
            file.seek(0)
            if is_lfs_pointer(file.read(LFS_HEAD_BYTES)):
                raise lfs_pointer(path) from None
            raise CheckpointError(path, problem, _DAMAGED) from None
        except OSError as error:
            raise unreadable(path, error) from error


@contextlib.contextmanager
def open_unchanged(file: DataFile) -> Iterator[int]:
    """Opens a file for `read_at` and yields its descriptor.

    Raises:
      CheckpointError: If it cannot be opened, or has changed since its header was read, or while it
        was open.
    """
    descriptor = open_regular(file.path)
    try:
        check_unchanged(file, os.fstat(descriptor))
        yield descriptor
        check_unchanged(file, os.fstat(descriptor))
    finally:
        os.close(descriptor)


def check_unchanged(file: DataFile, found: os.stat_result) -> None:
    """Checks that a file is the one whose header was read, and as it was then.

    Raises:
      CheckpointError: If its length is another, or it has been written to.
    """
    if found.st_size != file.file_size:
        raise CheckpointError(
            file.path,
            f"has {found.st_size} bytes, expected the {file.file_size} bytes it had when its "
            "header was read",
            CHANGED,
        )
    if found.st_mtime_ns != file.modified:
        raise CheckpointError(file.path, "has been written to since its header was read", CHANGED)


def read_at(file: DataFile, descriptor: int, offset: int, buffer: memoryview) -> None:
    """Fills a buffer from a place in an open file.

    Unlike a mapped file, one that is cut off while it is read is an error and not a crash.

    Args:
      file: The file, for messages.
      descriptor: Where it is open.
      offset: Bytes from its start.
      buffer: Bytes to fill.

    Raises:
      CheckpointError: If the file cannot be read, or ends before the buffer does.
    """
    while buffer:
        try:
            count = _read(descriptor, buffer[:_READ_BYTES], offset)
        except OSError as error:
            raise CheckpointError(
                file.path,
                f"cannot be read at byte {offset}: {error.strerror}",
                "see whether its disk is in order",
                "unreadable",
            ) from error
        if not count:
            raise CheckpointError(
                file.path,
                f"ends at byte {offset}, expected the {file.file_size} bytes it had when its "
                "header was read",
                CHANGED,
            )
        buffer, offset = buffer[count:], offset + count


def _read(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Reads to a buffer, and returns how many bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    # On Windows. Nobody else uses the descriptor, so it may be moved.
    with io.FileIO(descriptor, closefd=False) as file:
        file.seek(offset)
        return file.readinto(buffer) or 0


def read_span(
    file: DataFile, span: ArraySpan, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Reads elements of one array of a file into memory of their own.

    Args:
      file: The file.
      span: One of its arrays.
      start: First row to read, along the first axis.
      stop: Behind the last row; None for the array's last.

    Returns:
      A new array, `span.shape` with the first axis cut.

    Raises:
      CheckpointError: If the file cannot be read, or its length has changed since its header was
        read.
    """
    stop = span.shape[0] if stop is None else stop
    array = np.empty((stop - start, *span.shape[1:]), DTYPES[span.dtype])
    offset = span.offset + start * (span.nbytes // span.shape[0])
    with open_unchanged(file) as descriptor:
        read_at(file, descriptor, offset, array.reshape(-1).view(np.uint8).data)
    return array


def write_tensor(
    path: str | os.PathLike[str], values: np.ndarray, scales: np.ndarray | None = None
) -> None:
    """Writes a tensor file byte for byte as the released files are; replaces an existing file.

    The payload is streamed from the array; only an array that is not C-contiguous is copied.

    Args:
      path: File to write.
      values: A float32 tensor, or an int8 weight.
      scales: The bfloat16 scales of an int8 weight, else None.

    Raises:
      ValueError: If the dtypes are not one of these two combinations, or a shape is empty or too
        large.
      OSError: If the disk refuses; a partial file may be left.
    """
    dtypes = str(values.dtype), None if scales is None else str(scales.dtype)
    if dtypes not in (("float32", None), ("int8", "bfloat16")):
        raise ValueError(
            f"{pathlib.Path(path).name}: values are {dtypes[0]} with scales {dtypes[1]}, expected "
            "float32 values without scales or int8 values with bfloat16 scales"
        )
    pieces = tensor_file_pieces(values.shape, None if scales is None else scales.shape)
    payloads = iter((values, scales))
    with open(path, "wb") as file:
        for piece in pieces:
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                # A view of bytes, because bfloat16 has no buffer of its own to write from.
                file.write(np.ascontiguousarray(next(payloads)).reshape(-1).view(np.uint8).data)


def tensor_file_size(spec: TensorSpec) -> int:
    """Returns the length in bytes of the file that `write_tensor` makes of such a tensor.

    Raises:
      ValueError: If the shape is not one that `write_tensor` writes.
    """
    pieces = tensor_file_pieces(spec.shape, spec.scales_shape)
    return sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)


def tensor_file_pieces(
    shape: tuple[int, ...], scales_shape: tuple[int, ...] | None
) -> list[bytes | int]:
    """Returns a tensor file as the bytes around its payloads, and each payload as its length.

    Args:
      shape: Shape of a float32 tensor, or of an int8 weight.
      scales_shape: Shape of the scales of an int8 weight, else None.

    Raises:
      ValueError: If a shape is not one that a tensor file has.
    """

    def array(dtype: str, shape: tuple[int, ...]) -> Object:
        if not _is_shape(shape):
            raise ValueError(f"found the shape {shape}, expected {_ANY_SHAPE}")
        elements = Bytes(0, ArraySpan(0, shape, dtype).nbytes)
        return _array(dtype, shape, elements, _RECONSTRUCT[0], Bytes(0, 1, b"b"), False)

    if scales_shape is None:
        return write_notes(array("float32", shape))
    return write_notes(_weight(array("int8", shape), array("bfloat16", scales_shape)))


_DAMAGED = "the file is damaged or no Grok-1 tensor: download it again"
_DISTRUST = "nothing was executed. Do not trust this file: download it again"
_READ_BYTES = 1 << 26  # Of one call; Linux reads at most 2 GiB at a time.
_MAX_NDIM = 32  # NumPy 1's own limit.
_MAX_SIZE = 2**31 - 1  # Of one dimension; larger ones take other opcodes.


@dataclasses.dataclass(frozen=True, repr=False)
class _Rule:
    """Stands, in the notes of a valid file, for every value that it accepts."""

    text: str
    accepts: Callable[[Any], bool]

    def __repr__(self) -> str:
        return self.text


def _is_shape(value: Any) -> bool:
    sizes = value if isinstance(value, tuple) and len(value) <= _MAX_NDIM else ()
    return bool(sizes) and all(type(size) is int and 1 <= size <= _MAX_SIZE for size in sizes)


_NDARRAY = Global("numpy", "ndarray")
_DTYPE = Global("numpy", "dtype")
_BFLOAT16 = Global("ml_dtypes", "bfloat16")
_QUANTIZED = Global("__main__", "QuantizedWeight8bit")
# NumPy 1 wrote the released files; NumPy 2 writes the second.
_RECONSTRUCT = tuple(Global(f"numpy.{x}.multiarray", "_reconstruct") for x in ("core", "_core"))
_ALLOWED = (*_RECONSTRUCT, _NDARRAY, _DTYPE, _BFLOAT16, _QUANTIZED)
# The first argument of numpy.dtype; byte order, ..., size, alignment and flags of its state.
_DTYPE_NOTES = {
    "float32": ("f4", ("<", None, None, None, -1, -1, 0)),
    "int8": ("i1", ("|", None, None, None, -1, -1, 0)),
    "bfloat16": (_BFLOAT16, ("<", None, None, None, 2, 2, 64)),
}
_ANY_SHAPE = _Rule(f"a shape of 1 to {_MAX_NDIM} integers from 1 to {_MAX_SIZE}", _is_shape)
_ANY_BYTES = _Rule("the bytes of the elements", lambda note: isinstance(note, Bytes))
_ANY_RECONSTRUCT = _Rule(describe(_RECONSTRUCT[0]), lambda note: note in _RECONSTRUCT)
_PLACEHOLDER = _Rule("b'b'", lambda note: isinstance(note, Bytes) and note.content == b"b")
_C_ORDER = _Rule("False (C order, not Fortran order)", lambda note: note is False)


def _array(
    dtype: str,
    shape: Any = _ANY_SHAPE,
    elements: Any = _ANY_BYTES,
    reconstruct: Any = _ANY_RECONSTRUCT,
    placeholder: Any = _PLACEHOLDER,
    is_fortran: Any = _C_ORDER,
) -> Object:
    """Notes how NumPy pickles an array: made as an empty one of dtype `b`, then given its state."""
    code, dtype_state = _DTYPE_NOTES[dtype]
    described = Object("REDUCE", _DTYPE, (code, False, True), (3, *dtype_state))
    state = (1, shape, described, is_fortran, elements)
    return Object("REDUCE", reconstruct, (_NDARRAY, (0,), placeholder), state)


def _weight(values: Object, scales: Object) -> Object:
    return Object("NEWOBJ", _QUANTIZED, (), {"weight": values, "scales": scales})


def _header(path: pathlib.Path, status: os.stat_result, root: Any) -> TensorHeader:
    """Checks the note of the pickled object and takes the arrays from it."""
    file = path, status.st_size, status.st_mtime_ns
    if isinstance(root, Object) and root.function == _QUANTIZED:
        _check(root, _weight(_array("int8"), _array("bfloat16")))
        weight, scales = root.state["weight"], root.state["scales"]
        return TensorHeader(*file, _span(weight, "int8"), _span(scales, "bfloat16"))
    _check(root, _array("float32"))
    return TensorHeader(*file, _span(root, "float32"), None)


def _check(
    found: Any, valid: Any, what: str = "the object", offset: int = 0, of: Any = None
) -> None:
    """Refuses a note that differs from `valid`; goes no deeper than `valid` does.

    `what` names it for the message, as a part of what `of` makes if that is given.
    """
    accepted = type(found) is type(valid)
    match valid:
        case _Rule():
            accepted = valid.accepts(found)
        case Object() if accepted:
            for part in ("opcode", "function", "args", "state"):
                pair = getattr(found, part), getattr(valid, part)
                _check(*pair, part, found.offset, valid.function)
        case tuple() if accepted and len(found) == len(valid):
            for item, rule in zip(found, valid, strict=True):
                _check(item, rule, what, offset, of)
        case dict() if accepted and found.keys() == valid.keys():
            for key, rule in valid.items():
                _check(found[key], rule, key, offset)
        case _:
            accepted = accepted and found == valid
    if not accepted:
        whose = "" if of is None else f" of {describe(of)}"
        problem = f"{what}{whose}: found {describe(found)}, expected {describe(valid)}"
        raise PickleRefusedError(offset, problem)


def _span(array: Object, dtype: str) -> ArraySpan:
    _, shape, _, _, payload = array.state
    span = ArraySpan(payload.offset, shape, dtype)
    if payload.length != span.nbytes:
        raise PickleRefusedError(
            payload.offset,
            f"{payload.length} bytes of elements, expected {span.nbytes} for {dtype}{list(shape)}",
        )
    return span
