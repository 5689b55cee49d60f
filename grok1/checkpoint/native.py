"""Blocks of files read and sent in C++ (`transfer.cc`), so that threads do not wait for Python's.

A thread that reads needs the interpreter some ten times for 4 MiB, and sixteen of them wait for one
another most of the time. Here one call does a block, without the interpreter. It does what
`blocks.Block.read` and `sending` do, which are what runs where there is no compiler, and where
something is wrong: they find it again, and say what it is.
"""

import collections
import ctypes
import functools
import pathlib
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

import jax
import numpy as np

from grok1.machine import environment
from grok1.machine.announcement import hint
from grok1.machine.cuda_driver import Copier, refused
from grok1.machine.native_library import Sources, UnavailableError, loaded_library

_SOURCES = Sources("transfer", pathlib.Path(__file__).parent, "what reads files")
_LOCK = threading.Lock()
_DONE, _IMPOSSIBLE, _NOT_READ, _NOT_FINITE, _STOPPED = range(5)  # Outcome
_CALLS = ("cuCtxSetCurrent", "cuMemcpyHtoDAsync_v2", "cuMemcpy2DAsync_v2", "cuStreamSynchronize")
_LOOKS = {"float32": 1, "bfloat16": 2}  # Look

FLOATS = tuple(_LOOKS)
"""Names of the types whose elements it can look at."""


