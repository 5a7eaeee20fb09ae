"""Sums over stretches of time. Pure; an interval is (begin, end) in seconds, begin <= end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["Interval", "length", "union", "without"]

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that any of them covers, as disjoint intervals in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def without(these: Sequence[Interval], those: Sequence[Interval]) -> list[Interval]:
    """The time in these but not in those; both are disjoint and in order, and so is the result."""
    found: list[Interval] = []
    first = 0
    for begin, end in these:
        while first < len(those) and those[first][1] <= begin:
            first += 1
        index = first
        while index < len(those) and those[index][0] < end:
            if those[index][0] > begin:
                found.append((begin, those[index][0]))
            begin = max(begin, those[index][1])
            index += 1
        if begin < end:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Seconds in all; of disjoint intervals the time that they cover."""
    return sum(end - begin for begin, end in intervals)
