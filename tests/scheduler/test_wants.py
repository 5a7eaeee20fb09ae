"""What forward passes say that they will enter next."""

from __future__ import annotations

import pytest

from odewei.scheduler.plan import Window
from odewei.scheduler.records import UnitRecord
from odewei.scheduler.regularity import Regularity
from odewei.scheduler.states import State
from odewei.scheduler.wants import Wants

from .fakes import Setup, running_frame


def records(count: int = 4) -> dict[int, UnitRecord]:
    """Absent units of 100 bytes, of which 250 bytes may be ahead."""
    setup = Setup([100] * count, 1000)
    setup.account.window = Window(None, 250)
    return setup.ledger.units


def test_the_first_missing_of_the_first_thread() -> None:
    """Units are fetched in the order given, past those that are here, one thread after the other."""
    units, wants = records(), Wants()
    assert not wants
    wants.put("a", [2, 1])
    wants.put("b", [3])
    assert 1 in wants
    assert 0 not in wants
    found = []
    while (record := wants.first_missing(units)) is not None:
        found.append(record.id)
        record.state = State.READING
    assert found == [2, 1, 3]
    for thread, unit in (("a", 2), ("a", 0), ("a", 1), ("b", 3)):
        wants.met(thread, unit)
    assert not wants


def test_no_more_than_the_window_is_ahead() -> None:
    """A thread's further units wait until it has entered some; one may always be ahead, however large it is."""
    units, wants = records(), Wants()
    wants.put("a", [0, 1, 2])
    units[0].state = units[1].state = State.RESIDENT
    assert wants.first_missing(units) is None
    wants.met("a", 0)
    assert wants.first_missing(units) is units[2]
    units[2].account.window = Window(None, 1)
    wants.met("a", 1)
    assert wants.first_missing(units) is units[2]


def test_no_more_than_keeps_a_disk_busy_is_ahead() -> None:
    """A large window is not filled with what one thread wants: it would drive out what others use."""
    setup, wants = Setup([40 << 20] * 4, 1 << 30), Wants()
    setup.account.window = Window(None, 1 << 29)
    wants.put("a", [0, 1, 2, 3])
    setup.ledger.units[0].state = State.READING
    assert wants.first_missing(setup.ledger.units) is setup.ledger.units[1]
    setup.ledger.units[1].state = State.READING
    assert wants.first_missing(setup.ledger.units) is None


def test_what_is_not_to_be_read() -> None:
    """Not what has failed, nor what is gone, nor anything without prefetch or of a model that closes."""
    units, wants = records(), Wants()
    wants.put("a", [0, 99, 1])
    units[0].state = State.FAILED
    assert wants.first_missing(units) is units[1]
    account = units[1].account
    account.closed = RuntimeError()
    assert wants.first_missing(units) is None
    account.closed, account.window = None, Window(0, 0)
    assert wants.first_missing(units) is None


def test_dropping() -> None:
    """A thread's new wants replace its old ones; none, or all dropped, is nothing."""
    wants = Wants()
    wants.put("a", [1])
    wants.put("a", [2])
    assert 1 not in wants
    wants.put("a", [])
    assert not wants
    wants.put("b", [1])
    assert wants.drop_all()
    assert not wants.drop_all()


@pytest.fixture
def setup() -> Setup:
    """Six units, of which three fit, and two may be ahead."""
    made = Setup([4096] * 6, 3 * 4096)
    made.account.window = Window(2, 3 * 4096)
    return made


def test_wanted_units_are_read_before_anybody_waits(setup: Setup) -> None:
    """They are read without a forward that enters them, before what is predicted, and leave for none of that."""
    setup.driver.want([5, 4, 3])
    setup.prefetch()
    assert setup.reads == [5, 4, 3]
    for unit in (5, 4, 3):
        setup.visit(unit)
    assert setup.account.counters.stalls == 0
    assert not setup.ledger.wants
    setup.check()


def test_what_is_wanted_does_not_leave_for_what_is_predicted() -> None:
    """Although the prediction does not hold it, and there is a window for more."""
    setup = Setup([4096] * 6, 2 * 4096)
    setup.account.window = Window(5, 5 * 4096)
    setup.seed([0, 1, 2, 3])
    setup.driver.want([5, 4])
    setup.prefetch()
    assert setup.reads == [5, 4]
    setup.driver.want([])
    setup.prefetch()
    assert setup.reads == [5, 4, 0, 1]
    setup.check()


def test_the_driver_is_needed_while_something_is_wanted(setup: Setup) -> None:
    """Also when all that is expected is there."""
    for record in setup.account.units[3:]:
        record.on_demand = True
    setup.ledger.tally.idle = 3
    setup.run_pass([0, 1, 2])
    assert not setup.ledger.needs_driver()
    setup.driver.want([4])
    assert setup.ledger.needs_driver()
    setup.driver.want([])
    assert not setup.ledger.needs_driver()


def test_what_is_wanted_goes_when_a_forward_needs_the_room(setup: Setup) -> None:
    """Nobody waits for room that is only wanted, and the budget holds."""
    setup.driver.want([5, 4, 3])
    setup.prefetch()
    for unit in (0, 1, 2):
        setup.driver.enter(unit, running_frame())
    assert set(setup.client.bound) == {0, 1, 2}
    for unit in (2, 1, 0):
        setup.driver.leave(unit)
    assert setup.budget.overdrafts == 0
    setup.check()


def test_nothing_is_wanted_after_the_pass(setup: Setup) -> None:
    """Wants that were left behind end with the pass at the latest."""
    setup.ledger.enter_pass(setup.account, running_frame())
    setup.driver.want([5])
    setup.ledger.leave_pass(setup.account)
    assert not setup.ledger.wants


def test_what_is_held_does_not_leave(setup: Setup) -> None:
    """A unit on demand of which somebody has a tensor is not evicted, until nobody has one."""
    setup.account.window = Window(0, 0)
    for record in setup.account.units[2:]:
        record.on_demand = True
    setup.ledger.tally.idle = 4
    held = {3}
    setup.account.is_held = held.__contains__
    for unit in (3, 2, 1, 0, 2, 4, 5, 1):
        setup.visit(unit)
        assert 3 in setup.client.bound
    held.clear()
    for unit in (4, 5, 2, 1, 0, 4, 5, 2):
        setup.visit(unit)
    assert 3 not in setup.client.bound
    setup.check()


def test_a_new_unit_that_nobody_expects() -> None:
    """It is irregular, its first interval is the time until its first use, and even intervals make it regular."""
    regularity = Regularity()
    regularity.distrust(3, step=10)
    assert regularity.is_irregular(3)
    regularity.note_access(3, 30)
    assert regularity.interval(3) == 20
    for step in range(50, 130, 20):
        assert regularity.is_irregular(3)
        regularity.note_access(3, step)
    assert not regularity.is_irregular(3)