class _Rows(ctypes.Structure):
    _fields_ = [
        ("descriptor", ctypes.c_int32),
        ("look", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("stop", ctypes.c_void_p),
    ]


class _Piece(ctypes.Structure):
    _fields_ = [
        ("context", ctypes.c_void_p),
        ("out", ctypes.c_uint64),
        ("out_bytes", ctypes.c_int64),
        ("pitch", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]


class _Slot(ctypes.Structure):
    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("streams", ctypes.POINTER(ctypes.c_void_p)),
    ]


class _Report(ctypes.Structure):
    """What a call took, seconds of its thread, and how it ended."""

    _fields_ = [
        ("reading", ctypes.c_double),
        ("looking", ctypes.c_double),
        ("copying", ctypes.c_double),
        ("waiting", ctypes.c_double),
        ("outcome", ctypes.c_int32),
        ("status", ctypes.c_int32),
    ]


class Stop:
    """Says to threads that read that nobody wants it any more; they end within some megabytes."""

    def __init__(self) -> None:
        self._flag = ctypes.c_int32(0)

    def set(self) -> None:
        """Says so."""
        self._flag.value = 1

    def check(self) -> None:
        """Ends what a thread does.

        Raises:
          CancelledError: After `set`.
        """
        if self._flag.value:
            raise CancelledError

    @property
    def address(self) -> int:
        """Of the number that is not 0 after `set`."""
        return ctypes.addressof(self._flag)


class Rows(NamedTuple):
    """Rows of a file.

    Attributes:
      descriptor: Where it is open.
      offset: Of the first.
      num_rows: How many.
      num_bytes: Of each.
      stride: Bytes from one to the next.
      finite: Name of the type of their elements, which are to be finite; "" for any elements.
      stop: Ends it.
    """

    descriptor: int
    offset: int
    num_rows: int
    num_bytes: int
    stride: int
    finite: str
    stop: Stop

    def _native(self) -> _Rows:
        look = _LOOKS[self.finite] if self.finite else 0
        sizes = self.offset, self.num_rows, self.num_bytes, self.stride
        return _Rows(self.descriptor, look, *sizes, self.stop.address)


class Sent(NamedTuple):
    """Columns of rows, and where they go.

    Attributes:
      copier: Copies there.
      out: All rows of them, as `Copier.copy` takes it.
      column: The first of them, in bytes.
    """

    copier: Copier
    out: np.ndarray
    column: int

    def _native(self) -> _Piece:
        pitch, width = self.out.strides[0], self.out.shape[1] * self.out.itemsize
        size = (self.out.shape[0] - 1) * pitch + width
        out = self.out.ctypes.data
        return _Piece(self.copier.context, out, size, pitch, self.column, width)


_SPENT: collections.Counter[str] = collections.Counter()


def spent() -> dict[str, float]:
    """Returns the seconds that threads of this process have spent here so far, by what they did.

    They are "reading", "looking" at elements, "copying", which is to begin to, and "waiting" for
    memory that is still being copied out of.
    """
    with _LOCK:
        return dict(_SPENT)


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not environment.is_on("GROK1_NATIVE"):
        return None
    try:
        library = loaded_library(["grok1_read", "grok1_send"], _SOURCES)
    except (UnavailableError, OSError, RuntimeError) as error:
        # On a CPU the kernels have said so, and nothing is slower for it.
        if jax.default_backend() != "cpu":
            hint(f"reading files without native code, which is slower: {error}")
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.grok1_read.argtypes = [pointer, pointer, number, pointer]
    library.grok1_send.argtypes = [pointer, pointer, pointer, number, pointer, number, pointer]
    library.grok1_read.restype = library.grok1_send.restype = None
    return library


def is_available() -> bool:
    """Whether it can be called; builds the library when first asked.

    Says on stderr, once a process, why it cannot, unless all devices are CPUs. False without a word
    if GROK1_NATIVE=0.

    Raises:
      ValueError: If a variable of the environment has a value that means nothing.
    """
    with _LOCK:
        return _library() is not None


def read(rows: Rows, out: np.ndarray) -> bool:
    """Reads rows, one behind the other.

    Args:
      rows: Which.
      out: uint8, contiguous, as many bytes as they have.

    Returns:
      Whether they are there; not if they cannot be read or are not finite, or without a library.

    Raises:
      CancelledError: If it was stopped.
    """
    if not is_available():
        return False
    library, report = _library(), _Report()
    assert library is not None
    native = rows._native()
    library.grok1_read(ctypes.byref(native), out.ctypes.data, out.nbytes, ctypes.byref(report))
    assert report.outcome != _IMPOSSIBLE, (rows, out.shape)
    _note(report)
    return report.outcome == _DONE


def send(
    rows: Rows,
    pieces: Sequence[Sent],
    slots: Sequence[tuple[np.ndarray, Sequence[Any]]],
) -> bool:
    """Reads rows to slots in turn, and begins to copy out of them.

    Args:
      rows: Which.
      pieces: What goes where.
      slots: Pinned memory, as many whole rows in each, and a stream for each piece. Waits for what
        these streams have to do before it writes there; copies are under way at the end.

    Returns:
      Whether all are under way, as `read`; if not, some may be.

    Raises:
      DriverError: If the driver refuses.
      CancelledError: If it was stopped; some may be under way.
    """
    if not is_available():
        return False
    library, report = _library(), _Report()
    assert library is not None
    pieces[0].copier.enter()
    native_rows = rows._native()
    native_pieces = (_Piece * len(pieces))(*(piece._native() for piece in pieces))
    streams = [(ctypes.c_void_p * len(pieces))(*(s.value for s in of)) for _, of in slots]
    native_slots = (_Slot * len(slots))(
        *(
            _Slot(memory.ctypes.data, memory.nbytes, of)
            for (memory, _), of in zip(slots, streams, strict=True)
        )
    )
    driver = pieces[0].copier.functions(_CALLS)
    library.grok1_send(
        ctypes.byref(native_rows),
        driver,
        native_pieces,
        len(pieces),
        native_slots,
        len(slots),
        ctypes.byref(report),
    )
    assert report.outcome != _IMPOSSIBLE, (rows, pieces)
    _note(report)
    if report.outcome > _STOPPED:
        raise refused(_CALLS[report.outcome - _STOPPED - 1], report.status)
    return report.outcome == _DONE


def _note(report: _Report) -> None:
    """Counts what a call took.

    Raises:
      CancelledError: If it was stopped.
    """
    with _LOCK:
        for name in ("reading", "looking", "copying", "waiting"):
            _SPENT[name] += getattr(report, name)
    if report.outcome == _STOPPED:
        raise CancelledError
