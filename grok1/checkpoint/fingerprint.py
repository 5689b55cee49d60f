"""A short digest by which two copies of a checkpoint are told from two checkpoints."""

import concurrent.futures
import hashlib
import os
import pathlib

from grok1.checkpoint.directory import is_safetensors
from grok1.files import open_regular, unreadable

_SAMPLE_BYTES = 1 << 14
_SAMPLES = 4  # of a file, the first at its beginning and the last at its end; a small one is whole
_THREADS = 16


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Returns a digest of the files of a checkpoint's tensors: names, sizes, and samples of each.

    Models that were trained or drawn apart differ in every tensor, so that samples tell them apart
    without reading hundreds of gigabytes. One weight that is damaged is for `verify --deep`.

    Args:
      path: A directory with `ckpt-0/`, or with a safetensors conversion.

    Raises:
      CheckpointError: If a file cannot be read, or is none.
    """
    directory = pathlib.Path(path)
    files = sorted(
        directory.glob("*.safetensors" if is_safetensors(path) else "ckpt-0/tensor*"),
        key=lambda file: file.name,
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(_sampled, files))
    digest = hashlib.sha256()
    for file, part in zip(files, parts, strict=True):
        digest.update(f"{file.name} ".encode("utf-8", "surrogateescape") + part)
    return digest.hexdigest()[:12]


def _sampled(file: pathlib.Path) -> bytes:
    """A digest of a file's size and of samples, evenly over its length."""
    with open(open_regular(file), "rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        last = max(0, size - _SAMPLE_BYTES)
        for number in range(_SAMPLES):
            try:
                opened.seek(last * number // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
            except OSError as error:
                raise unreadable(file, error) from error
    return digest.digest()
