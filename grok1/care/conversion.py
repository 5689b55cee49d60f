"""A model from one format on disk to another, a matrix at a time."""

import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from grok1.care import gguf_file
from grok1.care.contents import check_elements
from grok1.care.int4_card import NAME as CARD_NAME
from grok1.care.rounding import Calibrated, Rounding, calibration_tokens
from grok1.care.staging import Checks, OutputFile, Piece, content, write_files
from grok1.checkpoint import safetensors_layout
from grok1.checkpoint.directory import load_config, located, open_tensors, tokenizer_path
from grok1.checkpoint.released import open_checkpoint
from grok1.checkpoint.safetensors_file import open_safetensors
from grok1.checkpoint.storage import (
    StoredArray,
    StoredModel,
    StoredTensor,
    dequantized_matrix,
    read_matrix,
    transpose,
)
from grok1.checkpoint.tensor_file import DTYPES, tensor_file_pieces
from grok1.config import ModelConfig
from grok1.files import CheckpointError
from grok1.keywords import shown
from grok1.machine.float_errors import as_numpy_comes
from grok1.machine.safe_files import absolute
from grok1.nn.manifest import TensorSpec, file_name, manifest, with_int4_experts
from grok1.ops.formats import INT4
from grok1.tokenizer import Tokenizer
from grok1.version import __version__

FORMATS = ("grok1", "safetensors", "int4", "gguf")

_BLOCK_BYTES = 1 << 28  # Rows of a larger matrix, as the embedding, are converted in such blocks.


_PACKAGES = {"safetensors": "safetensors", "int4": "safetensors", "gguf": "gguf"}


class _Plan(NamedTuple):
    files: list[OutputFile]
    check: Callable[[pathlib.Path], None]
    notes: list[str]


@as_numpy_comes
def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | Calibrated,
    dtype: str | None = None,
    embedding: str | None = None,
    progress: bool = True,
) -> list[str]:
    """Writes a model on disk in another format.

    Interrupted at any point, the same call continues where it stopped; the result is the same.

    Args:
      source: A directory that `grok1.load` reads.
      target: A new directory; with `to="gguf"` a new file.
      to: "grok1", the released format; "safetensors", see `safetensors_layout`; "int4", the same
        with 4-bit experts and a `quantization.json` that says how they were made, or `Calibrated`,
        these rounded for a text; or "gguf", see `gguf_file`, which this library writes and does not
        read.
      dtype: "bfloat16" for dequantised weights; "int8" to be refused if the source has none; None
        to keep what the source has.
      embedding: With `to="gguf"`, the type of the embedding, one of `gguf_file.EMBEDDING_TYPES`;
        None for "f32", which is exact.
      progress: Show bytes, rate and time left on stderr, if that is a terminal.

    Returns:
      What there is to know about the result, a sentence each.

    Raises:
      CheckpointError: If the source is no model, or one that `grok1.load` refuses because of its
        elements; or the target cannot be written.
      ValueError: If the options do not go together.
      ModuleNotFoundError: If the package of the format is not installed.
    """
    text, to = (to.text, "int4") if isinstance(to, Calibrated) else (None, to)
    _check_options(to, dtype, embedding)
    source, target = located(source), os.path.expanduser(target)
    config = load_config(source)
    tokenizer_file = tokenizer_path(source, config)
    tensors, specs = open_tensors(source, config)
    if dtype == "int8" and all(spec.scales_shape is None for spec in specs):
        raise CheckpointError(
            source,
            f"its weights are {_weight_type(specs)}, and int8 was asked for",
            "convert the released files instead",
            "foreign",
        )
    rounding = None
    if to == "grok1":
        plan = _grok1_plan(source, config, tensors, specs)
    elif to == "safetensors":
        plan = _safetensors_plan(config, tensors, specs, _dequantized(specs, dtype))
        if dtype == "bfloat16" and any(spec.scales_shape for spec in specs):
            plan.notes.append(
                f"weights are rounded to bfloat16 once, from {_weight_type(specs)} times its scale"
            )
    elif to == "int4":
        _check_int8_experts(source, specs)
        stored = StoredModel(tensors, specs)
        tokens = None if text is None else calibration_tokens(config, tokenizer_file, text)
        rounding = Rounding(source, config, stored, tokens, progress)
        plan = _safetensors_plan(config, tensors, specs, with_int4_experts(specs), rounding)
        plan.files.append(OutputFile(CARD_NAME, [rounding.card]))
    else:
        plan = _gguf_plan(source, config, tensors, specs, dtype, embedding or "f32")
    # Loaders of safetensors want to be told which model it is.
    config_json = config.to_json(hugging_face=to in ("safetensors", "int4")).encode()
    tokenizer = b""
    if tokenizer_file is not None:
        Tokenizer.load(tokenizer_file)
        tokenizer = tokenizer_file.read_bytes()
    if to != "gguf":
        plan.files.append(content("config.json", config_json))
        if tokenizer:
            plan.files.append(content("tokenizer.model", tokenizer))
    identity = {
        "source": str(absolute(source)),
        "to": to,
        "dtype": dtype,
        "embedding": embedding,
        "config": hashlib.sha256(config_json).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "source files": _digest(tensors),
        "versions": _versions(to),
    }
    check_source = functools.partial(check_elements, StoredModel(tensors, specs), progress)
    checks = Checks(check_source, plan.check)
    arguments = target, plan.files, identity, checks, progress
    if rounding is None:
        return plan.notes + write_files(*arguments)
    if rounding.calibration is not None:
        identity["calibration"] = rounding.calibration
    notes = write_files(*arguments, rounding.keep_in)
    return [*plan.notes, *rounding.notes(), *notes]


