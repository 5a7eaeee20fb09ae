"""A limit that follows what the machine can spare, and residents that follow the limit."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from odewei.errors import OptionsError
from odewei.scheduler.budget import Budget
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.machine import FOR_WEIGHTS, AutoLimit, Ceiling, available_bytes, check_room
from odewei.scheduler.plan import Window
from odewei.scheduler.records import Account
from odewei.scheduler.slabs import SlabPool
from odewei.scheduler.synchronous import SynchronousDriver

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


MIB = 1 << 20
ROOMY = Ceiling("the machine's memory", 1000 * MIB, 10 * MIB, 900 * MIB)
GROUP = Ceiling("the group's limit", 500 * MIB, 100 * MIB, 200 * MIB)


def test_a_budget_that_a_limit_never_allows_is_refused() -> None:
    """Beyond what the lowest limit leaves besides the process's own memory: an error with limit, size and cure."""
    check_room(150 * MIB, 0, [ROOMY, GROUP])
    with pytest.raises(OptionsError, match="the group's limit is 500 MiB") as caught:
        check_room(401 * MIB, 0, [ROOMY, GROUP])
    assert "400 MiB" in str(caught.value.cure)
    assert "auto" in str(caught.value.cure)


def test_a_budget_that_others_are_in_the_way_of_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Between what is left now and what the limit allows there is a warning, and no error; below both nothing."""
    check_room(400 * MIB, 0, [ROOMY, GROUP])
    assert "only 200 MiB are left" in caplog.text
    caplog.clear()
    check_room(200 * MIB, 0, [ROOMY, GROUP])
    assert not caplog.text


def test_what_weights_hold_already_is_theirs(caplog: pytest.LogCaptureFixture) -> None:
    """A second model under a budget whose memory is in use is not asked for that memory again."""
    check_room(450 * MIB, 50 * MIB, [GROUP])
    caplog.clear()
    check_room(250 * MIB, 50 * MIB, [GROUP])
    assert not caplog.text
    with pytest.raises(OptionsError):
        check_room(451 * MIB, 50 * MIB, [GROUP])


_LIMITED = """
import resource, sys, torch
from torch import nn
import odewei
from odewei.scheduler.machine import available_bytes
from odewei.torch import init_on_demand_weights_model
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), -1))
assert available_bytes() <= 64 << 20, available_bytes()
def build():
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(4)))
def load(module, names):
    return {name: torch.zeros(4096, 4096) for name in names}
try:
    init_on_demand_weights_model(build, load, memory_budget="256MiB")
except odewei.errors.OptionsError as error:
    assert "ulimit -v" in str(error), error
    sys.exit(7)
"""


def test_the_limit_of_the_process_counts() -> None:
    """Under a real RLIMIT_AS "auto" sees what is left, and a budget beyond it is refused when the model is built."""
    command = [sys.executable, "-c", _LIMITED]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, timeout=60, env=environment, check=False).returncode == 7
