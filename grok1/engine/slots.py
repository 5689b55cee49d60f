"""Which slots of a state are taken, and how the rows of a call lie over the devices.

The slots of a state are shared out over the groups of devices of a mesh's data axis, in order, and
so are the rows of a call: a row lies in the group that has its slot.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The rows of a call.

    Attributes:
      slots: int32 `[R]`, the slot of each row; the number of slots where a row belongs to none.
      rows: Which row each of the slots that were asked for is.
    """

    slots: np.ndarray
    rows: np.ndarray


class Slots:
    """The slots of a state; those that are taken last are free first.

    Attributes:
      num_slots: How many there are.
      num_groups: Devices, or groups of them, that hold slots of their own.
    """

    def __init__(self, num_slots: int, num_groups: int):
        """All are free.

        Args:
          num_slots: A multiple of the groups.
          num_groups: Devices, or groups of them, that hold slots of their own.
        """
        self.num_slots, self.num_groups = num_slots, num_groups
        self._of_group = num_slots // num_groups
        starts = range(0, num_slots, self._of_group)
        self._free = [list(range(start, start + self._of_group)) for start in starts]

    @property
    def num_free(self) -> int:
        """How many are free."""
        return sum(map(len, self._free))

    def group(self, slot: int) -> int:
        """Returns the group that has a slot."""
        return slot // self._of_group

    def take(self) -> int:
        """Takes the first free slot of the group that has the most; there must be one."""
        group = max(range(self.num_groups), key=lambda n: (len(self._free[n]), -n))
        return heapq.heappop(self._free[group])

    def give_back(self, slot: int) -> None:
        """Frees a slot that was taken."""
        heapq.heappush(self._free[self.group(slot)], slot)

    def layout(self, slots: Sequence[int], row_counts: Sequence[int]) -> Layout:
        """Lays out the rows of a call.

        Args:
          slots: What the call runs.
          row_counts: Numbers of rows that there are programs for, ascending multiples of the
            groups; the last is for all slots.
        """
        by_group: list[list[int]] = [[] for _ in range(self.num_groups)]
        for place, slot in enumerate(slots):
            by_group[self.group(slot)].append(place)
        most = max(map(len, by_group)) * self.num_groups
        num_rows = next(count for count in row_counts if count >= most)
        laid_out = np.full(num_rows, self.num_slots, np.int32)
        rows = np.zeros(len(slots), np.int32)
        for group, places in enumerate(by_group):
            first = group * num_rows // self.num_groups
            rows[places] = np.arange(first, first + len(places))
        laid_out[rows] = slots
        return Layout(laid_out, rows)
