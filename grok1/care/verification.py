"""Every fault of a checkpoint at once: first by the headers, then, if asked, by the weights.

`released.open_checkpoint` stops at the first fault, because it stands before a load; this is for
people who have 318 GB to repair and want one list, and the command that fetches only what is bad.
"""

import collections
import os
import pathlib
import re
import shlex
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from grok1.care.contents import (
    CheckedFile,
    Journal,
    check_writable,
    others_named,
    read_contents,
    read_sums,
    write_sums,
)
from grok1.checkpoint.directory import is_safetensors, load_config, located
from grok1.checkpoint.released import LAYER, check_tensor, describe_storage
from grok1.checkpoint.safetensors_file import examine_safetensors
from grok1.checkpoint.safetensors_layout import INDEX_NAME
from grok1.checkpoint.tensor_file import TensorHeader, read_header, tensor_file_size
from grok1.config import GROK_1, ModelConfig
from grok1.files import LFS_PROBLEM, LFS_REMEDY, CheckpointError, listed, printable
from grok1.machine.progress import progress_bar
from grok1.nn.manifest import TensorSpec, file_name, manifest
from grok1.ops.formats import INT4
from grok1.tokenizer import Tokenizer

SUMS_NAME = "SHA256SUMS"
TOKENIZER_NAME = "tokenizer.model"

_NUM_THREADS = 8
_MANY = 64  # Files, from which on fetching the directory again is the shorter command.


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
        return [printable(line) for line in [*lines, *self.notes, *self.advice]]


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
        holes, and all files that `sums_file` names have the SHA-256 that it says. Files of weights
        that it does not name are taken as they are: their checksums are added once the weights are
        good, so that a later run, or `sha256sum -c`, sees any change. An interrupted run is
        continued by the next.
      sums_file: Checksums in the form of `sha256sum`, with names relative to `directory`; None for
        `SHA256SUMS` in `directory`.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Raises:
      CheckpointError: If there is no such directory, or the checksums cannot be read or written.
      ValueError: If `config.json` is none, or there are checksums to compare and nothing is read.
    """
    if sums_file is not None and not deep:
        raise ValueError("sums_file is compared with what deep=True reads; give both, or neither")
    directory = located(directory)
    config = load_config(directory)
    specs = manifest(config)
    find = _safetensors_files if is_safetensors(directory) else _tensor_files
    files, faults = find(directory, specs)
    known_bad = {fault.path for fault in faults}
    faults = _pointers_as_one(faults)
    notes: list[str] = []
    if deep:
        sums_path = directory / SUMS_NAME
        if sums_file is not None:
            sums_path = pathlib.Path(os.path.expanduser(sums_file))
        found, notes = _read_all(directory, files, known_bad, sums_path, progress)
        faults += found
    faults += _tokenizer_faults(directory, config)
    bad = {fault.path for fault in faults}
    num_bytes = sum(file.file_size for file in files if file.name not in bad)
    return Report(
        directory, len(specs), num_bytes, faults, notes, _advice(directory, config, faults)
    )


def _pointers_as_one(faults: list[Fault]) -> list[Fault]:
    """Says of many Git LFS pointers once what they are: all come with the same command."""
    pointers = [fault.path for fault in faults if fault.problem == LFS_PROBLEM]
    if len(pointers) < 2:
        return faults
    problem = f"{LFS_PROBLEM}, and so are {len(pointers) - 1} more"
    others = [fault for fault in faults if fault.problem != LFS_PROBLEM]
    return [Fault(pointers[0], problem, LFS_REMEDY, fetch=False), *others]


def _tokenizer_faults(directory: pathlib.Path, config: ModelConfig) -> Iterator[Fault]:
    path = directory / TOKENIZER_NAME
    if not os.path.lexists(path):
        return
    try:
        Tokenizer.load(path).check_vocabulary(config.vocab_size)
    except CheckpointError as error:
        yield _fault(TOKENIZER_NAME, error, fetch=False)
    except (OSError, ValueError) as error:
        problem = str(error).removeprefix(f"{path}: ")
        yield Fault(TOKENIZER_NAME, problem, "copy it again, or remove it", fetch=False)


def _safetensors_files(
    directory: pathlib.Path, specs: list[TensorSpec]
) -> tuple[list[CheckedFile], list[Fault]]:
    index = directory / INDEX_NAME
    try:
        found = examine_safetensors(directory, specs)
    except CheckpointError as error:
        return [], [_fault(INDEX_NAME, error)]
    faults = []
    for error in found.faults:
        assert error.path is not None  # each is about a file
        name = error.path.name
        if error.kind == "missing":
            faults.append(Fault(name, "missing, expected as the index names it", "copy it again"))
        else:
            faults.append(_fault(name, error))
    bad = {fault.path for fault in faults}
    known = {shard.path.name for shard in found.shards} | bad
    for name in sorted(listed(directory)):
        if name.endswith(".safetensors") and name not in known:
            faults.append(
                Fault(name, "foreign, expected no such file by the index", "move it away", False)
            )
    files = [
        CheckedFile(
            shard.path.name,
            shard.path,
            shard.file_size,
            shard.modified,
            [(f"{_part_of(name)} of {name}", span) for name, span in shard.spans.items()],
        )
        for shard in found.shards
    ]
    found = index.stat()
    files.append(CheckedFile(INDEX_NAME, index, found.st_size, found.st_mtime_ns, []))
    return [file for file in files if file.name not in bad], faults


def _part_of(name: str) -> str:
    """Which of a weight's arrays a name is of."""
    parts = (part for part in INT4.parts if part.suffix and name.endswith(part.suffix))
    return next((part.name for part in parts), "values")


