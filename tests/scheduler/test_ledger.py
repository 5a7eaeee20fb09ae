"""Who has what: leases, waiting, eviction."""

import gc
import threading
import weakref

import pytest

from odewei.errors import ClosedError
from odewei.scheduler.plan import Window
from odewei.scheduler.prefetcher import PrefetchingDriver
from odewei.scheduler.records import Waiter

from .fakes import Forward, Setup, enter_and_get_lost, running_frame, started


def test_accesses_are_counted() -> None:
    """Hits, stalls, passes, reads and evictions add up over two passes with room for three of four units."""
    setup = Setup([4096] * 4, 3 * 4096)
    setup.run_pass()
    setup.run_pass()
    counters = setup.account.counters
    assert (counters.passes, counters.accesses, counters.hits, counters.stalls) == (2, 8, 3, 5)
    assert (counters.units_read, counters.bytes_read, counters.evictions) == (5, 5 * 4096, 2)
    assert counters.mispredictions == 0
    assert counters.inside_seconds >= counters.stall_seconds > 0


def test_a_pass_within_a_pass_is_one() -> None:
    """Only the outermost call of a model is counted, and it returns what inner ones left behind."""
    setup = Setup([64] * 2, 128)
    for _ in range(2):
        setup.ledger.enter_pass(setup.account, running_frame())
    setup.driver.enter(0, running_frame())
    setup.ledger.leave_pass(setup.account)
    assert (setup.ledger.leases(), setup.account.counters.passes) == (0, 0)
    setup.ledger.leave_pass(setup.account)
    assert setup.account.counters.passes == 1


def test_leases_of_ended_threads_are_returned() -> None:
    """What a thread left behind is returned when another one first enters."""
    setup = Setup([64] * 2, 128)
    assert Forward(lambda: setup.driver.enter(0, running_frame())).join() is None
    assert setup.ledger.leases() == 1
    setup.visit(1)
    assert setup.ledger.leases() == 0


def test_a_lease_that_was_not_taken_is_not_returned() -> None:
    """Who was interrupted does not know how far it came: it lets go in any case, and perhaps twice."""
    setup = Setup([64] * 2, 128)
    setup.visit(0)
    one, other = Waiter(0), Waiter(0)
    setup.driver.hold(one)
    for _ in range(2):
        setup.driver.let_go(other)
        assert setup.ledger.leases() == 1
    for _ in range(2):
        setup.driver.let_go(one)
        assert setup.ledger.leases() == 0


def test_stale_leases_of_others_are_returned_for_room() -> None:
    """A lease that another thread's ended call left behind does not drive a demand beyond the limit."""
    setup = Setup([4096] * 2, 4096)
    setup.visit(1)
    setup.ledger._local = threading.local()  # as if this were another thread, and the first lived on
    enter_and_get_lost(setup, 0)
    setup.ledger._local = threading.local()
    setup.visit(1)
    assert (setup.budget.overdrafts, setup.ledger.leases()) == (0, 0)


def test_nested_units_that_do_not_fit_go_beyond_the_limit() -> None:
    """A unit within a unit is read though the budget has room for one: counted, and given back afterwards."""
    setup = Setup([4096, 8192], 8192)
    setup.enter(0)
    setup.enter(1)
    assert (setup.budget.overdrafts, setup.budget.worst_overdraft_bytes) == (1, 4096)
    setup.driver.leave(1)
    setup.driver.leave(0)
    setup.visit(1)
    setup.run_pass()
    assert setup.budget.overdrafts == 1
    setup.check()


def test_a_closed_ledger_wakes_and_refuses() -> None:
    """Those who wait get the reason; those who come later get an error that chains it, and hold no lease."""
    setup = Setup([64], 64)
    waiter = setup.ledger.enter(0, running_frame())
    assert waiter is not None
    reason = ClosedError("because")
    setup.ledger.close(reason)
    assert waiter.done.is_set()
    assert waiter.error is reason
    setup.ledger.leave(0)
    with pytest.raises(ClosedError) as caught:
        setup.ledger.enter(0, running_frame())
    assert caught.value.__cause__ is reason
    assert setup.ledger.leases() == 0


def test_who_gave_up_is_not_woken() -> None:
    """After the last of those who wait has given up, the unit is not demanded any more."""
    setup = Setup([64], 64)
    first, second = (setup.ledger.enter(0, running_frame()) for _ in range(2))
    assert first is not None
    assert second is not None
    setup.ledger.give_up(first)
    decision = setup.ledger.next_decision()
    assert decision is not None
    setup.ledger.give_up(second)
    setup.ledger.give_up(second)
    assert setup.ledger.next_decision() is None
    setup.ledger.check_invariants()


def test_a_unit_that_needs_other_room_gets_it() -> None:
    """A resized unit is read again into a slab of its new size; what it had reserved comes back."""
    setup = Setup([4096, 4096], 16384)
    setup.ledger.resize(0, 8192)
    setup.units[0].nbytes = 8192
    setup.run_pass()
    assert setup.resident_bytes == 12288
    setup.check()


def test_what_leaves_for_a_unit_that_had_failed_is_fetched_again() -> None:
    """A victim that is needed before the point up to which nothing was missing is not passed over."""
    setup = Setup([4096] * 4, 3 * 4096)
    setup.account.window = Window(2, 3 * 4096)
    setup.units[3].fault = lambda: ValueError("the disk is on fire")
    for unit in range(3):
        setup.visit(unit)
        setup.prefetch()
    setup.units[3].fault = None
    setup.visit(3)  # 2 leaves for it
    setup.prefetch()
    hits = setup.account.counters.hits
    for unit in range(3):
        setup.visit(unit)
        setup.prefetch()
    assert setup.account.counters.hits - hits == 3


