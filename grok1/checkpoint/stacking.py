"""A model in memory, layers stacked, without files: made at random, or taken apart to be saved."""

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from grok1.config import ModelConfig
from grok1.nn.manifest import TensorSpec, abstract_params, arrange
from grok1.nn.sharding import abstract_stack
from grok1.nn.transformer import Params
from grok1.ops.formats import is_quantized
from grok1.ops.quantized import QuantizedArray, refine_groups

# Standard deviation of the uniform integers from -127 to 127.
_INT8_DEVIATION = 73.3


def unstack(
    params: Params, config: ModelConfig, tensors: list[TensorSpec]
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields (values, scales or None) of every tensor on the host, in file order, one at a time.

    Args:
      params: The model, layers stacked.
      config: Its architecture.
      tensors: The files' tensors, with the scale grouping to write.
    """
    numbers: dict[str, dict[str, Any]] = {}
    for number, spec in enumerate(tensors):
        module, _, parameter = spec.name.rpartition("/")
        numbers.setdefault(module, {})[parameter] = number
    arranged = arrange(numbers, config)

    source: dict[int, tuple[Any, int | None]] = {
        arranged.embedding: (params.embedding, None),
        arranged.final_norm: (params.final_norm, None),
    }
    weights = jax.tree.leaves(params.layers, is_leaf=is_quantized)
    for layer, of_layer in enumerate(arranged.layers):
        for number, weight in zip(jax.tree.leaves(of_layer), weights, strict=True):
            source[number] = (weight, layer)

    for number, spec in enumerate(tensors):
        weight, layer = source[number]
        part = weight if layer is None else jax.tree.map(operator.itemgetter(layer), weight)
        if isinstance(part, QuantizedArray):
            scales = np.asarray(part.scales)
            assert spec.scales_shape is not None  # it is the loaded file's own
            step = scales.shape[-2] // spec.scales_shape[-2]
            yield np.asarray(part.values), scales[..., ::step, :]
        else:
            yield np.asarray(part, np.float32), None


def random_params(config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Makes random int8 weights of the size that keeps activations near unit variance.

    Args:
      config: The model.
      mesh: Where they go; the same values on every mesh.
      seed: Seed of the values.
    """
    abstract = arrange(abstract_params(config.first_layers(1)), config.first_layers(1))
    abstract = abstract._replace(layers=list(abstract.layers) * config.num_layers)
    target = abstract_stack(abstract, config, mesh)
    groups = jax.tree.map(_file_groups, abstract.layers[0], is_leaf=is_quantized)
    key = jax.random.key(seed, impl="threefry2x32")  # named: a setting would choose another
    keys = iter(jax.random.split(key, len(jax.tree.leaves(target))))

    def normal(leaf, deviation):
        return _normal(leaf.shape, deviation, leaf.sharding)(next(keys))

    def weight(leaf, num_groups):
        if not isinstance(leaf, QuantizedArray):
            if len(leaf.shape) == 2:
                return _ones(leaf.shape, leaf.sharding)()
            return normal(leaf, leaf.shape[-2] ** -0.5)
        values = _values(leaf.values.shape, leaf.values.sharding)
        scales = _scales(leaf.scales.shape, num_groups, leaf.shape[-2], leaf.scales.sharding)
        return QuantizedArray(values(next(keys)), scales(next(keys)))

    return Params(
        embedding=normal(target.embedding, 1 / config.embedding_multiplier_scale),
        layers=jax.tree.map(weight, target.layers, groups, is_leaf=is_quantized),
        final_norm=_ones(target.final_norm.shape, target.final_norm.sharding)(),
    )


# Weights of one shape, in this model and in others, are made by one program.
_once = functools.lru_cache(maxsize=64)


@_once
def _normal(shape: tuple[int, ...], deviation: float, sharding: Sharding) -> Callable:
    return jax.jit(
        lambda key: deviation * jax.random.normal(key, shape, jnp.float32), out_shardings=sharding
    )


@_once
def _ones(shape: tuple[int, ...], sharding: Sharding) -> Callable:
    return jax.jit(lambda: jnp.ones(shape, jnp.float32), out_shardings=sharding)


@_once
def _values(shape: tuple[int, ...], sharding: Sharding) -> Callable:
    def of_layer(key):
        bits = _hashed_positions(jax.random.key_data(key), shape[1:]).astype(jnp.uint8)
        return jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.int8), -127)

    return jax.jit(
        lambda key: jax.lax.map(of_layer, jax.random.split(key, shape[0])), out_shardings=sharding
    )


@_once
def _scales(shape: tuple[int, ...], num_groups: int, rows: int, sharding: Sharding) -> Callable:
    *lead, refined, columns = shape
    size = 1 / (_INT8_DEVIATION * rows**0.5)

    def scales(key):
        # Drawn as one row, whose numbers are the same: XLA takes five times as long to compile
        # draws of four axes.
        count = math.prod(lead) * num_groups * columns
        drawn = jax.random.uniform(key, (count,), jnp.float32, 0.5 * size, 1.5 * size)
        drawn = drawn.astype(jnp.bfloat16).reshape(*lead, num_groups, columns)
        return refine_groups(drawn, refined)

    return jax.jit(scales, out_shardings=sharding)


def _hashed_positions(seed: Array, shape: tuple[int, ...]) -> Array:
    """Random uint32 of a shape, each a hash of its position, so that XLA makes them in place.

    `jax.random` would take sixteen times an int8 weight's memory on the way. The mixing steps are
    those of MurmurHash3.
    """
    bits = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        bits = bits * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for word in (seed[0], seed[1]):
        bits ^= word
        bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
        bits ^= bits >> 16
    return bits


def _file_groups(weight: Any) -> int:
    return weight.scales.shape[-2] if isinstance(weight, QuantizedArray) else 0
