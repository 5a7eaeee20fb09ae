"""The merged futures of threads: the fast ways against brute force."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from odewei.scheduler import history as history_module
from odewei.scheduler.history import NEVER, History
from odewei.scheduler.outlook import Outlook

UNITS = 6
THREADS = ("one", "two", "three")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("access"), st.integers(0, 2), st.integers(0, UNITS - 1)),
        st.tuples(st.just("walk"), st.integers(0, 2), st.integers(1, 2 * UNITS)),  # so many units in order
        st.tuples(st.sampled_from(["enter", "leave", "forget"]), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("arrive"), st.just(0), st.integers(0, UNITS - 1)),
        st.tuples(st.sampled_from(["evict", "lose"]), st.just(0), st.integers(0, UNITS - 1)),
    ),
    max_size=40,
)


class Twin:
    """An outlook as a ledger uses it, and its slow twin: every question is answered from whole futures."""

    def __init__(self, order: Sequence[int]) -> None:
        self.outlook = Outlook(order)
        self.order = order
        self.present: set[int] = set()
        self.histories: dict[str, History] = {}
        self.inside: set[str] = set()
        self.latest: str | None = None
        self.clock = 0
        self.last_use: dict[int, int] = {}
        self.places: dict[str, int] = {}

    def access(self, thread: str, unit: int) -> None:
        if thread not in self.histories:
            latest = self.histories.get(self.latest or "")
            self.histories[thread] = History(latest.recent_pass() if latest and latest.period else self.order)
        self.latest = thread
        self.clock += 1
        self.last_use[unit] = self.clock
        expected = next(self.histories[thread].upcoming(), None)
        self.histories[thread].record(unit)
        assert self.outlook.record(thread, unit) == (expected == unit)
        if unit in self.present:
            self.outlook.note_evictable(unit)

    def do(self, what: str, number: int, unit: int) -> None:
        thread = THREADS[number]
        if what == "access":
            self.access(thread, unit)
        elif what == "walk":
            for _ in range(unit):
                place = self.places[thread] = self.places.get(thread, -1) + 1
                self.access(thread, place % UNITS)
                self.check()
        elif what == "enter":
            self.inside.add(thread)
            self.outlook.enter(thread)
        elif what == "leave":
            self.inside.discard(thread)
            self.outlook.leave(thread)
        elif what == "forget":
            self.inside.discard(thread)
            self.outlook.forget(thread)
            if thread != self.latest:
                self.histories.pop(thread, None)
        elif what == "arrive" and unit not in self.present:
            self.present.add(unit)
            self.outlook.note_evictable(unit)
        elif what == "evict" and unit in self.present:
            self.present.discard(unit)
            self.outlook.note_missing(unit)

    def futures(self) -> list[list[int]]:
        live = [self.histories[one] for one in {*self.inside, self.latest} if one in self.histories]
        return [list(history.upcoming()) for history in live or [History(self.order)]]

    def distance(self, unit: int) -> float:
        return min((future.index(unit) for future in self.futures() if unit in future), default=NEVER)

    def check(self) -> None:
        """Every answer is that of brute force."""
        distances = {unit: self.distance(unit) for unit in range(UNITS)}
        assert {unit: self.outlook.next_use(unit) for unit in range(UNITS)} == distances
        missing = {unit: distance for unit, distance in distances.items() if unit not in self.present}
        nearest = min(missing.values(), default=NEVER)
        found = self.outlook.first_missing(lambda unit: unit not in self.present)
        assert found is None if nearest == NEVER else found is not None and found[1] == nearest
        assert found is None or missing[found[0]] == nearest
        for leased in (set(), {0, 3}):
            free = self.present - leased
            order = list(self.outlook.furthest_first(lambda unit, free=free: unit in free, self.present))
            assert sorted(order) == sorted((unit, distances[unit]) for unit in free)
            keys = [(-distance, self.last_use.get(unit, 0)) for unit, distance in order]
            assert keys == sorted(keys)


@given(steps=STEPS, seed=st.sampled_from([(), tuple(range(UNITS))]))
@example(steps=[("walk", 0, 12), ("enter", 1, 0), ("walk", 1, 3), ("walk", 0, 3), ("leave", 1, 0)], seed=())
@settings(deadline=None, max_examples=150)
def test_fast_ways_agree_with_brute_force(steps: list[tuple[str, int, int]], seed: tuple[int, ...]) -> None:
    """With one thread or several, in loops or not, whatever comes and goes: same order, same distances."""
    twin = Twin(seed)
    twin.check()
    for step in steps:
        twin.do(*step)
        twin.check()


@given(steps=STEPS, kept=st.integers(8, 24))
@example(steps=[("arrive", 0, 0), ("walk", 0, 12), ("walk", 0, 12)], kept=8)
@settings(deadline=None, max_examples=150)
def test_fast_ways_agree_while_the_past_is_trimmed(steps: list[tuple[str, int, int]], kept: int) -> None:
    """What histories forget changes no answer behind the outlook's back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history_module, "_KEPT", kept)
        twin = Twin(())
        for step in steps:
            twin.do(*step)
            twin.check()


def test_a_trace_replaces_the_guess_of_all_threads() -> None:
    """After a seed, every thread expects the seed's order, also those that come later."""
    outlook = Outlook([0, 1, 2])
    for thread in ("one", "two"):
        outlook.enter(thread)
        outlook.record(thread, 0)
    outlook.seed([2, 1, 0])
    assert [outlook.next_use(unit) for unit in (2, 1, 0)] == [0, 1, 2]
    assert all(outlook.record(thread, unit) for thread in ("one", "two") for unit in (2, 1, 0))
    assert Outlook([5, 6]).first_missing(lambda unit: unit == 6) == (6, 1)


def test_a_new_thread_expects_what_the_latest_does() -> None:
    """The period of the thread that ran last is the seed of a new one."""
    outlook = Outlook()
    for unit in (7, 8, 9) * 2:
        outlook.record("old", unit)
    assert all(outlook.record("new", unit) for unit in (7, 8, 9))


def test_an_idle_thread_neither_holds_nor_fetches() -> None:
    """What only a thread outside of every forward would need does not count."""
    outlook = Outlook()
    for thread, units in (("idle", (1, 2)), ("busy", (3, 4))):
        outlook.enter(thread)
        for unit in units * 2:
            outlook.record(thread, unit)
    assert outlook.next_use(1) == 0
    outlook.leave("idle")
    assert outlook.next_use(1) == NEVER
    assert outlook.first_missing(lambda unit: unit in (1, 2)) is None


def test_the_nearest_use_over_all_threads_counts() -> None:
    """Threads in the same loop at different places share one stream of units."""
    outlook = Outlook(range(10))
    for thread, steps in (("ahead", 6), ("behind", 2)):
        outlook.enter(thread)
        for unit in range(steps):
            outlook.record(thread, unit)
    assert outlook.next_use(2) == 0  # by the one behind
    assert outlook.next_use(6) == 0  # by the one ahead
    assert outlook.first_missing(lambda unit: unit in (3, 9)) == (3, 1)
