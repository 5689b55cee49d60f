"""What several test modules need."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import grok1
from grok1.checkpoint.stacking import unstack
from grok1.config import ModelConfig
from grok1.nn.manifest import abstract_params, arrange
from grok1.nn.sharding import abstract_stack
from grok1.nn.transformer import NamedParams, Params, forward
from grok1.ops.cpu import bindings
from grok1.ops.quantized import QuantizedArray, refine_groups
from tests import one_device

SLOW_TESTS = "GROK1_SLOW_TESTS" in os.environ

slow = pytest.mark.skipif(not SLOW_TESTS, reason="slow; set GROK1_SLOW_TESTS=1")
"""Marks what a fast test covers but for its size."""


covered_by_a_mesh = pytest.mark.skipif(
    not SLOW_TESTS and not one_device.IS_CHOSEN, reason="slow; set GROK1_SLOW_TESTS=1"
)
"""Marks what is one device's where a test beside it has several."""


def skip_unless_it_runs_here(form: str) -> None:
    """Skips a test of a form in C++ where there are no kernels."""
    if form == "cpp" and not bindings.is_available():
        pytest.skip("no native kernels on this machine")


def flags_with_devices(number: int) -> str:
    """XLA_FLAGS for a process with so many virtual CPU devices."""
    flags = os.environ["XLA_FLAGS"].split()
    kept = [flag for flag in flags if "device_count" not in flag]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={number}"])


def relative_error(found, expected) -> float:
    """Norm of the difference over norm of the expected, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def named_params(model: grok1.Model) -> dict:
    """A model's tensors by Haiku name, on the host: XLA would compile a slice for each shape."""
    named: dict = {}
    params = jax.tree.map(np.asarray, model.params)
    for spec, (values, scales) in zip(
        model.tensors, unstack(params, model.config, model.tensors), strict=True
    ):
        module, _, parameter = spec.name.rpartition("/")
        leaf = values if scales is None else QuantizedArray(values, scales)
        named.setdefault(module, {})[parameter] = leaf
    return named


def dequantized(weight) -> np.ndarray:
    """What an int8 weight stands for, exactly: float32 as `quantized.dequantize`, on the host."""
    if not isinstance(weight, QuantizedArray):
        return np.asarray(weight)
    scales = np.asarray(weight.scales, np.float32)
    return np.asarray(weight.values) * refine_groups(scales, weight.shape[-2])


def random_named(config: ModelConfig, seed: int = 0, *, quantized: bool = True) -> NamedParams:
    """Random weights of the size that `grok1.random_model` gives them, without XLA.

    Args:
      config: The model.
      seed: Of the draws.
      quantized: False for floats.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if isinstance(leaf, QuantizedArray):
            values = rng.integers(-127, 128, leaf.shape, np.int8)
            size = 1 / (73.3 * leaf.shape[-2] ** 0.5)
            scales = rng.uniform(0.5 * size, 1.5 * size, leaf.scales.shape)
            return QuantizedArray(values, scales.astype(leaf.scales.dtype))
        if len(leaf.shape) == 1:
            return np.ones(leaf.shape, leaf.dtype)
        is_embedding = "embed" in jax.tree_util.keystr(path)
        deviation = (
            1 / config.embedding_multiplier_scale if is_embedding else leaf.shape[-2] ** -0.5
        )
        return (deviation * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    abstract = abstract_params(config, quantized=quantized)
    return jax.tree.map_with_path(
        draw, abstract, is_leaf=lambda node: isinstance(node, QuantizedArray)
    )


def stack(named: NamedParams, config: ModelConfig, mesh: Mesh) -> Params:
    """Stacks named parameters and puts them on a mesh.

    Args:
      named: Arrays or `QuantizedArray`s by Haiku name.
      config: The model.
      mesh: Where it goes.
    """
    params = arrange(named, config)
    target = abstract_stack(params, config, mesh)
    layers = jax.tree.map(lambda *leaves: np.stack(leaves), *params.layers)

    def place(leaf: jax.ShapeDtypeStruct, array):
        if array.shape != leaf.shape:
            array = refine_groups(array, leaf.shape[-2])
        return jax.device_put(array, leaf.sharding)

    return jax.tree.map(place, target, params._replace(layers=layers))


_forward = jax.jit(forward, static_argnames=("config", "experts"))


def readable(named: NamedParams, config: ModelConfig, tokens, **options) -> tuple:
    """Logits `[T, V]` and the layers' traces of the readable form, compiled.

    Args:
      named: Arrays or `QuantizedArray`s by Haiku name.
      config: The model.
      tokens: `[T]`.
      **options: As `forward` takes them.
    """
    logits, traces = _forward(arrange(named, config), config, jnp.asarray(tokens)[None], **options)
    return logits[0], traces


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
        # In order: of a name that two regions use, the last is meant.
        sources: dict[str, str] = {}
        for line in function.splitlines():
            name, defined, value = line.strip().partition(" = ")
            if not defined:
                continue
            operands: list[str] = re.findall(r"%[^\s,]+", value)
            if re.search(r"stablehlo\.(?:subtract|divide) ", line):
                one, other = (sources.get(operand, operand) for operand in operands)
                if one == other:
                    found.append(line.strip())
            sources.pop(name, None)
            if re.search(r"stablehlo\.convert %\S+ : \(tensor<(?:\S+x)?b?f\d+>", line):
                sources[name] = sources.get(operands[0], operands[0])
    return found
