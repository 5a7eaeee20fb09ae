"""Who is irregular, for how long, and which irregular unit leaves first."""

from hypothesis import given
from hypothesis import strategies as st

from odewei.scheduler.regularity import RareFirst, Regularity


def made_irregular(*units: int) -> Regularity:
    regularity = Regularity()
    for unit in units:
        for _ in range(4):
            regularity.blame(unit)
    return regularity


def test_a_unit_is_irregular_after_four_blames_and_says_so_once() -> None:
    """Three wrong predictions are forgotten by as many right ones; the fourth in a row turns the unit."""
    regularity = Regularity()
    for _ in range(3):
        for _ in range(3):
            regularity.blame(5)
        for _ in range(3):
            regularity.forgive(5)
    assert not regularity.is_irregular(5)
    for _ in range(20):
        regularity.blame(5)
    assert regularity.is_irregular(5)
    assert regularity.turned == [5]
    assert not regularity.is_irregular(1_000_000)


def test_even_intervals_make_a_unit_regular_again() -> None:
    """A unit that has turned is judged by its intervals: even ones are forgiven, others blamed."""
    regularity = made_irregular(3)
    step = 0
    for interval in (3, 90, 7, 200):
        step += interval
        regularity.note_access(3, step)
    assert regularity.is_irregular(3)
    for _ in range(60):
        step += 10
        regularity.note_access(3, step)
    assert not regularity.is_irregular(3)
    assert abs(regularity.interval(3) - 10) < 0.1
    assert regularity.last_use(3) == step


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=200))
def test_the_number_of_irregular_units_is_right(steps: list[tuple[bool, int]]) -> None:
    """Whatever is blamed and forgiven, the sum agrees with the counters."""
    regularity = Regularity()
    for blames, unit in steps:
        (regularity.blame if blames else regularity.forgive)(unit)
        assert regularity._irregular == sum(blame >= 4 for blame in regularity._blame)


def test_nothing_is_known_of_the_unused() -> None:
    """A unit that was never used has no interval and no last use, and may be asked for."""
    regularity = Regularity()
    assert (regularity.interval(9), regularity.last_use(9), regularity.is_irregular(9)) == (0, -1, False)


def test_the_rarest_leaves_first_and_of_equals_the_one_used_last() -> None:
    """Units leave from the longest interval on; within a class, most recently used first."""
    regularity = Regularity()
    for step in range(1, 129):
        for unit, interval in ((0, 64), (1, 4), (2, 4), (3, 16)):
            if step % interval == 0:
                regularity.note_access(unit, step)
    rare = RareFirst(regularity)
    for unit in (0, 1, 2, 3):
        rare.put(unit)
    order = list(rare.rarest_first(128))
    assert [unit for unit, _ in order] == [0, 3, 2, 1]
    assert [distance for _, distance in order] == sorted((distance for _, distance in order), reverse=True)


def test_one_that_is_used_no_more_counts_as_rarer() -> None:
    """What was used often, long ago, leaves before what is used now and then."""
    regularity = Regularity()
    rare = RareFirst(regularity)
    for step in (1, 2, 3):
        regularity.note_access(0, step)
    for step in range(50, 1001, 50):
        regularity.note_access(1, step)
    rare.put(0)
    rare.put(1)
    assert next(rare.rarest_first(1000))[0] == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 40)), max_size=60))
def test_it_holds_what_was_put_and_not_discarded(steps: list[tuple[bool, int, int]]) -> None:
    """Each unit that is in it comes once, rarest class first, whatever was put and discarded."""
    regularity = Regularity()
    rare, plain, now = RareFirst(regularity), set[int](), 0
    for puts, unit, later in steps:
        now += later
        if puts:
            regularity.note_access(unit, now)
            rare.put(unit)
            plain.add(unit)
        else:
            assert rare.discard(unit) == (unit in plain)
            plain.discard(unit)
        order = list(rare.rarest_first(now))
        assert sorted(one for one, _ in order) == sorted(plain)
        assert [distance for _, distance in order] == sorted((distance for _, distance in order), reverse=True)
        assert len(rare) == len(plain)
        assert (unit in rare) == (unit in plain)
