"""Interventions on activations: the residual stream, what goes into it, and attention heads.

Dimension key: T token, L layer, D model dim, N query heads, P layers that have values of their own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grok1.config import ModelConfig
from grok1.keywords import shown
from grok1.nn import hooks
from grok1.nn.hooks import STREAM_POINTS
from grok1.study.intervention import Intervention, everywhere
from grok1.study.router_interventions import ForceExperts


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CapLayers(Intervention):
    """Ends the model early: what layers from `num_layers` on would add is left out.

    At which positions, `positions` says, as of an `Intervention`.

    The program keeps its shape, and computes those layers, so that one serves every cap; the
    residual stream passes them unchanged into the final norm.

    Attributes:
      num_layers: Layers that still add to the residual stream, from 0 to L. `layers` stays None.
    """

    num_layers: int

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        first = self._number("num_layers", self.num_layers, 0, config.num_layers)
        if self.layers is not None:
            raise self._error("layers= has no meaning here; num_layers says which are left out")
        left_out = np.arange(config.num_layers) >= first
        where = hooks.Where(left_out, self._where(config).positions)
        return [hooks.Zero(where, point) for point in ("attention_out", "moe_out")]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AddToResidual(Intervention):
    """Adds a vector to the residual stream.

    In which layers and at which positions, `layers` and `positions` say, as of an `Intervention`.

    Attributes:
      vector: `[D]`; or `[P, D]`, one for each of `layers`, or for every layer.
      point: "residual" after the layer, "residual_in" before it, "residual_mid" between its
        branches.
    """

    vector: Any
    point: str = "residual"

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        points = [point for point in STREAM_POINTS if point.startswith("residual")]
        if self.point not in points:
            raise self._error(
                f"point must be one of {', '.join(points)}, found {shown(self.point)}"
            )
        vector = self._floats("vector", self.vector)
        if vector.ndim not in (1, 2) or vector.shape[-1] != config.emb_size:
            raise self._error(
                f"vector must have shape [{config.emb_size}] or [layers, {config.emb_size}], "
                f"found {list(vector.shape)}"
            )
        if vector.ndim == 1:
            table = everywhere(vector, config)
        else:
            table = self._table("vectors", vector[:, None], config)
            table = hooks.Table(table.slots, table.values[:, :1])
        return [hooks.Add(self._where(config), table, self.point)]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """Puts activations recorded from another run in the place of this one's.

    In which layers and at which positions, `layers` and `positions` say, as of an `Intervention`.

    Position t takes the value of the recorded text's token t. Without `positions`, or with a slice
    of them, the two texts have the same length, and what is generated afterwards is not patched.

    Attributes:
      point: One of `STREAM_POINTS`, or "router": the chosen experts and their weights.
      values: A `Trace`, or another mapping with the point's array (for "router" `expert_indices`
        and `expert_weights`); or the array itself, `[P, T, D]` with one entry for each of `layers`
        or for every layer, or `[T, D]` for a single one.
    """

    point: str
    values: Any
    _num_tokens = 0  # until it is prepared

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        if self.point == "router":
            forced = self._forced()
            self._keep_length(forced.experts)
            return forced.prepare(config)
        values = self._values()
        if values.ndim != 3 or values.shape[-1] != config.emb_size or not values.size:
            raise self._error(
                f"values must have shape [layers, tokens, {config.emb_size}], found "
                f"{list(values.shape)}"
            )
        self._keep_length(values)
        where = self._where(config, values.shape[1])
        return [hooks.Replace(where, self._table("values", values, config), self.point)]

    def check_length(self, num_tokens: int, is_whole: bool = True) -> None:
        """As `Intervention.check_length`."""
        super().check_length(num_tokens, is_whole)
        self._check_tokens("values", self._num_tokens, num_tokens)

    @property
    def _tells_positions(self) -> bool:
        return True

    def _keep_length(self, values: np.ndarray) -> None:
        # Asked before every run, of each of its texts; a file of arrays may be closed by then.
        object.__setattr__(self, "_num_tokens", values.shape[1])

    def _forced(self) -> ForceExperts:
        if not isinstance(self.values, Mapping):
            raise self._error(
                'at the point "router" values must be a Trace, or a mapping with expert_indices '
                f"and expert_weights, found {type(self.values).__name__}"
            )
        indices, weights = map(self._recorded, ("expert_indices", "expert_weights"))
        if indices.ndim != 3:
            raise self._error(
                "expert_indices must have shape [layers, tokens, experts], found "
                f"{list(indices.shape)}"
            )
        return _PatchedRouting(indices, weights, layers=self.layers, positions=self.positions)

    def _values(self) -> np.ndarray:
        if self.point not in STREAM_POINTS:
            points = ", ".join((*STREAM_POINTS, "router"))
            raise self._error(f"point must be one of {points}, found {shown(self.point)}")
        given = self._recorded(self.point) if isinstance(self.values, Mapping) else self.values
        array = self._floats("values", given)
        return array[None] if array.ndim == 2 else array

    def _recorded(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise self._error(
                f"the trace has no {name}; it has {', '.join(self.values) or 'nothing'}"
            )
        return np.asarray(self.values[name])


class _PatchedRouting(ForceExperts):
    """What `Patch` asks for at the router, so that errors name what the user wrote."""

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{Patch.__name__}: {message}")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ScaleHeads(Intervention):
    """Multiplies what attention heads mixed, before the output projection.

    In which layers and at which positions, `layers` and `positions` say, as of an `Intervention`.

    Attributes:
      heads: Query heads, one or several, from 0 to N - 1; none changes nothing.
      factor: 0 ablates them, 1 changes nothing.
    """

    heads: int | Sequence[int]
    factor: float = 0.0

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        factor = self._floats("factor", self.factor)
        if factor.ndim:
            raise self._error(f"factor must be one number, found shape {list(factor.shape)}")
        factors = np.ones(config.num_q_heads, np.float32)
        factors[self._numbers("heads", self.heads, config.num_q_heads)] = factor
        return [hooks.ScaleHeads(self._where(config), factors)]
