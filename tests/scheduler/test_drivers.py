"""What holds for both drivers, the plain and the prefetching one; and what holds for the plain one."""

import contextlib
import errno
import gc
import sys
import threading
import weakref
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odewei.errors import ClosedError, MissingWeightError, OdeweiError, WeightReadError
from odewei.scheduler.host_memory import HostMemory
from odewei.scheduler.reader import Resized
from odewei.scheduler.records import BusyTime
from odewei.scheduler.states import State

from .fakes import PATIENCE, Forward, Setup, running_frame, started

PAGE = 4096
both = pytest.mark.parametrize("depth", [0, 2], ids=["plain", "prefetching"])


@both
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ValueError("odd"), WeightReadError),
        (OSError(5, "broken"), WeightReadError),
        (WeightReadError("short", file="f", cure="Mend it"), WeightReadError),
        (MissingWeightError("gone", weight="w"), MissingWeightError),
    ],
)
def test_the_error_of_a_read_reaches_the_forward(depth: int, error: Exception, seen: type[OdeweiError]) -> None:
    """As itself where it is of the library, with the module's name and its cause; no lease stays; a retry works."""

    def break_one(setup: Setup) -> None:
        setup.units[1].fault = lambda: error

    with started([PAGE] * 3, 3 * PAGE, break_one, depth=depth) as setup:
        for _ in range(2):
            with pytest.raises(seen) as caught:
                setup.enter(1)
            assert caught.value.module == "unit1"
            assert caught.value.__cause__ is error
            if isinstance(error, OdeweiError):
                assert (caught.value.problem, caught.value.file, caught.value.weight, caught.value.cure) == (
                    error.problem, error.file, error.weight, error.cure
                )  # fmt: skip
            assert setup.ledger.leases() == 0
        setup.visit(0)
        setup.units[1].fault = None
        setup.run_pass()


@both
def test_a_unit_that_cannot_be_bound_fails_alone(depth: int) -> None:
    """An error of the model's side reaches the forward like one of reading, and the memory comes back."""

    def break_one(setup: Setup) -> None:
        setup.client.fault = lambda unit: TypeError("does not fit") if unit == 1 else None

    with started([PAGE] * 3, 3 * PAGE, break_one, depth=depth) as setup:
        with pytest.raises(WeightReadError, match="does not fit"):
            setup.enter(1)
        setup.visit(0)
        setup.client.fault = lambda unit: None
        setup.run_pass()
    assert setup.budget.overdrafts == 0


@both
def test_an_error_keeps_nothing_alive_when_it_is_dropped(depth: int) -> None:
    """Neither what the pass computed with, nor the unit's memory: no garbage collection is needed."""

    def break_one(setup: Setup) -> None:
        setup.client.fault = lambda unit: TypeError("does not fit") if unit == 1 else None

    with started([PAGE] * 3, 3 * PAGE, break_one, depth=depth) as setup:

        def forward() -> weakref.ref[torch.Tensor]:
            hidden = torch.ones(3)
            watched = weakref.ref(hidden)
            with contextlib.suppress(WeightReadError):
                setup.enter(int(hidden[0]))
            return watched

        gc.disable()
        try:
            assert forward()() is None
        finally:
            gc.enable()


@both
def test_a_unit_that_needs_other_room_is_read_again(depth: int) -> None:
    """Resized is no error: the next try has a slab of the right size, whether it is larger or smaller."""

    def resize(setup: Setup) -> None:
        setup.units[0].nbytes, setup.units[2].nbytes = 2 * PAGE, 64

    with started([PAGE] * 3, 6 * PAGE, resize, depth=depth) as setup:
        setup.run_pass()
        assert [record.nbytes for record in setup.ledger.units.values()] == [2 * PAGE, PAGE, 64]
        assert sorted(setup.reads) == [0, 0, 1, 2, 2]
        setup.run_pass()
    assert setup.budget.overdrafts == 0


@both
def test_two_threads_with_room_for_one_unit_both_finish(depth: int) -> None:
    """Threads that hold what the other's budget would need go beyond the limit instead of waiting for each other."""
    inside = threading.Barrier(2)
    with started([PAGE] * 4, PAGE, depth=depth) as setup:

        def work(units: tuple[int, int]) -> None:
            setup.ledger.enter_pass(setup.account, running_frame())
            setup.driver.enter(units[0], running_frame())
            inside.wait(PATIENCE)  # both hold a unit now
            setup.enter(units[1])
            setup.driver.leave(units[1])
            setup.driver.leave(units[0])
            setup.ledger.leave_pass(setup.account)

        forwards = [Forward(lambda: work((0, 1))), Forward(lambda: work((2, 3)))]
        assert [forward.join() for forward in forwards] == [None, None]
        assert setup.budget.overdrafts >= 1
        assert setup.ledger.leases() == 0


@both
def test_threads_in_the_same_model_share_its_units(depth: int) -> None:
    """Three forwards at once see right weights, and none of them hangs."""
    with started([PAGE] * 6, 4 * PAGE, depth=depth, num_readers=2) as setup:

        def work() -> None:
            for _ in range(3):
                setup.run_pass()

        forwards = [Forward(work) for _ in range(3)]
        assert [forward.join() for forward in forwards] == [None] * 3
        assert setup.account.counters.passes == 9


