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
from grok1.ops.layers import exact_einsum


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
    num_selected: int,
    softcap: float | None = None,
    renormalize: bool = False,
) -> tuple[Float[Array, "M E"], Routing]:
    """`route` by the router of a layer.

    Args:
      x: float32, the layer's normed input.
      routers: Those of all layers.
      layer: Which.
      num_selected: A.
      softcap: As `ModelConfig.router_softcap`.
      renormalize: As `ModelConfig.renormalize_gates`.

    Returns:
      The logits, float32, and the choice.
    """
    options = {"num_selected": num_selected, "softcap": softcap, "renormalize": renormalize}
    return forms.run("route", x, routers, layer, **options)


@forms.form("route", "xla")
def route_by_xla(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    num_selected: int,
    softcap: float | None,
    renormalize: bool,
) -> tuple[Float[Array, "M E"], Routing]:
    """By XLA, in several kernels."""
    logits = router_logits(x, routers[layer], softcap)
    return logits, choose_experts(logits, num_selected, renormalize)


@forms.form("route", "cpp")
def route_by_cpp(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    num_selected: int,
    softcap: float | None,
    renormalize: bool,
) -> tuple[Float[Array, "M E"], Routing]:
    """In C++, a token whatever the others are."""
    options = num_selected, softcap, renormalize
    logits, *routing = rowwise.route(x.astype(jnp.float32), routers, layer, *options)
    return logits, Routing(*routing)


def _is_no_route_for_cuda(x, routers, layer) -> str | None:
    if len(x) > shapes.MOST_ROWS:
        return f"it routes up to {shapes.MOST_ROWS} tokens, not {len(x)}"
    if routers.shape[-1] > shapes_of_rows.MOST_EXPERTS:
        return f"it chooses from up to {shapes_of_rows.MOST_EXPERTS} experts"
    return None


@forms.form("route", "cuda", refuses=_is_no_route_for_cuda)
def route_by_cuda(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: Int[Array, ""],
    num_selected: int,
    softcap: float | None,
    renormalize: bool,
) -> tuple[Float[Array, "M E"], Routing]:
    """In one launch, in CUDA."""
    options = num_selected, softcap, renormalize
    logits, *routing = calls_of_rows.route(x.astype(jnp.float32), routers, layer, *options)
    return logits, Routing(*routing)
