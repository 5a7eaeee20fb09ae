"""What comes next: the past of one thread of execution, and the future that it suggests.

Knows unit ids only. Pure: no clock, no locks, no input or output.

The predicted future is what followed the longest recent match of the last few accesses in the past: one pointer into
the past that advances as long as it is right, and is looked up again when it is wrong. Past its end the future
repeats: a past that ends at ``end`` with the pointer at ``p`` predicts ``past[p:end]`` over and over. That covers
plain loops, the wrap from the last layer to the first, an encoder once and its decoder many times, and a loop inside
a pipeline. A wrong prediction costs a stall, never an error.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

__all__ = ["NEVER", "History"]

NEVER = math.inf
"""The distance to the next use of a unit that the predicted future does not hold."""

_LONGEST_MATCH = 32
_CANDIDATES = 16
_KEPT = 1 << 16


class History:
    """The accesses of one thread, oldest first, with a prediction of the next ones.

    A loop longer than some 57,000 accesses (or seven times the seed) is forgotten before it repeats, and not predicted.

    ``seed`` is a guess of one pass (definition order, a trace, another thread's last pass). It is treated as the past.
    """

    def __init__(self, seed: Sequence[int] = ()) -> None:
        self._past: list[int] = list(seed)
        self._first = 0  # the absolute position of _past[0]
        self._positions: dict[int, list[int]] = {}
        for position, unit in enumerate(self._past):
            self._positions.setdefault(unit, []).append(position)
        self._pointer: int | None = 0 if self._past else None
        self._kept = max(_KEPT, 8 * len(self._past))

    def record(self, unit: int) -> bool:
        """Append an access. True if it was the predicted one, so that all other predictions stand."""
        right = self._pointer is not None and self._at(self._pointer) == unit
        position = self._end
        self._past.append(unit)
        known = self._positions.setdefault(unit, [])
        if right:
            assert self._pointer is not None
            self._pointer += 1
        else:
            self._pointer = self._look_up(known)
        known.append(position)
        if len(self._past) > self._kept:
            return self._forget_half() and right
        return right

    @property
    def period(self) -> int:
        """The number of accesses after which the predicted future repeats; 0 when nothing is predicted."""
        return 0 if self._pointer is None else self._end - self._pointer

    def upcoming(self, start: int = 0) -> Iterator[int]:
        """The predicted accesses from distance ``start`` on, one period at most in all."""
        if self._pointer is not None:
            for position in range(self._pointer + start, self._end):
                yield self._at(position)

    def next_use(self, unit: int) -> float:
        """How many predicted accesses come before the next one of ``unit``: 0 for the very next, NEVER if none does."""
        positions = self._positions.get(unit)
        if self._pointer is None or not positions:
            return NEVER
        index = bisect_left(positions, self._pointer)
        return positions[index] - self._pointer if index < len(positions) else NEVER

    def recent_pass(self) -> tuple[int, ...]:
        """The predicted period as a seed for another thread's history."""
        return tuple(self.upcoming())

    @property
    def _end(self) -> int:
        return self._first + len(self._past)

    def _at(self, position: int) -> int:
        return self._past[position - self._first]

    def _look_up(self, earlier: list[int]) -> int | None:
        """The position after the longest, then most recent, earlier match of the past's end."""
        best, best_length = None, 0
        for position in earlier[-_CANDIDATES:][::-1]:
            length = self._match_length(position)
            if length > best_length:
                best, best_length = position + 1, length
        return best

    def _match_length(self, position: int) -> int:
        last = self._end - 1
        length = 1
        while (
            length < _LONGEST_MATCH
            and position - length >= self._first
            and self._at(position - length) == self._at(last - length)
        ):
            length += 1
        return length

    def _forget_half(self) -> bool:
        """Drop the older half of the past, or what lies before the pointer if that is less.

        False if the pointer was too far back for that, and was looked up anew.
        """
        dropped = len(self._past) // 2
        if self._pointer is not None:
            dropped = min(dropped, self._pointer - self._first)
        if dropped < self._kept // 8:
            self._pointer, dropped = None, len(self._past) // 2
        self._past = self._past[dropped:]
        self._first += dropped
        self._positions = {}
        for index, unit in enumerate(self._past):
            self._positions.setdefault(unit, []).append(self._first + index)
        if self._pointer is not None:
            return True
        self._pointer = self._look_up(self._positions[self._past[-1]][:-1])
        return False

    def __repr__(self) -> str:
        return f"<History of {len(self._past)} accesses, period {self.period}>"
