"""Every fault of a checkpoint at once: first by the headers, then, if asked, by the weights.

`checkpoint.open_checkpoint` stops at the first fault, because it stands before a load; this is for
people who have 318 GB to repair and want one list, and the command that fetches only what is bad.
"""

import collections
import contextlib
import errno
import hashlib
import math
import os
import pathlib
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from grok1.checkpoint import LAYER, check_tensor, describe_storage
from grok1.config import GROK_1, ModelConfig
from grok1.directory import is_safetensors, load_config
from grok1.manifest import TensorSpec, file_name, manifest
from grok1.safetensors_file import INDEX_NAME, examine_safetensors
from grok1.tensor_file import (
    DTYPES,
    ArraySpan,
    CheckpointError,
    HostileFileError,
    TensorHeader,
    open_unchanged,
    read_at,
    read_header,
    tensor_file_size,
)

SUMS_NAME = "SHA256SUMS"

_NUM_THREADS = 8
_READ_BYTES = 1 << 24  # A thread holds as much.
_HOLE_BYTES = 1 << 18  # As many zeros in a row are no weights: eight rows of an expert.
_MANY = 64  # Files, from which on fetching the directory again is the shorter command.
_SUMS_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class Fault(NamedTuple):
    """One thing that is wrong.

    Attributes:
      path: The file, relative to the checkpoint.
      problem: What was expected and what was found.
      remedy: What to do.
      fetch: Whether the file must be fetched again.
    """

    path: str
    problem: str
    remedy: str
    fetch: bool = True


class Report(NamedTuple):
    """What a verification found.

    Attributes:
      directory: The checkpoint.
      num_tensors: Tensors that it should have.
      num_bytes: Bytes of the files that are good by their headers.
      faults: Everything that is wrong.
      notes: What else there is to know.
      advice: Commands that repair it.
    """

    directory: pathlib.Path
    num_tensors: int
    num_bytes: int
    faults: list[Fault]
    notes: list[str]
    advice: list[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"{fault.path}: {fault.problem}; {fault.remedy}" for fault in self.faults]
        verdict = f"{len(self.faults)} faults" if self.faults else "no fault"
        lines.append(
            f"{self.directory}: {verdict}; {self.num_tensors} tensors expected, "
            f"{self.num_bytes:,} bytes are as they should be"
        )
        return [*lines, *self.notes, *self.advice]


