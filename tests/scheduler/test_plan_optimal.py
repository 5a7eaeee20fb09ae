"""The plan beside the true optimum, found by trying everything, over the real ledger with reads that take no time."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from odewei.scheduler.outlook import Outlook
from odewei.scheduler.plan import Window

from .simulation import Disk, Simulation


def optimum(trace: Sequence[int], sizes: Sequence[int], budget: int) -> int:
    """The fewest bytes that any schedule reads for ``trace``, all of its future known.

    Goes through all sets of units that can be resident after each access. Reading a unit only when it is used loses
    nothing, and neither does evicting no more than has to be.
    """
    costs = {frozenset[int](): 0}
    for unit in trace:
        following: dict[frozenset[int], int] = {}
        for resident, cost in costs.items():
            for kept, more in [(resident, 0)] if unit in resident else _rooms(resident, unit, sizes, budget):
                following[kept] = min(cost + more, following.get(kept, 1 << 60))
        costs = following
    return min(costs.values())


def _rooms(resident: frozenset[int], unit: int, sizes: Sequence[int], budget: int) -> list[tuple[frozenset[int], int]]:
    """What may be resident after ``unit`` was read, and the bytes that were."""
    found: list[frozenset[int]] = []
    for count in range(len(resident), -1, -1):
        for kept in map(frozenset, combinations(resident, count)):
            fits = sum(sizes[other] for other in kept) + sizes[unit] <= budget
            if fits and not any(kept < more for more in found):
                found.append(kept)
    return [(kept | {unit}, sizes[unit]) for kept in found]


def used_bytes(trace: Sequence[int], sizes: Sequence[int], budget: int, depth: int, rounds: int) -> int:
    """What is read in so many rounds when the trace is known from the start, less what is ahead at the end."""
    simulation = Simulation(sizes, budget, Window(depth, budget), Disk(math.inf), seed=trace)
    outcomes = simulation.run([[(unit, 1.0) for unit in trace]] * rounds)
    assert simulation.pool.budget.peak_bytes <= budget
    simulation.ledger.check_invariants()
    return sum(one.bytes_read for one in outcomes) - simulation.ledger.tally.ahead_bytes


TRACES = st.lists(st.integers(0, 5), min_size=1, max_size=14)
ROUNDS = st.sampled_from([1, 1, 4])
DEPTHS = st.integers(0, 2)


@given(TRACES, st.integers(2, 5), DEPTHS, ROUNDS)
@example([3, 4, 5, 0, 0, 0, 2, 1, 2, 5, 3, 2], 5, 1, 1)  # units were taken for those of one loop by coincidence
@settings(deadline=None, max_examples=400)
def test_no_more_is_read_than_the_optimum_without_the_window_reads(
    trace: list[int], budget: int, depth: int, rounds: int
) -> None:
    """Units of one size: no more is read and used than the optimum of a budget smaller by the depth reads.

    The units ahead are read for a use to come, each of which the optimum has to read too, if it has no room for it.
    Meanwhile they take a place each, and furthest-first is optimal in the places that are left. With a depth of 0
    the bound is the optimum itself, so it is met exactly. In a loop, the units ahead at the end belong to the next
    round: they are the difference between what is read and what is used, at most ``depth``.
    """
    assume(budget > depth)
    best = optimum(trace * rounds, [1] * 6, budget - depth)
    used = used_bytes(trace, [1] * 6, budget, depth, rounds)
    assert used <= best
    assert depth or used == best


@given(TRACES, st.lists(st.integers(1, 3), min_size=6, max_size=6), st.integers(2, 5), DEPTHS, ROUNDS)
@settings(deadline=None, max_examples=400, derandomize=True)
def test_uneven_units_cost_at_most_one_more_place(
    trace: list[int], sizes: list[int], places: int, depth: int, rounds: int
) -> None:
    """Units of 1 to 3 bytes: no more is read than the optimum of a budget smaller by depth and one of the largest.

    This is measured (none in some 17,000 such cases was worse), not proven: with uneven sizes furthest-first is no
    optimum, and finding one is hard. Within the whole budget less the window it was up to 1.6 times the optimum.
    """
    largest = max(sizes)
    budget = places * largest
    assume(places >= depth + 2)
    best = optimum(trace * rounds, sizes, budget - (depth + 1) * largest)
    assert used_bytes(trace, sizes, budget, depth, rounds) <= best


def test_the_bound_tells_least_recently_used_from_furthest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicting what was used longest ago breaks the bound: a loop that does not fit is then read as a whole."""

    def least_recent(
        self: Outlook, evictable: Callable[[int], bool], residents: Collection[int], beyond: float = -1
    ) -> Iterator[tuple[int, float]]:
        for unit in sorted(residents, key=self._regularity.last_use):
            if evictable(unit) and self.next_use(unit) > beyond:
                yield unit, self.next_use(unit)

    trace = [0, 1, 2, 3]
    assert used_bytes(trace, [1] * 4, 3, 0, 4) == optimum(trace * 4, [1] * 4, 3) == 8
    monkeypatch.setattr(Outlook, "best_to_leave", least_recent)
    assert used_bytes(trace, [1] * 4, 3, 0, 4) == 16
