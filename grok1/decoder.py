"""The fast forward pass: cached attention, sparse experts, layers in one compiled loop.

Everything here is per device: it runs inside `jax.shard_map` over a mesh with the axes of
`sharding`, sees its own shard of each weight and of the cache, and speaks to the other devices only
in the `psum`s that are written out. `transformer.forward` is the same computation to read.

Dimension key: B batch row, T position in this call, M = B*T, D model dim, C key/value head held
here, H head dim, V vocabulary rows held here, L layer.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.attention import KVCache, append, attend_cache
from grok1.config import ModelConfig
from grok1.layers import apply_rope, rms_norm
from grok1.moe import experts, route
from grok1.quantization import QuantizedArray, Weight, matmul_split
from grok1.sharding import MODEL_AXIS
from grok1.transformer import LayerParams, Params

Captures = dict[str, Array]
"""Values kept on the way, each with a leading axis L; see `forward`."""


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    num_valid: Int[Array, " B"],
    cache: KVCache,
    dtype: Any,
    capture: Collection[str] = (),
) -> tuple[Float[Array, "B T D"], KVCache, Captures]:
    """Runs the next tokens of every row through all layers and appends them to the cache.

    Args:
      params: This device's shard of the model, layers stacked.
      config: The model.
      tokens: Token ids; row b continues at position `cache.length[b]`.
      num_valid: How many of the T tokens of each row are real; the rest is padding, which is
        computed on but neither dispatched to experts nor cached.
      cache: This device's shard of the cache.
      dtype: Type of the products with weights; the residual stream stays float32.
      capture: Names of the values to keep for every layer: "residual" `[L, B, T, D]` after the
        layer, "router_probs" `[L, B*T, E]`, "expert_indices" `[L, B*T, A]`. What is not named is
        not computed.

    Returns:
      The final norm's output, float32; the cache, grown by `num_valid`; the captured values.
    """
    offsets_T = jnp.arange(tokens.shape[1])
    positions_BT = cache.length[:, None] + offsets_T
    valid_BT = offsets_T < num_valid[:, None]
    x_BTD = embed(params.embedding, tokens) * config.embedding_multiplier_scale

    def run_layer(carry, layer):
        x_BTD, cache = carry
        x_BTD, cache, captured = decoder_layer(
            params.layers, layer, config, x_BTD, cache, positions_BT, valid_BT, dtype
        )
        return (x_BTD, cache), {name: captured[name] for name in capture}

    layers = jnp.arange(config.num_layers)
    (x_BTD, cache), captured = jax.lax.scan(run_layer, (x_BTD, cache), layers)
    cache = cache._replace(length=cache.length + num_valid)
    return rms_norm(x_BTD, params.final_norm), cache, captured


def decoder_layer(
    params: LayerParams,
    layer: Int[Array, ""],
    config: ModelConfig,
    x: Float[Array, "B T D"],
    cache: KVCache,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    dtype: Any,
) -> tuple[Float[Array, "B T D"], KVCache, Captures]:
    """One layer of a stack: attention, then experts, each between its two norms.

    Args:
      params: The stack; only matrices that are used are read from it.
      layer: Which layer, in the stack and in the cache.
      config: The model.
      x: Residual stream, float32.
      cache: Keys and values so far.
      positions: Absolute position of each token.
      valid: False for padding.
      dtype: Type of the products with weights. In bfloat16 only the experts' inputs are rounded to
        it; attention, a small part of the work that decides where the router sends a token, keeps
        16 bits (`matmul_split`).

    Returns:
      The residual stream after the layer, the cache with the layer's keys and values, and
      everything that `forward` can capture.
    """
    normed = rms_norm(x, params.attention_pre_norm[layer])
    branch, cache = _attention(params, layer, config, normed, cache, positions, valid, dtype)
    x += rms_norm(branch, params.attention_post_norm[layer])

    normed_MD = rms_norm(x, params.moe_pre_norm[layer]).reshape(-1, config.emb_size)
    routing = route(normed_MD, params.router[layer], config.num_selected_experts)
    branch_MD = experts(
        normed_MD.astype(dtype), params.experts, (layer,), routing, valid.reshape(-1)
    )
    branch = jax.lax.psum(branch_MD, MODEL_AXIS).reshape(x.shape)
    x += rms_norm(branch, params.moe_post_norm[layer])
    captured = {
        "residual": x,
        "router_probs": routing.probs,
        "expert_indices": routing.expert_indices,
    }
    return x, cache, captured


def embed(embedding: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Looks tokens up in a table whose rows are shared out over the devices; float32."""
    rows = embedding.shape[0]
    local = tokens - jax.lax.axis_index(MODEL_AXIS) * rows
    here = (local >= 0) & (local < rows)
    found = embedding[jnp.where(here, local, 0)].astype(jnp.float32)
    return jax.lax.psum(jnp.where(here[..., None], found, 0), MODEL_AXIS)


def _attention(
    params: LayerParams,
    layer: Int[Array, ""],
    config: ModelConfig,
    x: Float[Array, "B T D"],
    cache: KVCache,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    dtype: Any,
) -> tuple[Float[Array, "B T D"], KVCache]:
    batch, length, _ = x.shape
    heads_here = cache.k.shape[2]

    def heads(weight, index):
        projected = matmul_split(x, weight, index, dtype)
        return projected.reshape(batch, length, -1, config.key_size)

    query = apply_rope(heads(params.query, (layer,)), positions)
    key_weight = _columns_of_device(params.key, layer, heads_here, config)
    value_weight = _columns_of_device(params.value, layer, heads_here, config)
    key = apply_rope(heads(*key_weight), positions)
    value = heads(*value_weight)
    cache = append(cache, layer, key, value, positions, valid)
    # Int8 is exact in any type of product; queries of a float cache are rounded as its keys.
    as_keys = dtype != jnp.float32 and cache.k.dtype != jnp.int8
    query_BTCGH = query.astype(cache.k.dtype if as_keys else dtype).reshape(
        batch, length, heads_here, -1, config.key_size
    )
    mixed = attend_cache(query_BTCGH, cache, layer, positions, config.attn_output_multiplier)
    out = matmul_split(mixed.reshape(batch, length, -1), params.attention_out, (layer,), dtype)
    return jax.lax.psum(out, MODEL_AXIS), cache


def _columns_of_device(
    weight: Weight, layer: Int[Array, ""], heads_here: int, config: ModelConfig
) -> tuple[Weight, tuple]:
    """The key or value weight of this device's heads, as (weight, index) for `matmul`.

    A shard holds just those columns, unless devices outnumber heads: then it holds all, and
    neighbouring devices use the same head.
    """
    columns = heads_here * config.key_size
    if weight.shape[-1] == columns:
        return weight, (layer,)
    head = jax.lax.axis_index(MODEL_AXIS) * config.num_kv_heads // jax.lax.axis_size(MODEL_AXIS)

    def take(array):
        sizes = (1, array.shape[1], columns)
        return jax.lax.dynamic_slice(array, (layer, 0, head * config.key_size), sizes)[0]

    if isinstance(weight, QuantizedArray):
        return QuantizedArray(take(weight.values), take(weight.scales)), ()
    return take(weight), ()