def verify(
    directory: str | os.PathLike[str],
    *,
    deep: bool = False,
    sums_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Report:
    """Checks all files of a checkpoint against the model and lists everything that is wrong.

    Args:
      directory: A directory that `grok1.load` reads.
      deep: Also read every weight: scales and float weights must be finite, int8 weights without
        holes, and files have the SHA-256 that `sums_file` says. Files that it does not name are
        taken as they are: their checksums are added once the weights are good, so that a later run,
        or `sha256sum -c`, sees any change. An interrupted run is continued by the next.
      sums_file: Checksums in the form of `sha256sum`, with names relative to `directory`; None for
        `SHA256SUMS` in `directory`.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Raises:
      CheckpointError: If there is no such directory, or the checksums cannot be read or written.
      ValueError: If `config.json` is none.
    """
    directory = pathlib.Path(directory)
    config = load_config(directory)
    specs = manifest(config)
    find = _safetensors_files if is_safetensors(directory) else _tensor_files
    files, faults = find(directory, specs)
    notes: list[str] = []
    if deep:
        sums_path = pathlib.Path(sums_file if sums_file is not None else directory / SUMS_NAME)
        found, notes = _read_all(directory, files, sums_path, progress)
        faults += found
    bad = {fault.path for fault in faults}
    num_bytes = sum(file.file_size for file in files if file.name not in bad)
    return Report(
        directory, len(specs), num_bytes, faults, notes, _advice(directory, config, faults)
    )


class _File(NamedTuple):
    """A file that is good by its header.

    Attributes:
      name: Its path, relative to the checkpoint.
      path: Where it is.
      file_size: Its length in bytes.
      arrays: What it holds, each with what to call it.
    """

    name: str
    path: pathlib.Path
    file_size: int
    arrays: list[tuple[str, ArraySpan]]


def _safetensors_files(
    directory: pathlib.Path, specs: list[TensorSpec]
) -> tuple[list[_File], list[Fault]]:
    index = directory / INDEX_NAME
    try:
        found = examine_safetensors(directory, specs)
    except CheckpointError as error:
        return [], [_fault(INDEX_NAME, index, error)]
    faults = []
    for path, error in found.faults:
        name = path.name
        if isinstance(error.__cause__, FileNotFoundError):
            faults.append(Fault(name, "missing, expected as the index names it", "copy it again"))
        else:
            faults.append(_fault(name, path, error))
    bad = {fault.path for fault in faults}
    known = {shard.path.name for shard in found.shards} | bad
    for name in sorted(os.listdir(directory)):
        if name.endswith(".safetensors") and name not in known:
            faults.append(
                Fault(name, "foreign, expected no such file by the index", "move it away", False)
            )
    files = [
        _File(
            shard.path.name,
            shard.path,
            shard.file_size,
            [
                (f"{'scales' if name.endswith('_scale') else 'values'} of {name}", span)
                for name, span in shard.spans.items()
            ],
        )
        for shard in found.shards
    ]
    files.append(_File(INDEX_NAME, index, index.stat().st_size, []))
    return [file for file in files if file.name not in bad], faults


def _tensor_files(
    directory: pathlib.Path, specs: list[TensorSpec]
) -> tuple[list[_File], list[Fault]]:
    """Checks names and headers of `ckpt-0`."""
    place = directory / "ckpt-0"
    try:
        names = set(os.listdir(place))
    except OSError as error:
        hint = ""
        if (directory / file_name(0)).exists():
            hint = "; this directory itself holds tensor files: give the one above it"
        raise CheckpointError(
            f"{place}: cannot be listed: {error.strerror}; expected the directory of the tensor "
            f"files. Grok-1's are fetched with {_hf_command(directory)}{hint}"
        ) from error
    faults, headers = [], {}
    for index, spec in enumerate(specs):
        name = file_name(index)
        if name not in names:
            faults.append(
                Fault(
                    f"ckpt-0/{name}",
                    f"missing, expected {tensor_file_size(spec):,} bytes with {spec.name}",
                    "fetch it",
                )
            )
            continue
        try:
            header = read_header(place / name)
        except CheckpointError as error:
            faults.append(_header_fault(place / name, spec, error))
            continue
        try:
            check_tensor(header, spec)
            headers[index] = header
        except CheckpointError as error:
            faults.append(_fault(f"ckpt-0/{name}", place / name, error))
    faults += _unlike_faults(headers, specs)
    faults += _extra_faults(place, names, specs)
    bad = {fault.path for fault in faults}
    files = [_file(header) for header in headers.values()]
    return [file for file in files if file.name not in bad], faults


def _file(header: TensorHeader) -> _File:
    spans = [("values", header.values), ("scales", header.scales)]
    arrays = [(what, span) for what, span in spans if span is not None]
    return _File(f"ckpt-0/{header.path.name}", header.path, header.file_size, arrays)


def _header_fault(path: pathlib.Path, spec: TensorSpec, error: CheckpointError) -> Fault:
    name = f"ckpt-0/{path.name}"
    fault = _fault(name, path, error)
    if isinstance(error, HostileFileError):
        return fault._replace(problem=f"hostile: {fault.problem}")
    expected = tensor_file_size(spec)
    try:
        found = path.stat().st_size if path.is_file() else expected
    except OSError:
        found = expected
    if found < expected:
        share = f"{100 * found / expected:.0f} %" if found else "nothing of it"
        problem = f"short, {found:,} bytes, expected {expected:,} ({share} is there)"
        return Fault(name, problem, "fetch it again")
    if found > expected and "byte" in fault.problem:
        return Fault(name, f"long, {found:,} bytes, expected {expected:,}", "fetch it again")
    return fault


def _fault(name: str, path: pathlib.Path, error: CheckpointError) -> Fault:
    """Takes an error about a file apart into the problem and the remedy."""
    text = str(error).removeprefix(f"{path}: ")
    problem, found, remedy = text.rpartition("; ")
    if not found:
        problem, remedy = text, "fetch it again"
    cause = error.__cause__
    is_closed = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM)
    return Fault(name, problem, remedy, fetch=not is_closed)


