"""Which rows of a table are in memory, in which slot, and which leave for others. Knows numbers; moves no bytes.

A set-associative cache, as processors have them: row *r* may lie in any of the ``ways`` slots of set ``r % sets``, and
the least recently used of these leaves for it. Looking up and putting in are array operations whose cost grows with
the rows asked for, not with the rows kept, and nothing here is as large as the table. As many slots as rows make every
row its own set: nothing ever leaves.

Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Ids", "RowSlots"]

Ids = npt.NDArray[np.int64]

_WAYS = 16


class RowSlots:
    """``count`` slots, at most what was asked for, for the rows ``0 <= row < rows`` of one table; empty at first."""

    def __init__(self, slots: int, rows: int) -> None:
        self._ways = 1 if slots >= rows else max(1, min(_WAYS, slots))
        self._sets = min(slots, rows) // self._ways
        self._rows = np.full((self._sets, self._ways), -1, np.int64)
        self._used = np.zeros((self._sets, self._ways), np.int64)
        self._now = 0

    @property
    def count(self) -> int:
        return self._sets * self._ways

    @property
    def kept(self) -> int:
        """Slots that hold a row."""
        return int((self._rows >= 0).sum())

    def find(self, rows: Ids) -> Ids:
        """The slot of each row, -1 for those that are not here. What is found counts as used just now."""
        slots = self._where(rows)
        self._now += 1
        self._used.reshape(-1)[slots[slots >= 0]] = self._now
        return slots

    def put(self, rows: Ids) -> Ids:
        """Make room for rows, each named once: the slot of each, to be filled by the caller before anybody else looks.

        -1 for a row that needs no filling: it is here already, or its set is full of others of this call.
        """
        slots = np.full(len(rows), -1, np.int64)
        new = np.flatnonzero(self._where(rows) < 0) if self._sets else np.empty(0, np.int64)
        sets = rows[new] % self._sets if self._sets else new
        order = np.argsort(sets, kind="stable")
        new, sets = new[order], sets[order]
        first = np.searchsorted(sets, sets)  # where the rows of the same set begin
        rank = np.arange(len(sets)) - first
        new, sets, rank = (part[rank < self._ways] for part in (new, sets, rank))
        oldest = np.argsort(self._used[sets], axis=1, kind="stable")
        ways = np.take_along_axis(oldest, rank[:, None], axis=1)[:, 0]
        self._now += 1
        self._rows[sets, ways] = rows[new]
        self._used[sets, ways] = self._now
        slots[new] = sets * self._ways + ways
        return slots

    def _where(self, rows: Ids) -> Ids:
        if not self._sets:
            return np.full(len(rows), -1, np.int64)
        sets = rows % self._sets
        same = self._rows[sets] == rows[:, None]
        ways = same.argmax(axis=1)
        found = same[np.arange(len(rows)), ways]
        return np.where(found, sets * self._ways + ways, -1)

    def __repr__(self) -> str:
        return f"<RowSlots: {self.kept} rows in {self.count} slots>"
