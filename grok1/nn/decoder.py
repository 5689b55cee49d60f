"""The fast forward pass: cached attention, sparse experts, layers in one compiled loop.

Everything here is per device: it runs inside `jax.shard_map` over a mesh with the axes of
`sharding`, sees its own shard of each weight and of the cache, and speaks to the other devices only
in the `psum`s that are written out. `transformer.forward` is the same computation to read.

What is captured and what intervenes is known when the program is traced; without either, the
program is as if there were neither.

Dimension key: R row of this call, T position in this call, M = R*T, D model dim, C key/value head
held here, H head dim, V vocabulary rows held here, L layer, N query head held here, S cache
capacity, E expert, A selected experts a token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grok1.config import ModelConfig
from grok1.nn.capture import NOTHING, Capture
from grok1.nn.hooks import apply, redirect
from grok1.nn.sharding import MODEL_AXIS
from grok1.nn.transformer import LayerParams, Params
from grok1.nn.unembedding import logit_lens
from grok1.ops.attention import KVCache, Place, attend_cache, attention_map
from grok1.ops.experts import experts
from grok1.ops.formats import is_quantized
from grok1.ops.heads import Attending, Projections, append_and_attend, append_heads
from grok1.ops.quantized import Weight, matmul_split
from grok1.ops.residual import add_branch, layer_norm, norm
from grok1.ops.routing import Routing, Selection, add_and_route, route_layer

Captures = dict[str, Array]
"""Values kept on the way, each with a leading axis L; see `forward`."""


class Run(NamedTuple):
    """How a forward pass is run, the same in all its layers.

    Attributes:
      config: The model.
      dtype: Type of the products with weights; the residual stream stays float32. In bfloat16 only
        the experts' inputs are rounded to it; attention, a small part of the work that decides
        where the router sends a token, keeps 16 bits (`matmul_split`).
      capture: What to keep; what is not named is not computed. For every layer: "residual_in",
        "residual_mid", "residual", "attention_out" and "moe_out" `[L, R, T, D]`, the stream before,
        within and after the layer and what its branches add; "router_probs" `[L, M, E]`,
        "expert_indices" and "expert_weights" `[L, M, A]`; "lens_tokens" and "lens_logprobs"
        `[L, M, lens_top]`. Of `attention_layers`: "attention_probs" `[layers, R, N, T, S]`.
      interventions: Hooks, as `study.intervention.prepare` makes them.
      next_norms: float32 `[L, D]`, scales of the norm that comes after each layer, the next one's
        first or the final one, where a layer ends with it; None where each begins with its own.
    """

    config: ModelConfig
    dtype: Any
    capture: Capture = NOTHING
    interventions: Sequence[Any] = ()
    next_norms: Any = None


class Stream(NamedTuple):
    """The residual stream between two layers.

    Attributes:
      x: float32 `[R, T, D]`.
      normed: What is next to see of it, its norm; None if that is still to be taken.
    """

    x: Any
    normed: Any = None


def forward(
    params: Params,
    run: Run,
    cache: KVCache,
    slots: Int[Array, " R"],
    tokens: Int[Array, "R T"],
    num_valid: Int[Array, " R"],
) -> tuple[Float[Array, "R T D"], KVCache, Captures]:
    """Runs the next tokens of some rows through all layers and appends them to the cache.

    Args:
      params: This device's shard of the model, layers stacked.
      run: How.
      cache: This device's shard of the cache.
      slots: Which row of the cache each row is; one outside the cache belongs to none.
      tokens: Token ids; row r continues at position `cache.length[slots[r]]`.
      num_valid: How many of the T tokens of each row are real; the rest is padding, which is
        computed on but neither dispatched to experts nor cached.

    Returns:
      The final norm's output, float32; the cache, grown by `num_valid`; the captured values.
    """
    config, capture = run.config, run.capture
    place = place_of(cache, slots, tokens.shape[1], num_valid)
    stream = Stream(embed(params.embedding, tokens) * config.embedding_multiplier_scale)
    if _is_unseen(run, "residual_in", "moe_out", "residual"):
        first_norms = params.layers.attention_pre_norm
        next_norms = jnp.concatenate([first_norms[1:], params.final_norm[None]])
        run = run._replace(next_norms=next_norms)
        stream = stream._replace(normed=layer_norm(stream.x, first_norms, jnp.int32(0)))

    def run_layer(carry, layer):
        stream, cache, maps = carry
        stream, cache, captured = decoder_layer(params.layers, layer, run, place, stream, cache)
        captured |= lens(params, config, stream.x, capture)
        if maps is not None:
            # Of the chosen layers alone: a stack of all could be many times as large.
            number = jnp.asarray(numbers)[layer]
            maps = maps.at[number].set(captured.pop("attention_probs"), mode="drop")
        return (stream, cache, maps), captured

    maps = None
    numbers = np.full(config.num_layers, len(capture.attention_layers), np.int32)
    numbers[list(capture.attention_layers)] = np.arange(len(capture.attention_layers))
    if "attention_probs" in capture:
        shape = _map_shape(config, tokens.shape, cache)
        maps = jnp.zeros((len(capture.attention_layers), *shape))
    carry = stream, cache, maps
    if capture:
        layers = jnp.arange(config.num_layers)
        (stream, cache, maps), captured = jax.lax.scan(run_layer, carry, layers)
    else:
        # The loop's own counter is the layer, without a kernel that looks it up.
        stream, cache, maps = jax.lax.fori_loop(
            0, config.num_layers, lambda layer, carry: run_layer(carry, layer)[0], carry
        )
        captured = {}
    cache = grown(cache, slots, num_valid)
    if maps is not None:
        captured["attention_probs"] = maps
    normed = norm(stream.x, params.final_norm) if stream.normed is None else stream.normed
    return normed, cache, captured


def place_of(
    cache: KVCache, slots: Int[Array, " R"], length: int, num_valid: Int[Array, " R"]
) -> Place:
    """Where the next `length` tokens of some rows stand, of which `num_valid` are real."""
    filled = cache.length.at[slots].get(mode="fill", fill_value=0)
    offsets = jnp.arange(length)
    # Padding stands where the last real token does: behind that the cache holds what an earlier
    # text has left, which may be no number, and times a weight of 0 it would be none.
    seen = jnp.minimum(offsets, jnp.maximum(num_valid - 1, 0)[:, None])
    return Place(slots, filled[:, None] + seen, offsets < num_valid[:, None])


def grown(cache: KVCache, slots: Int[Array, " R"], num_valid: Int[Array, " R"]) -> KVCache:
    """The cache once every layer has written so many tokens of these rows."""
    return cache._replace(length=cache.length.at[slots].add(num_valid, mode="drop"))


def decoder_layer(
    params: LayerParams,
    layer: Int[Array, ""],
    run: Run,
    place: Place,
    stream: Stream,
    cache: KVCache,
) -> tuple[Stream, KVCache, Captures]:
    """One layer of a stack: attention, then experts, each between its two norms.

    Args:
      params: The stack; only matrices that are used are read from it.
      layer: Which layer, in the stack and in the cache.
      run: How.
      place: Where the tokens stand.
      stream: The residual stream before the layer.
      cache: Keys and values so far.

    Returns:
      The residual stream after the layer, the cache with the layer's keys and values, and what is
      captured of the layer, as `forward` does without the axis of layers; "attention_probs" are 0
      for a layer that is not of `attention_layers`. The lens is left to `lens`.
    """
    x, cache, normed_MD, routing, captured = attend_and_route(
        params, layer, run, place, stream, cache
    )
    branch_MD = experts(
        normed_MD.astype(run.dtype), params.experts, (layer,), routing, place.valid.reshape(-1)
    )
    stream, more = add_experts(params, layer, run, place, x, branch_MD)
    return stream, cache, captured | more


def attend_and_route(
    params: LayerParams,
    layer: Int[Array, ""],
    run: Run,
    place: Place,
    stream: Stream,
    cache: KVCache,
) -> tuple[Float[Array, "R T D"], KVCache, Float[Array, "M D"], Routing, Captures]:
    """The first half of a layer, up to the choice of experts; arguments as for `decoder_layer`.

    Returns:
      The residual stream between the branches, the cache, the input of the experts and their
      choice, and what is captured of this half.
    """
    config = run.config
    visit, captured = _visitor(layer, run, place)
    x, normed = visit("residual_in", stream.x), stream.normed
    if normed is None:
        normed = layer_norm(x, params.attention_pre_norm, layer)
    branch, cache, maps = _attention(params, layer, run, place, normed, cache)
    captured |= maps
    scales = params.attention_post_norm, params.moe_pre_norm
    selection = Selection(
        config.num_selected_experts, config.router_softcap, config.renormalize_gates
    )
    if _is_unseen(run, "attention_out", "residual_mid"):
        x, normed, logits_ME, routing = add_and_route(
            x, branch, scales, params.router, layer, selection
        )
    else:
        x += visit("attention_out", layer_norm(branch, scales[0], layer))
        x = visit("residual_mid", x)
        normed = layer_norm(x, scales[1], layer)
        rows = normed.reshape(-1, config.emb_size)
        logits_ME, routing = route_layer(rows, params.router, layer, selection)
    normed_MD = normed.reshape(-1, config.emb_size)
    routing = redirect(run.interventions, logits_ME, routing, layer, place.positions.reshape(-1))
    kept = {
        "router_probs": routing.probs,
        "expert_indices": routing.expert_indices,
        "expert_weights": routing.expert_weights,
    }
    captured |= {name: value for name, value in kept.items() if name in run.capture}
    return x, cache, normed_MD, routing, captured


def add_experts(
    params: LayerParams,
    layer: Int[Array, ""],
    run: Run,
    place: Place,
    x: Float[Array, "R T D"],
    branch: Float[Array, "M D"],
) -> tuple[Stream, Captures]:
    """The second half of a layer.

    Args:
      params: The stack of layers.
      layer: Which layer.
      run: How.
      place: Where the tokens stand.
      x: float32 `[R, T, D]`, the residual stream between the branches.
      branch: What `experts.experts` makes of the choice, on this device.

    Returns:
      The residual stream after the layer, and what is captured of this half.
    """
    visit, captured = _visitor(layer, run, place)
    summed = jax.lax.psum(branch, MODEL_AXIS).reshape(x.shape)
    if run.next_norms is not None:
        return Stream(*add_branch(x, summed, (params.moe_post_norm, run.next_norms), layer)), {}
    if _is_unseen(run, "moe_out"):
        (x,) = add_branch(x, summed, (params.moe_post_norm,), layer)
    else:
        x += visit("moe_out", layer_norm(summed, params.moe_post_norm, layer))
    return Stream(visit("residual", x)), captured


def _is_unseen(run: Run, *points: str) -> bool:
    """Whether nothing looks at these points of a layer's stream, or changes them."""
    watched = {*run.capture.names, *(hook.point for hook in run.interventions)}
    return watched.isdisjoint(points)