def test_a_kept_tensor_does_not_end_prefetching() -> None:
    """A user who holds one tensor takes its room, not the hits of every pass from then on."""
    setup = Setup([4096] * 8, 4 * 4096)
    setup.account.window = Window(1, 4 * 4096)
    kept = []
    for _ in range(4):
        hits = setup.account.counters.hits
        for unit in range(8):
            setup.enter(unit)
            setup.prefetch()
            if not kept:
                kept.append(setup.client.weight(unit))
            setup.driver.leave(unit)
            setup.prefetch()
    assert setup.budget.overdrafts == 0
    assert setup.account.counters.hits - hits == 8


class _Garbage:
    """Something that only the cyclic garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_a_model_may_be_collected_at_any_moment() -> None:
    """The finalizer of a model runs in whichever thread collects it, also while that one holds the ledger's lock."""
    setup = Setup([64, 64], 64)
    garbage = _Garbage()
    weakref.finalize(garbage, setup.driver.close)

    def collected_here(unit: int) -> bool:
        gc.collect()
        return False

    setup.account.was_written = collected_here
    del garbage
    error = Forward(setup.run_pass).join()
    assert error is None or isinstance(error, ClosedError)


@pytest.mark.parametrize("which", ["ledger", "pool"])
def test_a_forward_that_collects_its_model_under_a_lock_does_not_hang(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collected in a forward's thread that holds a lock of the scheduler, the model closes without waiting for it."""
    with started([4096] * 2, 4096, depth=1) as setup:
        assert isinstance(setup.driver, PrefetchingDriver)
        thread, hung = setup.driver._thread, []

        def join_a_while() -> None:
            threading.Thread.join(thread, 0.5)
            hung.append(thread.is_alive())

        monkeypatch.setattr(thread, "join", join_a_while)
        with setup.ledger.lock if which == "ledger" else setup.pool.lock:
            setup.driver.close()
        monkeypatch.undo()
    assert not any(hung)


def test_a_weight_just_taken_is_not_driven_out_by_a_hint() -> None:
    """Inside a pass a unit that was accessed by itself stays until the thread enters another, or waits for its room."""
    setup = Setup([4096] * 3, 2 * 4096)
    setup.account.window = Window(2, 2 * 4096)
    setup.seed([0, 1, 2])
    setup.ledger.enter_pass(setup.account, running_frame())
    setup.driver.enter(0, running_frame(), lingers=True)
    setup.driver.leave(0)
    setup.prefetch()
    assert [setup.ledger.units[unit].state.value for unit in range(3)] == ["resident", "resident", "absent"]
    setup.visit(1)
    setup.prefetch()
    assert setup.ledger.units[2].state.value == "resident", "0 made room: the thread has gone on"
    setup.driver.enter(2, running_frame(), lingers=True)
    setup.driver.leave(2)
    setup.driver.enter(1, running_frame())
    setup.driver.enter(0, running_frame())  # takes the room of 2, or there is none
    assert setup.ledger.units[2].state.value == "absent"
    setup.driver.leave(0)
    setup.driver.leave(1)
    setup.ledger.leave_pass(setup.account)
    assert setup.budget.overdrafts == 0
    setup.check()


def test_a_weight_taken_in_a_loop_lingers_through_calls_of_its_module() -> None:
    """A forward that loops over views of a weight has the module compute with each; entering another unit ends it."""
    setup = Setup([4096] * 2, 2 * 4096)
    setup.ledger.enter_pass(setup.account, running_frame())
    setup.driver.enter(0, running_frame(), lingers=True)
    setup.driver.leave(0)
    for unit, lingers in ((0, True), (1, False), (0, False)):
        setup.visit(unit)
        assert setup.ledger._leases.lingers(setup.ledger.units[0]) is lingers
    setup.ledger.leave_pass(setup.account)
    setup.check()


def test_a_unit_stays_while_views_of_it_are_held() -> None:
    """Driving it out would free nothing, and its next call would read it beyond the budget."""
    setup = Setup([4096] * 3, 2 * 4096)
    setup.account.window = Window(2, 2 * 4096)
    setup.seed([0, 1, 2])
    held = {0, 1}
    setup.account.is_held = held.__contains__
    setup.ledger.enter_pass(setup.account, running_frame())
    setup.driver.enter(0, running_frame())
    setup.driver.leave(0)
    setup.visit(1)
    setup.prefetch()
    assert [setup.ledger.units[unit].state.value for unit in range(3)] == ["resident", "resident", "absent"]
    held.clear()
    setup.prefetch()
    assert setup.ledger.units[2].state.value == "resident"
    setup.ledger.leave_pass(setup.account)
    assert setup.budget.overdrafts == 0
    setup.check()


def test_a_demand_takes_the_room_of_what_lingers() -> None:
    """It holds nobody up: not the thread itself, and not another one."""
    setup = Setup([4096] * 2, 4096)
    setup.ledger.enter_pass(setup.account, running_frame())
    setup.driver.enter(0, running_frame(), lingers=True)
    setup.driver.leave(0)
    assert Forward(lambda: setup.visit(1)).join() is None
    setup.ledger.leave_pass(setup.account)
    assert setup.budget.overdrafts == 0
    setup.check()
