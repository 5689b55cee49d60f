"""The Grok-1 transformer in Haiku: the parameters' names, and the forward pass to read first.

Haiku gives each parameter the name it has in the checkpoint, and nothing else; the mathematics are
the pure functions of `ops`. `decoder` runs the same layers fast, with a cache, over a mesh; this
form has no cache, no mesh, and computes every expert.

Dimension key: B batch row, T position, V vocabulary, D model dim, N query heads, K key/value heads,
G query heads per key/value head, H head dim, F expert hidden dim, E expert, L layer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grok1.config import ModelConfig
from grok1.ops.attention import attend
from grok1.ops.experts import ExpertWeights, experts_dense
from grok1.ops.layers import apply_rope, rms_norm
from grok1.ops.quantized import dequantize, matmul, quantize
from grok1.ops.routing import Routing, route

NamedParams = Mapping[str, Mapping[str, Any]]
"""Parameters by Haiku module and name, as `{"transformer/decoder_layer_0/router": {"w": ...}}`."""

SCALE_GROUPS = {"moe/linear_1": 8, "multi_head_attention/linear": 8}
"""Scale groups in the released files, 1 elsewhere: these two had their rows sharded 8 ways."""


class LayerParams(NamedTuple):
    """One decoder layer, or, with a leading axis L on every leaf, a stack of them.

    Attributes:
      attention_pre_norm: float32 `[D]`.
      query: `[D, N*H]`.
      key: `[D, K*H]`.
      value: `[D, K*H]`.
      attention_out: `[N*H, D]`.
      attention_post_norm: float32 `[D]`.
      moe_pre_norm: float32 `[D]`.
      router: float32 `[D, E]`.
      experts: gate and up `[E, D, F]`, down `[E, F, D]`.
      moe_post_norm: float32 `[D]`.
    """

    attention_pre_norm: Any
    query: Any
    key: Any
    value: Any
    attention_out: Any
    attention_post_norm: Any
    moe_pre_norm: Any
    router: Any
    experts: ExpertWeights
    moe_post_norm: Any


class Params(NamedTuple):
    """A whole model.

    Attributes:
      embedding: `[V, D]`, float32 on disk; also the output head.
      layers: One `LayerParams` a layer, or a single stacked one.
      final_norm: float32 `[D]`.
    """

    embedding: Any
    layers: Any
    final_norm: Any


class LayerTrace(NamedTuple):
    """What one layer of the readable forward pass computed.

    Attributes:
      residual: float32 `[B, T, D]`, the residual stream after the layer.
      routing: Router probabilities and choices, tokens flattened to `[B*T, ...]`.
    """

    residual: Array
    routing: Routing


class Linear(hk.Module):
    """The weight `w` of a linear map without bias, quantised unless `quantized` is False."""

    def __init__(self, shape: tuple[int, ...], *, groups: int = 1, quantized: bool, name: str):
        super().__init__(name=name)
        self._shape, self._groups, self._quantized = shape, groups, quantized

    def __call__(self) -> Any:
        def init(shape, dtype) -> Any:
            fan_in = shape[-2]
            weight = jax.random.normal(hk.next_rng_key(), shape, dtype) / jnp.sqrt(fan_in)
            return quantize(weight, self._groups) if self._quantized else weight

        return hk.get_parameter("w", self._shape, init=init)


class RMSNorm(hk.Module):
    """The `scale` of a root-mean-square norm."""

    def __init__(self, size: int, name: str):
        super().__init__(name=name)
        self._size = size

    def __call__(self) -> Any:
        return hk.get_parameter("scale", (self._size,), init=jnp.ones)


class Embedding(hk.Module):
    """The embedding table, which is also the output head."""

    def __init__(self, config: ModelConfig, name: str = "in_out_embed"):
        super().__init__(name=name)
        self._config = config

    def __call__(self) -> Any:
        shape = (self._config.vocab_size, self._config.emb_size)
        # Times the embedding multiplier sqrt(D), this starts the residual stream at unit variance.
        init = hk.initializers.RandomNormal(1 / self._config.embedding_multiplier_scale)
        return hk.get_parameter("embeddings", shape, init=init)


class MultiHeadAttention(hk.Module):
    """The four projections of grouped-query attention."""

    def __init__(self, config: ModelConfig, quantized: bool, name: str = "multi_head_attention"):
        super().__init__(name=name)
        self._config, self._quantized = config, quantized

    def __call__(self) -> tuple[Any, Any, Any, Any]:
        config = self._config
        query_size = config.num_q_heads * config.key_size
        kv_size = config.num_kv_heads * config.key_size
        sizes = {
            "query": (config.emb_size, query_size),
            "key": (config.emb_size, kv_size),
            "value": (config.emb_size, kv_size),
            "linear": (query_size, config.emb_size),
        }
        groups = _scale_groups("multi_head_attention/linear", query_size)
        query, key, value, out = (
            Linear(
                shape,
                groups=groups if name == "linear" else 1,
                quantized=self._quantized,
                name=name,
            )()
            for name, shape in sizes.items()
        )
        return query, key, value, out


class MixtureOfExperts(hk.Module):
    """The experts' weights; on disk gate is `linear`, up is `linear_v`, down is `linear_1`."""

    def __init__(self, config: ModelConfig, quantized: bool, name: str = "moe"):
        super().__init__(name=name)
        self._config, self._quantized = config, quantized

    def __call__(self) -> ExpertWeights:
        config = self._config
        wide = (config.num_experts, config.emb_size, config.ffn_size)
        narrow = (config.num_experts, config.ffn_size, config.emb_size)
        groups = _scale_groups("moe/linear_1", config.ffn_size)
        return ExpertWeights(
            gate=Linear(wide, quantized=self._quantized, name="linear")(),
            up=Linear(wide, quantized=self._quantized, name="linear_v")(),
            down=Linear(narrow, groups=groups, quantized=self._quantized, name="linear_1")(),
        )


