"""A step of a model as many programs: a layer's, called for each layer, and an expert's.

Between a layer's halves the host learns which experts were chosen, and brings those to the device
that are not there (`device_experts`). As one program a step could not wait for that without holding
up the device. A CPU with the kernels needs none of this: there a step is one program, and experts
are computed with where the host has them.

Dimension key: R row, T position, M = R*T, D model dim, A selected experts a token.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from grok1.engine.compilation import Program
from grok1.engine.programs import Key, Kind, Programs, StepSpec, Weights
from grok1.engine.steps import DecodeState, LastHidden, Rows, next_tokens
from grok1.nn.decoder import (
    Captures,
    Run,
    Stream,
    add_experts,
    attend_and_route,
    embed,
    grown,
    lens,
    place_of,
)
from grok1.offload.device_experts import DeviceExperts
from grok1.ops.experts import Routed, fetched_expert
from grok1.ops.residual import norm


class LayerwiseStep:
    """What a step's program is, (weights, state, rows, *arguments) -> (state, outputs, captured).

    See `Programs.step`; the parameters are without the experts' values.
    """

    def __init__(self, programs: Programs, spec: StepSpec, experts: DeviceExperts):
        """Compiles nothing yet.

        Args:
          programs: Has the pieces compiled that it is made of.
          spec: The step.
          experts: Where experts come from.
        """
        config, dtype = programs.setup.config, programs.setup.dtype
        key, head = spec.key, spec.head
        length, capture = key.length, key.capture

        def run_of(weights):
            return Run(config, dtype, capture, weights.interventions)

        def begin(weights, state, rows):
            x = embed(weights.params.embedding, next_tokens(state, rows.slots, length))
            return x * config.embedding_multiplier_scale

        def attend(weights, layer, rows, x, cache):
            place = place_of(cache, rows.slots, length, rows.count)
            x, cache, normed, routing, captured = attend_and_route(
                weights.params.layers, layer, run_of(weights), place, Stream(x), cache
            )
            # Padding goes to none.
            chosen = jnp.where(
                place.valid.reshape(-1)[:, None], routing.expert_indices, config.num_experts
            )
            out = jnp.zeros(normed.shape)
            return x, cache, out, normed.astype(dtype), chosen, routing.expert_weights, captured

        def add_expert(weights, layer, expert, values, out, *routed):
            experts = weights.params.layers.experts
            return out + fetched_expert(Routed(*routed), values, experts, layer, expert)

        def finish(weights, layer, rows, cache, out, x):
            place = place_of(cache, rows.slots, length, rows.count)
            layers = weights.params.layers
            (x, _), captured = add_experts(layers, layer, run_of(weights), place, x, out)
            return x, captured | lens(weights.params, config, x, capture)

        def end(weights, state, rows, x, captured, *arguments):
            params = weights.params
            state = state._replace(cache=grown(state.cache, rows.slots, rows.count))
            last = LastHidden(params.embedding, config, norm(x, params.final_norm))
            state, outputs = head(last, state, rows, *arguments)
            return state, outputs, jax.tree.map(jnp.stack, captured, is_leaf=_is_list)

        self._config, self._capture, self._experts = config, capture, experts
        piece = functools.partial(_piece, programs)
        shared = Key(kind=Kind.PIECE, length=length, capture=capture)
        self._begin = piece(shared, "beginning", begin)
        self._attend = piece(shared, "attention", attend, "x", "cache")
        self._add_expert = piece(shared, "expert", add_expert, "out")
        self._finish = piece(shared, "end of a layer", finish, "x")
        # Steps share all but this.
        own = key._replace(kind=Kind.PIECE, of=key.kind)
        self._end = piece(own, "end", end, "state")

    def __call__(
        self, weights: Weights, state: DecodeState, rows: Rows, *arguments: Any
    ) -> tuple[DecodeState, Any, Captures]:
        """Runs the step; may return before the device is done.

        Raises:
          CheckpointError: If an expert cannot be read.
          CancelledError: After the store's `cancel`.
        """
        self._experts.cache.step()
        x, cache = self._begin(weights, state, rows), state.cache
        captured: dict[str, list[Any]] = {}
        for number in range(self._config.num_layers):
            layer = np.int32(number)
            x, cache, out, *routed, of_layer = self._attend(weights, layer, rows, x, cache)
            chosen = np.unique(np.asarray(routed[1]))
            for expert, values in self._experts.fetch(
                number, chosen[chosen < self._config.num_experts].tolist()
            ):
                out = self._add_expert(weights, layer, np.int32(expert), values, out, *routed)
                del values  # whose memory the one after the next takes
            x, more = self._finish(weights, layer, rows, cache, out, x)
            for name, value in (of_layer | more).items():
                if name != "attention_probs" or number in self._capture.attention_layers:
                    captured.setdefault(name, []).append(value)
        if "attention_probs" in captured:
            # In the order that was asked for.
            maps = dict(
                zip(
                    sorted(self._capture.attention_layers), captured["attention_probs"], strict=True
                )
            )
            captured["attention_probs"] = [maps[n] for n in self._capture.attention_layers]
        return self._end(weights, state._replace(cache=cache), rows, x, captured, *arguments)


def _piece(programs: Programs, key: Key, name: str, function: Callable, *donated: str) -> Program:
    """Compiles a function per device, which may have the memory of some of its arguments."""
    key = key._replace(piece=name)
    names = list(inspect.signature(function).parameters)
    per_device = programs.per_device(function, P(), P())
    donate = [names.index(one) for one in donated]
    return programs.get(
        key, lambda: programs.compiled(key, jax.jit(per_device, donate_argnums=donate))
    )


def _is_list(node: Any) -> bool:
    return isinstance(node, list)
