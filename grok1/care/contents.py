"""The contents of files, read once: their checksums, and whether the elements can be weights."""

import contextlib
import functools
import hashlib
import math
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

import numpy as np

from grok1.checkpoint.elements import (
    MOST_SCALE,
    are_scales,
    check_finite,
    check_scales,
    is_finite,
)
from grok1.checkpoint.storage import StoredArray, StoredModel, read_matrix
from grok1.checkpoint.tensor_file import DTYPES, ArraySpan, DataFile, open_unchanged, read_at
from grok1.files import CheckpointError, read_bounded
from grok1.machine.cache_directory import private_directory
from grok1.machine.progress import progress_bar
from grok1.machine.safe_files import absolute, is_plain, replacing
from grok1.nn.manifest import is_large

_READ_BYTES = 1 << 24  # A thread holds as much.
_MOST_SUMS_BYTES = 1 << 24
_HOLE_BYTES = 1 << 18  # As many zeros in a row are no weights: eight rows of an expert.
_JOURNAL_LINE = re.compile(r"([0-9a-f]{64}) (\S+) (.+)")
_SUMS_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class CheckedFile(NamedTuple):
    """A file that is good by its header.

    Attributes:
      name: Its path, relative to the checkpoint.
      path: Where it is.
      file_size: Its length in bytes.
      modified: When it had been written to last, in nanoseconds.
      arrays: What it holds, each with what to call it.
    """

    name: str
    path: pathlib.Path
    file_size: int
    modified: int
    arrays: list[tuple[str, ArraySpan]]


class Reading(NamedTuple):
    """What reading a file has shown.

    Attributes:
      digest: Its SHA-256.
      stamp: What changes when the file does.
      notes: What is unusual about its elements.
    """

    digest: str
    stamp: str
    notes: list[str]


