"""Whether the elements of arrays can be those of a model: found at memory speed, and named."""

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from grok1.checkpoint.tensor_file import DataFile
from grok1.files import CheckpointError

MOST_SCALE = 2.0**20
"""The largest magnitude of a scale. Those of Grok-1 are below 0.1; 1e29 overflows in products."""

_DAMAGED = "the file is damaged: download it again"
# Elements, which stay in a cache of the processor; not fewer, because at both ends of each block
# many threads that look at weights at the same time wait for the interpreter's lock.
_BLOCK = 1 << 20
_EXPONENT = np.uint16(0x7F80)  # of a bfloat16
_MAGNITUDE = np.uint16(0x7FFF)
_MOST_BITS = np.array(MOST_SCALE, ml_dtypes.bfloat16).view(np.uint16)


def is_finite(values: np.ndarray) -> bool:
    """Whether all elements are finite, at some 10 GB/s.

    Args:
      values: float32 or bfloat16, C-contiguous.
    """
    flat = values.reshape(-1)
    held = np.empty(min(_BLOCK, flat.size), bool if flat.itemsize == 4 else np.uint16)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        out = held[: block.size]
        if flat.itemsize == 4:
            good = np.isfinite(block, out=out).all()
        else:
            # All bits of the exponent are set in what is infinite or not a number.
            good = np.bitwise_and(block.view(np.uint16), _EXPONENT, out=out).max() != _EXPONENT
        if not good:
            return False
    return True


def check_finite(
    file: DataFile, name: str, values: np.ndarray, origin: Sequence[int] | None = None
) -> None:
    """Checks that float weights are finite: one that is not makes the text wrong without a word.

    Args:
      file: The file they come from, for the message.
      name: The tensor, for the message.
      values: All of its elements, or a slice, as for `is_finite`.
      origin: Where the slice starts in the tensor; None for zeros.

    Raises:
      CheckpointError: If one is infinite or not a number.
    """
    if not is_finite(values):
        raise CheckpointError(
            file.path,
            f"{name}: {_faults(values, np.isfinite(values), origin, 'values', 'finite')}",
            _DAMAGED,
        )


class FiniteCheck(NamedTuple):
    """A `blocks.Check` by `check_finite`, which who reads can do in a way of their own.

    Attributes:
      file: The file that the elements come from, for the message.
      name: The tensor, for the message.
    """

    file: DataFile
    name: str

    def __call__(self, values: np.ndarray, origin: Sequence[int]) -> None:
        """As `check_finite`."""
        check_finite(self.file, self.name, values, origin)


def check_scales(file: DataFile, scales: np.ndarray, origin: Sequence[int] | None = None) -> None:
    """Checks that scales are finite, and no larger than products bear.

    Args:
      file: The file they come from, for the message.
      scales: All of its bfloat16 or float16 scales, or a slice.
      origin: Where the slice starts in the file's array; None for zeros.

    Raises:
      CheckpointError: If one is infinite, not a number, or above `MOST_SCALE`.
    """
    good = are_scales(scales)
    if not good.all():
        rule = f"finite, or above {MOST_SCALE:,.0f}"
        raise CheckpointError(file.path, _faults(scales, good, origin, "scales", rule), _DAMAGED)


def are_scales(values: np.ndarray) -> np.ndarray:
    """Returns which bfloat16 or float16 elements are finite and of at most `MOST_SCALE`."""
    if values.dtype == np.float16:  # whose largest is below that
        return np.isfinite(values)
    # As integers, the magnitudes of floats are in their order, and what is not finite is largest.
    return (values.view(np.uint16) & _MAGNITUDE) <= _MOST_BITS


def _faults(
    values: np.ndarray, good: np.ndarray, origin: Sequence[int] | None, what: str, rule: str
) -> str:
    """Says how many elements are not good, and where the first of them is."""
    first = np.unravel_index(np.argmin(good), good.shape)
    place = [int(n) for n in np.add(first, 0 if origin is None else origin)]
    return (
        f"{good.size - np.count_nonzero(good)} of {good.size} {what} are not {rule}, the first is "
        f"{values[first]} at {place}"
    )