def _unlike_faults(headers: dict[int, TensorHeader], specs: list[TensorSpec]) -> Iterator[Fault]:
    """A tensor must be stored as most layers store it: with one layer alone no kind can be told."""
    kinds: dict[str, dict[int, str]] = {}
    for index, header in headers.items():
        kind = LAYER.sub("decoder_layer_*", specs[index].name)
        kinds.setdefault(kind, {})[index] = describe_storage(header)
    for storages in kinds.values():
        usual = collections.Counter(storages.values()).most_common(1)[0][0]
        for index, storage in storages.items():
            if storage != usual:
                yield Fault(
                    f"ckpt-0/{file_name(index)}",
                    f"{specs[index].name} is stored as {storage}, expected {usual} as in the other "
                    "layers",
                    "the file is of another checkpoint: fetch it again",
                )


def _extra_faults(place: pathlib.Path, names: set[str], specs) -> Iterator[Fault]:
    expected = {file_name(index): spec for index, spec in enumerate(specs)}
    for name in sorted(names - expected.keys()):
        if name.startswith("."):
            continue
        number = re.match(r"tensor0*(\d+)", name)
        right = file_name(int(number[1])) if number else None
        if right not in expected:
            what = (
                "foreign" if right is None else f"foreign, a file beyond the {len(specs)} tensors"
            )
            yield Fault(f"ckpt-0/{name}", f"{what}, expected no such file", "move it away", False)
            continue
        remedy = "move it away"
        if right not in names:
            try:
                check_tensor(read_header(place / name), expected[right])
                remedy = f"rename it to {right}"
            except CheckpointError:
                pass  # Not even that tensor under another name.
        yield Fault(f"ckpt-0/{name}", f"misnamed, expected {right}", remedy, False)


def _read_all(
    directory: pathlib.Path, files: list[_File], sums_path: pathlib.Path, progress: bool
) -> tuple[list[Fault], list[str]]:
    """Reads the files side by side; `known` and what was read before an interruption count."""
    known = _read_sums(sums_path)
    if any(file.name not in known for file in files):
        _check_writable(sums_path)
    faults, notes, sums = [], [], dict(known)
    journal, stopped, lock = _Journal(sums_path), threading.Event(), threading.Lock()
    # disable=None is quiet when stderr is no terminal.
    with (
        tqdm(
            total=sum(file.file_size for file in files),
            desc="reading",
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        ) as bar,
        ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1)) as pool,
    ):

        def advance(num_bytes):
            if stopped.is_set():
                raise CheckpointError("stopped")
            with lock:
                bar.update(num_bytes)

        readings = [(file, pool.submit(_read, file, journal, advance)) for file in files]
        try:
            for file, reading in readings:
                try:
                    digest, modified, found = reading.result()
                    if known.get(file.name, digest) != digest:
                        raise CheckpointError(
                            f"SHA-256 is {digest}, expected {known[file.name]} as in {sums_path}; "
                            "the contents have changed: fetch it again"
                        )
                except CheckpointError as error:
                    faults.append(_fault(file.name, file.path, error))
                    continue
                sums[file.name] = digest
                notes += found
                if not found:
                    journal.add(file, modified, digest)
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    added = sums.keys() - known.keys()
    if added:
        _write_sums(sums_path, sums)
    journal.remove()
    checked = len({file.name for file in files} & known.keys())
    relative = shlex.quote(os.path.relpath(sums_path, directory))
    notes.append(
        f"{sums_path}: {checked} checksums compared, {len(added)} added; check again with "
        f"(cd {shlex.quote(str(directory))} && sha256sum -c {relative})"
    )
    return faults, notes


class _Reading(NamedTuple):
    digest: str
    modified: int
    notes: list[str]


class _Journal:
    """The good files of a run, so that the one after an interruption need not read them again.

    Where it cannot be written, as on a read-only disk whose checksums are complete, there is none.
    """

    def __init__(self, sums_path: pathlib.Path):
        self._path = sums_path.with_name(f".{sums_path.name}.journal")
        self._done: dict[tuple[str, int, int], str] = {}
        with contextlib.suppress(OSError):
            for line in self._path.read_text(encoding="utf-8").splitlines():
                digest, size, modified, name = line.split(" ", 3)
                self._done[name, int(size), int(modified)] = digest

    def digest(self, file: _File, modified: int) -> str | None:
        return self._done.get((file.name, file.file_size, modified))

    def add(self, file: _File, modified: int, digest: str) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as lines:
            lines.write(f"{digest} {file.file_size} {modified} {file.name}\n")

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _read(file: _File, journal: _Journal, advance: Callable[[int], None]) -> _Reading:
    """Reads a file once, for its checksum and for what its elements are."""
    with open_unchanged(file) as descriptor:
        modified = os.fstat(descriptor).st_mtime_ns
        known = journal.digest(file, modified)
        if known is not None:
            advance(file.file_size)
            return _Reading(known, modified, [])
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
    return _Reading(digest.hexdigest(), modified, notes)


