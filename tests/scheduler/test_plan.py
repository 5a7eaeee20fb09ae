"""What to fetch and what leaves: the rules, and what they cost in a loop."""

import itertools
import math

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from odewei.scheduler.outlook import Outlook
from odewei.scheduler.plan import Candidate, Decision, Window, Wish, choose_victims, decide

CANDIDATES = st.lists(st.tuples(st.integers(0, 20), st.one_of(st.integers(0, 30), st.just(math.inf))), max_size=8).map(
    lambda items: [
        Candidate(unit, nbytes, distance)
        for unit, (nbytes, distance) in enumerate(sorted(items, key=lambda item: -item[1]))
    ]
)
WISHES = st.builds(Wish, st.just(99), st.integers(0, 60), st.integers(0, 30), st.booleans())


@given(needed=st.integers(1, 60), candidates=CANDIDATES)
def test_victims_free_enough_and_no_more(needed: int, candidates: list[Candidate]) -> None:
    """Victims free enough, and each is needed for that."""
    victims = choose_victims(needed, candidates)
    allowed = candidates
    if victims is None:
        assert sum(candidate.nbytes for candidate in allowed) < needed
        return
    chosen = {candidate.unit: candidate.nbytes for candidate in allowed if candidate.unit in victims}
    assert len(chosen) == len(victims)
    assert sum(chosen.values()) >= needed
    for unit in chosen:
        assert sum(chosen.values()) - chosen[unit] < needed


