"""Which units of a loop should stay: evenly spread ones, so that reading and computing go on side by side all the time.

In a loop of which a part fits, furthest-first eviction keeps whichever units happened to be there first, one after
another. Which ones stay is indifferent to the bytes that are read, but not to time: while the forward runs through
units that are all there, the disk has nothing to do beyond its window, and afterwards the forward waits for every
unit.

So when a unit has come back after the same number of bytes twice, it is decided whether it stays: of a loop of so many
bytes the part that can be kept does. The rounding error goes on to the next unit, as in a line drawn over pixels. The
decision stands for as long as the loop is that long.

Knows unit ids and bytes only. Costs O(1) an access, and 33 bytes a unit.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice

__all__ = ["Spacing"]

_TRIED = 6  # spare units that a decision looks at
_SAME = 1 / 8  # loops that differ by less than this part are the same


class Spacing:
    """Units that stay, and the present ones that do not. ``keep`` says how many bytes can stay, first of all."""

    def __init__(self) -> None:
        self._keep = 0
        self._accessed = 0  # bytes, ever
        self._accessed_at = array("q")  # the sum at the last access of each unit
        self._round = array("q")  # the bytes from its last access but one to its last
        self._decided = array("q")  # the bytes of the loop for which it was decided; 0: it was not
        self._stays = bytearray()
        self._error = 0.0  # bytes
        self._spare: dict[int, None] = {}  # used, present, and need not stay; most recently used last

    def keep(self, nbytes: int) -> None:
        """So many bytes can stay from now on; decide anew."""
        if nbytes != self._keep:
            self._keep = nbytes
            self._decided = array("q", bytes(8 * len(self._decided)))

    def note_access(self, unit: int, nbytes: int) -> None:
        """A unit of ``nbytes`` bytes is used now."""
        if unit >= len(self._stays):
            self._reserve(unit)
        if self._accessed_at[unit] >= 0:
            round_bytes = self._accessed - self._accessed_at[unit]
            if self._decided[unit] != round_bytes:
                self._reconsider(unit, nbytes, round_bytes)
            self._round[unit] = round_bytes
        self._spare.pop(unit, None)
        if not self._stays[unit]:
            self._spare[unit] = None
        self._accessed_at[unit] = self._accessed
        self._accessed += nbytes

    def note_eviction(self, unit: int) -> None:
        """A unit leaves."""
        self._spare.pop(unit, None)

    def stays(self, unit: int) -> bool:
        """Whether others of the same loop should leave instead."""
        return unit < len(self._stays) and self._stays[unit] == 1

    def spare(self) -> Iterator[int]:
        """Some units that need not stay, most recently used first."""
        return islice(reversed(self._spare), _TRIED)

    def _reconsider(self, unit: int, nbytes: int, round_bytes: int) -> None:
        near = round_bytes * _SAME
        if abs(round_bytes - self._decided[unit]) <= near or abs(round_bytes - self._round[unit]) > near:
            return
        self._decided[unit] = round_bytes
        self._error += nbytes * min(1.0, self._keep / max(1, round_bytes))  # a loop of empty units has no bytes
        self._stays[unit] = self._error >= nbytes / 2
        if self._stays[unit]:
            self._error -= nbytes

    def _reserve(self, unit: int) -> None:
        lacking = unit + 1 - len(self._stays)
        if lacking > 0:
            self._accessed_at.extend([-1] * lacking)
            self._round.extend([0] * lacking)
            self._decided.extend([0] * lacking)
            self._stays.extend(bytes(lacking))

    def __repr__(self) -> str:
        return f"<Spacing: {sum(self._stays)} units stay, {len(self._spare)} are spare>"
