"""The residual stream: norms before and after a branch, and the sum.

Dimension key: M row, D model dim, L layer.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grok1.ops import forms
from grok1.ops.cpu import rowwise
from grok1.ops.cuda import calls_of_rows, shapes_of_rows
from grok1.ops.layers import RMS_NORM_EPSILON, rms_norm


def layer_norm(
    x: Float[Array, "*M D"],
    scales: Float[Array, "L D"],
    layer: Int[Array, ""],
    implementation: str | None = None,
) -> Float[Array, "*M D"]:
    """`rms_norm` with the scale of a layer.

    Args:
      x: float32.
      scales: Of all layers.
      layer: Which.
      implementation: "xla", "cpp" or "cuda"; None for that of `forms.PREFERRED`.

    Returns:
      float32.
    """
    return forms.run("norm", x, scales, layer, implementation=implementation)


def norm(x: Float[Array, "*M D"], scale: Float[Array, " D"]) -> Float[Array, "*M D"]:
    """`rms_norm` as in a layer, with a scale that is not one of a stack; float32."""
    return layer_norm(x, scale[None], jnp.int32(0))


def add_branch(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: tuple[Float[Array, "L D"], ...],
    layer: Int[Array, ""],
    implementation: str | None = None,
) -> tuple[Float[Array, "*M D"], ...]:
    """Adds the norm of a branch; then the norm of the sum, if there are scales for it too.

    Args:
      x: float32, the residual stream.
      branch: float32.
      scales: Of the norm of the branch in all layers, then of the norm of the sum.
      layer: Which layer.
      implementation: "xla", "cpp" or "cuda"; None for that of `forms.PREFERRED`.

    Returns:
      The stream, and its norm if there are scales for it; float32.
    """
    return forms.run("add_norm", x, branch, scales, layer, implementation=implementation)


@forms.form("norm", "xla")
def layer_norm_xla(
    x: Float[Array, "*M D"], scales: Float[Array, "L D"], layer: Int[Array, ""]
) -> Float[Array, "*M D"]:
    """By XLA."""
    return rms_norm(x, scales[layer])


@forms.form("add_norm", "xla")
def add_branch_xla(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: tuple[Float[Array, "L D"], ...],
    layer: Int[Array, ""],
) -> tuple[Float[Array, "*M D"], ...]:
    """By XLA."""
    x = x + rms_norm(branch, scales[0][layer])
    return (x, *(rms_norm(x, of_sum[layer]) for of_sum in scales[1:]))


@forms.form("norm", "cpp")
def layer_norm_cpp(
    x: Float[Array, "*M D"], scales: Float[Array, "L D"], layer: Int[Array, ""]
) -> Float[Array, "*M D"]:
    """In C++, a row whatever the others are."""
    return rowwise.norm(x.astype(jnp.float32), scales, layer, RMS_NORM_EPSILON)


@forms.form("add_norm", "cpp")
def add_branch_cpp(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: tuple[Float[Array, "L D"], ...],
    layer: Int[Array, ""],
) -> tuple[Float[Array, "*M D"], ...]:
    """In C++, a row whatever the others are."""
    x = rowwise.add_norm(x, branch, scales[0], layer, RMS_NORM_EPSILON)
    return (x, *(rowwise.norm(x, of_sum, layer, RMS_NORM_EPSILON) for of_sum in scales[1:]))


def _is_not_for_cuda(x, *others) -> str | None:
    return shapes_of_rows.refusal_of_rows(x.shape)


@forms.form("norm", "cuda", refuses=_is_not_for_cuda)
def layer_norm_cuda(
    x: Float[Array, "*M D"], scales: Float[Array, "L D"], layer: Int[Array, ""]
) -> Float[Array, "*M D"]:
    """In one launch."""
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return calls_of_rows.norm(rows, scales, layer, RMS_NORM_EPSILON).reshape(x.shape)


@forms.form("add_norm", "cuda", refuses=_is_not_for_cuda)
def add_branch_cuda(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: tuple[Float[Array, "L D"], ...],
    layer: Int[Array, ""],
) -> tuple[Float[Array, "*M D"], ...]:
    """In one launch."""
    rows, of_branch = (array.reshape(-1, x.shape[-1]) for array in (x, branch))
    found = calls_of_rows.add_norm(rows, of_branch, scales, layer, RMS_NORM_EPSILON)
    return tuple(array.reshape(x.shape) for array in found)
