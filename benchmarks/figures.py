"""One figure, and the rounds that it comes from."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

Rounds = dict[str, list[float]]
"""For each contestant its rate in every round."""


@dataclasses.dataclass
class Result:
    """One figure.

    Attributes:
      model: Name of the model.
      measurement: What was measured.
      value: The figure; a rate is the median of the rounds.
      unit: Its unit.
      threads: CPUs that were used; None on an accelerator.
      ratios: How many times faster than "roofline", "disk", "dense", "llama.cpp", "int8" or
        "greedy", the median of the ratios within the rounds; or how many times larger than
        "files", or which share of "int8's time".
      rounds: The rates in every round, those of the others in the same unit.
      details: What else belongs to it.
    """

    model: str
    measurement: str
    value: float
    unit: str
    threads: int | None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    rounds: Rounds = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One of what a GPU has to show.

    Attributes:
      name: Of what.
      value: The figure; None where it could not be had.
      unit: Its unit.
      bound: What it is held to; None where it is held to nothing.
      at_least: Whether more is better, so that the bound is the least.
      details: What else belongs to it.
    """

    name: str
    value: float | None
    unit: str = ""
    bound: float | None = None
    at_least: bool = False
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        if self.value is None:
            return False
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """It in words."""
        value = "-" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        bound = ""
        if self.bound is not None:
            bound = f" ({'>=' if self.at_least else '<='} {self.bound:g})"
        note = "" if self.holds else "  <-- NO"
        words = [f"{name} {value}" for name, value in self.details.items()]
        return f"{self.name}: {value}{bound}{note}" + (f"  [{', '.join(words)}]" if words else "")


@dataclasses.dataclass(frozen=True)
class Failure:
    """What could not be measured.

    Attributes:
      model: Name of the model.
      measurement: What was to be measured.
      reason: Why it could not.
    """

    model: str
    measurement: str
    reason: str


def interleave(
    contestants: Mapping[str, Callable[[], float]], repeats: int, say: Callable[[str], None]
) -> Rounds:
    """Measures every contestant once a round, in turn; the roofline also after the last round.

    A bound is what the machine can do, and that changes from one moment to the next: of a round the
    larger of the two figures counts between which the others were measured.

    Args:
      contestants: By name, a function that measures once and returns a rate.
      repeats: Number of rounds.
      say: Told which round it is.
    """
    rounds: Rounds = {name: [] for name in contestants}
    for i in range(repeats):
        say(f"round {i + 1} of {repeats}")
        for name, measure in contestants.items():
            rounds[name].append(measure())
    if "roofline" in contestants:
        after = [*rounds["roofline"][1:], contestants["roofline"]()]
        rounds["roofline"] = [*map(max, rounds["roofline"], after)]
    return rounds


def ratio(rounds: Rounds, name: str, other: str) -> float:
    """Returns the median over the rounds of how many times faster `name` was than `other`."""
    return statistics.median(
        mine / theirs for mine, theirs in zip(rounds[name], rounds[other], strict=True)
    )
