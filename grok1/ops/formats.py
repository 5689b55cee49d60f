"""The formats of quantised weights: what arrays each is made of, in files and in memory.

All that knows one format from another is here and in the modules of the types themselves: what
else handles weights goes by the parts.

Dimension key: K contracting rows, N output columns, G groups of rows that share a scale.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from grok1.ops import int4
from grok1.ops.int4 import Int4Array
from grok1.ops.quantized import QuantizedArray, num_refined_groups, refine_groups


class Part(NamedTuple):
    """One of the arrays of a weight.

    Attributes:
      name: Its field in the weight.
      dtype: Its type.
      suffix: What a file adds to the weight's name for it.
      rows_of_group: Its rows for each group; None for values, of which there are K / `packed`.
      packed: Rows of the weight in one row of values.
      refine: Takes it, how many groups each becomes, and the rows of a group; returns it for these.
    """

    name: str
    dtype: str
    suffix: str
    rows_of_group: int | None = None
    packed: int = 1
    refine: Callable[[np.ndarray, int, int], np.ndarray] = lambda array, *_: array

    def num_rows(self, rows: int, num_groups: int) -> int:
        """Returns the rows it has for a weight of K rows in G groups."""
        return (
            rows // self.packed if self.rows_of_group is None else self.rows_of_group * num_groups
        )


class Format(NamedTuple):
    """A way to quantise weights.

    Attributes:
      name: In manifests and on the command line.
      weight: The type, a tuple of arrays `[*lead, rows of the part, N]`.
      parts: Its arrays, in order; the first has the values.
      num_refined: Takes K, G and the number of devices that share the rows; returns the fewest
        groups that are whole on each of them.
    """

    name: str
    weight: type
    parts: tuple[Part, ...]
    num_refined: Callable[[int, int, int], int]

    def part_shapes(self, shape: tuple[int, ...], num_groups: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the parts of a weight `[*lead, K, N]` in G groups."""
        *lead, rows, columns = shape
        return [(*lead, part.num_rows(rows, num_groups), columns) for part in self.parts]

    def shape_of(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the weight whose values have a shape."""
        *lead, rows, columns = values
        return (*lead, rows * self.parts[0].packed, columns)

    def abstract(self, shape: tuple[int, ...], num_groups: int) -> Any:
        """Returns a weight of `jax.ShapeDtypeStruct`s."""
        shapes = self.part_shapes(shape, num_groups)
        return self.weight(
            *(
                jax.ShapeDtypeStruct(one, part.dtype)
                for one, part in zip(shapes, self.parts, strict=True)
            )
        )


INT8 = Format(
    "int8",
    QuantizedArray,
    (
        Part("values", "int8", ""),
        Part(
            "scales",
            "bfloat16",
            "_scale",
            1,
            refine=lambda array, repeats, _: refine_groups(array, array.shape[-2] * repeats),
        ),
    ),
    num_refined_groups,
)
INT4 = Format(
    "int4",
    Int4Array,
    (
        Part("values", "uint8", "", packed=2),
        Part("subscales", "uint8", "_subscale", int4.CODE_ROWS, refine=int4.refine_subscales),
        Part(
            "scales",
            "float16",
            "_scale",
            1,
            refine=lambda array, repeats, _: refine_groups(array, array.shape[-2] * repeats),
        ),
    ),
    lambda rows, num_groups, num_shards: int4.num_blocks(
        rows, math.gcd(rows // num_groups, rows // num_shards)
    ),
)
FORMATS = {one.name: one for one in (INT8, INT4)}
"""The formats by name."""

OF_VALUES = {one.parts[0].dtype: one for one in FORMATS.values()}
"""The formats by the type of their values."""


def is_quantized(weight: Any) -> bool:
    """Whether something is a weight in one of the formats, of arrays or of what stands for them."""
    return isinstance(weight, tuple(one.weight for one in FORMATS.values()))


def format_of(weight: Any) -> Format:
    """Returns the format of a quantised weight."""
    return next(one for one in FORMATS.values() if isinstance(weight, one.weight))