def _tensor_files(
    directory: pathlib.Path, specs: list[TensorSpec]
) -> tuple[list[CheckedFile], list[Fault]]:
    """Checks names and headers of `ckpt-0`."""
    place = directory / "ckpt-0"
    try:
        names = set(listed(place))
    except CheckpointError as error:
        if error.kind != "missing":
            raise
        remedy = f"{error.remedy}; Grok-1's are fetched with {_hf_command(directory)}"
        raise CheckpointError(place, error.problem, remedy, "missing") from error
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
            faults.append(_fault(f"ckpt-0/{name}", error))
    faults += _unlike_faults(headers, specs)
    faults += _extra_faults(place, names, specs)
    bad = {fault.path for fault in faults}
    files = [_file(header) for header in headers.values()]
    return [file for file in files if file.name not in bad], faults


def _file(header: TensorHeader) -> CheckedFile:
    spans = [("values", header.values), ("scales", header.scales)]
    arrays = [(what, span) for what, span in spans if span is not None]
    name = f"ckpt-0/{header.path.name}"
    return CheckedFile(name, header.path, header.file_size, header.modified, arrays)


def _header_fault(path: pathlib.Path, spec: TensorSpec, error: CheckpointError) -> Fault:
    name = f"ckpt-0/{path.name}"
    fault = _fault(name, error)
    if error.kind == "hostile":
        return fault._replace(problem=f"hostile: {fault.problem}")
    if error.kind != "damaged":
        return fault
    expected = tensor_file_size(spec)
    try:
        found = path.stat().st_size
    except OSError:
        return fault
    if found < expected:
        share = f"{100 * found / expected:.0f} %" if found else "nothing of it"
        problem = f"short, {found:,} bytes, expected {expected:,} ({share} is there)"
        return Fault(name, problem, "fetch it again")
    if found > expected:
        return Fault(name, f"long, {found:,} bytes, expected {expected:,}", "fetch it again")
    return fault


def _fault(name: str, error: CheckpointError, fetch: bool = True) -> Fault:
    fetch = fetch and not isinstance(error.__cause__, PermissionError)
    return Fault(name, error.problem, error.remedy or "fetch it again", fetch)


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


class _StoppedError(Exception):
    """Ends the threads that read, where another one has failed."""


def _read_all(
    directory: pathlib.Path,
    files: list[CheckedFile],
    bad: set[str],
    sums_path: pathlib.Path,
    progress: bool,
) -> tuple[list[Fault], list[str]]:
    """Reads the files side by side; `known` and what was read before an interruption count."""
    known = read_sums(sums_path)
    weights = {file.name for file in files} | bad
    others, notes = others_named(directory, sums_path, known.keys(), weights)
    files = [*files, *others]
    if any(file.name not in known for file in files):
        check_writable(sums_path)
    faults, sums = [], dict(known)
    journal, stopped, lock = Journal(sums_path), threading.Event(), threading.Lock()
    with (
        progress_bar(sum(file.file_size for file in files), "reading", progress) as bar,
        ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1)) as pool,
    ):

        def advance(num_bytes):
            if stopped.is_set():
                raise _StoppedError
            with lock:
                bar.update(num_bytes)

        readings = [(file, pool.submit(read_contents, file, journal, advance)) for file in files]
        try:
            for file, reading in readings:
                try:
                    digest, stamp, found = reading.result()
                    if known.get(file.name, digest) != digest:
                        raise CheckpointError(
                            file.path,
                            f"SHA-256 is {digest}, expected {known[file.name]} as in {sums_path}",
                            "the contents have changed: fetch it again",
                        )
                except CheckpointError as error:
                    # Others are not where the weights are fetched from.
                    faults.append(_fault(file.name, error, fetch=file.name in weights))
                    continue
                sums[file.name] = digest
                notes += found
                if not found:
                    journal.add(file, stamp, digest)
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    added = sums.keys() - known.keys()
    if added:
        write_sums(sums_path, sums)
    journal.remove()
    checked = len({file.name for file in files} & known.keys())
    relative = shlex.quote(os.path.relpath(sums_path, directory))
    notes.append(
        f"{sums_path}: {checked} checksums compared, {len(added)} added; check again with "
        f"(cd {shlex.quote(str(directory))} && sha256sum -c {relative})"
    )
    return faults, notes


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
