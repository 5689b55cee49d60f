"""A checkpoint directory: one tensor file for each tensor of the manifest, checked and written."""

import errno
import os
import pathlib
import re
import shlex
import types
from collections.abc import Iterable, Mapping

import numpy as np

from grok1.checkpoint.safetensors_layout import INDEX_NAME
from grok1.checkpoint.storage import text_of
from grok1.checkpoint.tensor_file import (
    ArraySpan,
    TensorHeader,
    read_header,
    tensor_file_size,
    write_tensor,
)
from grok1.files import CheckpointError, listed
from grok1.machine.safe_files import absolute, move_new, scratch_directory
from grok1.nn.manifest import TensorSpec, file_name

LAYER = re.compile(r"decoder_layer_\d+")
"""Finds the layer in a tensor's name."""


def open_checkpoint(
    directory: str | os.PathLike[str], manifest: list[TensorSpec]
) -> list[TensorHeader]:
    """Checks every file of a checkpoint against the model, before any payload is read.

    The grouping of the scales belongs to the file: for a weight `(*lead, K, N)` any scales
    `(*lead, G, N)` whose G divides K are accepted, and so is a float32 weight without scales, as
    long as all layers store that weight alike.

    Args:
      directory: The directory with the files, `ckpt-0` of a release.
      manifest: The tensors that the model expects, in file order.

    Returns:
      The headers of the files, in file order.

    Raises:
      CheckpointError: If the directory or a file is missing, a tensor file is left over, or a file
        is damaged or holds another tensor than the manifest says; the message names it.
    """
    directory = pathlib.Path(directory)
    _check_names(directory, manifest)
    headers = [read_header(directory / file_name(i)) for i in range(len(manifest))]
    first_of_kind: dict[str, TensorHeader] = {}
    for header, spec in zip(headers, manifest, strict=True):
        check_tensor(header, spec)
        first = first_of_kind.setdefault(LAYER.sub("decoder_layer_*", spec.name), header)
        if describe_storage(header) != describe_storage(first):
            raise CheckpointError(
                header.path,
                f"{spec.name} is stored as {describe_storage(header)}, expected "
                f"{describe_storage(first)} as in {first.path.name} for another layer",
                "these files are of different checkpoints",
                "foreign",
            )
    return headers


def check_tensor(header: TensorHeader, spec: TensorSpec) -> None:
    """Checks the types and shapes of one file against the manifest.

    Raises:
      CheckpointError: If they differ.
    """
    values, scales = header.values, header.scales
    if values.shape != spec.shape or values.dtype not in (spec.dtype, "float32"):
        raise CheckpointError(
            header.path,
            f"{spec.name} is {text_of(values)}, expected "
            f"{text_of(ArraySpan(0, spec.shape, spec.dtype))}",
            "is this a Grok-1 checkpoint?",
            "foreign",
        )
    if scales is not None:
        *lead, rows, columns = spec.shape
        groups = scales.shape[-2] if len(scales.shape) == len(spec.shape) else 0
        if not groups or scales.shape != (*lead, groups, columns) or rows % groups:
            layout = ",".join(map(str, [*lead, "G", columns]))
            raise CheckpointError(
                header.path,
                f"{spec.name} has scales {text_of(scales)}, expected bfloat16[{layout}] with a G "
                f"that divides {rows}",
                "is this a Grok-1 checkpoint?",
                "foreign",
            )


def describe_storage(header: TensorHeader) -> str:
    """Says how a tensor is stored, as `int8[8,6] with scales bfloat16[1,6]`."""
    if header.scales is None:
        return text_of(header.values)
    return f"{text_of(header.values)} with scales {text_of(header.scales)}"


