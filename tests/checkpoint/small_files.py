"""The bytes of small tensor files."""

import struct

import ml_dtypes
import numpy as np

from grok1.checkpoint import tensor_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

VALUES: np.ndarray = np.arange(6, dtype=np.float32).reshape(2, 3)
WEIGHT: np.ndarray = np.arange(12, dtype=np.int8).reshape(4, 3)
SCALES: np.ndarray = np.arange(1, 7).reshape(2, 3).astype(BFLOAT16)


def framed(body: bytes) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


def written(*arrays: np.ndarray) -> bytes:
    """The bytes of a small valid file."""
    scales_shape = arrays[1].shape if len(arrays) == 2 else None
    payloads = (array.tobytes() for array in arrays)
    pieces = tensor_file.tensor_file_pieces(arrays[0].shape, scales_shape)
    return b"".join(p if isinstance(p, bytes) else next(payloads) for p in pieces)


def body_of(*arrays: np.ndarray) -> bytes:
    return written(*(arrays or (VALUES,)))[11:]
