"""Which tensor is in which file: the order of a checkpoint, derived from the model itself.

The files carry no names. Their order is that of the parameters' names sorted as text, so that
layer 10 comes before layer 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grok1.config import ModelConfig
from grok1.nn.transformer import NamedParams, naming
from grok1.ops.quantized import QuantizedArray

EMBEDDING = "language_model/in_out_embed/embeddings"


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      name: Haiku module and parameter, as `transformer/decoder_layer_0/moe/linear/w`.
      shape: Shape of the weight.
      dtype: "float32", or "int8" for a quantised weight.
      scales_shape: Shape of the bfloat16 scales of a quantised weight, else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scales_shape: tuple[int, ...] | None


def file_name(index: int) -> str:
    """Returns the name of the file that holds tensor `index` of a manifest."""
    return f"tensor{index:05d}_000"


def abstract_params(config: ModelConfig, *, quantized: bool = True) -> NamedParams:
    """Returns the named parameters of a model as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    # An abstract key, because a real one would start the devices.
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(naming(config, quantized=quantized).init, key)


def manifest(config: ModelConfig) -> list[TensorSpec]:
    """Returns the tensors of a checkpoint of `config`, in the order of its files."""
    return [_spec(name, leaf) for name, leaf in named_leaves(abstract_params(config))]


def in_memory(specs: list[TensorSpec], embedding_dtype: Any) -> list[TensorSpec]:
    """Returns the tensors as they lie in memory, whatever the types of a file.

    Args:
      specs: Tensors with the types of their files.
      embedding_dtype: Type of the embedding.
    """
    embedding = str(jnp.dtype(embedding_dtype))
    return [
        spec
        if spec.scales_shape
        else spec._replace(dtype=embedding if spec.name == EMBEDDING else "float32")
        for spec in specs
    ]


def named_leaves(named: NamedParams) -> list[tuple[str, Any]]:
    """Returns (name, leaf) in file order; a quantised weight is one leaf."""
    return [
        (f"{module}/{parameter}", named[module][parameter])
        for module in sorted(named)
        for parameter in sorted(named[module])
    ]


def _spec(name: str, leaf) -> TensorSpec:
    if isinstance(leaf, QuantizedArray):
        return TensorSpec(name, leaf.shape, str(leaf.values.dtype), leaf.scales.shape)
    return TensorSpec(name, leaf.shape, str(leaf.dtype), None)
