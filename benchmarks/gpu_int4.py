"""A random model with its experts in 4 bits beside the same in int8: `gpu_check`.

Random bits stand for the weights: no checkpoint need be converted, and what a step takes does not
depend on them.
"""

import functools
import math
import statistics
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import grok1
from benchmarks import device, workload
from benchmarks.figures import Figure
from benchmarks.gpu_timing import is_on_cpu, longest
from grok1.nn.manifest import with_int4_experts
from grok1.ops.int4 import BOOK, Int4Array, num_blocks

_TURNS = 5
_DEVIATION_OF_SUBSCALES = 18.5  # of numbers from -32 to 31, each as often


def in_four_bits(model: grok1.Model) -> grok1.Model:
    """A model that shares all but its experts with another; those are random, and in 4 bits.

    Args:
      model: Of int8, on one device.
    """
    experts = model.params.layers.experts
    made = [
        jax.device_put(_random(weight.shape, seed), weight.values.sharding)
        for seed, weight in enumerate(experts)
    ]
    layers = model.params.layers._replace(experts=type(experts)(*made))
    return grok1.Model(
        model.params._replace(layers=layers),
        model.config,
        model.mesh,
        model.dtype,
        with_int4_experts(model.tensors),
    )


def _random(shape: tuple[int, ...], seed: int) -> Int4Array:
    *lead, rows, columns = shape
    blocks = num_blocks(rows)
    deviation = rows**-0.5 / float(BOOK.std()) / _DEVIATION_OF_SUBSCALES
    return Int4Array(
        _bits((*lead, rows // 2, columns), 2 * seed),
        _bits((*lead, 6 * blocks, columns), 2 * seed + 1),
        jnp.full((*lead, blocks, columns), deviation, jnp.float16),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bits(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Bytes that look random, made where they are to lie: JAX's generator takes room beside."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    number = jnp.uint32(0x9E3779B9 * (seed + 1) & 0xFFFFFFFF)
    for axis, stride in enumerate(strides):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        number = number + along * jnp.uint32(stride & 0xFFFFFFFF)
    # A hash of 32 bits, by Chris Wellons' search: https://github.com/skeeto/hash-prospector.
    number = (number ^ number >> 16) * jnp.uint32(0x7FEB352D)
    number = (number ^ number >> 15) * jnp.uint32(0x846CA68B)
    return (number ^ number >> 16).astype(jnp.uint8)


def decode(model: grok1.Model, batches: dict[int, float | None], steps: int) -> Iterator[Figure]:
    """Decoding in 4 bits and in int8, in turns.

    Args:
      model: Of int8.
      batches: Rows side by side, and how many times the rate of int8 is asked of them.
      steps: Of each turn.
    """
    models = {"int4": in_four_bits(model), "int8": model}
    for batch, bound in batches.items():
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(_TURNS + 1):
            for name, of in models.items():
                timing = workload.decode(of, batch, 16, steps)
                if turn:  # the first compiles
                    seconds[name].append(timing.steps / steps)
        both = zip(seconds["int8"], seconds["int4"], strict=True)
        ratio = statistics.median(int8 / int4 for int8, int4 in both)
        details = {
            f"ms a step of {name}": f"{1e3 * statistics.median(times):.3f}"
            for name, times in seconds.items()
        }
        name = f"decode, {batch} rows, 4-bit experts: times the rate of int8, in turns"
        yield Figure(name, ratio, "x", bound, at_least=True, details=details)
    if is_on_cpu():
        return
    kernels = device.profile(lambda: workload.decode(models["int4"], 1, 16, 8).sequences)
    name = "kernels of 8 steps in 4 bits, 1 row"
    yield Figure(name, sum(times for times, _ in kernels.values()), details=longest(kernels))
