"""A limit that follows what the machine can spare, and residents that follow the limit."""

from collections.abc import Iterator

import pytest

from odewei.scheduler.budget import Budget
from odewei.scheduler.drivers import SynchronousDriver
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.machine import FOR_WEIGHTS, AutoLimit, available_bytes
from odewei.scheduler.plan import Window
from odewei.scheduler.records import Account
from odewei.scheduler.slabs import SlabPool

from .fakes import Setup, started

PAGE = 4096


class Machine:
    """What a machine can spare besides what weights hold, and its clock."""

    def __init__(self, spare_bytes: float) -> None:
        self.spare_bytes, self.seconds = spare_bytes, 0.0
        self.budget: Budget | None = None

    def available(self) -> int:
        used = 0 if self.budget is None else self.budget.used_bytes
        return int(self.spare_bytes) - used

    def limit(self) -> AutoLimit:
        return AutoLimit(self.available, lambda: self.seconds)

    def fits(self, nbytes: int) -> None:
        """Have it spare so much that a limit of ``nbytes`` fits, from the next look on."""
        self.spare_bytes = nbytes / FOR_WEIGHTS + 1
        self.seconds += 1


def test_the_limit_is_a_part_of_what_is_available() -> None:
    """What weights hold already is available to weights; the limit stays between least and most."""
    machine = Machine(1000)
    auto = machine.limit()
    assert auto.fitting(0) == 800
    machine.spare_bytes = 600
    assert auto.fitting(400) == 800
    machine.seconds += 1
    assert auto.changed(700, 400, least_bytes=1, most_bytes=750) == 750
    machine.seconds += 1
    assert auto.changed(850, 0, least_bytes=820, most_bytes=2000) == 820


def test_it_is_looked_at_now_and_then_and_changed_for_a_reason() -> None:
    """Not twice within a second, and not for what activations that come and go make of it."""
    machine = Machine(1000)
    auto = machine.limit()
    assert auto.fitting(0) == 800
    machine.spare_bytes = 100
    assert auto.changed(800, 0, least_bytes=1, most_bytes=900) is None
    machine.seconds += 1
    assert auto.changed(800, 0, least_bytes=1, most_bytes=900) == 80
    machine.seconds += 1
    assert auto.changed(82, 0, least_bytes=1, most_bytes=900) is None
    machine.seconds += 1
    assert auto.changed(80, 0, least_bytes=1, most_bytes=900) is None


def test_this_machine_has_memory() -> None:
    """The system's own figures are read: positive, and not more than the machine has."""
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < available_bytes() <= total


@pytest.fixture
def adapting() -> Iterator[tuple[Setup, Machine]]:
    """A plain driver over eight units of a page, whose budget follows a machine that has room for all."""
    machine = Machine(0)
    with started([PAGE] * 8, 8 * PAGE) as setup:
        machine.budget = setup.budget
        machine.fits(8 * PAGE)
        setup.ledger.roster.auto = machine.limit()
        setup.account.least_bytes, setup.account.most_bytes = PAGE, 8 * PAGE
        yield setup, machine


def test_residents_leave_when_the_budget_shrinks(adapting: tuple[Setup, Machine]) -> None:
    """The furthest leave until the rest fits, free slabs go first, and nothing is fetched for it."""
    setup, machine = adapting
    setup.run_pass()
    setup.run_pass()
    assert setup.resident_bytes == 8 * PAGE
    machine.fits(3 * PAGE)
    reads = len(setup.reads)
    setup.driver.poke()
    assert setup.budget.limit_bytes == 3 * PAGE
    assert setup.resident_bytes == setup.budget.used_bytes == 3 * PAGE
    assert sorted(setup.client.bound) == [0, 1, 2], "what comes next stays"
    assert len(setup.reads) == reads
    setup.ledger.check_invariants()
    setup.run_pass()
    assert setup.budget.used_bytes <= 3 * PAGE
    assert setup.budget.overdrafts == 0


def test_a_budget_grows_back(adapting: tuple[Setup, Machine]) -> None:
    """After a shortage has passed, everything is kept again."""
    setup, machine = adapting
    setup.run_pass()
    for limit in (2, 8, 1, 8):
        machine.fits(limit * PAGE)
        setup.run_pass()
        setup.run_pass()
        assert setup.budget.limit_bytes == limit * PAGE
        assert setup.budget.used_bytes <= limit * PAGE
    reads = len(setup.reads)
    setup.run_pass()
    assert len(setup.reads) == reads


def test_a_unit_in_use_outlives_a_shortage(adapting: tuple[Setup, Machine]) -> None:
    """Leased units stay whatever happens, and go when they are returned."""
    setup, machine = adapting
    for unit in range(4):
        setup.enter(unit)
    machine.fits(PAGE)
    setup.ledger.adapt()
    setup.prefetch()
    assert setup.resident_bytes == 4 * PAGE
    for unit in reversed(range(4)):
        setup.driver.leave(unit)
    setup.prefetch()
    assert setup.resident_bytes == PAGE


def test_what_one_step_needs_is_never_given_up() -> None:
    """The limit does not fall below what a model needs at one moment, whatever the machine says."""
    machine = Machine(1)
    pool = SlabPool(Budget(10 * PAGE))
    ledger = Ledger(pool, machine.limit())
    driver = SynchronousDriver(ledger)
    account = Account(None, None, 0, least_bytes=5 * PAGE, most_bytes=9 * PAGE, window=Window(0, 0))  # type: ignore[arg-type]
    assert driver.join(account, [])
    machine.seconds += 1
    ledger.adapt()
    assert pool.budget.limit_bytes == 5 * PAGE
