"""Which bytes of files hold slices of an array, and which of them go where.

What is wanted is split into blocks of some megabytes, each element in one block however many want
it; a thread reads a block at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from grok1.checkpoint import native
from grok1.checkpoint.elements import FiniteCheck
from grok1.checkpoint.storage import StoredArray
from grok1.checkpoint.tensor_file import DTYPES, DataFile, read_at
from grok1.machine.cuda_driver import Copier

BLOCK_BYTES = 1 << 25
"""Of a block that goes through a thread's memory of the host's."""

# The kernel begins anew to read ahead at every block: of four times the size they come a fifth
# faster, of half the size a fifth slower.
_DIRECT_BYTES = 1 << 27
# To a device goes what sixteen threads read side by side: they are to end at the same time.
_SENT_BYTES = 1 << 25
_STOP_BYTES = 1 << 22  # that the interpreter reads before it looks whether anybody wants more

Bounds = tuple[int, int]
"""First index, and the one behind the last."""

Check = Callable[[np.ndarray, Sequence[int]], Any]
"""Looks at elements, in the type of the file, the first of which has these indices."""


class Target(NamedTuple):
    """A slice of an array and where it goes.

    Attributes:
      bounds: Its bounds along each axis.
      out: Array of the slice's shape, of any type that the elements convert to.
      copier: What copies to `out`, if that is in a device's memory, as `cuda_driver.place_of` says.
    """

    bounds: tuple[Bounds, ...]
    out: np.ndarray
    copier: Copier | None = None


class Piece(NamedTuple):
    """What one target wants of a block.

    Attributes:
      column: The first of its columns, counted from where the block's begin.
      out: Where they go `[rows, columns]`, all rows of the block; transposed if the file is.
      copier: As of the target.
    """

    column: int
    out: np.ndarray
    copier: Copier | None

    def of(self, staged: np.ndarray, transposed: bool) -> np.ndarray:
        """Returns its columns of rows of the block, in the order of the file's axes."""
        width = self.out.shape[0 if transposed else 1]
        return staged[:, self.column : self.column + width]


class Block(NamedTuple):
    """Rows of the same columns of a matrix in a file.

    Attributes:
      file: The file.
      offset: Of the first row.
      num_rows: How many.
      row_bytes: Of those columns.
      row_stride: Bytes from one row to the next.
      dtype: Type of the elements.
      transposed: Whether rows of the file are columns of the array.
      is_direct: Whether all of it can be read to where it goes.
      pieces: What goes where.
      origin: Indices in the array of its first element.
      check: What looks at the elements, if they are to be looked at.
      stop: Ends what reads it.
    """

    file: DataFile
    offset: int
    num_rows: int
    row_bytes: int
    row_stride: int
    dtype: np.dtype
    transposed: bool
    is_direct: bool
    pieces: list[Piece]
    origin: tuple[int, ...]
    check: Check | None
    stop: native.Stop

    @property
    def is_sent(self) -> bool:
        """Whether it goes to the memory of devices."""
        return self.pieces[0].copier is not None

    def read(self, descriptor: int, raw: np.ndarray, first: int, count: int) -> np.ndarray:
        """Reads some of its rows, and has them looked at.

        Args:
          descriptor: Where the file is open.
          raw: uint8, C-contiguous, of so many rows' bytes.
          first: The first of them.
          count: How many.

        Returns:
          The same memory as `[count, columns]`.

        Raises:
          CheckpointError: As `tensor_file.read_at`; what `check` raises.
          CancelledError: If it was stopped.
        """
        wanted = self.rows(descriptor, first, count)
        if wanted is None or not native.read(wanted, raw):
            return self.read_by_interpreter(descriptor, raw, first, count)
        return raw.view(self.dtype).reshape(count, -1)

    def rows(self, descriptor: int, first: int, count: int) -> native.Rows | None:
        """Returns some of its rows as native code reads them; None if it cannot look at them."""
        finite = ""
        if self.check is not None:
            finite = str(self.dtype)
            if not isinstance(self.check, FiniteCheck) or finite not in native.FLOATS:
                return None
        start = self.offset + first * self.row_stride
        sizes = count, self.row_bytes, self.row_stride
        return native.Rows(descriptor, start, *sizes, finite, self.stop)

    def read_by_interpreter(
        self, descriptor: int, raw: np.ndarray, first: int, count: int
    ) -> np.ndarray:
        """As `read`, without native code."""
        buffer = raw.data
        # Rows that follow one another are one.
        whole = self.row_stride == self.row_bytes
        size = min(count * self.row_bytes, _STOP_BYTES) if whole else self.row_bytes
        place = self.offset + first * self.row_stride
        for start in range(0, len(buffer), size):
            self.stop.check()
            read_at(self.file, descriptor, place, buffer[start : start + size])
            place += size if whole else self.row_stride
        rows = raw.view(self.dtype).reshape(count, -1)
        if self.check is not None:
            self._check(rows, first)
        return rows

    def _check(self, rows: np.ndarray, first: int) -> None:
        assert self.check is not None
        *lead, row, column = self.origin if len(self.origin) > 1 else (*self.origin, 0)
        if self.transposed:
            self.check(rows.T, (*lead, row, column + first))
        elif len(self.origin) > 1:
            self.check(rows, (*lead, row + first, column))
        else:
            self.check(rows[:, 0], (row + first,))