def save_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Iterable[tuple[np.ndarray, np.ndarray | None]],
    beside: Mapping[str, bytes] = types.MappingProxyType({}),
) -> None:
    """Writes a checkpoint directory and what lies beside it, whole or not at all.

    The files are written to a directory of their own and moved to their place at the end, so that a
    save that fails leaves nothing behind. Nothing that is there is replaced.

    Args:
      directory: Where the files go; must be absent or empty.
      tensors: (values, scales or None) of each tensor in manifest order, as for `write_tensor`.
      beside: Content of other files by name, such as `config.json`; they go beside `directory`.

    Raises:
      CheckpointError: If the directory already holds something, or the one around it a file of
        these names or a checkpoint in safetensors; or if the disk refuses.
      ValueError: If a tensor is of a type or shape that no tensor file has.
    """
    target = absolute(directory)
    step, written = "creating the directory", 0
    try:
        _check_nothing_is_replaced(target, beside)
        with scratch_directory(target.parent) as scratch:
            # Inside, because the scratch directory itself is closed to other users.
            partial = scratch / target.name
            partial.mkdir()
            for i, (values, scales) in enumerate(tensors):
                scales_shape = None if scales is None else scales.shape
                size = tensor_file_size(TensorSpec("", values.shape, "", scales_shape))
                step = f"writing {file_name(i)} ({size:,} bytes, {written:,} before it)"
                write_tensor(partial / file_name(i), values, scales)
                written += size
            for name, data in beside.items():
                step = f"writing {name} ({len(data):,} bytes, {written:,} before it)"
                (scratch / name).write_bytes(data)
            step = "moving the files to their place"
            target.parent.mkdir(parents=True, exist_ok=True)
            _move([*beside, target.name], scratch, target.parent)
    except OSError as error:
        raise CheckpointError(
            directory,
            f"not saved: {error.strerror} on {step}",
            "nothing was left behind, choose a directory that can be written and has the space",
            "unwritable",
        ) from error


def _check_nothing_is_replaced(target: pathlib.Path, beside: Iterable[str]) -> None:
    there = next(path for path in target.parents if os.path.lexists(path))
    if not there.is_dir():  # which would show when all is written, and is to be moved below it
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(there))
    around = os.listdir(target.parent) if target.parent.is_dir() else []
    of_another = [name for name in around if name.endswith((".safetensors", INDEX_NAME))]
    for place, found in (
        (target, os.listdir(target) if os.path.lexists(target) else []),
        (target.parent, [*(set(beside) & set(around)), *of_another]),
    ):
        if found:
            raise CheckpointError(
                place,
                f"already holds {_some(found)}",
                "choose a new directory, nothing was written",
                "unwritable",
            )


def _move(names: list[str], source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves all, or none; the last one, without which the others mean nothing, may be a directory.

    Raises:
      OSError: If one cannot be moved, or something is in its place.
    """
    moved: list[pathlib.Path] = []
    try:
        for name in names:
            move_new(source / name, target / name)
            moved.append(target / name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def download_advice(directory: pathlib.Path) -> str:
    """Says how Grok-1's weights come into a model's directory."""
    return (
        "Grok-1's weights (318 GB) come from the magnet link in the README of "
        "github.com/xai-org/grok-1, or with `hf download xai-org/grok-1 --include 'ckpt-0/*' "
        f"--local-dir {shlex.quote(str(directory))}`. To try the library without them, load the "
        'bundled "toy"'
    )


def _check_names(directory: pathlib.Path, manifest: list[TensorSpec]) -> None:
    if not directory.is_dir():
        raise CheckpointError(
            directory,
            "there is no such directory",
            download_advice(directory.parent),
            "missing",
        )
    found = {name for name in listed(directory) if name.startswith("tensor")}
    expected = {file_name(i) for i in range(len(manifest))}
    if found == expected:
        return
    problems, hint = [], "move the extra files away"
    if expected - found:
        problems.append(f"missing {_some(expected - found)}")
        hint = "the download is incomplete: resume it"
    if found - expected:
        problems.append(f"extra {_some(found - expected)}")
    outside = sum(not LAYER.search(spec.name) for spec in manifest)
    in_layer = sum("decoder_layer_0/" in spec.name for spec in manifest)
    num_layers, rest = divmod(len(found) - outside, in_layer)
    if num_layers > 0 and not rest and found == {file_name(i) for i in range(len(found))}:
        hint = (
            f"these are the files for {num_layers} layers, the configuration has "
            f"{(len(manifest) - outside) // in_layer}: is its config.json missing?"
        )
    raise CheckpointError(
        directory,
        f"found {len(found)} tensor files, expected {len(expected)}: {', '.join(problems)}",
        hint,
        "missing" if expected - found else "foreign",
    )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
