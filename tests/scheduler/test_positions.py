"""A set of positions answers as a plain set does."""

from hypothesis import given
from hypothesis import strategies as st

from odewei.scheduler.positions import PositionSet

POSITIONS = st.one_of(st.integers(0, 40), st.integers(0, 5_000), st.sampled_from([1023, 1024, 1025, 1 << 20]))


@given(st.lists(st.tuples(st.booleans(), POSITIONS), max_size=60), st.lists(POSITIONS, max_size=10))
def test_it_answers_as_a_plain_set_does(steps: list[tuple[bool, int]], asked: list[int]) -> None:
    """After any additions and removals, smallest, largest below, membership and length are those of a set."""
    positions, plain = PositionSet(), set[int]()
    for adds, position in steps:
        if adds:
            positions.add(position)
            plain.add(position)
        else:
            positions.discard(position)
            plain.discard(position)
        assert positions.smallest() == min(plain, default=None)
        for limit in [*asked, position, position + 1, 0, 1 << 21]:
            assert positions.largest_below(limit) == max((one for one in plain if one < limit), default=None)
            assert (limit in positions) == (limit in plain)
        assert len(positions) == len(plain)


def test_a_negative_position_is_never_in_it() -> None:
    """Who has no position may ask for it all the same."""
    positions = PositionSet()
    positions.add(0)
    positions.add(1023)
    assert -1 not in positions
    positions.discard(-1)
    assert len(positions) == 2
    assert positions.largest_below(-1) is None


def test_memory_grows_with_the_words_in_use() -> None:
    """A set that moves along a long sequence stays small."""
    positions = PositionSet()
    for position in range(0, 1 << 22, 512):
        positions.add(position)
        positions.discard(position - 4096)
    assert len(positions._words) <= 6
    assert positions._summary.bit_length() <= 6
