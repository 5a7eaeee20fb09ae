"""What stays of a loop is the part that fits, evenly spread."""

from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from odewei.scheduler.spacing import Spacing


def looped(sizes: list[int], keep: int, rounds: int = 4) -> Spacing:
    """A spacing that has seen so many rounds of a loop over units of these sizes."""
    spacing = Spacing()
    spacing.keep(keep)
    for _ in range(rounds):
        for unit, nbytes in enumerate(sizes):
            spacing.note_access(unit, nbytes)
    return spacing


@given(st.lists(st.integers(1, 100), min_size=2, max_size=60), st.floats(0, 1))
@settings(deadline=None)
def test_the_part_that_fits_stays(sizes: list[int], part: float) -> None:
    """What stays are as many bytes as can, give or take half of the largest unit; of any stretch its part does."""
    keep = int(sum(sizes) * part)
    spacing = looped(sizes, keep)
    error = 0.0
    for unit, nbytes in enumerate(sizes):
        error += nbytes * keep / sum(sizes) - nbytes * spacing.stays(unit)
        assert abs(error) <= max(sizes)
    assert abs(error) <= max(sizes) / 2 + 1e-6


@given(st.integers(10, 200), st.floats(0.05, 0.95))
@settings(deadline=None)
def test_runs_of_hits_are_short(units: int, part: float) -> None:
    """Of equal units, those that stay come in runs of the length that the part makes necessary."""
    keep = int(units * part)
    spacing = looped([1] * units, keep)
    runs = [len(list(run)) for stays, run in groupby(map(spacing.stays, range(units))) if stays]
    assert sum(runs) in (keep, keep + 1)
    assert max(runs, default=0) <= keep / max(1, units - keep) + 2


def test_the_decision_stands_until_what_fits_changes() -> None:
    """More rounds change nothing; another part, or a loop of another length, does."""
    spacing = looped([1] * 20, 10)
    before = [spacing.stays(unit) for unit in range(20)]
    for unit in list(range(20)) * 5:
        spacing.note_access(unit, 1)
    assert [spacing.stays(unit) for unit in range(20)] == before
    spacing.keep(5)
    for unit in list(range(20)) * 2:
        spacing.note_access(unit, 1)
    assert sum(spacing.stays(unit) for unit in range(20)) == 5
    for unit in list(range(40)) * 4:
        spacing.note_access(unit, 1)
    assert sum(spacing.stays(unit) for unit in range(40)) in (5, 6)


def test_spare_are_the_present_ones_that_need_not_stay() -> None:
    """The most recently used first, none that stays, none that has left; at most a few."""
    spacing = looped([1] * 20, 10)
    spare = list(spacing.spare())
    assert spare == [unit for unit in reversed(range(20)) if not spacing.stays(unit)][: len(spare)]
    assert 0 < len(spare) < 10
    spacing.note_eviction(spare[0])
    assert next(iter(spacing.spare())) == spare[1]
    assert not spacing.stays(1_000_000)


def test_units_without_bytes_are_no_loop() -> None:
    """A loop of empty units can be asked about like any other."""
    spacing = Spacing()
    spacing.keep(100)
    for _ in range(4):
        for unit in range(3):
            spacing.note_access(unit, 0)
    assert not spacing.stays(7)
