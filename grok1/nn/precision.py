"""The types that a model computes and caches in, as a caller may name them."""

from typing import Any

import jax.numpy as jnp


def product_dtype(dtype: Any, platform: str) -> jnp.dtype:
    """Returns the type of the products with weights.

    Args:
      dtype: "float32" or "bfloat16"; None for float32 on a CPU and bfloat16 elsewhere.
      platform: JAX's name of the devices' platform.

    Raises:
      ValueError: If it is another type.
    """
    if dtype is None:
        dtype = "float32" if platform == "cpu" else "bfloat16"
    name = _name(dtype)
    if name not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {name!r}')
    return jnp.dtype(name)


def cache_dtype(dtype: Any) -> jnp.dtype | None:
    """Returns the type of cached keys and values; None stays None, the default of the products'.

    Args:
      dtype: "float32", "float16", "int8" or None.

    Raises:
      ValueError: If it is another type.
    """
    if dtype is None:
        return None
    name = _name(dtype)
    if name not in ("float32", "float16", "int8"):
        raise ValueError(
            f'cache_dtype must be "float32", "float16" or "int8", or None for the default of '
            f"dtype, found {name!r}"
        )
    return jnp.dtype(name)


def default_cache_dtype(products: Any) -> jnp.dtype:
    """Returns the type of cached keys and values where none is asked for.

    Args:
      products: Type of the products with weights.
    """
    # float16 takes bfloat16's memory with three more bits; normed inputs keep within its range.
    return jnp.dtype(jnp.float32 if jnp.dtype(products) == jnp.float32 else jnp.float16)


def embedding_dtype(dtype: Any) -> jnp.dtype:
    """Returns the type that the embedding is kept in.

    Args:
      dtype: "float32" or "bfloat16".

    Raises:
      ValueError: If it is another type.
    """
    name = _name(dtype)
    if name not in ("float32", "bfloat16"):
        raise ValueError(f'embedding_dtype must be "float32" or "bfloat16", found {name!r}')
    return jnp.dtype(name)


def _name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)
