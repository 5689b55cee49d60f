"""The router of a layer, in forms that compute the same choice.

Dimension key: M token, D model dim, E expert, A selected experts a token, L layer.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grok1.ops import forms
from grok1.ops.cpu import rowwise
from grok1.ops.cuda import calls_of_rows, shapes, shapes_of_rows
from grok1.ops.experts import Routing, choose_experts, router_logits


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
