"""Rounds in which the things to compare take turns, and the ratios within the rounds."""

import statistics
from collections.abc import Callable, Mapping

Rounds = dict[str, list[float]]
"""For each contestant its rate in every round."""


def interleave(
    contestants: Mapping[str, Callable[[], float]], repeats: int, say: Callable[[str], None]
) -> Rounds:
    """Measures every contestant once a round, in turn.

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
    return rounds


def ratio(rounds: Rounds, name: str, other: str) -> float:
    """Returns the median over the rounds of how many times faster `name` was than `other`."""
    return statistics.median(
        mine / theirs for mine, theirs in zip(rounds[name], rounds[other], strict=True)
    )
