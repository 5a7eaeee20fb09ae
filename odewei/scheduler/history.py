"""What comes next: the past of one thread of execution, and the future that it suggests.

Knows unit ids only, small integers from 0 on. Pure: no clock, no locks, no input or output.

The predicted future is what followed an earlier place in the past: one *pointer* that advances as long as it is
right. Past its end the future repeats: a past that ends at ``end`` with the pointer at ``p`` predicts ``past[p:end]``
over and over. That covers plain loops, the wrap from the last layer to the first, an encoder once and its decoder
many times, and a loop inside a pipeline. A wrong prediction costs a stall, never an error.

When the pointer is wrong, in this order:

- the last few accesses have come like this before, somewhere else in the past: the pointer *jumps* there;
- the unit is expected a few accesses later: those between were *skipped*, the pointer moves on;
- it came as another place in the past said, the *rival*: the pointer *jumps* there;
- otherwise it was *inserted*, and the pointer waits. The rival becomes what followed the longest, then most recent,
  match of the last accesses. After many insertions in a row the pointer jumps to it.

What was skipped or inserted is blamed (see ``regularity``), and units that are blamed often are kept out of the past.

A history also keeps a set of *marked* units (those that are present) in the order of their next use. An access costs
O(1), asking for the furthest marked one and for the first missing one too, while predictions are right. A jump changes
no marks: those that it made wrong are put right when they are met, so many at a time.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from odewei.scheduler.positions import PositionSet
from odewei.scheduler.regularity import Regularity

__all__ = ["NEVER", "History", "Surprise"]

NEVER = math.inf
"""The distance to the next use of a unit that the predicted future does not hold."""

_LONGEST_MATCH = 32
_CERTAIN_MATCH = 8
_CANDIDATES = 16
_LONGEST_SKIP = 16
_MOST_INSERTIONS = 12
_KEPT = 1 << 16
_PERIODS_KEPT = 4  # of the seed, if that is more
_SCANNED_AT_ONCE = 64
_CORRECTED_AT_ONCE = 32


class Surprise(NamedTuple):
    """An access was not the predicted one. ``jumped``: nothing that was expected is expected any more where it was."""

    jumped: bool
    skipped: tuple[int, ...] = ()


class History:
    """The accesses of one thread, oldest first, with a prediction of the next ones.

    ``seed`` is a guess of one pass (definition order, a trace, another thread's last pass). It is treated as the past.
    A loop longer than some 57,000 accesses (or three times the seed) is forgotten before it repeats, and not predicted.
    Memory: 24 bytes an access that is kept, 16 a unit.
    """

    def __init__(self, seed: Sequence[int] = (), regularity: Regularity | None = None) -> None:
        self._regularity = Regularity() if regularity is None else regularity
        self._past = array("q")
        self._before = array("q")  # the position of the same unit's access before; smaller than _first: none
        self._after = array("q")  # and of the one after; -1: none
        self._first = 0  # the position of _past[0]; positions count from the very first access
        self._last = array("q")  # by unit: the position of its last access; -1: none
        self._next = array("q")  # by unit: that of its next use as last seen; it is there in _marked, if it is marked
        self._marked = PositionSet()
        self._unpredicted: dict[int, None] = {}  # marked, with no next use
        for unit in seed:
            self._append(unit)
        self._pointer = 0  # at the end: nothing is predicted
        self._rival = -1
        self._inserted: list[int] = []
        self._scanned = 0  # the position before which nothing is missing
        self._kept = max(_KEPT, _PERIODS_KEPT * len(self._past))
        self._pass_over_irregular()

    # -- accesses ----------------------------------------------------------------------------------------------------

    def record(self, unit: int) -> Surprise | None:
        """Append an access of a regular unit. None if it was the predicted one: all other predictions stand."""
        right = self._pointer < self._end and self._past[self._pointer - self._first] == unit
        self._append(unit)
        surprise = None
        if right:
            self._pointer += 1
            self._regularity.forgive(unit)
            if self._inserted:
                self._blame_inserted()
        else:
            surprise = self._recover(unit)
        self._pass_over_irregular()
        self._settle(unit)
        if len(self._past) > self._kept and self._forget_half():
            return Surprise(jumped=True)
        return surprise

    @property
    def period(self) -> int:
        """The number of accesses after which the predicted future repeats; 0 when nothing is predicted."""
        return self._end - self._pointer

    def upcoming(self) -> Iterator[int]:
        """The predicted accesses, one period."""
        for position in range(self._pointer, self._end):
            unit = self._past[position - self._first]
            if not self._regularity.is_irregular(unit):
                yield unit

    def next_use(self, unit: int) -> float:
        """How many predicted accesses come before the next one of ``unit``: 0 for the very next, NEVER if none does."""
        position = self._find(unit)
        return NEVER if position < 0 else position - self._pointer

    def first_missing(self, is_missing: Callable[[int], bool]) -> tuple[int, int] | None:
        """The first unit of the predicted future that is missing, and the accesses before it.

        Goes on where it stopped last time, for a limited stretch: None may also mean that it has not got that far.
        """
        first, irregular = self._first, self._regularity.is_irregular
        start = max(self._scanned, self._pointer)
        for position in range(start, min(start + _SCANNED_AT_ONCE, self._end)):
            unit = self._past[position - first]
            if is_missing(unit) and not irregular(unit):
                self._scanned = position
                return unit, position - self._pointer
        self._scanned = min(start + _SCANNED_AT_ONCE, self._end)
        return None

    # -- marks -------------------------------------------------------------------------------------------------------

    def mark(self, unit: int) -> None:
        """The unit is present from now on."""
        self._reserve(unit)
        self._settle(unit)
        if self._next[unit] < 0:
            self._unpredicted[unit] = None
        else:
            self._marked.add(self._next[unit])

    def unmark(self, unit: int) -> bool:
        """The unit is missing from now on; the search for missing ones goes back to its next use. True if it was
        marked.
        """
        position = self._find(unit)
        if position >= 0:
            self._scanned = min(self._scanned, position)
        marked = self._is_marked(unit)
        if marked and self._next[unit] >= 0:
            self._marked.discard(self._next[unit])
        self._unpredicted.pop(unit, None)
        return marked

    def unmark_all(self) -> None:
        """Forget who is present."""
        self._marked = PositionSet()
        self._unpredicted = {}
        self._scanned = 0

    def furthest_first(self) -> Iterator[tuple[int, float]]:
        """Marked units with the distance to their next use: first those that have none, then from the furthest on.

        Exact unless the pointer has jumped lately; then a unit may come sooner or later than it should.
        """
        self._settle_passed(_CORRECTED_AT_ONCE)
        yield from self._unpredicted_first()
        corrections = _CORRECTED_AT_ONCE
        position: int | None = self._end
        while position is not None and (position := self._marked.largest_below(position)) is not None:
            unit = self._past[position - self._first]
            if self._before[position - self._first] >= self._pointer or position < self._pointer:
                found = self._find(unit)
                if corrections > 0 and found >= 0:
                    corrections -= 1
                    self._settle(unit)
                    if found < position:
                        continue  # met again on the way down
                yield unit, NEVER if found < 0 else found - self._pointer
            else:
                yield unit, position - self._pointer

    def _unpredicted_first(self) -> Iterator[tuple[int, float]]:
        predicted = []
        try:
            for unit in self._unpredicted:
                if self._find(unit) < 0:
                    yield unit, NEVER
                else:
                    predicted.append(unit)
                    if len(predicted) == _CORRECTED_AT_ONCE:
                        break
        finally:
            for unit in predicted:
                self._settle(unit)

    def _settle_passed(self, at_most: int) -> None:
        """Find the next uses anew of marked units whose last one was passed over."""
        for _ in range(at_most):
            position = self._marked.smallest()
            if position is None or position >= self._pointer:
                return
            self._settle(self._past[position - self._first])

    def _settle(self, unit: int) -> None:
        """Note the next use of a unit, and move its mark there, if it is marked."""
        old, new = self._next[unit], self._find(unit)
        if old == new:
            return
        if self._is_marked(unit):
            self._marked.discard(old)
            self._unpredicted.pop(unit, None)
            if new >= 0:
                self._marked.add(new)
            else:
                self._unpredicted[unit] = None
        self._next[unit] = new

    def _is_marked(self, unit: int) -> bool:
        return unit in self._unpredicted or (unit < len(self._next) and self._next[unit] in self._marked)

    def _find(self, unit: int) -> int:
        """The position of the next use of a unit; -1 if there is none. A few steps from where it was last seen."""
        if unit >= len(self._last):
            return -1
        pointer, first = self._pointer, self._first
        position = self._next[unit]
        if position < first:
            position = self._last[unit]
            if position < pointer:
                return -1
        while position >= pointer and (earlier := self._before[position - first]) >= pointer:
            position = earlier
        while 0 <= position < pointer:
            position = self._after[position - first]
        return position

    # -- the pointer -------------------------------------------------------------------------------------------------

    def _recover(self, unit: int) -> Surprise:
        """The last access, of ``unit``, was not the predicted one."""
        last = self._end - 1
        if self._pointer == last:  # nothing was predicted
            return self._jump(self._look_up()[0])
        found, length = self._look_up()
        if length >= _CERTAIN_MATCH:
            return self._jump(found)
        for position in range(self._pointer, min(self._pointer + _LONGEST_SKIP + 1, last)):
            if self._past[position - self._first] == unit:
                return self._skip_to(position)
        if self._rival >= 0 and self._past[self._rival - self._first] == unit:
            return self._jump(self._rival + 1)
        self._rival = found
        self._inserted.append(unit)
        if len(self._inserted) > _MOST_INSERTIONS:
            return self._jump(self._rival)
        return Surprise(jumped=False)

    def _skip_to(self, position: int) -> Surprise:
        skipped = tuple(self._past[self._pointer - self._first : position - self._first])
        self._pointer = position + 1
        self._blame_inserted()
        for unit in skipped:
            if not self._regularity.is_irregular(unit):
                self._regularity.blame(unit)
            self._settle(unit)
        return Surprise(jumped=False, skipped=skipped)

    def _blame_inserted(self) -> None:
        for unit in self._inserted:
            self._regularity.blame(unit)
        self._inserted.clear()
        self._rival = -1

    def _jump(self, position: int) -> Surprise:
        self._pointer = self._scanned = position if position >= 0 else self._end
        self._inserted.clear()
        self._rival = -1
        return Surprise(jumped=True)

    def _pass_over_irregular(self) -> None:
        last = self._end - 1
        while self._pointer < last and self._regularity.is_irregular(self._past[self._pointer - self._first]):
            self._pointer += 1

    def _look_up(self) -> tuple[int, int]:
        """The position after the longest, then most recent, earlier match of the past's end, and the length of that
        match; -1 and 0 if there is none.
        """
        best, best_length = -1, 0
        position = self._before[-1]
        for _ in range(_CANDIDATES):
            if position < self._first:
                break
            length = self._match_length(position)
            if length > best_length:
                best, best_length = position + 1, length
            position = self._before[position - self._first]
        return best, best_length

    def _match_length(self, position: int) -> int:
        past, index, last = self._past, position - self._first, len(self._past) - 1
        length = 1
        while length < _LONGEST_MATCH and length <= index and past[index - length] == past[last - length]:
            length += 1
        return length

    # -- the past ----------------------------------------------------------------------------------------------------

    @property
    def _end(self) -> int:
        return self._first + len(self._past)

    def _append(self, unit: int) -> None:
        if unit >= len(self._last):
            self._reserve(unit)
        position, earlier = self._end, self._last[unit]
        self._past.append(unit)
        self._before.append(earlier)
        self._after.append(-1)
        if earlier >= self._first:
            self._after[earlier - self._first] = position
        self._last[unit] = position

    def _reserve(self, unit: int) -> None:
        lacking = unit + 1 - len(self._last)
        if lacking > 0:
            self._last.extend([-1] * lacking)
            self._next.extend([-1] * lacking)

    def _forget_half(self) -> bool:
        """Drop the older half of the past, or what lies before the pointer if that is less.

        True if the pointer was too far back for that, and was looked up anew.
        """
        dropped = min(len(self._past) // 2, self._pointer - self._first)
        jumped = dropped < max(1, self._kept // 8)
        if jumped:
            dropped = len(self._past) // 2
            self._jump(-1)
        self._settle_passed(len(self._past))
        del self._past[:dropped], self._before[:dropped], self._after[:dropped]
        self._first += dropped
        if jumped:
            self._jump(self._look_up()[0])
        if self._rival < self._first:
            self._rival = -1
        return jumped

    def __repr__(self) -> str:
        return f"<History of {len(self._past)} accesses, period {self.period}>"
