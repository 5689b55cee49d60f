"""The kernels in C++ that compute each row by itself: its results do not depend on the others.

How XLA sums a row, or which sine it takes, depends on how many rows there are; these do not.

Dimension key: M row, D model dim, L layer, E expert, R row of a call, T position, N query head,
C key head, H head dim, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grok1.ops.cpu import bindings


def norm(
    x: Float[Array, "*M D"], scales: Float[Array, "L D"], layer: int | Array, epsilon: float
) -> Float[Array, "*M D"]:
    """Divides by the root mean square and scales.

    Args:
      x: float32.
      scales: float32, of all layers.
      layer: Which.
      epsilon: What is added to the mean square.

    Returns:
      float32.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    number = jnp.asarray(layer, jnp.int32)
    return jax.ffi.ffi_call(bindings.NORM, out)(x, scales, number, epsilon=np.float32(epsilon))


def add_norm(
    x: Float[Array, "*M D"],
    branch: Float[Array, "*M D"],
    scales: Float[Array, "L D"],
    layer: int | Array,
    epsilon: float,
) -> Float[Array, "*M D"]:
    """`x` and the `norm` of `branch`, which are float32, added up."""
    bindings.require()
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    number = jnp.asarray(layer, jnp.int32)
    return jax.ffi.ffi_call(bindings.ADD_NORM, out)(
        x, branch, scales, number, epsilon=np.float32(epsilon)
    )


def rotate(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T C H"],
    positions: Int[Array, "R T"],
    frequencies: Float[Array, " half"],
) -> tuple[Float[Array, "R T N H"], Float[Array, "R T C H"]]:
    """Turns pairs (i, i + half) of heads by `positions * frequencies`; all float32.

    Args:
      query: Heads that ask.
      key: Heads that are asked.
      positions: int32, absolute.
      frequencies: By how much a position turns each pair; half of H.

    Returns:
      Both, turned; float32.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    out = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (query, key))
    query, key = jax.ffi.ffi_call(bindings.ROTATE, out)(query, key, positions, frequencies)
    return query, key


def route(
    x: Float[Array, "M D"],
    routers: Float[Array, "L D E"],
    layer: int | Array,
    num_selected: int,
    softcap: float | None,
    renormalize: bool,
) -> tuple[
    Float[Array, "M E"], Float[Array, "M E"], Int[Array, "M selected"], Float[Array, "M selected"]
]:
    """Chooses each row's experts, as `ops.routing.route` says.

    Args:
      x: float32.
      routers: float32; one of them is read, in place.
      layer: Which.
      num_selected: Experts a row.
      softcap: Bounds the logits; None for no bound.
      renormalize: Whether the weights of a row's experts are divided by their sum.

    Returns:
      The logits and their softmax, float32; the experts, int32, and their weights, float32.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    of_all = jax.ShapeDtypeStruct((len(x), routers.shape[-1]), jnp.float32)
    indices, weights = (
        jax.ShapeDtypeStruct((len(x), num_selected), dtype) for dtype in (jnp.int32, jnp.float32)
    )
    logits, probs, indices, weights = jax.ffi.ffi_call(
        bindings.ROUTE, (of_all, of_all, indices, weights)
    )(
        x,
        routers,
        jnp.asarray(layer, jnp.int32),
        softcap=np.float32(softcap or 0),
        renormalize=np.bool_(renormalize),
    )
    return logits, probs, indices, weights


def table_products(x: Float[Array, "M D"], table: Float[Array, "V D"]) -> Float[Array, "M V"]:
    """Computes `x @ table.T`; all float32.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    out = jax.ShapeDtypeStruct((len(x), len(table)), jnp.float32)
    return jax.ffi.ffi_call(bindings.TABLE_PRODUCTS, out)(x, table)


def exponential_sums(shifted: Float[Array, "M V"]) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Sums `exp(shifted)`, and `exp(shifted) * shifted`, over each row; all float32.

    Args:
      shifted: Not above 0.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    out = jax.ShapeDtypeStruct((len(shifted),), jnp.float32)
    total, weighted = jax.ffi.ffi_call(bindings.EXPONENTIAL_SUMS, (out, out))(shifted)
    return total, weighted


def log(x: Float[Array, " M"]) -> Float[Array, " M"]:
    """The natural logarithm; float32.

    Raises:
      RuntimeError: If there is no library.
    """
    bindings.require()
    return jax.ffi.ffi_call(bindings.LOG, jax.ShapeDtypeStruct(x.shape, jnp.float32))(x)
