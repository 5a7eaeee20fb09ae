"""Sums over stretches of time, beside a plain twin that counts moments."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from odewei.profiling.intervals import length, union, without

_some = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda pair: (pair[0], pair[0] + pair[1])))


def _moments(intervals: list[tuple[float, float]]) -> set[int]:
    return {moment for begin, end in intervals for moment in range(int(begin), int(end))}


@given(_some)
def test_a_union_covers_what_any_of_them_covers_once(intervals: list[tuple[float, float]]) -> None:
    """A union is in order, disjoint, and as long as the moments that it covers are many."""
    found = union(intervals)
    assert _moments(found) == _moments(intervals)
    assert length(found) == len(_moments(intervals))
    assert all(left[1] < right[0] for left, right in pairwise(found))


@given(_some, _some)
def test_without_leaves_what_the_others_do_not_cover(
    these: list[tuple[float, float]], those: list[tuple[float, float]]
) -> None:
    """What is left of these covers every moment of theirs that none of those covers, and no other."""
    found = without(union(these), union(those))
    assert _moments(found) == _moments(these) - _moments(those)
    assert length(found) == len(_moments(found))
