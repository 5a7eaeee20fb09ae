"""Passes rehearsed by the real scheduler with a counted clock."""

from __future__ import annotations

import pytest

from odewei.scheduler.plan import window_for
from odewei.scheduler.rehearsal import Enter, Leave, Rehearsal, RehearsedUnit

from .simulation import Disk, Simulation

SIZE = 1 << 16


def units(count: int, size: int = SIZE) -> list[RehearsedUnit]:
    return [RehearsedUnit(f"unit{index}", size, size) for index in range(count)]


def loop(count: int, seconds: float = 0.0) -> list[Enter | Leave]:
    return [step for unit in range(count) for step in (Enter(unit, seconds), Leave(unit))]


@pytest.mark.parametrize("computing", [0.0, 0.4, 0.9, 1.1, 3.0])
@pytest.mark.parametrize("fitting", [4, 8, 15, 20])
def test_it_agrees_with_the_simulation_of_the_tests(fitting: int, computing: float) -> None:
    """Bytes and times of each pass are those of the other virtual clock, which has readers and chunks too."""
    limit = fitting * SIZE
    simulation = Simulation([SIZE] * 20, limit, window_for(None, limit, SIZE), Disk(SIZE), range(20))
    expected = simulation.run([[(unit, computing) for unit in range(20)]] * 8)
    rehearsal = Rehearsal(units(20), limit_bytes=limit, bandwidth=SIZE)
    found = [rehearsal.run_pass(loop(20, computing)) for _ in range(8)]
    assert [each.bytes_read for each in found] == [each.bytes_read for each in expected]
    assert [each.seconds for each in found] == pytest.approx([each.seconds for each in expected])
    assert [each.stalled for each in found] == pytest.approx([each.stalled for each in expected])
    rehearsal.close()


def test_what_fits_is_read_once() -> None:
    """Under a budget for everything, all passes but the first read nothing and take what computing takes."""
    rehearsal = Rehearsal(units(10), limit_bytes=10 * SIZE, bandwidth=SIZE)
    first, *others = [rehearsal.run_pass(loop(10, 0.5)) for _ in range(3)]
    assert first.bytes_read == 10 * SIZE
    assert len(first.missed) == 10
    for later in others:
        assert (later.bytes_read, later.missed, later.stalled) == (0, frozenset(), 0.0)
        assert later.seconds == pytest.approx(5.0)


def test_depth_0_waits_for_each_unit() -> None:
    """Without reading ahead, reading and computing add up; with it the longer of the two is what a pass takes."""
    ahead, never = (
        Rehearsal(units(20), limit_bytes=4 * SIZE, bandwidth=SIZE, depth=depth).run_pass(loop(20, 1.0)).seconds
        for depth in (None, 0)
    )
    assert never == pytest.approx(40.0)
    assert ahead == pytest.approx(21.0)


def test_pinned_bytes_and_units_on_demand() -> None:
    """What is pinned of the budget holds no unit; what is not expected is not read ahead."""
    rehearsal = Rehearsal(units(4), limit_bytes=4 * SIZE, bandwidth=SIZE, pinned_bytes=2 * SIZE, ahead=2)
    passed = rehearsal.run_pass([*loop(2, 5.0)])
    assert passed.missed == {0, 1}
    assert rehearsal.run_pass(loop(4)).bytes_read >= 2 * SIZE