def _check_options(to: str, dtype: str | None, embedding: str | None) -> None:
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, found {shown(to)}")
    if dtype not in (None, "int8", "bfloat16"):
        raise ValueError(f'dtype must be "int8" or "bfloat16", found {shown(dtype)}')
    if to == "int4" and dtype is not None:
        raise ValueError("int4 says what the experts become; leave out the dtype")
    if to == "grok1" and dtype == "bfloat16":
        raise ValueError("Grok-1's own format has no bfloat16 weights; convert to safetensors")
    if embedding is not None and to != "gguf":
        raise ValueError(f"the type of the embedding can be chosen for gguf only, not for {to}")
    if embedding not in (None, *gguf_file.EMBEDDING_TYPES):
        raise ValueError(
            f"the embedding must be one of {', '.join(gguf_file.EMBEDDING_TYPES)}, found "
            f"{embedding!r}"
        )
    if package := _PACKAGES.get(to):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"converting to {to} needs the package {package}: pip install 'grok1[convert]'"
            ) from error


def _weight_type(specs) -> str:
    """The type of the experts, which are nearly all of the weights; norms are always float32."""
    return next(spec.dtype for spec in specs if len(spec.shape) == 3)


def _versions(to: str) -> dict[str, str]:
    """What writes the files: another version may write other bytes."""
    versions = {"grok1": __version__}
    if package := _PACKAGES.get(to):
        versions[package] = importlib.metadata.version(package)
    return versions


def _grok1_plan(
    source: pathlib.Path, config: ModelConfig, tensors: list[StoredTensor], specs
) -> _Plan:
    if any(spec.dtype == INT4.name for spec in specs):
        raise CheckpointError(
            source,
            "its experts are 4-bit, which Grok-1's own format has not",
            "convert the files that it was made from",
            "foreign",
        )
    files = []
    for number, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
        arrays = iter(array for array in tensor if array is not None)
        pieces = []
        frames = tensor_file_pieces(spec.shape, spec.scales_shape)
        for is_frame, run in itertools.groupby(frames, lambda piece: isinstance(piece, bytes)):
            if is_frame:
                pieces += content(
                    "", b"".join(piece for piece in run if isinstance(piece, bytes))
                ).pieces
            else:
                array = next(arrays)
                # Floats are float32 in this format.
                dtype = "float32" if spec.scales_shape is None else array.dtype
                pieces += _array_pieces(array, dtype)
        files.append(OutputFile(f"ckpt-0/{file_name(number)}", pieces))

    def check(path: pathlib.Path) -> None:
        open_checkpoint(path / "ckpt-0", manifest(config))

    return _Plan(files, check, [])


