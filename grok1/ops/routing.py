"""Where each token goes: the router, in forms that compute the same choice.

Dimension key: M token, D model dim, E expert, A selected experts a token, L layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grok1.ops import forms
from grok1.ops.cpu import rowwise
from grok1.ops.cuda import calls_of_rows, shapes, shapes_of_rows
from grok1.ops.layers import RMS_NORM_EPSILON, exact_einsum
from grok1.ops.residual import add_branch


class Selection(NamedTuple):
    """How experts are chosen.

    Attributes:
      num_selected: A, experts a token.
      softcap: Bounds the router's logits to (-softcap, softcap); None for no bound, as trained.
      renormalize: Whether the weights of a token's experts are divided by their sum.
    """

    num_selected: int
    softcap: float | None = None
    renormalize: bool = False


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
      probs: float32 `[M, E]`, softmax over all experts.
      expert_indices: int32 `[M, A]`, the most probable experts, best first.
      expert_weights: float32 `[M, A]`, their probabilities, as trained not renormalised.
    """

    probs: Array
    expert_indices: Array
    expert_weights: Array


def route(
    x: Float[Array, "M D"],
    router: Float[Array, "D E"],
    num_selected: int,
    softcap: float | None = None,
    renormalize: bool = False,
) -> Routing:
    """Picks each token's experts. Float32 throughout: a rounding could flip a near tie.

    Args:
      x: The layer's normed input.
      router: The router's weight.
      num_selected: A.
      softcap: Caps the router's logits to (-softcap, softcap); None for no cap.
      renormalize: Divide the weights of a token's experts by their sum.
    """
    return choose_experts(router_logits(x, router, softcap), num_selected, renormalize)


def router_logits(
    x: Float[Array, "M D"], router: Float[Array, "D E"], softcap: float | None = None
) -> Float[Array, "M E"]:
    """What the router's softmax is taken of.

    Args:
      x: float32 or bfloat16 `[M, D]`, the router's input.
      router: float32 `[D, E]`.
      softcap: Bounds the logits to (-softcap, softcap); None for no bound, as trained.

    Returns:
      float32 `[M, E]`.
    """
    logits = exact_einsum("MD,DE->ME", x.astype(jnp.float32), router)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def choose_experts(
    logits: Float[Array, "M E"], num_selected: int, renormalize: bool = False
) -> Routing:
    """The most probable experts of each token.

    Args:
      logits: float32 `[M, E]`.
      num_selected: Experts a token.
      renormalize: Divide the weights of a token's experts by their sum.

    Returns:
      Probabilities of all experts, float32 `[M, E]`, and the chosen ones' indices, int32, and
      weights, float32, `[M, A]`.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    expert_weights, expert_indices = jax.lax.top_k(probs, num_selected)
    if renormalize:
        expert_weights /= expert_weights.sum(axis=-1, keepdims=True)
    return Routing(probs, expert_indices, expert_weights)


def route_layer(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    selection: Selection,
) -> tuple[Float[Array, "M E"], Routing]:
    """`route` by the router of a layer.

    Args:
      x: float32, the layer's normed input.
      routers: Those of all layers.
      layer: Which.
      selection: How experts are chosen.

    Returns:
      The logits, float32, and the choice.
    """
    return forms.run("route", x, routers, layer, selection=selection)


@forms.form("route", "xla")
def route_by_xla(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    selection: Selection,
) -> tuple[Float[Array, "M E"], Routing]:
    """By XLA, in several kernels."""
    logits = router_logits(x, routers[layer], selection.softcap)
    return logits, choose_experts(logits, selection.num_selected, selection.renormalize)


@forms.form("route", "cpp")
def route_by_cpp(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    selection: Selection,
) -> tuple[Float[Array, "M E"], Routing]:
    """In C++, a token whatever the others are."""
    logits, *routing = rowwise.route(x.astype(jnp.float32), routers, layer, *selection)
    return logits, Routing(*routing)


def _is_no_route_for_cuda(x, routers, layer) -> str | None:
    reason = shapes_of_rows.refusal_of_rows(x.shape)
    if reason is None and routers.shape[-1] > shapes.MOST_EXPERTS:
        return f"it chooses from up to {shapes.MOST_EXPERTS} experts"
    return reason


@forms.form("route", "cuda", refuses=_is_no_route_for_cuda)
def route_by_cuda(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    selection: Selection,
) -> tuple[Float[Array, "M E"], Routing]:
    """In one launch, in CUDA."""
    router = _router(routers, selection)
    logits, *routing = calls_of_rows.route(x.astype(jnp.float32), routers, layer, router)
    return logits, Routing(*routing)


def add_and_route(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: tuple[Float[Array, "L D"], Float[Array, "L D"]],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    selection: Selection,
) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"], Float[Array, "M E"], Routing]:
    """`residual.add_branch`, then `route_layer` of the norm of the sum.

    Args:
      x: float32, the residual stream.
      branch: float32.
      scales: Of the norm of the branch in all layers, and of the norm of the sum.
      routers: Those of all layers.
      layer: Which.
      selection: How experts are chosen.

    Returns:
      The stream and its norm, float32; the logits, float32, and the choice.
    """
    return forms.run("add_and_route", x, branch, scales, routers, layer, selection=selection)


@forms.form("add_and_route", "apart")
def add_and_route_apart(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: tuple[Float[Array, "L D"], Float[Array, "L D"]],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    selection: Selection,
) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"], Float[Array, "M E"], Routing]:
    """One and then the other."""
    x, normed = add_branch(x, branch, scales, layer)
    rows = normed.reshape(-1, normed.shape[-1])
    return x, normed, *route_layer(rows, routers, layer, selection)


def _router(routers: Array, selection: Selection) -> shapes_of_rows.Router:
    _, width, num_experts = routers.shape
    return shapes_of_rows.Router(width, num_experts, *selection)


def _is_no_sum_for_cuda(x, branch, scales, routers, layer) -> str | None:
    return _is_no_route_for_cuda(x, routers, layer)


@forms.form("add_and_route", "cuda", refuses=_is_no_sum_for_cuda)
def add_and_route_cuda(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: tuple[Float[Array, "L D"], Float[Array, "L D"]],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    selection: Selection,
) -> tuple[Float[Array, "*M D"], Float[Array, "*M D"], Float[Array, "M E"], Routing]:
    """In one launch, in CUDA."""
    router = _router(routers, selection)
    rows, of_branch = (array.reshape(-1, x.shape[-1]) for array in (x, branch))
    added, normed, logits, *routing = calls_of_rows.add_and_route(
        (rows, of_branch), scales, routers, layer, router, RMS_NORM_EPSILON
    )
    return added.reshape(x.shape), normed.reshape(x.shape), logits, Routing(*routing)
