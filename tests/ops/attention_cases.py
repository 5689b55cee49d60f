"""Queries and caches for the tests of attention, and its forms compiled.

Sizes: B=3 rows, T=3 queries, C=2 key/value heads of G=5 query heads each, H=7, L=2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from grok1.ops.attention import KVCache, Place, append, attend, attend_cache

B, T, C, G, H, L = 3, 3, 2, 5, 7, 2
SCALE = 0.6


def in_order(positions, valid=None):
    """The place of rows that are the cache's, in its order."""
    positions = np.asarray(positions, np.int32)
    valid = np.ones(positions.shape, bool) if valid is None else valid
    return Place(np.arange(len(positions), dtype=np.int32), positions, valid)


@jax.jit
def append_at(cache, layer, place, key, value):
    return append(cache, layer, place, key, value)


def append_compiled(cache, layer, key, value, positions, valid):
    return append_at(cache, layer, in_order(positions, valid), key, value)


@jax.jit
def attend_at(query, cache, layer, place):
    return attend_cache(query, cache, layer, place, SCALE)


def attend_cached(query, cache, layer, positions):
    return attend_at(query, cache, layer, in_order(positions))


@jax.jit
def attend_plainly(query, cache, layer, positions):
    mask = jnp.arange(cache.k.shape[3]) <= positions[..., None]
    return attend(query, cache.k[layer], cache.v[layer], mask, SCALE)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def random_query(length=T, dtype=jnp.float32):
    return normal(7, B, length, C, G, H, dtype=dtype)


def random_cache(capacity, dtype=jnp.float32):
    k, v = (normal(seed, L, B, C, capacity, H, dtype=dtype) for seed in (8, 9))
    return KVCache(k, v, jnp.zeros(B, jnp.int32))


def with_slots(cache, where, k, v):
    """The cache with other keys and values at `where`, an index of `[L, B, C, S, H]`."""
    new_k, new_v = np.array(cache.k), np.array(cache.v)
    new_k[where], new_v[where] = k, v
    return cache._replace(k=jnp.asarray(new_k), v=jnp.asarray(new_v))


FORMS = ["blocked", "by_row", "sliced", "cpp"]


@functools.partial(jax.jit, static_argnames="form")
def attend_by(form, query, cache, layer, place):
    return attend_cache(query, cache, layer, place, SCALE, form)


def random_new(length=T):
    return normal(10, B, length, C, H), normal(11, B, length, C, H)


def int8_cache(capacity):
    shape = (L, B, C, capacity, H)
    values, scales = jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1])
    return KVCache(values, values, jnp.zeros(B, jnp.int32), scales, scales)


def dequantized(cache):
    """The float32 cache that an int8 one stands for."""
    k, v = (
        values.astype(jnp.float32) * scales[..., None]
        for values, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales))
    )
    return KVCache(k, v, cache.length)


def filled_int8_cache(capacity):
    """Layer 1 filled, each position, head and row with vectors of another size, from 0.01 to 10."""
    key, value = (
        normal(seed, B, capacity, C, H)
        * 10.0 ** jnp.asarray(np.random.default_rng(seed).uniform(-2, 1, (B, capacity, C, 1)))
        for seed in (12, 13)
    )
    everywhere = np.broadcast_to(np.arange(capacity), (B, capacity))
    valid = np.ones((B, capacity), bool)
    cache = append_compiled(int8_cache(capacity), 1, key, value, everywhere, valid)
    return cache, key.astype(jnp.float32), value.astype(jnp.float32)