@given(needed=st.integers(1, 20), candidates=CANDIDATES)
def test_units_of_one_size_leave_furthest_first(needed: int, candidates: list[Candidate]) -> None:
    """When all are equally large, the victims are those used last: Belady's rule."""
    equal = [candidate._replace(nbytes=5) for candidate in candidates]
    victims = choose_victims(needed, equal)
    count = -(-needed // 5)
    assert victims == (None if count > len(equal) else tuple(candidate.unit for candidate in equal[:count]))


def test_what_a_large_victim_makes_needless_stays() -> None:
    """A small unit that was chosen first stays when the next one alone is enough."""
    candidates = [Candidate(0, 1, 9), Candidate(1, 2, 8), Candidate(2, 10, 7), Candidate(3, 50, 6)]
    assert choose_victims(10, candidates) == (2,)
    assert choose_victims(11, candidates) == (0, 2)


def ask(
    wish: Wish | None, candidates: list[Candidate], room: int = 0, reading: int = 0, leaving: int = 0
) -> Decision | None:
    return decide(
        wish,
        room_bytes=room,
        reading_bytes=reading,
        leaving_bytes=leaving,
        best_to_leave=lambda beyond: [candidate for candidate in candidates if candidate.distance > beyond],
    )


@given(WISHES, CANDIDATES, st.integers(-20, 60), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=300)
def test_decisions_keep_the_rules(
    wish: Wish, candidates: list[Candidate], room: int, reading: int, leaving: int
) -> None:
    """Evict only for lack of room; for a hint nothing needed sooner; beyond the limit only for who waits, at last."""
    decision = ask(wish, candidates, room, reading, leaving)
    lacking = wish.nbytes - room
    available = sum(candidate.nbytes for candidate in candidates)
    if room + leaving < 0 and not wish.demanded:
        evicted = sum(candidates[unit].nbytes for unit in decision.evict) if decision else 0
        assert decision is None or (decision.fetch is None and decision.evict), "more leaves or nothing happens"
        assert evicted >= -room - leaving or evicted == available, "as much leaves as the budget lacks"
        return
    if lacking <= 0:
        assert decision == Decision(wish.unit)
    elif wish.demanded:
        assert (decision is None) == (available < lacking and reading > 0)
        assert decision is None or decision.beyond_limit == (available < lacking)
        if decision and decision.beyond_limit:
            assert decision.evict == tuple(candidate.unit for candidate in candidates)
    else:
        later = [candidate for candidate in candidates if candidate.distance > wish.distance]
        assert (decision is None) == (lacking <= leaving or sum(one.nbytes for one in later) < lacking)
        assert decision is None or not decision.beyond_limit
        assert decision is None or set(decision.evict) <= {one.unit for one in later}
    if decision and not decision.beyond_limit:
        assert decision.fetch == wish.unit
        assert sum(candidates[unit].nbytes for unit in decision.evict) >= lacking


def test_without_a_wish_nothing_is_done() -> None:
    """No missing unit, no decision, and nobody is asked what could leave."""
    assert ask(None, [Candidate(0, 5, math.inf)], room=100) is None


def test_a_forward_does_not_wait_for_memory_that_it_may_hold_itself() -> None:
    """A hint waits for what is leaving; a demand evicts others, or goes beyond the limit."""
    candidates = [Candidate(0, 5, 9)]
    assert ask(Wish(1, 5, 0, False), candidates, leaving=5) is None
    assert ask(Wish(1, 5, 0, True), candidates, leaving=5) == Decision(1, (0,))
    assert ask(Wish(1, 5, 0, True), [], leaving=5) == Decision(1, (), beyond_limit=True)


@given(
    depth=st.one_of(st.none(), st.integers(0, 4)),
    nbytes=st.integers(0, 50),
    ahead=st.lists(st.integers(0, 30), max_size=5),
    following=st.integers(0, 100),
)
def test_a_window_is_open_for_so_many_units_and_bytes(
    depth: int | None, nbytes: int, ahead: list[int], following: int
) -> None:
    """Both limits hold, except that the first unit may be of any size; with a depth of 0 it is never open."""
    is_open = Window(depth, nbytes).is_open(len(ahead), sum(ahead), following)
    if depth is not None and len(ahead) >= depth:
        assert not is_open
    elif not ahead:
        assert is_open
    else:
        assert is_open == (sum(ahead) + following <= nbytes)


class Loop:
    """A loop over ``n`` equal units under a budget of ``b``, with reads that take no time. Counts reads."""

    def __init__(self, n: int, b: int, depth: int) -> None:
        self.n, self.b, self.window = n, b, Window(depth, b)
        self.outlook = Outlook(range(n))
        self.resident: set[int] = set()
        self.ahead: set[int] = set()
        self.leased: int | None = None
        self.reads = 0

    def candidates(self, beyond: float) -> list[Candidate]:
        found = self.outlook.best_to_leave(lambda unit: unit != self.leased, self.resident, beyond)
        return [Candidate(unit, 1, distance) for unit, distance in found]

    def fetch(self, wish: Wish) -> bool:
        decision = decide(
            wish,
            room_bytes=self.b - len(self.resident),
            reading_bytes=0,
            leaving_bytes=0,
            best_to_leave=self.candidates,
        )
        if decision is None:
            return False
        assert not decision.beyond_limit
        for unit in decision.evict:
            self.resident.remove(unit)
            self.ahead.discard(unit)
            self.outlook.note_eviction(unit)
        self.resident.add(decision.fetch)
        self.outlook.note_present(decision.fetch)
        assert len(self.resident) <= self.b
        self.reads += 1
        return True

    def prefetch(self) -> None:
        while (found := self.outlook.first_missing(lambda unit: unit not in self.resident)) is not None:
            if not self.window.is_open(len(self.ahead), len(self.ahead), 1):
                return
            if not self.fetch(Wish(found[0], 1, found[1], False)):
                return
            self.ahead.add(found[0])

    def run_pass(self) -> int:
        """The units read during a pass, ahead or on demand."""
        before = self.reads
        for unit in range(self.n):
            self.outlook.record("thread", unit)
            self.leased = unit
            self.ahead.discard(unit)
            if unit not in self.resident:
                assert self.fetch(Wish(unit, 1, 0, True))
            self.prefetch()
            self.leased = None
        return self.reads - before


def belady_reads(n: int, b: int, passes: int) -> int:
    """What demand paging reads in so many passes when it knows the future: Belady's MIN."""
    trace = list(range(n)) * passes
    cache: set[int] = set()
    reads = 0
    for now, unit in enumerate(trace):
        if unit in cache:
            continue
        reads += 1
        if len(cache) == b:
            cache.remove(max(cache, key=lambda other: (other - trace[now]) % n))
        cache.add(unit)
    return reads


@given(n=st.integers(2, 14), b=st.integers(1, 14), depth=st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_a_loop_reads_what_does_not_fit_and_the_window(n: int, b: int, depth: int) -> None:
    """In the long run a pass over n units under a budget of b reads n - b, and the window and one more at most."""
    assume(b > depth)
    loop = Loop(n, b, depth)
    reads = [loop.run_pass() for _ in range(2 * n)]
    steady = reads[n // 2 + 2 :]
    assert max(steady) <= max(0, n - b) + (depth + 1 if b < n else 0)
    assert sum(reads) <= belady_reads(n, b, 2 * n) + (depth + 1) * 2 * n


@given(n=st.integers(2, 14), b=st.integers(1, 14))
@settings(deadline=None, max_examples=60)
def test_without_a_window_it_is_demand_paging_at_its_best(n: int, b: int) -> None:
    """With a depth of 0 the rules read exactly what Belady's MIN does."""
    loop = Loop(n, b, 0)
    assert sum(loop.run_pass() for _ in range(5)) == belady_reads(n, b, 5)


def test_a_model_that_fits_is_read_once() -> None:
    """Under a budget for everything, each unit is read once, whatever the window."""
    for depth in range(4):
        loop = Loop(6, 6, depth)
        assert list(itertools.islice(iter(loop.run_pass, None), 3)) == [6, 0, 0]
