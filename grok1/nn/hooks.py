"""What acts on a forward pass at its named points, on the device.

A hook is a frozen pytree whose arrays are arguments of the compiled program, so that another
layer, position, vector or patch of the same shape runs the same program. `study.intervention` makes
them of what a user asks for; `apply` and `redirect` are called by the decoder, per device.

Points, in the order in which a layer passes them: "residual_in" before the attention branch,
"heads" (what each query head mixed), "attention_out" what the branch adds, "residual_mid" between
the branches, "router", "moe_out" what the experts add, "residual" after the layer. Hooks at one
point are applied in the order in which they are given.

Dimension key: B batch row, T token, M = B*T, L layer, S context, D model dim, E expert, A selected
experts a token, P layers that have values of their own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grok1.nn.sharding import MODEL_AXIS
from grok1.ops.routing import Routing

STREAM_POINTS = ("residual_in", "attention_out", "residual_mid", "moe_out", "residual")
"""Points where the value is float32 `[B, T, D]`."""


def apply(
    prepared: Sequence[Any],
    point: str,
    value: Float[Array, "B T ..."],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
) -> Float[Array, "B T ..."]:
    """The value at a point of a layer, after the interventions there.

    Args:
      prepared: As `study.intervention.prepare` returns them.
      point: One of `STREAM_POINTS`, or "heads".
      value: `[B, T, D]`, or at "heads" this device's `[B, T, heads, H]`.
      layer: Which layer.
      positions: Absolute position of each token.
    """
    for hook in prepared:
        if hook.point == point:
            value = hook(value, layer, positions)
    return value


def redirect(
    prepared: Sequence[Any],
    logits: Float[Array, "M E"],
    routing: Routing,
    layer: Int[Array, ""] | int,
    positions: Int[Array, " M"],
) -> Routing:
    """A layer's routing after the interventions at the point "router".

    Args:
      prepared: As `study.intervention.prepare` returns them.
      logits: The router's, soft-capped where the model caps.
      routing: What it chose.
      layer: Which layer.
      positions: Absolute position of each token.

    Returns:
      As many choices a token as any intervention needs; E stands for none, with weight 0. An expert
      of weight 0 is none.
    """
    at_router = [hook for hook in prepared if hook.point == "router"]
    if not at_router:
        return routing
    routed = _Routed(logits, routing, jnp.zeros(logits.shape, bool))
    for hook in at_router:
        routed = hook(routed, layer, positions)
    indices, weights = routed.routing.expert_indices, routed.routing.expert_weights
    ablated = jnp.take_along_axis(routed.ablated, indices, axis=-1, mode="fill", fill_value=False)
    weights = jnp.where(ablated, 0, weights)
    indices = jnp.where(weights == 0, logits.shape[-1], indices)
    return Routing(routed.routing.probs, indices, weights)


class _Routed(NamedTuple):
    """A layer's routing between two interventions.

    Attributes:
      logits: float32 `[M, E]`, with those of experts that cannot be chosen at their least.
      routing: What is chosen, ablated experts included, so that their places stay taken.
      ablated: bool `[M, E]`, experts that do not run where they are chosen.
    """

    logits: Float[Array, "M E"]
    routing: Routing
    ablated: Bool[Array, "M E"]


def _on_device(cls: type) -> Any:
    """Makes a class a frozen pytree of its fields; `_static` ones are a part of its structure."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


@_on_device
class Where:
    """Attributes: layers bool `[L]`; positions bool `[S]`, or None for all."""

    layers: Any
    positions: Any

    def __call__(self, layer, positions) -> Array:
        """True where it acts: of the shape of `positions`, or a scalar."""
        here = jnp.asarray(self.layers)[layer]
        if self.positions is None:
            return here
        return here & jnp.asarray(self.positions).at[positions].get(mode="fill", fill_value=False)


@_on_device
class Table:
    """Attributes: slots int32 `[L]`, where a layer's values are; values `[P, T or 1, ...]`."""

    slots: Any
    values: Any

    def __call__(self, layer, positions) -> Array:
        """Each token's values, of the shape of `positions` and then `[...]`."""
        values = jnp.asarray(self.values)
        tokens = jnp.minimum(positions, values.shape[1] - 1)
        return values[jnp.asarray(self.slots)[layer], tokens]


@_on_device
class Zero:
    """Puts zeros in the place of the value."""

    where: Where
    point: str = _static()

    def __call__(self, value, layer, positions):
        return _select(self.where(layer, positions), jnp.zeros_like(value), value)


@_on_device
class Add:
    """Adds vectors."""

    where: Where
    vectors: Table
    point: str = _static()

    def __call__(self, value, layer, positions):
        more = self.vectors(layer, positions)
        return _select(self.where(layer, positions), value + more, value)


