"""v5"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice

__all__ = ["Spacing"]

_TRIED = 4  # spare units that a decision looks at
OWN=True
CAP=0   # capacity to keep, bytes

class Spacing:
    def __init__(self) -> None:
        self._accessed = 0  # bytes, ever
        self._sq=0
        self._sq_at=array("q")
        self._accessed_at = array("q")  # the sums at the last access of each unit
        self._place = array("q")
        self._stays = bytearray()
        self._spare: dict[int, None] = {}  # least recently used first

    def note_access(self, unit: int, nbytes: int) -> None:
        """A unit of ``nbytes`` bytes is used now."""
        lacking = unit + 1 - len(self._accessed_at)
        if lacking > 0:
            self._accessed_at.extend([-1] * lacking)
            self._sq_at.extend([-1] * lacking)
            self._place.extend([-1] * lacking)
            self._stays.extend(bytes(lacking))
        self._spare.pop(unit, None)
        if self._place[unit] < 0:
            self._place[unit] = self._accessed
        accessed = self._accessed - self._accessed_at[unit]
        if self._accessed_at[unit] >= 0 and accessed > 0 and nbytes:
            rate = max(0, 1 - CAP/accessed)
            rate /= nbytes if OWN else (self._sq-self._sq_at[unit])/accessed
            place = self._place[unit]
            self._stays[unit] = int((place + nbytes) * rate) == int(place * rate)
            if not self._stays[unit]:
                self._spare[unit] = None
        self._accessed_at[unit] = self._accessed
        self._sq_at[unit] = self._sq
        self._accessed += nbytes
        self._sq += nbytes**2

    def note_eviction(self, unit: int, nbytes: int) -> None:
        """A unit leaves."""
        self._spare.pop(unit, None)

    def stays(self, unit):
        return self._stays[unit] == 1

    def spare(self) -> Iterator[int]:
        return islice(self._spare, _TRIED)
    def __repr__(self):
        return f'{len(self._spare)} spare'
