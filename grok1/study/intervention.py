"""Changes to a forward pass at named points, as a user asks for them.

An intervention is a frozen value that names layers and positions; `prepare` turns it into hooks,
which act on the device. See `nn.hooks` for the points and their order. At the router none undoes
another in silence: an expert that is ablated stays so when others choose anew, until `ForceExperts`
asks for it; and what is forced cannot be chosen anew.

Dimension key: T token, L layer, S context, D model dim, E expert, A selected experts a token, N
query heads, P layers that have values of their own.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grok1.config import ModelConfig
from grok1.nn import hooks
from grok1.nn.hooks import STREAM_POINTS

Places = int | Iterable[int] | None
"""Layers or positions: one, several, or all."""

_SHORTEST_TABLE = 16  # tokens that a table of values is padded to, or a power of two above
_PLACES = ("layers", "positions", "experts", "heads")  # fields that name one or several


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Intervention:
    """A change to the forward pass; the base of all.

    Attributes:
      layers: Where it acts: a layer, several, or None for all.
      positions: At which tokens, counted from 0 at the beginning of the text: one, several, or None
        for all.
    """

    layers: Places = None
    positions: Places = None

    def __post_init__(self):
        for name in _PLACES:
            value = getattr(self, name, None)
            as_it_is = isinstance(value, (str, range)) or hasattr(value, "__array__")
            if isinstance(value, Iterable) and not as_it_is:
                # An iterator ends with its first use, and an intervention has many.
                object.__setattr__(self, name, tuple(value))

    def __repr__(self) -> str:
        # What it is comes before where it acts.
        fields = sorted(dataclasses.fields(self), key=lambda field: field.kw_only is True)
        given = [(field.name, getattr(self, field.name)) for field in fields]
        shown = [
            f"{name}={_in_brief(value)}"
            for name, value in given
            if value is not None and value is not False
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def prepare(self, config: ModelConfig) -> list[Any]:
        """Returns the hooks that `nn.hooks` applies, in numpy arrays.

        Raises:
          ValueError: If it does not fit the model; the message names the intervention.
        """
        raise NotImplementedError

    def check_length(self, num_tokens: int, is_whole: bool = True) -> None:
        """Checks that it fits a text of this many tokens.

        Args:
          num_tokens: T.
          is_whole: False for a text that is cut, so that positions in what is run do not count from
            its beginning.

        Raises:
          ValueError: If it holds the values of a text of another length, or tells the positions of
            a text that is cut apart.
        """
        if not is_whole and self._tells_positions:
            raise self._error(
                "it acts at positions counted from the beginning of the text, and this one of "
                f"{num_tokens} tokens is cut into pieces that begin elsewhere; give a shorter text "
                "or a larger window, or act at every position"
            )

    @property
    def _tells_positions(self) -> bool:
        return self.positions is not None

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {message}")

    def _numbers(self, what: str, given: Any, limit: int) -> list[int]:
        """Whole numbers from 0 to below `limit`, given as one or several."""
        single = not isinstance(given, (Iterable, np.ndarray)) or isinstance(given, str)
        array = np.array([given] if single else list(given))
        if array.size and (array.ndim != 1 or not np.issubdtype(array.dtype, np.integer)):
            raise self._error(f"{what} must be whole numbers, found {given!r:.80}")
        outside = array[(array < 0) | (array >= limit)] if array.size else array
        if outside.size:
            raise self._error(f"{what} must be from 0 to {limit - 1}, found {outside[0]}")
        return [int(number) for number in array]

    def _floats(self, what: str, given: Any) -> np.ndarray:
        try:
            array = np.asarray(given, np.float32)
        except (TypeError, ValueError):
            raise self._error(f"{what} must be numbers, found {given!r:.80}") from None
        if not np.isfinite(array).all():
            raise self._error(f"{what} must be finite numbers")
        return array

    def _layers(self, config: ModelConfig) -> list[int]:
        if self.layers is None:
            return list(range(config.num_layers))
        return self._numbers("layers", self.layers, config.num_layers)

    def _where(self, config: ModelConfig, num_tokens: int | None = None) -> "hooks.Where":
        """Where it acts; with `num_tokens`, only at the first so many positions."""
        layers = np.zeros(config.num_layers, bool)
        layers[self._layers(config)] = True
        if self.positions is None and num_tokens is None:
            return hooks.Where(layers, None)
        positions = np.zeros(config.sequence_len, bool)
        if self.positions is None:
            positions[:num_tokens] = True
        else:
            limit = config.sequence_len if num_tokens is None else num_tokens
            positions[self._numbers("positions", self.positions, limit)] = True
        return hooks.Where(layers, positions)

    def _table(self, what: str, values: np.ndarray, config: ModelConfig) -> "hooks.Table":
        """Values `[P, T, ...]` of the tokens of a text in each of `layers`, or in all."""
        layers = self._layers(config)
        if values.shape[1] > config.sequence_len:
            raise self._error(
                f"{what} are of {values.shape[1]} tokens, and the context holds "
                f"{config.sequence_len}"
            )
        if len(values) == config.num_layers:
            values = values[layers]
        elif len(values) != len(layers):
            raise self._error(
                f"{what} are of {len(values)} layers; give those of the {len(layers)} that layers= "
                f"names, or of all {config.num_layers}"
            )
        slots = np.zeros(config.num_layers, np.int32)
        slots[layers] = np.arange(len(layers))
        # Of few lengths, so that texts of different lengths share a program.
        length = max(_SHORTEST_TABLE, 1 << (values.shape[1] - 1).bit_length())
        padding = [(0, 0)] * values.ndim
        padding[1] = (0, length - values.shape[1])
        return hooks.Table(slots, np.pad(values, padding))

    def _check_tokens(self, what: str, found: int, num_tokens: int) -> None:
        if self.positions is None and found != num_tokens:
            raise self._error(
                f"{what} are of {found} tokens and the text has {num_tokens}; take them from a "
                "text of the same length, or name positions="
            )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AblateExperts(Intervention):
    """Takes experts out.

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
            return _everywhere(values.reshape(-1), config)

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

    An expert that `AblateExperts` took out before is picked and does not run, or with `reroute` is
    not picked. To pick anew what `ForceExperts` or `Patch("router", ...)` has set is an error.

    Attributes:
      count: How many, from 1 to E.
    """

    count: int

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        count = self.count
        whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
        if not whole or not 1 <= count <= config.num_experts:
            raise self._error(f"count must be from 1 to {config.num_experts}, found {count!r}")
        return [hooks.Select(self._where(config), int(count), config.renormalize_gates)]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CapLayers(Intervention):
    """Ends the model early: what layers from `num_layers` on would add is left out.

    The program keeps its shape, and computes those layers, so that one serves every cap; the
    residual stream passes them unchanged into the final norm.

    Attributes:
      num_layers: Layers that still add to the residual stream, from 0 to L. `layers` stays None.
    """

    num_layers: int

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        (first,) = self._numbers("num_layers", self.num_layers, config.num_layers + 1)
        if self.layers is not None:
            raise self._error("layers= has no meaning here; num_layers says which are left out")
        left_out = dataclasses.replace(self, layers=range(first, config.num_layers))
        where = left_out._where(config)
        return [hooks.Zero(where, point) for point in ("attention_out", "moe_out")]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AddToResidual(Intervention):
    """Adds a vector to the residual stream.

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
            raise self._error(f"point must be one of {', '.join(points)}, found {self.point!r}")
        vector = self._floats("vector", self.vector)
        if vector.ndim not in (1, 2) or vector.shape[-1] != config.emb_size:
            raise self._error(
                f"vector must have shape [{config.emb_size}] or [layers, {config.emb_size}], "
                f"found {list(vector.shape)}"
            )
        if vector.ndim == 1:
            table = _everywhere(vector, config)
        else:
            table = self._table("vectors", vector[:, None], config)
            table = hooks.Table(table.slots, table.values[:, :1])
        return [hooks.Add(self._where(config), table, self.point)]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Patch(Intervention):
    """Puts activations recorded from another run in the place of this one's.

    Position t takes the value of the recorded text's token t. Without `positions` the two texts
    have the same length, and what is generated afterwards is not patched.

    Attributes:
      point: One of `STREAM_POINTS`, or "router": the chosen experts and their weights.
      values: A `Trace`, or another mapping with the point's array (for "router" `expert_indices`
        and `expert_weights`); or the array itself, `[P, T, D]` with one entry for each of `layers`
        or for every layer, or `[T, D]` for a single one.
    """

    point: str
    values: Any

    def prepare(self, config: ModelConfig) -> list[Any]:
        """As `Intervention.prepare`."""
        if self.point == "router":
            return self._forced().prepare(config)
        values = self._values()
        if values.ndim != 3 or values.shape[-1] != config.emb_size or not values.size:
            raise self._error(
                f"values must have shape [layers, tokens, {config.emb_size}], found "
                f"{list(values.shape)}"
            )
        where = self._where(config, values.shape[1])
        return [hooks.Replace(where, self._table("values", values, config), self.point)]

    def check_length(self, num_tokens: int, is_whole: bool = True) -> None:
        """As `Intervention.check_length`."""
        super().check_length(num_tokens, is_whole)
        if self.point == "router":
            self._check_tokens("values", self._recorded("expert_indices").shape[1], num_tokens)
        else:
            self._check_tokens("values", self._values().shape[1], num_tokens)

    @property
    def _tells_positions(self) -> bool:
        return True

    def _forced(self) -> ForceExperts:
        if not isinstance(self.values, Mapping):
            raise self._error(
                'at the point "router" values must be a Trace, or a mapping with expert_indices '
                f"and expert_weights, found {type(self.values).__name__}"
            )
        indices, weights = map(self._recorded, ("expert_indices", "expert_weights"))
        return ForceExperts(indices, weights, layers=self.layers, positions=self.positions)

    def _values(self) -> np.ndarray:
        if self.point not in STREAM_POINTS:
            points = ", ".join((*STREAM_POINTS, "router"))
            raise self._error(f"point must be one of {points}, found {self.point!r}")
        given = self.values
        if isinstance(given, Mapping):
            given = self._recorded(self.point)
        array = self._floats("values", given)
        return array[None] if array.ndim == 2 else array

    def _recorded(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise self._error(
                f"the trace has no {name}; it has {', '.join(self.values) or 'nothing'}"
            )
        return np.asarray(self.values[name])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ScaleHeads(Intervention):
    """Multiplies what attention heads mixed, before the output projection.

    Attributes:
      heads: Query heads, one or several, from 0 to N - 1.
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


def prepare(interventions: Sequence[Any], config: ModelConfig) -> tuple[Any, ...]:
    """Returns the hooks that `nn.hooks` applies, in numpy arrays.

    Raises:
      TypeError: If one is no intervention.
      ValueError: If one does not fit the model, or chooses anew what one before it has forced.
    """
    for one in interventions:
        if not isinstance(one, Intervention):
            raise TypeError(
                f"intervene takes interventions such as AblateExperts(...), found "
                f"{type(one).__name__}"
            )
    forms = [(one, form) for one in interventions for form in one.prepare(config)]
    for later, (one, form) in enumerate(forms):
        for before, forced in forms[:later]:
            if isinstance(form, (hooks.Reroute, hooks.Select)) and isinstance(forced, hooks.Force):
                _check_not_forced(one, form, before, forced)
    return tuple(form for _, form in forms)


def _check_not_forced(one: Intervention, form: Any, before: Intervention, forced: Any) -> None:
    shared = np.flatnonzero(form.where.layers & forced.where.layers)
    places = [
        where.positions for where in (form.where, forced.where) if where.positions is not None
    ]
    if shared.size and (not places or np.logical_and.reduce(places).any()):
        raise one._error(
            f"it lets the router of layer {shared[0]} choose anew where {type(before).__name__}, "
            f"which comes before it, says which experts run; put {type(one).__name__} first, or "
            "name other layers= or positions="
        )


def _everywhere(values: np.ndarray, config: ModelConfig) -> hooks.Table:
    """The same values in every layer and at every position."""
    return hooks.Table(np.zeros(config.num_layers, np.int32), values[None, None])


def _in_brief(value: Any) -> str:
    """A value in a line: an array as its type and shape, what holds arrays by its type alone."""
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"{array.dtype}{list(array.shape)}" if array.ndim else str(array)
    return type(value).__name__ if isinstance(value, Mapping) else f"{value!r:.60}"