def _visitor(
    layer: Int[Array, ""], run: Run, place: Place
) -> tuple[Callable[[str, Array], Array], Captures]:
    """What the points of a layer's stream go through, and where it keeps what is captured."""
    captured: Captures = {}

    def visit(point: str, value: Array) -> Array:
        value = apply(run.interventions, point, value, layer, place.positions)
        if point in run.capture:
            captured[point] = value
        return value

    return visit, captured


def lens(
    params: Params, config: ModelConfig, x: Float[Array, "R T D"], capture: Capture
) -> Captures:
    """The logit lens of a layer's output, where it is captured; empty where it is not."""
    if "lens_tokens" not in capture and "lens_logprobs" not in capture:
        return {}
    flat = x.reshape(-1, config.emb_size)
    found = logit_lens(params.embedding, params.final_norm, config, flat, capture.lens_top)
    named = zip(("lens_tokens", "lens_logprobs"), found, strict=True)
    return {name: value for name, value in named if name in capture}


def embed(embedding: Float[Array, "V D"], tokens: Int[Array, "R T"]) -> Float[Array, "R T D"]:
    """Looks tokens up in a table whose rows are shared out over the devices; float32."""
    rows = embedding.shape[0]
    local = tokens - jax.lax.axis_index(MODEL_AXIS) * rows
    here = (local >= 0) & (local < rows)
    found = embedding[jnp.where(here, local, 0)].astype(jnp.float32)
    return jax.lax.psum(jnp.where(here[..., None], found, 0), MODEL_AXIS)


