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


def cancelled_differences(lowered_text: str) -> list[str]:
    """Finds the subtractions of which nothing is left where XLA keeps excess precision.

    Args:
      lowered_text: A lowered program in StableHLO. A float that is converted to a smaller type and
        back is itself again, as XLA on GPUs has it.

    Returns:
      The lines that subtract a value from itself, or divide it by itself.
    """
    found = []
    for function in lowered_text.split("func.func")[1:]:
        sources: dict[str, str] = {}
        conversions = re.finditer(
            r"(%\S+) = stablehlo.convert (%\S+) : \(tensor<(?:\S+x)?b?f\d+>", function
        )
        for conversion in conversions:
            result, operand = conversion.groups()
            sources[result] = sources.get(operand, operand)
        for line in re.findall(r".*stablehlo\.(?:subtract|divide) .*", function):
            one, other = re.findall(r"%[^\s,]+", line.partition("=")[2])
            if sources.get(one, one) == sources.get(other, other):
                found.append(line.strip())
    return found