def _dequantized(specs: list[TensorSpec], dtype: str | None) -> list[TensorSpec]:
    return [
        spec._replace(dtype="bfloat16", scales_shape=None)
        if dtype == "bfloat16" and spec.scales_shape
        else spec
        for spec in specs
    ]


def _check_int8_experts(source: pathlib.Path, specs: list[TensorSpec]) -> None:
    if _weight_type(specs) == INT4.name:
        raise CheckpointError(source, "its experts are 4-bit already", "use it as it is", "foreign")


def _safetensors_plan(
    config: ModelConfig,
    tensors: list[StoredTensor],
    specs: list[TensorSpec],
    stored: list[TensorSpec],
    rounding: Rounding | None = None,
) -> _Plan:
    """The shards of a model.

    Args:
      config: The model.
      tensors: Its tensors.
      specs: As they are.
      stored: As they are to be.
      rounding: How experts become 4-bit, if they do.
    """
    shards = safetensors_layout.shards(stored)
    files = []
    for number, shard in enumerate(shards):
        pieces = content("", safetensors_layout.shard_header(shard)).pieces
        for named in shard:
            tensor, spec = tensors[named.tensor], stored[named.tensor]
            if spec.dtype == INT4.name and specs[named.tensor].dtype != INT4.name:
                # All of a matrix at once: its parts follow one another.
                if named.part == "values":
                    assert rounding is not None
                    pieces = [*pieces, rounding.piece(tensor, spec, named.matrix)]
            elif spec.dtype == INT4.name:
                part: StoredArray = getattr(tensor, named.part)
                nbytes = part.nbytes // part.num_matrices
                make = functools.partial(read_matrix, part, named.matrix)
                pieces = [*pieces, Piece(nbytes, make)]
            elif safetensors_layout.is_transposed(spec):
                nbytes = int(np.prod(named.shape)) * DTYPES[named.dtype].itemsize
                make = functools.partial(_transposed, tensor, named)
                pieces = [*pieces, Piece(nbytes, make)]
            else:
                pieces = [*pieces, *_array_pieces(tensor.values, named.dtype)]
        files.append(OutputFile(safetensors_layout.shard_name(number, len(shards)), pieces))
    files.append(content(safetensors_layout.INDEX_NAME, safetensors_layout.index_json(shards)))

    def check(path: pathlib.Path) -> None:
        import safetensors

        open_safetensors(path, manifest(config))
        for number, shard in enumerate(shards):
            name = safetensors_layout.shard_name(number, len(shards))
            with safetensors.safe_open(path / name, "numpy") as file:
                names = file.keys()  # An iterator of the package's own, no dictionary's.
                found = {key: tuple(file.get_slice(key).get_shape()) for key in names}
            if found != {named.name: named.shape for named in shard}:
                raise CheckpointError(path / name, "the safetensors package reads other tensors")

    return _Plan(files, check, [])