@both
def test_a_kept_tensor_is_never_overwritten(depth: int) -> None:
    """Tensors that outlive their unit, up to all of the budget, cost an overdraft at worst; the pass goes on."""
    with started([PAGE] * 4, 2 * PAGE, depth=depth) as setup:
        kept: list[torch.Tensor] = []
        for unit in range(4):
            setup.enter(unit)
            kept.append(setup.client.weight(unit))
            setup.driver.leave(unit)
        assert [tensor[0].item() for tensor in kept] == [0, 1, 2, 3]
        assert setup.budget.overdrafts > 0
        assert setup.pool.escapes > 0
        kept.clear()
        overdrafts = setup.budget.overdrafts
        setup.run_pass()
        setup.run_pass()
        assert setup.budget.overdrafts == overdrafts
        assert setup.budget.used_bytes <= setup.budget.limit_bytes


@both
def test_after_close_nothing_can_be_used_and_nothing_is_held(depth: int) -> None:
    """A closed driver refuses, may be closed again, and keeps only the memory of what is still bound."""
    setup = Setup([PAGE] * 3, 3 * PAGE, depth=depth)
    setup.driver.start()
    setup.run_pass()
    for _ in range(2):
        setup.driver.close()
        with pytest.raises(ClosedError, match="closed"):
            setup.enter(0)
    setup.client.bound.clear()
    setup.pool.close()
    assert setup.budget.used_bytes == 0


@both
def test_a_driver_that_was_never_started_can_be_closed(depth: int) -> None:
    """Closing what did not begin leaves nothing behind."""
    setup = Setup([PAGE], PAGE, depth=depth)
    setup.driver.close()
    setup.driver.close()


@both
@given(
    orders=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=10), min_size=1, max_size=4), b=st.integers(1, 6)
)
@settings(deadline=None, max_examples=25)
def test_any_order_finishes_and_is_right(depth: int, orders: list[list[int]], b: int) -> None:
    """Whatever is accessed in whatever order under whatever budget: right bytes, within the limit, nothing lost."""
    with started([PAGE] * 6, b * PAGE, depth=depth, num_readers=2) as setup:
        for order in orders:
            setup.run_pass(order)
        assert setup.account.counters.accesses == sum(map(len, orders))
    setup.check()
    assert setup.budget.overdrafts == 0


def test_an_interrupt_of_a_read_passes_and_leaves_nothing() -> None:
    """KeyboardInterrupt during the plain driver's read reaches the caller; the next call reads the unit."""
    with started([PAGE], PAGE) as setup:
        setup.units[0].fault = KeyboardInterrupt  # raised by the job, as an interrupt would be
        with pytest.raises(KeyboardInterrupt):
            setup.enter(0)
        assert (setup.ledger.leases(), setup.ledger.units[0].state) == (0, State.FAILED)
        setup.check()
        setup.units[0].fault = None
        setup.visit(0)


def test_the_plain_driver_reads_what_is_needed_and_starts_no_thread() -> None:
    """Units are read in the order of their use, one at a time, by the caller."""
    threads = threading.active_count()
    with started([PAGE] * 3, 3 * PAGE) as setup:
        setup.run_pass([2, 0, 2, 1])
        assert setup.reads == [2, 0, 1]
        assert threading.active_count() == threads
        assert setup.account.busy.seconds > 0


def test_a_plain_read_that_uses_its_own_unit_says_so() -> None:
    """A function that loads weights by using the model is told that it must not, as the prefetching driver does."""
    with started([PAGE], PAGE) as setup:

        def use_the_model() -> BaseException:
            setup.driver.enter(0, sys._getframe())
            return ValueError("never")

        setup.units[0].fault = use_the_model
        with pytest.raises(OdeweiError, match="must not use the model"):
            setup.enter(0)


def test_busy_time_counts_overlaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads that overlap are busy from the first's begin to the last's end, or until now."""
    clock = count()
    monkeypatch.setattr("odewei.scheduler.drivers.time.perf_counter", lambda: float(next(clock)))
    busy = BusyTime()
    with busy:
        with busy:
            pass
        assert busy.seconds == 1  # the clock goes on by one each time somebody looks at it
    assert busy.seconds == 2
    with busy:
        pass
    assert busy.seconds == 3
    assert Resized(77).nbytes == 77


@both
def test_a_shortage_that_passes_leaves_a_budget_that_works(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for the very first unit a forward is told; afterwards the smallest budget that works is there."""

    def none(source: HostMemory, nbytes: int) -> object:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    def prepare(setup: Setup) -> None:
        setup.account.least_bytes = PAGE
        monkeypatch.setattr(HostMemory, "allocate", none)

    with started([PAGE] * 3, 3 * PAGE, prepare, depth=depth) as setup:
        with pytest.raises(WeightReadError, match="no memory"):
            setup.enter(1)
        monkeypatch.undo()
        for _ in range(2):
            setup.run_pass()
        setup.check()
        assert setup.budget.overdrafts == 0
