"""What several test modules need."""

import re

import jax.numpy as jnp
import numpy as np

import grok1
from grok1.quantization import QuantizedArray
from grok1.stacking import unstack


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


def count_collectives(compiled_text: str) -> dict[str, int]:
    """Counts the collective operations in a compiled program, loop bodies once."""
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {
        name: len(re.findall(rf"= [^=]*? {name}(?:-start)?\(", compiled_text)) for name in names
    }
