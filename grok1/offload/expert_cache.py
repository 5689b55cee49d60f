"""Which experts stay in memory: those used most often, not those used last.

A token goes through all layers in turn, so between two uses of an expert every other layer's
experts have come by. A cache that kept the last ones used, and holds less than a token uses, would
throw each out before it is wanted again, and never have one. This one lets a newcomer in only if
it has been used clearly more often, lately, than the one that would have to leave: by a power of
two, since bringing one in costs as much as some uses save. What it holds is then always part of
what a larger one would hold: more memory is never a lower hit rate.
"""

import math
from collections.abc import Collection
from typing import Generic, TypeVar

Key = tuple[int, int]
"""Layer, and expert of it."""

Value = TypeVar("Value")

_HALF_LIFE = 256  # steps after which uses count half, so that a new subject finds its experts


class ExpertCache(Generic[Value]):
    """A number of experts by layer and number.

    Attributes:
      capacity: Most experts it holds.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._held: dict[Key, Value] = {}
        self._uses: dict[Key, float] = {}
        self._num_steps = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def step(self) -> None:
        """Counts a step of the model; after some, earlier uses count less."""
        self._num_steps += 1
        # All at once: were each step's uses worth a little more, none would be worth the same.
        if self._num_steps % _HALF_LIFE == 0:
            self._uses = {key: uses / 2 for key, uses in self._uses.items()}

    def use(self, key: Key) -> Value | None:
        """Notes a use and returns what is held; None if it is not."""
        self._uses[key] = self._uses.get(key, 0.0) + 1
        return self._held.get(key)

    def victim(self, key: Key, kept: Collection[Key] = ()) -> Key | None:
        """Returns what must leave so that `key`, used just now, can be put; itself if it may not.

        Args:
          key: An expert that is not held.
          kept: Experts that must not leave.

        Returns:
          A held expert, used clearly less than `key`; `key` if there is none; None if there is
          room.
        """
        if len(self._held) < self.capacity:
            return None
        candidates = (held for held in self._held if held not in kept)
        least = min(candidates, key=lambda held: (self._uses[held], held), default=key)
        return least if _level(self._uses[least]) < _level(self._uses[key]) else key

    def put(self, key: Key, value: Value) -> None:
        """Holds an expert; there must be room."""
        assert len(self._held) < self.capacity
        self._held[key] = value

    def take(self, key: Key) -> Value:
        """Removes an expert and returns what was held."""
        return self._held.pop(key)

    def shrink(self, capacity: int) -> None:
        """Sets the capacity, and lets go of the experts used least that are then too many."""
        self.capacity = capacity
        by_use = sorted(self._held, key=lambda held: (self._uses[held], held))
        for key in by_use[: max(0, len(by_use) - capacity)]:
            del self._held[key]


def _level(uses: float) -> int:
    """The same for all numbers from a power of two to below the next."""
    return math.frexp(uses)[1]
