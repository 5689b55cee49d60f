"""A peer on a GPU: one prompt decoded by the simplest CUDA kernels in place of XLA's products.

The kernels are those of a shared library with two handlers of XLA's FFI, `experts_probe` and
`matvec_probe`; everything else of the step goes through XLA, without a loop that depends on data.
"""

import ctypes
import os
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import grok1
from benchmarks import workload
from benchmarks.figures import Figure
from grok1.ops import forms
from grok1.ops.cuda import presence

NAME = "probe"

# Rows of a block of gate and up, of down, and of a wide or narrow projection, and rows that a warp
# has under way: those of the measurements that came with the kernels.
_ROWS_OF_HIDDEN, _ROWS_OF_DOWN, _ROWS_WIDE, _ROWS_NARROW, _UNROLL = 384, 512, 384, 96, 4
_NARROW = 2048  # columns
_TURNS, _STEPS = 5, 64
_COMPARED = 24  # tokens


def register_forms() -> None:
    """Adds a form of `experts` and one of `project`; nothing chooses them by itself."""
    forms.form("experts", NAME)(_experts)
    forms.form("project", NAME)(_project)


def _experts(x: Any, weights: Any, index: Any, routing: Any, valid: Any) -> Any:
    del valid  # one token
    gate, up, down = weights
    tokens, selected = routing.expert_indices.shape
    width, hidden = gate.shape[-2:]
    parts = jax.ShapeDtypeStruct(
        (tokens * selected, width // _ROWS_OF_HIDDEN, 2, hidden), jnp.float32
    )
    out = jax.ShapeDtypeStruct((tokens * selected, hidden // _ROWS_OF_DOWN, width), jnp.float32)
    sizes = {"kc1": _ROWS_OF_HIDDEN, "kc2": _ROWS_OF_DOWN, "unroll": _UNROLL}
    _, of_parts = jax.ffi.ffi_call("experts_probe", (parts, out))(
        x.astype(jnp.float32),
        *(array for weight in (gate, up, down) for array in (weight.values, weight.scales)),
        jnp.asarray(index, jnp.int32),
        routing.expert_indices.astype(jnp.int32),
        routing.expert_weights,
        **{name: np.int64(size) for name, size in sizes.items()},
    )
    return of_parts.reshape(tokens, -1, width).sum(axis=1)


def _project(x: Any, weights: Any, indices: Any, dtype: Any) -> list[Any]:
    del dtype  # all of float32 counts
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    found = []
    for weight, index in zip(weights, indices, strict=True):
        depth, columns = weight.shape[-2:]
        each = _ROWS_WIDE if columns > _NARROW else _ROWS_NARROW
        parts = jax.ShapeDtypeStruct((depth // each, len(rows), columns), jnp.float32)
        of_parts = jax.ffi.ffi_call("matvec_probe", parts)(
            rows,
            weight.values,
            weight.scales,
            jnp.asarray(index, jnp.int32),
            kc=np.int64(each),
            unroll=np.int64(_UNROLL),
        )
        found.append(of_parts.sum(axis=0).reshape(*x.shape[:-1], columns))
    return found


def decode(model: grok1.Model, library: pathlib.Path) -> Iterator[Figure]:
    """Decoding one prompt, in turns with the probe.

    Args:
      model: Of int8.
      library: The shared library.

    Raises:
      ValueError: If there is no GPU: the model would be measured beside itself.
      OSError: If the library cannot be loaded.
      AttributeError: If it has no such handlers.
    """
    if jax.default_backend() != "gpu":
        raise ValueError(f"the probe's kernels are CUDA's, and this is a {jax.default_backend()}")
    handlers = ctypes.CDLL(str(library.absolute()))
    for name in ("experts_probe", "matvec_probe"):
        jax.ffi.register_ffi_target(
            name, jax.ffi.pycapsule(getattr(handlers, name)), platform="CUDA"
        )
    register_forms()
    chosen = {"experts": NAME, "project": NAME, "attend_cache": "sliced"}
    table = {name: {**forms.PREFERRED[name], "cuda": (form,)} for name, form in chosen.items()}
    with (
        presence.assumed(frozenset()),
        mock.patch.dict(forms.PREFERRED, table),
        # A stored program is found by the library's sources, which do not tell of these forms.
        mock.patch.dict(os.environ, GROK1_COMPILATION_CACHE="0"),
    ):
        probe = grok1.Model(model.params, model.config, model.mesh, model.dtype, model.tensors)
        found = workload.decode(probe, 1, 1, _COMPARED).sequences
    expected = workload.decode(model, 1, 1, _COMPARED).sequences
    seconds: dict[str, list[float]] = {"this library": [], NAME: []}
    for _ in range(_TURNS):
        for (_, times), of in zip(seconds.items(), (model, probe), strict=True):
            times.append(workload.decode(of, 1, 1, _STEPS).steps / _STEPS)
    details: dict[str, Any] = {
        f"ms a step of {name}": f"{1e3 * statistics.median(times):.3f}"
        for name, times in seconds.items()
    }
    details[f"tokens of {_COMPARED} that differ"] = int(np.sum(found != expected))
    both = zip(*seconds.values(), strict=True)
    ratio = statistics.median(other / ours for ours, other in both)
    name = "decode, 1 row: times the rate of the probe's kernels among XLA's"
    yield Figure(name, ratio, "x", 1.25, at_least=True, details=details)
