"""Measures how the products of a decode step are best cut, on the NVIDIA GPU that is here.

    python -m tools.gpu_cuts --rows 1 8 32 --shards 1 8

A product begins with the cut that the library has for it. Those next to it are measured, of twice
or half as many warps, teams or parts, or a stage more or less; the fastest is the next to begin
with, until none is faster by 2 %. Where another is, the place for it is `cut_of_...` in
`grok1/ops/cuda/shapes.py` or `cuts` in `shapes_int4.py`, and `tests/ops/test_cuda.py` says whether
its sums fit in registers. Times are the device's own, of launches that read other weights each.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device
from grok1.config import GROK_1, ModelConfig
from grok1.machine.processor import available_cores
from grok1.ops.cuda import calls, presence, shapes, shapes_int4
from grok1.ops.cuda.kernel import Array, Kernel
from grok1.ops.cuda.shapes import Cut, Matrix

NAMES = ("gate_up", "down", "projections", "output", "gate_up_int4", "down_int4")

_BETTER = 0.98  # of the time, for a cut to be the next
_MOST_SHARED = 227 << 10  # bytes of a multiprocessor of compute capability 9.0
_GROUPS = 8  # of rows, in the released files, of a matrix that is sharded by them
_BLOCK = 256  # rows of a block of 4-bit weights
_STACK_BYTES = 400e6  # several times what a second-level cache holds


class Product(NamedTuple):
    """What is cut.

    Attributes:
      name: One of `NAMES`: the first or the second half of the experts, attention's three
        projections or its last.
      rows: Tokens of the step.
      shards: Devices that share the matrices.
      config: The model.
    """

    name: str
    rows: int
    shards: int
    config: ModelConfig = GROK_1

    @property
    def is_of_attention(self) -> bool:
        """Whether the matrices are not those of experts."""
        return self.name in ("projections", "output")

    @property
    def is_int4(self) -> bool:
        """Whether the weights have 4 bits."""
        return self.name.endswith("int4")

    @property
    def matrices(self) -> list[Matrix]:
        """What the rows are multiplied with, on one device."""
        config = self.config
        width, hidden = config.emb_size, config.ffn_size // self.shards
        groups = _GROUPS // self.shards
        if self.is_of_attention:
            heads = (config.num_q_heads, config.num_kv_heads, config.num_kv_heads)
            columns = [count * config.key_size // self.shards for count in heads]
            if self.name == "output":
                return [Matrix(columns[0], width, groups)]
            return [Matrix(width, of, 1) for of in columns]
        of_width, of_hidden = (-(-of // _BLOCK) if self.is_int4 else 0 for of in (width, hidden))
        if self.name.startswith("gate_up"):
            return [Matrix(width, hidden, of_width or 1)] * 2
        return [Matrix(hidden, width, of_hidden or groups)]

    def kernels(self) -> tuple[Kernel | None, Kernel]:
        """The product's, behind the one that makes its inputs, if there is one."""
        if self.is_of_attention:
            return shapes.project(self.rows, tuple(self.matrices), "split")
        kind = "_int4" if self.is_int4 else ""
        gate = self._replace(name=f"gate_up{kind}").matrices[0]
        down = self._replace(name=f"down{kind}").matrices[0]
        config = self.config
        choice = self.rows, config.num_selected_experts, config.num_experts
        if self.is_int4:
            sizes = shapes_int4.Sizes(*choice, gate, down, "bfloat16")
            kernels = shapes_int4.experts(sizes, "experts_int4_of_one" in presence.kernels())
        else:
            kernels = shapes.experts(*choice, gate, down, "bfloat16")
        if self.name.startswith("down"):
            return kernels[-2], kernels[-1]
        return (kernels[0] if self.is_int4 else None), kernels[-2]

    @contextlib.contextmanager
    def answered(self, answer: Callable[[Any], Any]) -> Iterator[None]:
        """Has `answer` make what the library is told of what it would be told."""
        module = shapes_int4 if self.is_int4 else shapes
        half = "down" if self.name.startswith("down") else "hidden"
        name = "cuts" if self.is_int4 else f"cut_of_{half}"
        if self.is_of_attention:
            name = "cut_of_projection"
        own = getattr(module, name)
        with mock.patch.object(module, name, lambda *sizes: answer(own(*sizes))):
            yield