class Journal:
    """The good files of a run, so that the one after an interruption need not read them again.

    It lies in the user's private directory and not beside the checksums, where whoever made the
    checkpoint could have prepared it. Where there is no such directory there is no journal.
    """

    def __init__(self, sums_path: pathlib.Path):
        place = absolute(sums_path)
        self._path: pathlib.Path | None = None
        self._done: dict[tuple[str, str], str] = {}
        with contextlib.suppress(OSError, RuntimeError):
            name = hashlib.sha256(os.fsencode(place)).hexdigest()
            self._path = private_directory() / f"verify-{name}"
            for line in self._path.read_text(encoding="utf-8").splitlines():
                # The process may have been killed while it wrote a line.
                if match := _JOURNAL_LINE.fullmatch(line):
                    digest, stamp, file_name = match.groups()
                    self._done[file_name, stamp] = digest

    def digest(self, file: CheckedFile, stamp: str) -> str | None:
        """Returns the SHA-256 of a file that has not changed since it was added, else None."""
        return self._done.get((file.name, stamp))

    def add(self, file: CheckedFile, stamp: str, digest: str) -> None:
        """Notes a good file."""
        if self._path is not None:
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as lines:
                lines.write(f"{digest} {stamp} {file.name}\n")

    def remove(self) -> None:
        """Ends the run."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def file_stamp(status: os.stat_result) -> str:
    """Returns what tells a file from itself changed, and from a copy with the same times."""
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_dev}-{status.st_ino}"


def read_contents(file: CheckedFile, journal: Journal, advance: Callable[[int], None]) -> Reading:
    """Reads a file once, for its checksum and for what its elements are.

    Args:
      file: The file.
      journal: What need not be read again.
      advance: Called with numbers of bytes as they are read; what it raises ends the reading.

    Raises:
      CheckpointError: If the file cannot be read, has changed, or holds what cannot be weights.
    """
    with open_unchanged(file) as descriptor:
        stamp = file_stamp(os.fstat(descriptor))
        known = journal.digest(file, stamp)
        if known is not None:
            advance(file.file_size)
            return Reading(known, stamp, [])
        digest, buffer = hashlib.sha256(), np.empty(_READ_BYTES, np.uint8)
        checks = [_ArrayCheck(file, *array) for array in file.arrays]
        for check, start, stop in _blocks(file, checks):
            data = buffer[: stop - start]
            read_at(file, descriptor, start, data.data)
            digest.update(data.data)
            if check is not None:
                check.look(data, start)
            advance(len(data))
    notes = [note for check in checks for note in check.notes()]
    return Reading(digest.hexdigest(), stamp, notes)


def _blocks(
    file: CheckedFile, checks: list["_ArrayCheck"]
) -> Iterator[tuple["_ArrayCheck | None", int, int]]:
    """Cuts a file into blocks of one array, or of what lies between two."""
    ends: list[tuple[_ArrayCheck | None, int]] = []
    for check in sorted(checks, key=lambda check: check.span.offset):
        ends.append((None, check.span.offset))
        ends.append((check, check.span.offset + check.span.nbytes))
    ends.append((None, file.file_size))
    start = 0
    for check, end in ends:
        while start < end:
            stop = min(start + _READ_BYTES, end)
            yield check, start, stop
            start = stop


def check_elements(stored: StoredModel, progress: bool = False) -> None:
    """Checks of a model's elements what `load` checks: scales, and floats that are few.

    A number that is none gives other numbers that look well where weights are rounded anew.

    Args:
      stored: The model.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Raises:
      CheckpointError: If a scale, a norm, a router's weight or an embedding is not finite, or a
        scale too large; or a file cannot be read.
    """
    checks: list[tuple[StoredArray, Callable[..., None]]] = []
    for tensor, spec in zip(stored.tensors, stored.specs, strict=True):
        if tensor.scales is not None:
            checks.append((tensor.scales, check_scales))
        elif not is_large(spec):
            checks.append((tensor.values, functools.partial(_check_floats, spec.name)))
    with progress_bar(sum(array.nbytes for array, _ in checks), "checking", progress) as bar:
        for array, check in checks:
            for file, elements, origin in in_blocks(array):
                check(file, elements, origin)
                bar.update(elements.nbytes)


def _check_floats(name: str, file: DataFile, values: np.ndarray, origin: list[int]) -> None:
    check_finite(file, name, values, origin)


def in_blocks(array: StoredArray) -> Iterator[tuple[DataFile, np.ndarray, list[int]]]:
    """Yields an array in parts: the file, the elements, and the indices of the first of them."""
    lead = array.shape[:-2]
    row_bytes = array.nbytes // array.num_matrices // array.num_rows
    # A file's columns lie apart.
    step = array.num_rows if array.transposed else max(1, _READ_BYTES // row_bytes)
    for number in range(array.num_matrices):
        file, _ = array.parts[number if len(array.parts) > 1 else 0]
        for start in range(0, array.num_rows, step):
            stop = min(start + step, array.num_rows)
            rows = np.ascontiguousarray(read_matrix(array, number, start, stop))
            place = [int(n) for n in np.unravel_index(number, lead)] if lead else []
            origin = [*place, start, 0][: len(array.shape)]
            yield file, rows.reshape((1,) * len(lead) + rows.shape), origin


_WHOLE_NUMBERS = ("int8", "uint8")


class _ArrayCheck:
    """What the elements of one array are, seen a block at a time."""

    def __init__(self, file: CheckedFile, what: str, span: ArraySpan):
        self.span = span
        self._path, self._what = file.path, what
        self._is_scales = what.startswith("scales")
        self._not_finite, self._first = 0, ""
        self._lowest, self._zeros = 0, 0

    def look(self, data: np.ndarray, start: int) -> None:
        """Takes in the bytes of the file from `start` on."""
        dtype = DTYPES[self.span.dtype]
        values = data.view(dtype)
        if self.span.dtype not in _WHOLE_NUMBERS:
            self._look_for_faults(values, (start - self.span.offset) // dtype.itemsize)
        step = _HOLE_BYTES // dtype.itemsize
        for first in range(0, len(values), step):
            block = values[first : first + step]
            lowest = block.min() if self.span.dtype in _WHOLE_NUMBERS else block[0]
            if lowest == -128 and self.span.dtype == "int8":
                self._lowest += int(np.count_nonzero(block == -128))
            elif lowest == 0 and len(block) == step and not block.any():
                self._zeros += 1

    def notes(self) -> list[str]:
        """Returns what is unusual.

        Raises:
          CheckpointError: If it is wrong.
        """
        if self._not_finite:
            raise CheckpointError(
                self._path,
                f"{self._not_finite} of {math.prod(self.span.shape)} {self._what} are not finite, "
                f"{f'or above {MOST_SCALE:,.0f}, ' if self._is_scales else ''}the first is "
                f"{self._first}",
                "the file is damaged: fetch it again",
            )
        holes = f"{self._zeros * _HOLE_BYTES:,} bytes of the {self._what} in whole blocks are zero"
        if self._zeros and self.span.dtype in _WHOLE_NUMBERS:
            raise CheckpointError(
                self._path,
                f"{holes}, expected weights",
                "the download left a hole: fetch it again",
            )
        notes = [f"{self._path}: {holes}"] if self._zeros else []
        if self._lowest:
            notes.append(
                f"{self._path}: {self._lowest} of the {self._what} are -128, which symmetric "
                "rounding never makes"
            )
        return notes

    def _look_for_faults(self, values: np.ndarray, start: int) -> None:
        if self._is_scales:
            finite = are_scales(values)
        elif is_finite(values):
            return
        else:
            finite = np.isfinite(values)
        if finite.all():
            return
        if not self._not_finite:
            first = int(np.argmin(finite))
            place = [int(n) for n in np.unravel_index(start + first, self.span.shape)]
            self._first = f"{values[first]} at {place}"
        self._not_finite += finite.size - int(np.count_nonzero(finite))


def read_sums(path: pathlib.Path) -> dict[str, str]:
    """Returns the checksums of a file of `sha256sum` by name; none if there is no such file.

    Raises:
      CheckpointError: If it cannot be read.
    """
    known: dict[str, str] = {}
    try:
        data = read_bounded(path, _MOST_SUMS_BYTES)
    except CheckpointError as error:
        # A link to nowhere is replaced, and what it leads to left alone.
        if error.kind == "missing":
            return known
        raise
    lines = data.decode(errors="surrogateescape").splitlines()
    for number, line in enumerate(lines, 1):
        match = _SUMS_LINE.fullmatch(line)
        if match is None or not is_plain(match[2]):
            raise CheckpointError(
                path,
                f"line {number} is {line!r:.80}, expected a SHA-256, two spaces and a file name, "
                "as sha256sum writes them",
                "repair it, or delete it to begin anew",
            )
        known[os.path.normpath(match[2])] = match[1].lower()
    return known


def others_named(
    directory: pathlib.Path, sums_path: pathlib.Path, known: Set[str], expected: Set[str]
) -> tuple[list[CheckedFile], list[str]]:
    """Returns the files that checksums name beside those of the weights, and what to say of others.

    Args:
      directory: The checkpoint.
      sums_path: Where the checksums are from.
      known: The names there.
      expected: Names of the files of the weights, good or bad.

    Raises:
      CheckpointError: If there are checksums, and none is of a file here.
    """
    found, absent = [], []
    for name in sorted(known - expected):
        path = pathlib.Path(name)
        is_inside = not path.is_absolute() and path.parts[:1] != ("..",)
        with contextlib.suppress(OSError, ValueError):  # the last of what is no path
            status = (directory / path).stat()
            if is_inside and stat.S_ISREG(status.st_mode):
                sizes = status.st_size, status.st_mtime_ns
                found.append(CheckedFile(name, directory / path, *sizes, []))
                continue
        absent.append(name)
    if not absent:
        return found, []
    if len(absent) == len(known):
        raise CheckpointError(
            sums_path,
            f"none of its {len(known)} names is of a file here, the first is {absent[0]!r:.80}; "
            f"expected names relative to {directory}, as ckpt-0/tensor00000_000",
            "repair them, or give another file with --manifest FILE",
            "foreign",
        )
    return found, [
        f"{sums_path}: {len(absent)} of its names are of no file here, the first is "
        f"{absent[0]!r:.80}"
    ]


def check_writable(path: pathlib.Path) -> None:
    """Checks that checksums can be written, because long reading should not end with that error.

    Raises:
      CheckpointError: If they cannot.
    """
    # Of the directory alone: a new file takes the place of what is there.
    place = absolute(path).parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise CheckpointError(
            path,
            "cannot be written",
            "give a place for the checksums with --manifest FILE",
            "unwritable",
        )


def write_sums(path: pathlib.Path, sums: dict[str, str]) -> None:
    """Writes checksums as `sha256sum` does, whole or not at all.

    Raises:
      CheckpointError: If the disk refuses.
    """
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    try:
        with replacing(path) as file:
            file.write("".join(lines).encode())
    except OSError as error:
        raise CheckpointError(
            path,
            f"cannot be written: {error.strerror}",
            "give another place for the checksums with --manifest FILE",
            "unwritable",
        ) from error
