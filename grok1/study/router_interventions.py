"""Interventions at the router: which experts run, and which of them it may choose.

Dimension key: T token, L layer, E expert, A selected experts a token, P layers that have values of
their own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from grok1.config import ModelConfig
from grok1.keywords import shown
from grok1.nn import hooks
from grok1.study.intervention import Intervention, everywhere


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AblateExperts(Intervention):
    """Takes experts out.

    In which layers and at which positions, `layers` and `positions` say, as of an `Intervention`.

    By default a chosen expert that is ablated does not run, nothing takes its place, and the other
    experts keep their weights (zero ablation); it does not run either where a later intervention
    chooses it again, unless that is `ForceExperts`. With `reroute` the router cannot choose it: its
    logit is taken out of the softmax, and the next best expert takes its place (expert pruning).
    What `ForceExperts` or `Patch("router", ...)` has set before is no choice of the router's, and
    to reroute there is an error.

    Attributes:
      experts: One, or several; none changes nothing.
      reroute: Choose others in their place.
    """

    experts: int | Sequence[int]
    reroute: bool = False

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        experts = np.zeros(config.num_experts, bool)
        experts[self._numbers("experts", self.experts, config.num_experts)] = True
        where = self._where(config)
        if not isinstance(self.reroute, (bool, np.bool_)):
            raise self._error(f"reroute must be True or False, found {shown(self.reroute)}")
        if not self.reroute:
            return [hooks.Ablate(where, experts)]
        if not experts.any():
            return []
        if experts.all():
            raise self._error("reroute leaves no expert to choose; ablate fewer")
        return [hooks.Reroute(where, experts, config.renormalize_gates)]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ForceExperts(Intervention):
    """Sends tokens to given experts, whatever the router would choose.

    In which layers and at which positions, `layers` and `positions` say, as of an `Intervention`.

    It overrides what came before it: an expert that was ablated runs if it is forced, and one that
    was ablated with `reroute` has probability 0, unless `weights` are given. After it, experts can
    be ablated or forced, but not chosen anew in the same places.

    Attributes:
      experts: One for every token, or several; or `[P, T, A]`, those of each token of a text in
        each of the P `layers`, or in all layers, of which `layers` picks, as
        `trace.expert_indices`; -1 stands for no expert.
      weights: Their weights, in the shape of `experts`; None for the router's own probabilities of
        them, renormalised where the model renormalises.
    """

    experts: Any
    weights: Any = None

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        experts, weights = np.asarray(self.experts), None
        if not np.issubdtype(experts.dtype, np.integer):
            raise self._error(f"experts must be whole numbers, found {experts.dtype}")
        if experts.ndim not in (0, 1, 3) or not experts.size:
            raise self._error(
                "experts must be one, several, or an array [layers, tokens, experts], found shape "
                f"{list(experts.shape)}"
            )
        of_tokens = experts.ndim == 3
        outside = experts[(experts < -of_tokens) | (experts >= config.num_experts)]
        if outside.size:
            raise self._error(
                f"experts must be from 0 to {config.num_experts - 1}, found {outside.flat[0]}"
            )
        ordered = np.sort(np.atleast_1d(experts), axis=-1)
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise self._error("the experts of a token must differ, found one twice")
        if self.weights is not None:
            weights = self._floats("weights", self.weights)
            if weights.shape != experts.shape:
                raise self._error(
                    f"weights must have the shape of experts, {list(experts.shape)}, found "
                    f"{list(weights.shape)}"
                )
        experts = np.where(experts < 0, config.num_experts, experts).astype(np.int32)

        def table(what, values):
            if values is None or of_tokens:
                return None if values is None else self._table(what, values, config)
            return everywhere(values.reshape(-1), config)

        return [
            hooks.Force(
                self._where(config, experts.shape[1] if of_tokens else None),
                table("experts", experts),
                table("weights", weights),
                config.renormalize_gates,
            )
        ]

    def check_length(self, num_tokens: int, is_whole: bool = True) -> None:
        """As `Intervention.check_length`."""
        super().check_length(num_tokens, is_whole)
        shape = np.shape(self.experts)
        if len(shape) == 3:
            self._check_tokens("experts", shape[1], num_tokens)

    @property
    def _tells_positions(self) -> bool:
        return self.positions is not None or np.ndim(self.experts) == 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SelectExperts(Intervention):
    """Changes how many experts the router picks for a token; their weights stay probabilities.

    In which layers and at which positions, `layers` and `positions` say, as of an `Intervention`.

    An expert that `AblateExperts` took out before is picked and does not run, or with `reroute` is
    not picked. To pick anew what `ForceExperts` or `Patch("router", ...)` has set is an error.

    Attributes:
      count: How many, from 1 to E.
    """

    count: int

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        count = self._number("count", self.count, 1, config.num_experts)
        return [hooks.Select(self._where(config), count, config.renormalize_gates)]
