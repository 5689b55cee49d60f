"""The tensors of a model on disk, whichever files and whichever order of axes hold them.

Dimension key: K contracting rows, N output columns, G scale groups, as in `quantized`. A weight
is a number of matrices `[K, N]`, one for each index of its leading axes: one for a projection, one
an expert for the experts.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from grok1.checkpoint.tensor_file import DTYPES, ArraySpan, DataFile, TensorHeader, read_span
from grok1.config import ModelConfig
from grok1.nn.manifest import TensorSpec, in_memory, manifest
from grok1.ops.formats import OF_VALUES, Format
from grok1.ops.int4 import Int4Array, dequantize_int4

# Rows and columns of the tile in which a matrix is transposed: as int8 it fits the first- or
# second-level cache, which a whole row after another does not.
_TILE = 64, 2048
_ROWS, _COLUMNS = 256, 1024  # that are made float32 at a time


class StoredArray(NamedTuple):
    """One array of a model and where its elements lie.

    Attributes:
      shape: Shape in the model.
      dtype: One of `tensor_file.DTYPES`.
      parts: The file and the span of the whole array, or of each of its matrices.
      transposed: Whether the parts are matrices `[N, K]`, as other programs keep them.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[tuple[DataFile, ArraySpan], ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(span.nbytes for _, span in self.parts)

    @property
    def num_rows(self) -> int:
        """Rows of a matrix, elements of a vector."""
        return self.shape[-2:][0]

    @property
    def num_matrices(self) -> int:
        """Matrices in the array; 1 for a vector."""
        return math.prod(self.shape[:-2])


class StoredTensor(NamedTuple):
    """One tensor of a manifest on disk.

    Attributes:
      values: The elements; those of a quantised weight as its format has them.
      scales: The scales `[*lead, G, N]` of a quantised weight, else None.
      subscales: Those of groups of a format that has both, else None.
    """

    values: StoredArray
    scales: StoredArray | None
    subscales: StoredArray | None = None

    @property
    def format(self) -> Format | None:
        """How a quantised weight is stored; None for floats."""
        return None if self.scales is None else OF_VALUES[self.values.dtype]

    @property
    def dtype(self) -> str:
        """The type of its elements, or the name of its format."""
        return self.values.dtype if self.format is None else self.format.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shape = self.values.shape
        return shape if self.format is None else self.format.shape_of(shape)

    @property
    def parts(self) -> list[StoredArray]:
        """The arrays of a quantised weight in the order of its format; of floats, the elements."""
        if self.format is None:
            return [self.values]
        return [getattr(self, part.name) for part in self.format.parts]

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(part.nbytes for part in self.parts)


class StoredModel(NamedTuple):
    """The tensors of a model, or of some of its layers, on disk.

    Attributes:
      tensors: Where they lie, in manifest order.
      specs: Their names, in the same order, with the types and scale grouping of the files, or the
        types in memory.
    """

    tensors: list[StoredTensor]
    specs: list[TensorSpec]

    def only(self, config: ModelConfig) -> "StoredModel":
        """Returns the tensors that a model of fewer layers has."""
        names = {spec.name for spec in manifest(config)}
        kept = [number for number, spec in enumerate(self.specs) if spec.name in names]
        return StoredModel(
            [self.tensors[number] for number in kept], [self.specs[number] for number in kept]
        )

    def in_memory(self, embedding_dtype: Any) -> "StoredModel":
        """Returns the same with the types in memory, as `manifest.in_memory`."""
        return self._replace(specs=in_memory(self.specs, embedding_dtype))


def from_header(header: TensorHeader) -> StoredTensor:
    """Returns the tensor of one file in Grok-1's own format."""

    def array(span: ArraySpan) -> StoredArray:
        return StoredArray(span.shape, span.dtype, ((header, span),))

    return StoredTensor(array(header.values), header.scales and array(header.scales))


def read_matrix(
    array: StoredArray, number: int = 0, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Reads one matrix of an array, or some of its rows; of a vector, elements.

    Args:
      array: The array.
      number: Which matrix, of `array.num_matrices`.
      start: First row.
      stop: Behind the last row; None for all.

    Returns:
      A new array `[rows, N]`, not always contiguous.

    Raises:
      CheckpointError: As `tensor_file.read_span`.
    """
    if array.transposed:
        return read_span(*array.parts[number]).T[start:stop]
    is_apart = len(array.parts) > 1
    file, span = array.parts[number if is_apart else 0]
    if not is_apart:
        offset = span.offset + number * span.nbytes // array.num_matrices
        span = ArraySpan(offset, span.shape[-2:], span.dtype)
    return read_span(file, span, start, array.num_rows if stop is None else stop)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """Returns a contiguous copy of the transposed matrix."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    transpose_into(result, matrix)
    return result


def transpose_into(out: np.ndarray, matrix: np.ndarray) -> None:
    """Copies a matrix `[N, K]` to `out` `[K, N]`, tile by tile, with a conversion to its type."""
    rows, columns = matrix.shape
    step, wide_step = _TILE if matrix.strides[0] > matrix.strides[1] else _TILE[::-1]
    for i in range(0, rows, step):
        for j in range(0, columns, wide_step):
            tile = matrix[i : i + step, j : j + wide_step]
            out[j : j + wide_step, i : i + step] = tile.T


def dequantized_matrix(tensor: StoredTensor, number: int, dtype: str) -> np.ndarray:
    """Reads one matrix of a quantised weight and returns what it stands for, `[K, N]`.

    Args:
      tensor: The weight.
      number: Which matrix.
      dtype: "float32", which is exact, or "bfloat16", rounded once.

    Raises:
      CheckpointError: As `read_matrix`.
    """
    parts = [np.ascontiguousarray(read_matrix(part, number)) for part in tensor.parts]
    if tensor.subscales is None:
        values, scales = parts
        return dequantize_matrix(values, scales, dtype)
    weight = Int4Array(*parts)
    result = np.empty(weight.shape, DTYPES[dtype])
    for start in range(0, result.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        result[:, columns] = dequantize_int4(Int4Array(*(part[:, columns] for part in parts)))
    return result


def matrix_as_float32(tensor: StoredTensor, number: int) -> np.ndarray:
    """Reads one matrix of a weight, whatever its type, and returns it as float32 `[K, N]`.

    Raises:
      CheckpointError: As `read_matrix`.
    """
    if tensor.scales is None:
        return np.ascontiguousarray(read_matrix(tensor.values, number), np.float32)
    return dequantized_matrix(tensor, number, "float32")


def dequantize_matrix(values: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the matrix `[K, N]` that int8 values and scales `[G, N]` stand for.

    Args:
      values: int8 `[K, N]`.
      scales: bfloat16 `[G, N]`.
      dtype: "float32", which is exact, or "bfloat16", rounded once.
    """
    result = np.empty(values.shape, DTYPES[dtype])
    group_rows = len(values) // len(scales)
    for group, scale in enumerate(scales.astype(np.float32)):
        end = (group + 1) * group_rows
        # In steps, so that the float32 product of a large matrix never exists as a whole.
        for start in range(group * group_rows, end, _ROWS):
            rows = slice(start, min(start + _ROWS, end))
            result[rows] = values[rows] * scale
    return result


def text_of(span: ArraySpan) -> str:
    """Returns an array's type and shape for messages."""
    return f"{span.dtype}[{','.join(map(str, span.shape))}]"
