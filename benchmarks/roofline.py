"""What a step cannot do without, and how fast this machine does that alone."""

import concurrent.futures
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import grok1

_SECONDS = 0.5  # of one measurement: long enough for many passes, short beside a round
_READ_BYTES = 1 << 30  # several times the largest cache
_COPY_BYTES = 1 << 31


def decode_bytes(
    model: grok1.Model, batch: int, start: int, num_steps: int, experts_per_step: float
) -> dict[str, float]:
    """Bytes that one decode step must read, by what they are, the mean over the steps.

    Args:
      model: The model.
      batch: Rows.
      start: Position of the first step.
      num_steps: Number of steps.
      experts_per_step: Experts needed a step, over all layers (`workload.experts_read`).

    Returns:
      Weights as they are held in memory, scales included, of "layers" (attention, norms, router),
      "experts" and "head"; and the filled part of the "cache".
    """
    config, params = model.config, model.params
    capacity = model.engine.capacity_for(start + num_steps + 1)
    cache = model.engine.abstract_state(batch, capacity).cache
    filled = start + (num_steps + 1) / 2  # a step at position p reads p + 1 keys
    return {
        "layers": _num_bytes(params.layers._replace(experts=())) + _num_bytes(params.final_norm),
        "experts": _num_bytes(params.layers.experts)
        / (config.num_layers * config.num_experts)
        * experts_per_step,
        "head": head_bytes(model),
        "cache": _num_bytes(cache._replace(length=())) / capacity * filled,
    }


def head_bytes(model: grok1.Model) -> float:
    """Bytes that finding the most probable token must read: the embedding, or its int8 copy."""
    table = model.engine.screening_table
    return _num_bytes(model.params.embedding if table is None else table)


def prefill_operations(config: grok1.ModelConfig, num_tokens: int) -> float:
    """Multiplications and additions that a prompt needs, with only the chosen experts.

    Weights twice, for a product and a sum; scores and mixing over the positions up to each token's
    own. No logits: prefill has none.
    """
    width = config.num_q_heads * config.key_size
    attention = 2 * config.emb_size * (width + config.num_kv_heads * config.key_size)
    expert = 3 * config.emb_size * config.ffn_size
    weights = attention + config.emb_size * config.num_experts
    weights += config.num_selected_experts * expert
    mean_keys = (num_tokens + 1) / 2
    return 2 * num_tokens * config.num_layers * (weights + 2 * width * mean_keys)


class HostBandwidth:
    """Reads an array larger than any cache on as many threads as the process may use.

    NumPy's maximum of bytes is one instruction a vector and lets go of the interpreter's lock.
    Sums, by NumPy or by a compiled loop, were mostly slower where measured, by up to a
    sixth: they would flatter what is compared.
    """

    def __init__(self):
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        threads = threads or os.cpu_count() or 1
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        # Written, not only allocated: untouched pages are all the same page of zeros.
        self._parts = np.array_split(np.ones(_READ_BYTES, np.uint8), threads)

    def __call__(self) -> float:
        """Bytes read per second."""
        return _READ_BYTES / _seconds_of(lambda: list(self._pool.map(np.max, self._parts)))


class DeviceBandwidth:
    """Copies an array on an accelerator, where what is read and what is written both count."""

    def __init__(self):
        self._data = jnp.zeros(_COPY_BYTES // 4, jnp.int32)
        self._copy = jax.jit(lambda x: x + 1)  # a plain copy would be no work at all

    def __call__(self) -> float:
        """Bytes read and written per second."""
        return 2 * _COPY_BYTES / _seconds_of(lambda: self._copy(self._data))


class MatmulRate:
    """A square product of the type that the model's products have: float32, or bfloat16."""

    def __init__(self, dtype, on_cpu: bool):
        self._size = 2048 if on_cpu else 8192
        self._x = jnp.ones((self._size, self._size), dtype)
        self._matmul = jax.jit(
            lambda x, y: jnp.matmul(
                x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
            )
        )

    def __call__(self) -> float:
        """Operations per second."""
        return 2 * self._size**3 / _seconds_of(lambda: self._matmul(self._x, self._x))


def _seconds_of(work: Callable[[], object]) -> float:
    """Mean time of `work`, over as many times as fit the measurement, the first one apart."""
    jax.block_until_ready(work())
    times, elapsed = 0, 0.0
    start = time.perf_counter()
    while elapsed < _SECONDS:
        # Several in a row, so that a device is not idle while the host looks at the clock.
        jax.block_until_ready([work() for _ in range(4)][-1])
        times += 4
        elapsed = time.perf_counter() - start
    return elapsed / times


def _num_bytes(tree) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