@_on_device
class Replace:
    """Puts recorded values in the place of the value."""

    where: Where
    values: Table
    point: str = _static()

    def __call__(self, value, layer, positions):
        return _select(self.where(layer, positions), self.values(layer, positions), value)


@_on_device
class ScaleHeads:
    """Multiplies what each head mixed."""

    where: Where
    factors: Any
    point: str = _static(default="heads")

    def __call__(self, value, layer, positions):
        heads_here = value.shape[2]
        first = jax.lax.axis_index(MODEL_AXIS) * heads_here
        factors = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.factors), first, heads_here)
        return _select(self.where(layer, positions), value * factors[:, None], value)


@_on_device
class Ablate:
    """Leaves experts out where they are chosen."""

    where: Where
    experts: Any
    point: str = _static(default="router")

    def __call__(self, routed, layer, positions):
        ablated = routed.ablated | jnp.asarray(self.experts)
        return routed._replace(
            ablated=_select(self.where(layer, positions), ablated, routed.ablated)
        )


@_on_device
class Reroute:
    """Lets the router choose among the other experts."""

    where: Where
    experts: Any
    renormalize: bool = _static()
    point: str = _static(default="router")

    def __call__(self, routed, layer, positions):
        logits, routing, _ = routed
        here = self.where(layer, positions)
        # Finite, so that a softmax of nothing but these is a number, which the mask then drops.
        least = jnp.finfo(logits.dtype).min
        masked = jnp.where(self.experts, least, logits)
        probs = jnp.where(masked == least, 0, jax.nn.softmax(masked, axis=-1))
        counts = (routing.expert_indices < logits.shape[-1]).sum(axis=-1)
        width = routing.expert_indices.shape[-1]
        changed = _most_probable(probs, width, counts, self.renormalize)
        return routed._replace(
            logits=_select(here, masked, logits), routing=_merged(here, changed, routing)
        )


@_on_device
class Force:
    """Says which experts run."""

    where: Where
    experts: Table
    weights: Table | None
    renormalize: bool = _static()
    point: str = _static(default="router")

    def __call__(self, routed, layer, positions):
        here, probs = self.where(layer, positions), routed.routing.probs
        indices = self.experts(layer, positions)
        if self.weights is None:
            weights = jnp.take_along_axis(probs, indices, axis=-1, mode="fill", fill_value=0)
            weights = _renormalized(weights) if self.renormalize else weights
        else:
            weights = self.weights(layer, positions)
        return routed._replace(
            routing=_merged(here, Routing(probs, indices, weights), routed.routing),
            ablated=_select(here, jnp.zeros_like(routed.ablated), routed.ablated),
        )


@_on_device
class Select:
    """Lets the router choose more experts, or fewer."""

    where: Where
    count: int = _static()
    renormalize: bool = _static()
    point: str = _static(default="router")

    def __call__(self, routed, layer, positions):
        probs = routed.routing.probs
        changed = _most_probable(probs, self.count, self.count, self.renormalize)
        here = self.where(layer, positions)
        return routed._replace(routing=_merged(here, changed, routed.routing))


def _select(here: Array, changed: Array, value: Array) -> Array:
    """`changed` where `here`, which has the leading axes of `value`, or none."""
    return jnp.where(here.reshape(*here.shape, *(1,) * (value.ndim - here.ndim)), changed, value)


def _most_probable(
    probs: Float[Array, "M E"], width: int, counts: Int[Array, " M"] | int, renormalize: bool
) -> Routing:
    """Each token's `counts` most probable experts, in `width` places; none of probability 0."""
    weights, indices = jax.lax.top_k(probs, width)
    chosen = (jnp.arange(width) < jnp.reshape(counts, (-1, 1))) & (weights > 0)
    weights = jnp.where(chosen, weights, 0)
    weights = _renormalized(weights) if renormalize else weights
    return Routing(probs, jnp.where(chosen, indices, probs.shape[-1]), weights)


def _renormalized(weights: Float[Array, "M A"]) -> Float[Array, "M A"]:
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def _merged(here: Array, changed: Routing, routing: Routing) -> Routing:
    """`changed` where `here`, in as many places as the wider of the two."""
    num_experts = routing.probs.shape[-1]
    width = max(changed.expert_indices.shape[-1], routing.expert_indices.shape[-1])

    def widened(array: Array, fill: int) -> Array:
        missing = width - array.shape[-1]
        return jnp.pad(array, ((0, 0), (0, missing)), constant_values=fill)

    def merged(new: Array, old: Array, fill: int) -> Array:
        return _select(here, widened(new, fill), widened(old, fill))

    return Routing(
        _select(here, changed.probs, routing.probs),
        merged(changed.expert_indices, routing.expert_indices, num_experts),
        merged(changed.expert_weights, routing.expert_weights, 0),
    )