class _Wanted(NamedTuple):
    """What one target wants of a matrix, in the order of the file's axes."""

    rows: Bounds
    columns: Bounds
    out: np.ndarray  # [rows, columns], transposed if the file is
    copier: Copier | None


def blocks(
    array: StoredArray,
    targets: Sequence[Target],
    check: Check | None = None,
    stop: native.Stop | None = None,
    most_bytes: int | None = None,
) -> Iterator[Block]:
    """Splits slices into blocks, in the order of the file.

    Args:
      array: The array.
      targets: The slices, equal ones or ones without a common element; all of them go to the
        memory of devices, or none does.
      check: What is to look at the elements.
      stop: What is to end those who read them.
      most_bytes: Of a block that goes to devices; None for what is best for many.
    """
    stop = stop or native.Stop()
    dtype = DTYPES[array.dtype]
    matrices: dict[int, list[_Wanted]] = {}
    for bounds, out, copier in targets:
        if len(array.shape) == 1:  # a vector is a matrix of one column
            bounds, out = (*bounds, (0, 1)), out[:, None]
        *lead, rows, columns = bounds
        numbers = np.arange(array.num_matrices).reshape(array.shape[:-2])
        chosen = numbers[tuple(slice(*pair) for pair in lead)]
        if array.transposed:
            rows, columns = columns, rows
        for place, number in np.ndenumerate(chosen):
            matrices.setdefault(int(number), []).append(_Wanted(rows, columns, out[place], copier))
    size = array.num_rows, math.prod(array.shape[-1:]) if len(array.shape) > 1 else 1
    num_columns = size[0] if array.transposed else size[1]
    for number, wanted in sorted(matrices.items()):
        file, span = array.parts[number if len(array.parts) > 1 else 0]
        start = span.offset
        if len(array.parts) == 1:
            start += number * (span.nbytes // array.num_matrices)
        lead = np.unravel_index(number, array.shape[:-2]) if len(array.shape) > 2 else ()
        for rows, columns, members in _merged(wanted):
            row_bytes = (columns[1] - columns[0]) * dtype.itemsize
            is_direct = not array.transposed and _is_direct(members, dtype)
            step = max(1, _most_bytes(members, is_direct, most_bytes) // row_bytes)
            for first in range(*rows, step):
                here = slice(first - rows[0], min(first + step, rows[1]) - rows[0])
                origin = (columns[0], first) if array.transposed else (first, columns[0])
                yield Block(
                    file,
                    start + (first * num_columns + columns[0]) * dtype.itemsize,
                    here.stop - here.start,
                    row_bytes,
                    num_columns * dtype.itemsize,
                    dtype,
                    array.transposed,
                    is_direct,
                    [
                        Piece(
                            one.columns[0] - columns[0],
                            one.out[:, here] if array.transposed else one.out[here],
                            one.copier,
                        )
                        for one in members
                    ],
                    (*map(int, lead), *origin)[: len(array.shape)],
                    check,
                    stop,
                )


def _is_direct(members: list[_Wanted], dtype: np.dtype) -> bool:
    """Whether rows of a file can be read to where they go."""
    out = members[0].out
    on_host = members[0].copier is None
    return on_host and len(members) == 1 and out.dtype == dtype and out.flags.c_contiguous


def _most_bytes(members: list[_Wanted], is_direct: bool, sent: int | None) -> int:
    if members[0].copier is not None:
        return min(sent or _SENT_BYTES, _SENT_BYTES)
    return _DIRECT_BYTES if is_direct else BLOCK_BYTES


def _merged(wanted: list[_Wanted]) -> Iterator[tuple[Bounds, Bounds, list[_Wanted]]]:
    """Yields (rows, columns, members) of those with the same rows and neighbouring columns."""
    run: list[_Wanted] = []
    end = 0
    for one in sorted(wanted, key=lambda one: one[:2]):
        if run and (one.rows != run[0].rows or one.columns[0] > end):
            yield run[0].rows, (run[0].columns[0], end), run
            run = []
        end = max(end, one.columns[1]) if run else one.columns[1]
        run.append(one)
    yield run[0].rows, (run[0].columns[0], end), run
