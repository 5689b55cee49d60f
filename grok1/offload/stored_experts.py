"""Where experts lie in files, and whether what is fetched of them can be a model's.

Scales of int8 experts are in memory, and were looked at when they were loaded. Those of 4-bit
experts are fetched with the rest.
"""

from collections.abc import Sequence

import numpy as np

from grok1.checkpoint.blocks import Check
from grok1.checkpoint.elements import check_scales
from grok1.checkpoint.mapping import Window
from grok1.checkpoint.storage import StoredArray
from grok1.checkpoint.tensor_file import DTYPES, DataFile
from grok1.ops.formats import INT4


def place_of(array: StoredArray, expert: int) -> tuple[DataFile, int]:
    """Returns the file that an expert's part of an array is in, and the byte where it begins."""
    if len(array.parts) == 1:
        file, span = array.parts[0]
        return file, span.offset + expert * (array.nbytes // array.num_matrices)
    file, span = array.parts[expert]
    return file, span.offset


def check_of(array: StoredArray, expert: int) -> Check | None:
    """Returns what is to look at an expert's part of an array; None where nothing is."""
    if array.dtype != INT4.parts[-1].dtype:
        return None
    file, _ = place_of(array, expert)

    def check(scales: np.ndarray, origin: Sequence[int]) -> None:
        check_scales(file, scales.reshape(1, *scales.shape[-2:]), origin)

    return check


def check_mapped(arrays: Sequence[StoredArray], expert: int, windows: Sequence[Window]) -> None:
    """Looks at an expert whose files are mapped, and whose pages are there.

    Args:
      arrays: Those of all experts of its layer.
      expert: Which of them.
      windows: On its part of each.

    Raises:
      CheckpointError: If a scale is not finite.
    """
    for array, window in zip(arrays, windows, strict=True):
        check = check_of(array, expert)
        if check is not None:
            elements = window.bytes().view(DTYPES[array.dtype])
            check(elements.reshape(array.shape[-2:]), (expert, 0, 0))