class DecoderLayer(hk.Module):
    """One layer: attention and mixture of experts, each between two norms."""

    def __init__(self, config: ModelConfig, quantized: bool, name: str):
        super().__init__(name=name)
        self._config, self._quantized = config, quantized

    def __call__(self) -> LayerParams:
        config = self._config
        query, key, value, out = MultiHeadAttention(config, self._quantized)()
        norms = [
            RMSNorm(config.emb_size, name)()
            for name in ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3")
        ]
        router_shape = (config.emb_size, config.num_experts)
        return LayerParams(
            attention_pre_norm=norms[0],
            query=query,
            key=key,
            value=value,
            attention_out=out,
            attention_post_norm=norms[1],
            moe_pre_norm=norms[2],
            router=Linear(router_shape, quantized=False, name="router")(),
            experts=MixtureOfExperts(config, self._quantized)(),
            moe_post_norm=norms[3],
        )


class Transformer(hk.Module):
    """The stack of decoder layers."""

    def __init__(self, config: ModelConfig, quantized: bool, name: str = "transformer"):
        super().__init__(name=name)
        self._config, self._quantized = config, quantized

    def __call__(self) -> list[LayerParams]:
        return [
            DecoderLayer(self._config, self._quantized, f"decoder_layer_{i}")()
            for i in range(self._config.num_layers)
        ]


class LanguageModel(hk.Module):
    """The embedding and the final norm, which also is the head, around a transformer."""

    def __init__(self, config: ModelConfig, layers: list[LayerParams], name="language_model"):
        super().__init__(name=name)
        self._config, self._layers = config, layers

    def __call__(self) -> Params:
        return Params(
            embedding=Embedding(self._config)(),
            layers=self._layers,
            final_norm=RMSNorm(self._config.emb_size, "rms_norm")(),
        )


def naming(config: ModelConfig, *, quantized: bool = True) -> hk.Transformed:
    """Returns the Haiku transform between a model's named parameters and `Params`.

    `naming(config).init(key)` makes random `NamedParams`; `naming(config).apply(named, None)`
    arranges them as `Params` with one `LayerParams` a layer. Names are those of the checkpoint, in
    which the transformer stands beside the language model, not inside it.

    Args:
      config: The architecture.
      quantized: False for float weights, as in training.
    """

    def params() -> Params:
        layers = Transformer(config, quantized)()
        return LanguageModel(config, layers)()

    return hk.transform(params)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    experts: Callable[..., Array] = experts_dense,
) -> tuple[Float[Array, "B T V"], list[LayerTrace]]:
    """Computes logits at every position, the plain way: float32, all experts, no cache, no mesh.

    Differentiable when the weights are float.

    Args:
      params: The model, `layers` a list.
      config: Its architecture.
      tokens: Token ids.
      experts: Stands in for `experts.experts_dense`, with its signature.

    Returns:
      float32 logits of the next token after each position, and a trace of each layer.
    """
    x = params.embedding[tokens] * config.embedding_multiplier_scale
    traces = []
    for layer in params.layers:
        x, normed_MD, routing = attend_and_route(layer, config, x)
        branch = experts(normed_MD, layer.experts, (), routing).reshape(x.shape)
        x = x + rms_norm(branch, layer.moe_post_norm)
        traces.append(LayerTrace(x, routing))
    normed = rms_norm(x, params.final_norm)
    return matmul(normed, params.embedding.T) * config.output_multiplier_scale, traces


def attend_and_route(
    layer: LayerParams, config: ModelConfig, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Float[Array, "M D"], Routing]:
    """The first half of a layer, up to the choice of experts; reads no weights of theirs.

    Args:
      layer: The layer's parameters.
      config: The architecture.
      x: The residual stream before the layer, float32.

    Returns:
      The residual stream between the branches, the input of the experts, and their choice, tokens
      flattened.
    """
    branch = _attention(layer, config, rms_norm(x, layer.attention_pre_norm))
    x = x + rms_norm(branch, layer.attention_post_norm)
    normed_MD = rms_norm(x, layer.moe_pre_norm).reshape(-1, config.emb_size)
    routing = route(
        normed_MD,
        layer.router,
        config.num_selected_experts,
        config.router_softcap,
        config.renormalize_gates,
    )
    return x, normed_MD, routing


def _attention(layer: LayerParams, config: ModelConfig, x) -> Array:
    batch, length, _ = x.shape
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))

    def heads(weight):
        return matmul(x, dequantize(weight)).reshape(batch, length, -1, config.key_size)

    query = apply_rope(heads(layer.query), positions)
    key = apply_rope(heads(layer.key), positions)
    mixed = attend(
        query.reshape(batch, length, config.num_kv_heads, -1, config.key_size),
        key.transpose(0, 2, 1, 3),
        heads(layer.value).transpose(0, 2, 1, 3),
        mask,
        config.attn_output_multiplier,
    )
    return matmul(mixed.reshape(batch, length, -1), dequantize(layer.attention_out))


def _scale_groups(name: str, rows: int) -> int:
    """The released files' grouping where it fits, else one group."""
    groups = SCALE_GROUPS[name]
    return groups if rows % groups == 0 else 1