def _blocks(
    file: _File, checks: list["_ArrayCheck"]
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


class _ArrayCheck:
    """What the elements of one array are, seen a block at a time."""

    def __init__(self, file: _File, what: str, span: ArraySpan):
        self.span = span
        self._path, self._what = file.path, what
        self._not_finite, self._first = 0, ""
        self._lowest, self._zeros = 0, 0

    def look(self, data: np.ndarray, start: int) -> None:
        """Takes in the bytes of the file from `start` on."""
        dtype = DTYPES[self.span.dtype]
        values = data.view(dtype)
        if self.span.dtype != "int8":
            self._look_for_faults(values, (start - self.span.offset) // dtype.itemsize)
        step = _HOLE_BYTES // dtype.itemsize
        for first in range(0, len(values), step):
            block = values[first : first + step]
            lowest = block.min() if self.span.dtype == "int8" else block[0]
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
                f"{self._path}: {self._not_finite} of {math.prod(self.span.shape)} {self._what} "
                f"are not finite, the first is {self._first}; the file is damaged: fetch it again"
            )
        holes = f"{self._zeros * _HOLE_BYTES:,} bytes of the {self._what} in whole blocks are zero"
        if self._zeros and self.span.dtype == "int8":
            raise CheckpointError(
                f"{self._path}: {holes}, expected weights; the download left a hole: fetch it again"
            )
        notes = [f"{self._path}: {holes}"] if self._zeros else []
        if self._lowest:
            notes.append(
                f"{self._path}: {self._lowest} of the {self._what} are -128, which symmetric "
                "rounding never makes"
            )
        return notes

    def _look_for_faults(self, values: np.ndarray, start: int) -> None:
        if self.span.dtype == "bfloat16":
            # All bits of the exponent are set in what is infinite or not a number.
            finite = (values.view(np.uint16) & 0x7F80) != 0x7F80
        else:
            finite = np.isfinite(values)
        if finite.all():
            return
        if not self._not_finite:
            first = int(np.argmin(finite))
            place = [int(n) for n in np.unravel_index(start + first, self.span.shape)]
            self._first = f"{values[first]} at {place}"
        self._not_finite += finite.size - int(np.count_nonzero(finite))


def _read_sums(path: pathlib.Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    known = {}
    for number, line in enumerate(lines, 1):
        match = _SUMS_LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(
                f"{path}: line {number} is {line!r:.80}, expected a SHA-256, two spaces and a file "
                "name, as sha256sum writes them"
            )
        known[os.path.normpath(match[2])] = match[1].lower()
    return known


def _check_writable(path: pathlib.Path) -> None:
    """Hours of reading should not end with a directory that cannot be written."""
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CheckpointError(
            f"{path}: cannot be written; give a place for the checksums with --manifest FILE"
        )


def _write_sums(path: pathlib.Path, sums: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(
            "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())),
            encoding="utf-8",
        )
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error


def _hf_command(directory: pathlib.Path, what: str = "--include 'ckpt-0/*'") -> str:
    """The command that fetches Grok-1, or some of its files."""
    return f"`hf download xai-org/grok-1 {what} --local-dir {shlex.quote(str(directory))}`"


def _advice(directory: pathlib.Path, config: ModelConfig, faults: list[Fault]) -> list[str]:
    to_fetch = [fault for fault in faults if fault.fetch]
    missing = sorted({fault.path for fault in to_fetch if fault.problem.startswith("missing")})
    bad = sorted({fault.path for fault in to_fetch} - set(missing))
    if not to_fetch:
        return []
    if config != GROK_1 or is_safetensors(directory):
        names = sorted([*missing, *bad])
        return [f"copy {len(names)} files again from where they came: {' '.join(names)}"]
    advice = []
    if len(missing) > _MANY:
        advice = [f"to resume the download: {_hf_command(directory)}"]
    elif missing:
        advice = [f"to fetch what is missing: {_hf_command(directory, ' '.join(missing))}"]
    if bad:
        # Files that are there are left as they are, unless they are to be replaced.
        command = _hf_command(directory, f"{' '.join(bad)} --force-download")
        advice.append(f"to fetch the bad files again: {command}")
    return advice
