"""Memory that an expert is brought to, of the host or of a device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grok1.machine.cuda_driver import Copier


class Buffer(NamedTuple):
    """Memory for an expert.

    Attributes:
      matrices: What is fetched of gate, up and down, `[1, rows, N]` each, to be written to.
      arrays: The same memory, as `jax.device_put` takes it.
      copier: What copies to `matrices`, if they are in the memory of the device: then `arrays` are
        what programs take, and the memory is not to be written to again.
    """

    matrices: Sequence[np.ndarray]
    arrays: Sequence[Any]
    copier: Copier | None = None


class PartOfExpert(NamedTuple):
    """Shape and type of one of the arrays that an expert is fetched as."""

    shape: tuple[int, ...]
    dtype: np.dtype


def pageable_buffer(parts: Sequence[PartOfExpert]) -> Buffer:
    """Returns ordinary memory for the parts of an expert."""
    matrices = [np.empty((1, *part.shape), part.dtype) for part in parts]
    return Buffer(matrices, matrices)