class Choice(NamedTuple):
    """How a product is cut.

    Attributes:
      cut: Into what.
      resident: Blocks that a multiprocessor holds at once; 0 where that follows.
    """

    cut: Cut
    resident: int = 0


def chosen(product: Product) -> Choice:
    """What the library has for a product."""
    found: list[Any] = []
    with product.answered(lambda own: found.append(own) or own):
        product.kernels()
    if product.is_int4:
        return Choice(*found[-1][product.name.startswith("down")])
    return Choice(found[-1])


def kernel_of(product: Product, choice: Choice) -> Kernel | None:
    """The kernel of a product that is cut so; None if no multiprocessor holds a block."""

    def answer(own: Any) -> Any:
        if not product.is_int4:
            return choice.cut
        hidden, down = own
        return (hidden, choice) if product.name.startswith("down") else (choice, down)

    with product.answered(answer):
        _, kernel = product.kernels()
    fits = kernel.threads <= 1024 and kernel.shared_bytes * kernel.resident <= _MOST_SHARED
    return kernel if fits else None


def neighbours(choice: Choice) -> list[Choice]:
    """Those that differ in one number, by a step."""
    cut, resident = choice
    cuts = [
        cut._replace(**{name: of})
        for name in ("across", "teams", "parts")
        for of in (getattr(cut, name) // 2, 2 * getattr(cut, name))
        if of >= 1
    ]
    cuts += [cut._replace(stages=of) for of in (cut.stages - 1, cut.stages + 1) if of >= 2]
    others = (resident - 1, resident + 1) if resident else ()
    return [
        *(Choice(of, resident) for of in cuts),
        *(Choice(cut, of) for of in others if of >= 1),
    ]


def fastest(
    start: Choice, measure: Callable[[Sequence[Choice]], dict[Choice, float]]
) -> tuple[Choice, dict[Choice, float]]:
    """Walks from a choice to the best beside it, while that is faster.

    Args:
      start: Where it begins.
      measure: Gives the seconds of each of some choices; infinity for what does not run.

    Returns:
      Where it ended, and all that was measured.
    """
    times = measure([start])
    best = start
    while True:
        times |= measure([of for of in neighbours(best) if of not in times])
        found = min(times, key=lambda of: times[of])
        if not times[found] < _BETTER * times[best]:
            return best, times
        best = found


class Operands:
    """What a product's kernels take, however it is cut; weights are a stack of layers."""

    def __init__(self, product: Product):
        self.product = product
        of_weight = _arrays_int4 if product.is_int4 else _arrays_int8
        lead = () if product.is_of_attention else (product.config.num_experts,)
        arrays = [of_weight(matrix) for matrix in product.matrices]
        num_bytes = sum(
            math.prod((*lead, *array.shape)) * np.dtype(array.dtype).itemsize
            for of in arrays
            for array in of
        )
        self.layers = max(2, math.ceil(_STACK_BYTES / num_bytes))
        lead = (self.layers, *lead)
        self.weights = [
            [_filled((*lead, *array.shape), array.dtype) for array in of] for of in arrays
        ]
        self.inputs = [_filled(array.shape, array.dtype) for array in self._inputs()]
        rng, rows = np.random.default_rng(0), product.rows
        picks = [rng.permutation(product.config.num_experts) for _ in range(rows)]
        indices = np.array(picks, np.int32)[:, : product.config.num_selected_experts]
        self.choice = [jnp.asarray(indices), jnp.ones(rows, bool)]
        if product.name.startswith("down"):
            self.choice.append(jnp.full(indices.shape, 0.5, jnp.float32))

    def _inputs(self) -> Sequence[Array]:
        before, _ = self.product.kernels()
        if before is None:
            width = self.product.matrices[0].rows
            return [Array((self.product.rows, width), "float32")]
        return before.outputs[: 2 if self.product.is_int4 else 1]

    def launch(self, kernel: Kernel) -> list[jax.Array]:
        """Runs a kernel once for each layer."""
        return _program(self.product.is_of_attention, self.layers, kernel)(
            self.inputs, self.weights, self.choice
        )

    def seconds(self, choices: Sequence[Choice]) -> dict[Choice, float]:
        """Of a launch, by the device's own clock, the median; infinity where it fails."""
        kernels = {choice: kernel_of(self.product, choice) for choice in choices}
        with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
            runs = {of: pool.submit(self._prepare, of) for of in {*kernels.values()} if of}
        ready = [kernel for kernel, run in runs.items() if run.exception() is None]
        times: dict[str, list[float]] = {}
        if ready:
            for name, seconds in device.launches(lambda: [self.launch(of) for of in ready]):
                times.setdefault(name, []).append(seconds)
        found = dict.fromkeys(choices, math.inf)
        for choice, kernel in kernels.items():
            if kernel is not None and kernel in ready:
                found[choice] = statistics.median(times[calls.name_of(kernel)])
        return found

    def _prepare(self, kernel: Kernel) -> None:
        jax.block_until_ready(self.launch(kernel))


@functools.cache
def _program(is_of_attention: bool, layers: int, kernel: Kernel) -> Callable[..., list[jax.Array]]:
    def run(inputs, weights, choice):
        found = []
        for number in range(layers):
            layer = jnp.int32(number)
            if is_of_attention:
                operands = [array for weight in weights for array in (*weight, layer)]
            else:
                operands = [*(array for weight in weights for array in weight), layer, *choice]
            found.append(calls.call(kernel, *inputs, *operands)[0])
        return found

    return jax.jit(run)


def _arrays_int8(matrix: Matrix) -> list[Array]:
    rows, columns, groups = matrix
    return [Array((rows, columns), "int8"), Array((groups, columns), "bfloat16")]


def _arrays_int4(matrix: Matrix) -> list[Array]:
    rows, columns, blocks = matrix
    shapes_of_parts = ((rows // 2, columns), (6 * blocks, columns), (blocks, columns))
    return [
        Array(shape, dtype)
        for shape, dtype in zip(shapes_of_parts, shapes_int4.WEIGHTS, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _filled(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Whole numbers that look random, or floats about one: a device draws less power for zeros."""
    number = jnp.uint32(1)
    for axis in range(len(shape)):
        number = number * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        number = (number ^ number >> 15) * jnp.uint32(0x85EBCA77)
    if jnp.issubdtype(dtype, jnp.floating):
        return (0.5 + (number >> 8).astype(jnp.float32) / (1 << 24)).astype(dtype)
    return (number >> 24).astype(dtype)


def line(product: Product, best: Choice, times: dict[Choice, float]) -> str:
    """What was found of a product."""
    own = chosen(product)

    def said(choice: Choice) -> str:
        resident = f", {choice.resident} resident" if choice.resident else ""
        return f"{tuple(choice.cut)}{resident} {1e6 * times[choice]:.1f} us"

    where = f"{product.name}, {product.rows} rows, 1/{product.shards}: {said(own)}"
    return where if best == own else f"{where}; faster: {said(best)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints a line for each product."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args(arguments)
    for rows in options.rows:
        if not 1 <= rows <= shapes.MOST_ROWS:
            parser.error(f"--rows: the kernels take 1 to {shapes.MOST_ROWS}, found {rows}")
    for shards in options.shards:
        if shards < 1 or _GROUPS % shards:
            parser.error(f"--shards: a matrix is cut into 1, 2, 4 or 8, found {shards}")
    if jax.default_backend() != "gpu":
        sys.exit(f"gpu_cuts: the kernels are CUDA's, and this is a {jax.default_backend()}")
    for name in options.only:
        for shards in options.shards:
            for rows in options.rows:
                product = Product(name, rows, shards)
                operands = Operands(product)
                print(line(product, *fastest(chosen(product), operands.seconds)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ngpu_cuts: interrupted")
