"""Every fault of a checkpoint at once: first by the headers, then, if asked, by the weights.

`checkpoint.open_checkpoint` stops at the first fault, because it stands before a load; this is for
people who have 318 GB to repair and want one list, and the command that fetches only what is bad.
"""

import collections
import hashlib
import os
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from grok1.checkpoint import LAYER, check_scales, check_tensor, describe_storage
from grok1.config import GROK_1, ModelConfig
from grok1.directory import is_safetensors, load_config
from grok1.manifest import TensorSpec, file_name, manifest
from grok1.safetensors_file import INDEX_NAME, open_safetensors
from grok1.tensor_file import (
    CheckpointError,
    DataFile,
    HostileFileError,
    TensorHeader,
    read_header,
    read_span,
    tensor_file_size,
)

SUMS_NAME = "SHA256SUMS"

_READ_BYTES = 1 << 24
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
        added to it once they are good, so that a later run, or `sha256sum -c`, sees any change.
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
    if is_safetensors(directory):
        headers, faults = _safetensors_headers(directory, specs)
    else:
        headers, faults = _tensor_headers(directory, specs, config)
    notes: list[str] = []
    if deep:
        found, notes = _read_all(
            directory,
            headers,
            pathlib.Path(sums_file if sums_file is not None else directory / SUMS_NAME),
            progress,
        )
        faults += found
    bad = {fault.path for fault in faults}
    num_bytes = sum(size for name, size, _ in headers if name not in bad)
    return Report(
        directory, len(specs), num_bytes, faults, notes, _advice(directory, config, faults)
    )


class _Header(NamedTuple):
    """A file that is good by its header, with the tensor that it holds, if it is a tensor file."""

    name: str
    size: int
    file: TensorHeader | None


def _safetensors_headers(directory, specs) -> tuple[list[_Header], list[Fault]]:
    try:
        tensors = open_safetensors(directory, specs)
    except CheckpointError as error:
        path, _, problem = str(error).partition(": ")
        problem, _, remedy = problem.rpartition("; ")
        return [], [Fault(os.path.relpath(path, directory), problem, remedy)]
    files: dict[str, DataFile] = {
        file.path.name: file for tensor in tensors for file, _ in tensor.values.parts
    }
    sizes = {name: file.file_size for name, file in files.items()}
    sizes[INDEX_NAME] = (directory / INDEX_NAME).stat().st_size
    return [_Header(name, size, None) for name, size in sorted(sizes.items())], []


def _tensor_headers(directory, specs, config) -> tuple[list[_Header], list[Fault]]:
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
            faults.append(Fault(f"ckpt-0/{name}", *_parts(place / name, error)))
    faults += _unlike_faults(headers, specs)
    faults += _extra_faults(place, names, specs)
    bad = {fault.path for fault in faults}
    good = [_Header(f"ckpt-0/{h.path.name}", h.file_size, h) for h in headers.values()]
    return [header for header in good if header.name not in bad], faults


def _header_fault(path: pathlib.Path, spec: TensorSpec, error: CheckpointError) -> Fault:
    name = f"ckpt-0/{path.name}"
    problem, remedy = _parts(path, error)
    if isinstance(error, HostileFileError):
        return Fault(name, f"hostile: {problem}", remedy)
    expected = tensor_file_size(spec)
    try:
        found = path.stat().st_size if path.is_file() else expected
    except OSError:
        found = expected
    if found < expected:
        share = f"{100 * found / expected:.0f} %" if found else "nothing of it"
        problem = f"short, {found:,} bytes, expected {expected:,} ({share} is there)"
        return Fault(name, problem, "fetch it again")
    if found > expected and "byte" in problem:
        return Fault(name, f"long, {found:,} bytes, expected {expected:,}", "fetch it again")
    return Fault(name, problem, remedy, fetch="permission" not in remedy)


def _parts(path: pathlib.Path, error: CheckpointError) -> tuple[str, str]:
    """Takes an error about a file apart into the problem and the remedy."""
    problem, _, remedy = str(error).removeprefix(f"{path}: ").rpartition("; ")
    return problem, remedy


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