def _attention(
    params: LayerParams,
    layer: Int[Array, ""],
    run: Run,
    place: Place,
    x: Float[Array, "R T D"],
    cache: KVCache,
) -> tuple[Float[Array, "R T D"], KVCache, Captures]:
    config, dtype = run.config, run.dtype
    rows, length, _ = x.shape
    heads_here = cache.k.shape[2]

    key_weight = _columns_of_device(params.key, layer, heads_here, config)
    value_weight = _columns_of_device(params.value, layer, heads_here, config)
    # Int8 is exact in any type of product; queries of a float cache are rounded as its keys.
    as_keys = dtype != jnp.float32 and cache.k.dtype != jnp.int8
    dtypes = (dtype, cache.k.dtype if as_keys else dtype)
    projections = Projections(
        (params.query, key_weight[0], value_weight[0]),
        ((layer,), key_weight[1], value_weight[1]),
        (params.attention_out,),
    )
    scale = config.attn_output_multiplier
    captured: Captures = {}
    if "attention_probs" not in run.capture:
        attending = Attending(*dtypes, scale)
        mixed, cache = append_and_attend(x, projections, cache, layer, place, attending)
    else:
        query_RTCGH, cache = append_heads(x, projections, cache, layer, place, dtypes)
        mixed = attend_cache(query_RTCGH, cache, layer, place, scale)
        captured["attention_probs"] = jax.lax.cond(
            jnp.isin(layer, jnp.array(run.capture.attention_layers)),
            lambda: attention_map(query_RTCGH, cache, layer, place, scale),
            lambda: jnp.zeros(_map_shape(config, (rows, length), cache)),
        )
    if any(hook.point == "heads" for hook in run.interventions):
        by_head = mixed.reshape(rows, length, -1, config.key_size)
        mixed = apply(run.interventions, "heads", by_head, layer, place.positions)
    out = matmul_split(mixed.reshape(rows, length, -1), params.attention_out, (layer,), dtype)
    return jax.lax.psum(out, MODEL_AXIS), cache, captured


def _map_shape(config: ModelConfig, shape: tuple[int, ...], cache: KVCache) -> tuple[int, ...]:
    """Shape of this device's attention map of a layer: `[R, N, T, S]`."""
    rows, length = shape
    heads_here = config.num_q_heads // jax.lax.axis_size(MODEL_AXIS)
    return rows, heads_here, length, cache.k.shape[3]


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

    if is_quantized(weight):
        return jax.tree.map(take, weight), ()
    return take(weight), ()
