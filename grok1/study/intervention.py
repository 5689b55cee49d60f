"""Changes to a forward pass at named points, as a user asks for them.

An intervention is a frozen value that names layers and positions; `prepare` turns it into hooks,
which act on the device. See `nn.hooks` for the points and their order. At the router none undoes
another in silence: an expert that is ablated stays so when others choose anew, until `ForceExperts`
asks for it; and what is forced cannot be chosen anew.

Dimension key: T token, L layer, S context, D model dim, E expert, A selected experts a token, N
query heads, P layers that have values of their own.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grok1.config import ModelConfig
from grok1.keywords import as_python, is_whole, shown
from grok1.nn import hooks

Places = int | Iterable[int] | None
"""Layers or positions: one, several, or all."""

_SHORTEST_TABLE = 16  # tokens that a table of values is padded to, or a power of two above
_PLACES = ("layers", "positions", "experts", "heads")  # fields that name one or several


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Intervention:
    """A change to the forward pass; the base of all.

    Attributes:
      layers: Where it acts: a layer, several, or None for all.
      positions: At which tokens, counted from 0 at the beginning of the text: one, several, all
        from one on as `slice(10, None)`, or None for all. A text without one of them is refused,
        unless tokens may be generated there; where none was in the end, a warning says so.
    """

    layers: Places = None
    positions: Places | slice = None

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

    def check_positions(self, num_tokens: int, num_new: int = 0) -> None:
        """Checks that a text has every position that it names.

        Args:
          num_tokens: T.
          num_new: Most tokens that may be run behind them.

        Raises:
          ValueError: If no token can be there.
        """
        beyond = self.beyond(num_tokens + num_new)
        if beyond is not None:
            new = f" and at most {num_new} new ones are run" if num_new else ""
            raise self._error(
                f"positions must be from 0 to {num_tokens + num_new - 1}, since the text has "
                f"{num_tokens} tokens{new}, found {beyond}; give a longer text, or name all from "
                "one on as slice(10, None)"
            )

    def beyond(self, num_tokens: int) -> int | None:
        """The largest position that it names and so many tokens do not reach; None without."""
        if self.positions is None:
            return None
        if isinstance(self.positions, slice):
            largest = int(self.positions.start or 0)
        else:
            largest = max(self._numbers("positions", self.positions, sys.maxsize))
        return largest if largest >= num_tokens else None

    @property
    def _tells_positions(self) -> bool:
        return self.positions is not None

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {message}")

    def _numbers(self, what: str, given: Any, limit: int) -> list[int]:
        """Whole numbers from 0 to below `limit`, given as one or several."""
        single = not isinstance(given, Iterable) or isinstance(given, str)
        single = single or getattr(given, "ndim", 1) == 0  # an array without axes
        array = np.array([given] if single else list(given))
        if array.size and (array.ndim != 1 or not np.issubdtype(array.dtype, np.integer)):
            raise self._error(f"{what} must be whole numbers, found {shown(given)}")
        outside = array[(array < 0) | (array >= limit)] if array.size else array
        if outside.size:
            raise self._error(f"{what} must be from 0 to {limit - 1}, found {outside[0]}")
        return [int(number) for number in array]

    def _places(self, what: str, given: Any, limit: int) -> list[int]:
        """As `_numbers`, at least one: none is too easily taken for all."""
        found = self._numbers(what, given, limit)
        if not found:
            raise self._error(f"{what} names none; name at least one, or leave {what}= out for all")
        return found

    def _number(self, what: str, given: Any, least: int, most: int) -> int:
        number = as_python(given)
        if not is_whole(number) or not least <= number <= most:
            raise self._error(f"{what} must be from {least} to {most}, found {shown(given)}")
        return number

    def _floats(self, what: str, given: Any) -> np.ndarray:
        try:
            array = np.asarray(given)
            # NumPy would read texts, and None as NaN, and drop imaginary parts.
            if array.dtype.kind in "OSUc":
                raise TypeError
            with np.errstate(over="ignore", under="ignore"):  # infinity is refused below
                array = array.astype(np.float32)
        except (TypeError, ValueError):
            raise self._error(f"{what} must be numbers, found {shown(given)}") from None
        if not np.isfinite(array).all():
            raise self._error(f"{what} must be finite numbers")
        return array

    def _layers(self, config: ModelConfig) -> list[int]:
        if self.layers is None:
            return list(range(config.num_layers))
        return self._places("layers", self.layers, config.num_layers)

    def _positions(self, limit: int) -> list[int]:
        given = self.positions
        if given is None:
            return list(range(limit))
        if not isinstance(given, slice):
            return self._places("positions", given, limit)
        if given.stop is not None or given.step is not None:
            raise self._error(
                "positions as a slice go on to the end, as slice(10, None); give a range for some "
                f"that end before, found {shown(given)}"
            )
        start = 0 if given.start is None else given.start
        return list(range(self._number("positions", start, 0, limit - 1), limit))

    def _where(self, config: ModelConfig, num_tokens: int | None = None) -> "hooks.Where":
        """Where it acts; with `num_tokens`, only at the first so many positions."""
        layers = np.zeros(config.num_layers, bool)
        layers[self._layers(config)] = True
        if self.positions is None and num_tokens is None:
            return hooks.Where(layers, None)
        positions = np.zeros(config.sequence_len, bool)
        limit = min(num_tokens or config.sequence_len, config.sequence_len)
        positions[self._positions(limit)] = True
        return hooks.Where(layers, positions)

    def _table(self, what: str, values: np.ndarray, config: ModelConfig) -> "hooks.Table":
        """Values `[P, T, ...]` of the tokens of a text in each of `layers`, or in all."""
        layers = self._layers(config)
        if values.shape[1] > config.sequence_len:
            raise self._error(
                f"{what} are of {values.shape[1]} tokens, and the context holds "
                f"{config.sequence_len}"
            )
        if len(values) == len(layers) == config.num_layers and layers != sorted(set(layers)):
            raise self._error(
                f"{what} of all {config.num_layers} layers may be in their order or in that of "
                f"layers=, found {shown(self.layers)}; put them in the order of the layers, and "
                "leave layers= out"
            )
        if len(values) == config.num_layers:
            values = values[layers]
        elif len(values) != len(layers):
            raise self._error(
                f"{what} are of {len(values)} layers; give those of the {len(layers)} that layers= "
                f"names, or of all {config.num_layers}"
            )
        elif len(set(layers)) != len(layers):
            raise self._error(
                f"layers must differ where each has {what} of its own, found {shown(self.layers)}"
            )
        slots = np.zeros(config.num_layers, np.int32)
        slots[layers] = np.arange(len(layers))
        # Of few lengths, so that texts of different lengths share a program.
        length = max(_SHORTEST_TABLE, 1 << (values.shape[1] - 1).bit_length())
        padding = [(0, 0)] * values.ndim
        padding[1] = (0, length - values.shape[1])
        return hooks.Table(slots, np.pad(values, padding))

    def _check_tokens(self, what: str, found: int, num_tokens: int) -> None:
        to_the_end = self.positions is None or isinstance(self.positions, slice)
        if to_the_end and found != num_tokens:
            raise self._error(
                f"{what} are of {found} tokens and the text has {num_tokens}; take them from a "
                "text of the same length, or name positions="
            )


def prepare(
    interventions: Sequence[Any],
    config: ModelConfig,
    before: Sequence[tuple[Intervention, Any]] = (),
) -> list[tuple[Intervention, Any]]:
    """Returns the hooks that `nn.hooks` applies, in numpy arrays, each behind what asked for it.

    Args:
      interventions: Those to prepare.
      config: The model.
      before: What was returned for those that act already.

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
    found = [(one, hook) for one in interventions for hook in one.prepare(config)]
    for later, (one, hook) in enumerate(found):
        for earlier, forced in [*before, *found[:later]]:
            if isinstance(hook, (hooks.Reroute, hooks.Select)) and isinstance(forced, hooks.Force):
                _check_not_forced(one, hook, earlier, forced)
    return found


def _check_not_forced(one: Intervention, hook: Any, before: Intervention, forced: Any) -> None:
    wheres = (hook.where, forced.where)
    shared = np.flatnonzero(np.logical_and(*(where.layers for where in wheres)))
    places = [where.positions for where in wheres if where.positions is not None]
    if shared.size and (not places or np.logical_and.reduce(places).any()):
        raise one._error(
            f"it lets the router of layer {shared[0]} choose anew where {type(before).__name__}, "
            f"which comes before it, says which experts run; put {type(one).__name__} first, or "
            "name other layers= or positions="
        )


def everywhere(values: np.ndarray, config: ModelConfig) -> hooks.Table:
    """The same values in every layer and at every position."""
    return hooks.Table(np.zeros(config.num_layers, np.int32), values[None, None])


def _in_brief(value: Any) -> str:
    """A value in a line: an array as its type and shape, what holds arrays by its type alone."""
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"{array.dtype}{list(array.shape)}" if array.ndim else str(array)
    return type(value).__name__ if isinstance(value, Mapping) else f"{value!r:.60}"