def _read_all(directory, headers: list[_Header], sums_path, progress):
    known = _read_sums(sums_path)
    _check_writable(sums_path)
    faults, notes, sums = [], [], dict(known)
    total = sum(header.size for header in headers)
    # disable=None is quiet when stderr is no terminal.
    with tqdm(
        total=total, desc="reading", unit="B", unit_scale=True, disable=None if progress else True
    ) as bar:
        for name, _, file in headers:
            try:
                digest = _digest(directory / name, bar)
                if name in known and digest != known[name]:
                    raise CheckpointError(
                        f"SHA-256 is {digest}, expected {known[name]} as in {sums_path}; the "
                        "contents have changed: fetch it again"
                    )
                if file is not None:
                    notes += _check_payload(file)
                sums[name] = digest
            except CheckpointError as error:
                faults.append(Fault(name, *_parts(directory / name, error)))
    added = sums.keys() - known.keys()
    if added:
        _write_sums(sums_path, sums)
    checked = len({name for name, _, _ in headers} & known.keys())
    relative = shlex.quote(os.path.relpath(sums_path, directory))
    notes.append(
        f"{sums_path}: {checked} checksums compared, {len(added)} added; check again with "
        f"(cd {shlex.quote(str(directory))} && sha256sum -c {relative})"
    )
    return faults, notes


def _digest(path: pathlib.Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
                bar.update(len(data))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; fetch it again"
        ) from error
    return digest.hexdigest()


def _check_payload(file: TensorHeader) -> list[str]:
    """Looks at every element, some rows at a time; they are in the page cache from `_digest`."""
    if file.scales is not None:
        check_scales(file, read_span(file, file.scales))
    row_bytes = file.values.nbytes // file.values.shape[0]
    step = max(1, _READ_BYTES // row_bytes)
    lowest, zeros = 0, 0
    for start in range(0, file.values.shape[0], step):
        values = read_span(file, file.values, start, min(start + step, file.values.shape[0]))
        if values.dtype == np.int8:
            lowest += int(np.count_nonzero(values == -128))
        elif not np.isfinite(values).all():
            bad = values.size - int(np.count_nonzero(np.isfinite(values)))
            raise CheckpointError(
                f"{file.path}: {bad} of {values.size} values are not finite, near row {start}; the "
                "file is damaged: fetch it again"
            )
        zeros += _zero_blocks(values)
    if zeros and file.values.dtype == "int8":
        raise CheckpointError(
            f"{file.path}: {zeros * _HOLE_BYTES:,} bytes in whole blocks are zero, expected "
            "weights; the download left a hole: fetch it again"
        )
    notes = (
        [f"{file.path}: {zeros * _HOLE_BYTES:,} bytes in whole blocks are zero"] if zeros else []
    )
    if lowest:
        notes.append(
            f"{file.path}: {lowest} weights are -128, which symmetric rounding never makes"
        )
    return notes


def _zero_blocks(values: np.ndarray) -> int:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    whole = len(data) // _HOLE_BYTES
    blocks = data[: whole * _HOLE_BYTES].reshape(whole, _HOLE_BYTES)
    return int(np.count_nonzero(~blocks.any(axis=1)))


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


def _hf_command(directory: pathlib.Path, names: list[str] | None = None) -> str:
    """The command that fetches the whole of Grok-1, or just these files even if they are there."""
    where = f"--local-dir {shlex.quote(str(directory))}"
    if names is None:
        return f"`hf download xai-org/grok-1 --include 'ckpt-0/*' {where}`"
    return f"`hf download xai-org/grok-1 {' '.join(names)} --force-download {where}`"


def _advice(directory: pathlib.Path, config: ModelConfig, faults: list[Fault]) -> list[str]:
    bad = sorted({fault.path for fault in faults if fault.fetch})
    if not bad:
        return []
    if config != GROK_1 or is_safetensors(directory):
        return [f"copy {len(bad)} files again from where they came: {' '.join(bad)}"]
    absent = all("missing" in fault.problem for fault in faults if fault.fetch)
    if absent and len(bad) > _MANY:
        return [f"to resume the download: {_hf_command(directory)}"]
    return [f"to fetch only the bad files: {_hf_command(directory, bad)}"]