def _gguf_plan(source, config: ModelConfig, tensors, specs, dtype, embedding: str) -> _Plan:
    gguf_file.check_model(config)
    layout = gguf_file.layout(config, specs, embedding, dtype)
    report = gguf_file.scale_report(tensors, layout)
    tokenizer_file = tokenizer_path(source, config)
    tokenizer = Tokenizer.load(tokenizer_file) if tokenizer_file is not None else None
    # A name that is not UTF-8 cannot be one in the file.
    name = absolute(source).name.encode(errors="replace").decode()
    data, alignment = gguf_file.header(name, config, layout, tokenizer)
    pieces = content("", data).pieces
    for entry in layout:
        spec, tensor = specs[entry.tensor], tensors[entry.tensor]
        flip = len(spec.shape) > 1 and entry.name != "token_embd.weight"
        whole = [(number, 0, None) for number in range(tensor.values.num_matrices)]
        # Rows of a matrix that is flipped do not lie together in the file.
        for number, start, stop in whole if flip else _blocks(tensor.values):
            nbytes = entry.nbytes // tensor.values.num_matrices
            if stop is not None:
                nbytes = entry.nbytes // spec.shape[0] * (stop - start)
            make = functools.partial(
                gguf_file.encode, tensor, entry.kind, number, start, stop, flip
            )
            pieces.append(Piece(nbytes, make))
        padding = -entry.nbytes % alignment
        if padding:
            pieces += content("", bytes(padding)).pieces
    num_unchanged = sum(
        entry.kind == "q8_0" and specs[entry.tensor].scales_shape is not None for entry in layout
    )
    notes = [
        f"{num_unchanged} tensors hold the int8 weights unchanged in Q8_0 blocks; "
        f"{report.num_inexact:,} of {report.num_scales:,} scales are not exactly a float16"
        + (f", the worst is off by {report.largest_error:.1e}" if report.num_inexact else "")
    ]
    num_int4 = sum(entry.kind == "iq4_xs" for entry in layout)
    if num_int4:
        notes.append(f"{num_int4} tensors hold the 4-bit experts unchanged in IQ4_XS blocks")
    if embedding != "f32":
        notes.append(f"the embedding is rounded to {embedding}")
    widened = sum(
        entry.kind == "f32" and specs[entry.tensor].scales_shape is not None for entry in layout
    )
    if widened:
        notes.append(
            f"{widened} tensors are float32, exactly, because their scale groups are no multiples "
            "of the 32 rows of a Q8_0 block"
            if not any(spec.dtype == INT4.name for spec in specs)
            else f"{widened} tensors are float32, exactly, because their blocks are not of the 256 "
            "rows of IQ4_XS"
        )
    notes.append(
        "this library does not read GGUF, and there is no way back from it: keep the source"
    )
    if tokenizer is None:
        missing = source / "tokenizer.model"
        notes.append(f"{missing} is not there: llama.cpp will have tokens but no text")
    return _Plan([OutputFile("", pieces)], lambda path: gguf_file.check_file(path, layout), notes)


def _array_pieces(array: StoredArray, dtype: str) -> list[Piece]:
    """The elements of an array in the model's order."""
    pieces = []
    columns = math.prod(array.shape[-2:][1:])
    for number, start, stop in _blocks(array):
        num_rows = (array.num_rows if stop is None else stop) - start
        nbytes = num_rows * columns * DTYPES[dtype].itemsize
        pieces.append(Piece(nbytes, functools.partial(_plain, array, number, start, stop, dtype)))
    return pieces


def _blocks(array: StoredArray) -> Iterator[tuple[int, int, int | None]]:
    """Yields the matrices of an array, and a large one in blocks of rows: number, start, stop."""
    nbytes = array.nbytes // array.num_matrices
    for number in range(array.num_matrices):
        if nbytes <= _BLOCK_BYTES or len(array.shape) < 2:
            yield number, 0, None
            continue
        rows = array.num_rows
        step = max(1, rows * _BLOCK_BYTES // nbytes)
        for start in range(0, rows, step):
            yield number, start, min(start + step, rows)


def _plain(array: StoredArray, number: int, start: int, stop: int | None, dtype: str) -> np.ndarray:
    return read_matrix(array, number, start, stop).astype(DTYPES[dtype], copy=False)


def _transposed(tensor: StoredTensor, named: safetensors_layout.NamedMatrix) -> np.ndarray:
    if named.dtype == "bfloat16" and named.part == "values" and tensor.scales is not None:
        matrix = dequantized_matrix(tensor, named.matrix, "bfloat16")
    else:
        array: StoredArray = getattr(tensor, named.part)
        matrix = read_matrix(array, named.matrix)
    return transpose(matrix.astype(DTYPES[named.dtype], copy=False))


def _digest(tensors: list[StoredTensor]) -> str:
    """A checksum of the source's file names, lengths and times: whether it is still the same."""
    found = {
        file.path: [file.path.name, file.file_size, file.modified]
        for tensor in tensors
        for part in tensor.parts
        for file, _ in part.parts
    }
    files = [found[path] for path in sorted(found)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
