"""What several test modules need."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import grok1
from grok1.checkpoint.stacking import unstack
from grok1.config import ModelConfig
from grok1.nn.sharding import abstract_stack
from grok1.nn.transformer import NamedParams, Params, naming
from grok1.ops.quantized import QuantizedArray, refine_groups


def relative_error(found, expected) -> float:
    """Norm of the difference over norm of the expected, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def named_params(model: grok1.Model) -> dict:
    """A model's tensors by Haiku name."""
    named: dict = {}
    tensors = unstack(model.params, model.config, model.tensors)
    for spec, (values, scales) in zip(model.tensors, tensors, strict=True):
        module, _, parameter = spec.name.rpartition("/")
        values = jnp.asarray(values)
        leaf = values if scales is None else QuantizedArray(values, jnp.asarray(scales))
        named.setdefault(module, {})[parameter] = leaf
    return named


def stack(named: NamedParams, config: ModelConfig, mesh: Mesh) -> Params:
    """Stacks named parameters and puts them on a mesh.

    Args:
      named: Arrays or `QuantizedArray`s by Haiku name.
      config: The model.
      mesh: Where it goes.
    """
    params = naming(config).apply(named, None)
    target = abstract_stack(params, config, mesh)
    layers = jax.tree.map(lambda *leaves: np.stack(leaves), *params.layers)

    def place(leaf: jax.ShapeDtypeStruct, array):
        if array.shape != leaf.shape:
            array = refine_groups(array, leaf.shape[-2])
        return jax.device_put(array, leaf.sharding)

    return jax.tree.map(place, target, params._replace(layers=layers))


def count_collectives(compiled_text: str) -> dict[str, int]:
    """Counts the collective operations in a compiled program, loop bodies once."""
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {
        name: len(re.findall(rf"= [^=]*? {name}(?:-start)?\(", compiled_text)) for name in names
    }
