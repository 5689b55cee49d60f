"""Which tensor is in which file: the order of a checkpoint, derived from the model itself.

The files carry no names. Their order is that of the parameters' names sorted as text, so that
layer 10 comes before layer 2. Layers are alike: Haiku is asked for one, and the others follow,
because tracing 64 takes a second.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grok1.config import ModelConfig
from grok1.nn.transformer import NamedParams, Params, naming
from grok1.ops.formats import INT4, format_of, is_quantized
from grok1.ops.int4 import num_blocks

EMBEDDING = "language_model/in_out_embed/embeddings"

_FIRST_LAYER = "transformer/decoder_layer_0/"
_LARGE = re.compile("/(moe|multi_head_attention)/")


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      name: Haiku module and parameter, as `transformer/decoder_layer_0/moe/linear/w`.
      shape: Shape of the weight.
      dtype: "float32", or the name of a quantised weight's format.
      scales_shape: Shape of the scales of a quantised weight, else None.
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
    one = _one_layer(config.first_layers(1))
    in_layers = [
        spec._replace(name=_in_layer(spec.name, number))
        for number in range(config.num_layers)
        for spec in one
        if spec.name.startswith(_FIRST_LAYER)
    ]
    outside = [spec for spec in one if not spec.name.startswith(_FIRST_LAYER)]
    return sorted([*outside, *in_layers], key=lambda spec: spec.name.rpartition("/")[::2])


def arrange(named: NamedParams, config: ModelConfig) -> Params:
    """Arranges named parameters as `naming(config).apply(named, None)` does; checks no shape.

    Args:
      named: By module and parameter, anything.
      config: The model.

    Returns:
      `Params` with one `LayerParams` a layer.
    """
    names = _names(config.first_layers(1))

    def of_layer(number: int) -> Any:
        return jax.tree.map(lambda name: _named(named, _in_layer(name, number)), names.layers[0])

    return Params(
        embedding=_named(named, names.embedding),
        layers=[of_layer(number) for number in range(config.num_layers)],
        final_norm=_named(named, names.final_norm),
    )


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


def with_int4_experts(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Returns the tensors of a model with 4-bit experts, in blocks of at most 256 rows.

    Raises:
      ValueError: If experts have an odd number of rows.
    """
    return [
        spec._replace(
            dtype=INT4.name,
            scales_shape=(*spec.shape[:-2], num_blocks(spec.shape[-2]), spec.shape[-1]),
        )
        if is_of_experts(spec)
        else spec
        for spec in specs
    ]


def is_of_experts(spec: TensorSpec) -> bool:
    """Whether a tensor has the weights of a layer's experts."""
    return len(spec.shape) == 3


def is_large(spec: TensorSpec) -> bool:
    """Whether a tensor is one of the weights that take as long to look at as to read."""
    return _LARGE.search(spec.name) is not None


def named_leaves(named: NamedParams) -> list[tuple[str, Any]]:
    """Returns (name, leaf) in file order; a quantised weight is one leaf."""
    return [
        (f"{module}/{parameter}", named[module][parameter])
        for module in sorted(named)
        for parameter in sorted(named[module])
    ]


@functools.lru_cache(maxsize=16)
def _one_layer(config: ModelConfig) -> tuple[TensorSpec, ...]:
    return tuple(_spec(name, leaf) for name, leaf in named_leaves(abstract_params(config)))


@functools.lru_cache(maxsize=16)
def _names(config: ModelConfig) -> Params:
    """The names of a model of one layer, where its parameters go."""
    places: dict[str, dict[str, Any]] = {}
    for spec in _one_layer(config):
        module, _, parameter = spec.name.rpartition("/")
        places.setdefault(module, {})[parameter] = _Place(spec.name, spec.shape)
    return jax.tree.map(
        lambda place: place.name,
        naming(config).apply(places, None),
        is_leaf=lambda node: isinstance(node, _Place),
    )


class _Place(NamedTuple):
    """Stands for a parameter of which Haiku checks the shape."""

    name: str
    shape: tuple[int, ...]


def _named(named: NamedParams, name: str) -> Any:
    module, _, parameter = name.rpartition("/")
    return named[module][parameter]


def _in_layer(name: str, number: int) -> str:
    return name.replace(_FIRST_LAYER, f"transformer/decoder_layer_{number}/", 1)


def _spec(name: str, leaf) -> TensorSpec:
    if is_quantized(leaf):
        return TensorSpec(name, leaf.shape, format_of(leaf).name, leaf.scales.shape)
    return TensorSpec(name, leaf.shape, str(leaf.dtype), None)
