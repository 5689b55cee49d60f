"""The tensors of a checkpoint as a table, and the statistics of their weights by layer."""

import collections
import math
import os
import re
from typing import Any, NamedTuple

import numpy as np

from grok1.checkpoint.directory import load_config, located, open_tensors
from grok1.checkpoint.storage import StoredTensor, read_matrix
from grok1.checkpoint.tensor_file import ArraySpan, read_span
from grok1.machine.float_errors import as_numpy_comes
from grok1.ops.int4 import BOOK, CODE_ROWS, Int4Array, group_rows, group_scales, unpack

_SAMPLE_ROWS = 16  # Of each matrix of the file, evenly spaced.
_FULL_ROWS = 256  # Read at a time.
_LAYER = re.compile(r"decoder_layer_(\d+)/")


class TensorReport(NamedTuple):
    """One tensor.

    Attributes:
      file: The file it is in, or the first of them.
      name: Haiku module and parameter.
      dtype: "float32", "bfloat16", or the name of a quantised weight's format.
      shape: Its shape.
      scales_shape: Shape of the scales of a quantised weight, else None.
      num_bytes: Its elements and scales.
      rms: Root of the mean square of the dequantised weights that were read.
      smallest_scale: Smallest of all its scales, None without.
      largest_scale: Largest of all its scales, None without.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    scales_shape: tuple[int, ...] | None
    num_bytes: int
    rms: float
    smallest_scale: float | None
    largest_scale: float | None


class LayerReport(NamedTuple):
    """The weights of one layer together.

    Attributes:
      layer: Its number.
      attention_rms: Root of the mean square of the four projections of attention.
      smallest_expert_rms: Of gate, up and down projections the smallest, all experts of each taken
        together.
      largest_expert_rms: The largest.
      router_rms: Root of the mean square of the router's weight.
      smallest_scale: Smallest of all scales of the layer, None without.
      largest_scale: Largest of all scales of the layer, None without.
    """

    layer: int
    attention_rms: float
    smallest_expert_rms: float
    largest_expert_rms: float
    router_rms: float
    smallest_scale: float | None
    largest_scale: float | None

    def line(self) -> str:
        """The same as a line of a table."""
        experts = f"{self.smallest_expert_rms:.5f} to {self.largest_expert_rms:.5f}"
        return (
            f"{self.layer:5} {self.attention_rms:11.5f} {experts:>20} {self.router_rms:9.5f}  "
            f"{_range(self.smallest_scale, self.largest_scale)}"
        ).rstrip()


class Inspection(NamedTuple):
    """A checkpoint.

    Attributes:
      tensors: The tensors asked for, in file order.
      layers: The layers asked for, in their order.
      num_weights: Weights in them.
      num_bytes: Bytes by type of the elements.
      is_sample: Whether `rms` is that of some rows only.
    """

    tensors: list[TensorReport]
    layers: list[LayerReport]
    num_weights: int
    num_bytes: dict[str, int]
    is_sample: bool

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        tensors = [tensor._asdict() for tensor in self.tensors]
        layers = [layer._asdict() for layer in self.layers]
        return {**self._asdict(), "tensors": tensors, "layers": layers}

    def lines(self) -> list[str]:
        """The same as a table."""
        width = max(len(tensor.name) for tensor in self.tensors)
        lines = [
            f"{'file':16} {'tensor':{width}} {'type':30} {'scales':20} {'rms':>9}  scale range"
        ]
        for tensor in self.tensors:
            shape = f"{tensor.dtype}[{','.join(map(str, tensor.shape))}]"
            scales = f"[{','.join(map(str, tensor.scales_shape))}]" if tensor.scales_shape else ""
            span = _range(tensor.smallest_scale, tensor.largest_scale)
            lines.append(
                f"{tensor.file:16} {tensor.name:{width}} {shape:30} {scales:20} "
                f"{tensor.rms:9.5f}  {span}".rstrip()
            )
        totals = ", ".join(f"{name} {count:,} bytes" for name, count in self.num_bytes.items())
        lines.append(f"{len(self.tensors)} tensors, {self.num_weights:,} weights: {totals}")
        lines.append(f"layer {'attention':>11} {'experts':>20} {'router':>9}  scale range")
        lines += [layer.line() for layer in self.layers]
        if self.is_sample:
            lines.append(f"rms is that of {_SAMPLE_ROWS} rows of each matrix; --full reads all")
        return lines


@as_numpy_comes
def inspect(
    directory: str | os.PathLike[str], *, layer: int | None = None, full: bool = False
) -> Inspection:
    """Lists the tensors of a checkpoint with statistics.

    Args:
      directory: A directory that `grok1.load` reads.
      layer: Only this layer; None for all, with the embedding and final norm.
      full: Read every weight rather than some rows of each matrix.

    Raises:
      CheckpointError: If a file is missing or damaged.
      ValueError: If there is no such layer, or `config.json` is none.
    """
    directory = located(directory)
    config = load_config(directory)
    if layer is not None and not 0 <= layer < config.num_layers:
        raise ValueError(f"layer must be in [0, {config.num_layers}), found {layer}")
    tensors, specs = open_tensors(directory, config)
    reports, totals = [], collections.Counter()
    for tensor, spec in zip(tensors, specs, strict=True):
        match = _LAYER.search(spec.name)
        if layer is not None and (match is None or int(match[1]) != layer):
            continue
        scales = tensor.scales and [
            read_matrix(tensor.scales, number) for number in range(tensor.scales.num_matrices)
        ]
        for part in tensor.parts:
            totals[part.dtype] += part.nbytes
        reports.append(
            TensorReport(
                tensor.values.parts[0][0].path.name,
                spec.name,
                spec.dtype,
                spec.shape,
                spec.scales_shape,
                tensor.nbytes,
                _int4_rms(tensor, full) if tensor.subscales else _rms(tensor, scales, full),
                float(min(part.min() for part in scales)) if scales else None,
                float(max(part.max() for part in scales)) if scales else None,
            )
        )
    num_weights = sum(math.prod(report.shape) for report in reports)
    return Inspection(reports, _layer_reports(reports), num_weights, dict(totals), not full)


def _range(smallest: float | None, largest: float | None) -> str:
    return "" if smallest is None else f"{smallest:.2e} to {largest:.2e}"


def _layer_reports(tensors: list[TensorReport]) -> list[LayerReport]:
    layers: dict[int, list[TensorReport]] = {}
    for tensor in tensors:
        match = _LAYER.search(tensor.name)
        if match is not None:
            layers.setdefault(int(match[1]), []).append(tensor)
    return [_layer_report(number, layers[number]) for number in sorted(layers)]


def _layer_report(number: int, tensors: list[TensorReport]) -> LayerReport:
    attention = [tensor for tensor in tensors if "/multi_head_attention/" in tensor.name]
    experts = [tensor.rms for tensor in tensors if "/moe/" in tensor.name]
    squares = sum(tensor.rms**2 * math.prod(tensor.shape) for tensor in attention)
    smallest = [t.smallest_scale for t in tensors if t.smallest_scale is not None]
    largest = [t.largest_scale for t in tensors if t.largest_scale is not None]
    return LayerReport(
        layer=number,
        attention_rms=math.sqrt(squares / sum(math.prod(tensor.shape) for tensor in attention)),
        smallest_expert_rms=min(experts),
        largest_expert_rms=max(experts),
        router_rms=next(tensor.rms for tensor in tensors if "/router/" in tensor.name),
        smallest_scale=min(smallest, default=None),
        largest_scale=max(largest, default=None),
    )


def _rms(tensor: StoredTensor, scales: list[np.ndarray] | None, full: bool) -> float:
    """Root mean square; rows are the file's, so that a sample reads no more than it needs."""
    array = tensor.values
    total, count = 0.0, 0
    for number in range(array.num_matrices):
        file, span = array.parts[number if array.transposed else 0]
        if not array.transposed:
            offset = span.offset + number * span.nbytes // array.num_matrices
            span = ArraySpan(offset, span.shape[-2:], span.dtype)
        rows = span.shape[0]
        step = _FULL_ROWS if full or len(span.shape) == 1 else max(1, rows // _SAMPLE_ROWS)
        length = step if full or len(span.shape) == 1 else 1
        for start in range(0, rows, step):
            stop = min(start + length, rows)
            values = read_span(file, span, start, stop).astype(np.float64)
            if scales is not None:
                values *= _scales_of_rows(scales[number], start, stop, span.shape, array.transposed)
            total, count = total + float(np.sum(values * values)), count + values.size
    return math.sqrt(total / count)


def _int4_rms(tensor: StoredTensor, full: bool) -> float:
    """Root mean square of 4-bit weights, a block of rows or a pair of them at a time."""
    total, count = 0.0, 0
    values, subscales, scales = tensor.parts
    rows = tensor.shape[-2] // scales.num_rows  # of a block
    step = rows if full else max(2, tensor.shape[-2] // _SAMPLE_ROWS * 2)
    for number in range(values.num_matrices):
        for first in range(0, tensor.shape[-2] // 2 * 2, step - step % 2):
            block, pair = first // rows, first // 2
            of_block = Int4Array(
                read_matrix(values, number, pair, pair + (rows // 2 if full else 1)),
                read_matrix(subscales, number, block * CODE_ROWS, (block + 1) * CODE_ROWS),
                read_matrix(scales, number, block, block + 1),
            )
            groups = group_scales(of_block._replace(values=np.empty((rows // 2, 1), np.uint8)))
            group = first % rows // group_rows(rows)
            codes = BOOK[unpack(of_block.values)].astype(np.float64)
            if full:
                codes *= groups.repeat(group_rows(rows), axis=0)
            else:
                codes *= groups[group]
            total, count = total + float(np.sum(codes * codes)), count + codes.size
    return math.sqrt(total / count)


def _scales_of_rows(scales, start, stop, shape, transposed) -> np.ndarray:
    """The scale of each element of these rows of the file."""
    scales = scales.astype(np.float64)
    if transposed:
        return scales.T[start:stop].repeat(shape[1] // len(scales), axis=1)
    return scales[np.arange(start, stop) * len(scales) // shape[0]]
