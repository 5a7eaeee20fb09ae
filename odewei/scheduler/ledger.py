"""Who has what: the state of every unit, who leases it, who waits for it. The one place where decisions are applied.

Knows unit ids, sizes, threads. Knows nothing of modules, files or asyncio. One lock guards everything here; nothing is
read, copied, allocated or bound while it is held. Order of locks: ledger, then slab pool.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from odewei.errors import ClosedError
from odewei.scheduler.chooser import Chooser
from odewei.scheduler.forks import is_held_by_nobody_here, was_forked
from odewei.scheduler.leases import LeaseBook, ThreadLeases
from odewei.scheduler.machine import AutoLimit
from odewei.scheduler.observer import Observer
from odewei.scheduler.outlook import Outlook
from odewei.scheduler.plan import Decision
from odewei.scheduler.reader import UnitReader
from odewei.scheduler.records import Account, UnitRecord, Waiter
from odewei.scheduler.roster import Roster
from odewei.scheduler.slab import Slab
from odewei.scheduler.slabs import SlabPool
from odewei.scheduler.states import State
from odewei.scheduler.tally import Tally
from odewei.scheduler.wants import Wants
from odewei.scheduler.whole import Books, whole

__all__ = ["Ledger"]


class Ledger(Books):
    """The book of all units of all models under one budget. Methods may be called from any thread unless they say
    otherwise. An interrupt costs what was predicted, and nothing else.
    """

    def __init__(self, pool: SlabPool, auto: AutoLimit | None = None) -> None:
        """``auto``: adapts the budget while models run."""
        self.pool = pool
        self.lock = threading.RLock()  # a finalizer may close the ledger in a thread that holds it
        self.outlook = Outlook()
        self.roster = Roster(pool, self.outlook, auto)
        self.accounts, self.units = self.roster.accounts, self.roster.units
        self.tally = Tally(self.units, self._has_moved)
        self.wants = Wants()
        self._leases = LeaseBook(self._thread_is_outside, self._thread_has_ended)
        self._chooser = Chooser(self.roster, self.tally, self.wants, self._leases)
        self._shrunk_for: set[int] = set()
        self._closed: BaseException | None = None
        self.observer: Observer | None = None

    # -- models come and go ------------------------------------------------------------------------------------------

    @whole
    def join(self, account: Account, units: Sequence[tuple[str, UnitReader]]) -> bool:
        """A model comes, with names and readers of its units, all absent, in the order they are expected to be used.

        False if the ledger was closed.
        """
        if self._closed is not None:
            return False
        self.roster.add(account, units)
        self.tally.come(account.units)
        return True

    @whole
    def seed(self, account: Account, order: Sequence[int]) -> None:
        """The order in which the units of a model, by their places in it, are expected to be entered in one pass."""
        self.roster.seed(account, order)

    @whole
    def depart(self, account: Account, reason: BaseException) -> bool:
        """A model goes: those who wait for its units get ``reason``, and its residents become absent.

        The caller unbinds them, lets reads under way end, then calls ``forget``. False if it is the last model: then
        the whole ledger was closed instead, and no other can join.
        """
        if self.accounts == [account]:
            self.close(reason)
            return False
        if account not in self.accounts:
            return True
        self.roster.remove(account)
        account.closed = reason
        for record in account.units:
            self.tally.wake(record, reason)
            if record.state is State.RESIDENT:
                self._evict(record)
        return True

    @whole
    def forget(self, account: Account) -> None:
        """Strike the units of a model that has departed. Nothing of it may be on its way."""
        for record in account.units:
            if record.state is State.FAILED:
                self.tally.move(record, State.ABSENT)
            assert record.state is State.ABSENT, f"{record.name} is still {record.state.value}"
        self.tally.go(self.roster.strike(account))

    def adapt(self) -> None:
        """Have an "auto" budget follow what is available, now and then."""
        if self.adapts:
            self._adapt()

    @whole
    def _adapt(self) -> None:
        self.roster.adapt()

    @property
    def adapts(self) -> bool:
        """Whether the budget may change while nothing else happens."""
        return self.roster.auto is not None

    @whole
    def resize(self, unit: int, nbytes: int) -> None:
        """A unit turned out to need other room. Only while it is absent or being read."""
        record = self.units[unit]
        assert record.state in (State.ABSENT, State.READING)
        self.tally.resize(record, nbytes)

    # -- the forward thread ------------------------------------------------------------------------------------------

    @whole
    def enter_pass(self, account: Account, frame: FrameType) -> bool:
        """This thread enters a model, whose call runs in ``frame``. Whether it was outside of every model."""
        mine = self._leases.mine()
        self._leases.take(mine, account, None, frame)
        self.outlook.enter(mine)
        if self.observer is not None:
            self.observer.entered(None, len(mine.leases))
        return len(mine.leases) == 1

    @whole
    def leave_pass(self, account: Account) -> bool:
        """This thread leaves a model, whether by return or by exception. Whether it is outside of every model now."""
        mine = self._leases.mine()
        self._leases.give_back(mine, account)
        if self.observer is not None:
            self.observer.left(None)
        if not mine.leases:
            account.counters.passes += 1
            self.wants.drop(mine)
        return not mine.leases

    @whole
    def enter(self, unit: int, frame: FrameType, lingers: bool = False) -> Waiter | None:
        """Take a lease. None: the unit is resident. Otherwise whoever drives the ledger sets ``done`` of the waiter."""
        record = self._open_record(unit)
        mine = self._leases.mine()
        self._leases.take(mine, record.account, record, frame, lingers=lingers)
        self._note_access(mine, record)
        if self.observer is not None:
            self.observer.entered(unit, len(mine.leases))
        if record.state is State.RESIDENT:
            record.account.counters.hits += 1
            return None
        waiter = Waiter(unit)
        self.tally.demand(record, waiter)
        return waiter

    @whole
    def leave(self, unit: int) -> None:
        """Return the innermost lease of ``unit`` of this thread. Leases above it were left behind and go too."""
        self._leases.give_back(self._leases.mine(), unit)
        if self.observer is not None:
            self.observer.left(unit)

    @whole
    def hold(self, waiter: Waiter) -> None:
        """Take a lease of the waiter's unit that belongs to no frame, until ``let_go``; the waiter is told, now or
        later.
        """
        record = self._open_record(waiter.unit)
        record.holders += (waiter,)
        record.leases += 1
        self._note_access(self._leases.mine(), record)
        if record.state is State.RESIDENT:
            record.account.counters.hits += 1
            waiter.finish()
        else:
            self.tally.demand(record, waiter)

    @whole
    def let_go(self, waiter: Waiter) -> None:
        """Return the lease that ``hold`` took, if it did."""
        record = self.units.get(waiter.unit)
        if record is not None and waiter in record.holders:
            record.holders = tuple(other for other in record.holders if other is not waiter)
            record.leases -= 1

    @whole
    def want(self, units: Sequence[int]) -> None:
        """This thread will enter these units next, in this order: read them together. An empty sequence: no more."""
        self.wants.put(self._leases.mine(), units)

    @whole
    def give_up(self, waiter: Waiter) -> None:
        """A forward stopped waiting (an interrupt): nobody needs to wake it any more."""
        record = self.units.get(waiter.unit)
        if record is not None:
            self.tally.give_up(record, waiter)

    @whole
    def note_stall(self, unit: int, began: float, ended: float) -> None:
        """This thread's forward has waited for a unit."""
        if self.observer is not None:
            self.observer.stalled(unit, began, ended)
        record = self.units.get(unit)
        if record is not None:
            record.account.counters.stalls += 1
            record.account.counters.stall_seconds += ended - began

    def needs_driver(self) -> bool:
        """Whether there is anything to decide: some unit is neither resident nor failed, nor idle. Without the lock, a
        hint.
        """
        return self.tally.lacks_any() or bool(self.tally.demanded) or bool(self.wants) or self._torn

    def is_inside(self) -> bool:
        """Whether this thread is inside a forward pass. Takes no lock: it asks about this thread only."""
        return self._leases.is_inside()

    @whole
    def may_leave(self, unit: int) -> None:
        """What kept a unit in memory for good has ended."""
        record = self.units.get(unit)
        if record is not None:
            record.stays = False

    # -- whoever drives: one thread at a time ------------------------------------------------------------------------

    @whole
    def next_decision(self) -> Decision | None:
        """Decide what to fetch next, and move its victims to ABSENT. The caller unbinds them, then begins the read."""
        wish = self._chooser.wish()
        if wish is not None and wish.demanded:
            self.pool.stop_expecting_leaving()  # what did not come back at once is held by somebody
        decision = self._chooser.decide(wish)
        for remedy in (self._leases.return_all_stale, self._leases.end_lingering, self.wants.drop_all):
            stuck = wish is not None and wish.demanded and (decision is None or decision.beyond_limit)
            if stuck and remedy():
                decision = self._chooser.decide(wish)
        for unit in decision.evict if decision else ():
            self._evict(self.units[unit])
        return decision

    @whole
    def next_shedding(self) -> Decision | None:
        """What leaves because the budget has shrunk, moved to ABSENT. The caller unbinds it."""
        decision = self._chooser.decide(None)
        for unit in decision.evict if decision else ():
            self._evict(self.units[unit])
        return decision

    @whole
    def begin_read(self, unit: int, slab: Slab | None) -> None:
        """ABSENT to READING, into ``slab`` (None: the unit has no bytes)."""
        record = self.units[unit]
        self.tally.move(record, State.READING)
        record.slab = slab
        record.unasked = not record.waiters
        if not record.leases:
            self.tally.fetched_ahead(record)

    @whole
    def finish_read(self, unit: int, nbytes: int) -> None:
        """READING to STAGED: ``nbytes`` have been read and all are in the slab."""
        record = self.units[unit]
        self.tally.move(record, State.STAGED)
        record.account.counters.bytes_read += nbytes
        record.account.counters.units_read += 1

    @whole
    def abandon_read(self, unit: int, nbytes: int) -> None:
        """READING back to ABSENT, without failure. ``nbytes`` were read all the same."""
        record = self.units[unit]
        self.tally.move(record, State.ABSENT)
        record.slab = None
        record.account.counters.bytes_read += nbytes
        self.outlook.note_missing(unit)

    @whole
    def begin_copy(self, unit: int) -> None:
        """STAGED to COPYING: the device is filling the unit's memory."""
        self.tally.move(self.units[unit], State.COPYING)

    @whole
    def arrive(self, unit: int) -> None:
        """STAGED or COPYING to RESIDENT: the unit is bound. Wakes those who wait for it."""
        record = self.units[unit]
        self._shrunk_for.clear()
        self.tally.move(record, State.RESIDENT)
        self.outlook.note_present(unit)
        self.tally.wake(record, None)

    @whole
    def fail(self, unit: int, error: BaseException, nbytes: int = 0) -> None:
        """READING, STAGED or COPYING to FAILED. Those who wait get ``error``; the next who needs it tries again.

        So do those who came to wait when the read, which nobody had asked for, was under way: what was wrong when it
        began may be past, and a forward gets the error of a read of its own only.
        """
        record = self.units[unit]
        self.tally.move(record, State.FAILED)
        record.slab = None
        record.account.counters.bytes_read += nbytes
        if not record.unasked or record.account.closed is not None or self._closed is not None:
            self.tally.wake(record, error)

    @whole
    def shrink_for(self, unit: int) -> bool:
        """The system had no memory for the unit: from now on the budget is what is in use, but never less than one step
        needs: the shortage may pass. True: try once more, when others have left for it.
        """
        again = unit not in self._shrunk_for
        self._shrunk_for.add(unit)
        budget = self.pool.budget
        self.roster.limit(min(budget.limit_bytes, max(1, self.roster.least_bytes, budget.used_bytes)))
        return again

    @whole
    def restart(self, unit: int) -> None:
        """A unit on its way whose read was cut short by an interrupt is ABSENT again; those who wait go on waiting."""
        record = self.units[unit]
        if record.state in (State.STAGED, State.COPYING):
            self.tally.move(record, State.FAILED)
            self.tally.move(record, State.ABSENT)
            record.slab = None
            self.outlook.note_missing(unit)
        elif record.state is State.READING:
            self.abandon_read(unit, 0)

    @whole
    def close(self, reason: BaseException) -> None:
        """No more accesses: they raise ``reason``, and so do all who wait now."""
        self._closed = self._closed or reason
        self._chooser.reads_ahead = False
        for record in self.units.values():
            self.tally.wake(record, reason)

    # -- looking -----------------------------------------------------------------------------------------------------

    def resident_slabs(self) -> Iterator[Slab]:
        """The slabs of all resident units."""
        return (slab for unit in self.tally.residents if (slab := self.units[unit].slab) is not None)

    @whole
    def leases(self) -> int:
        """All leases of units taken now, stale ones included."""
        return sum(record.leases for record in self.units.values())

    def reason(self) -> BaseException:
        """Why there are no more accesses."""
        return self._closed or ClosedError("the model was closed", cure="Build it again to use it again")

    def is_held_by_caller(self) -> bool:
        """Whether this thread is inside the ledger or its pool, and must wait for no one: a finalizer may run there."""
        return self.lock._is_owned() or self.pool.is_held_by_caller()

    @whole
    def check_invariants(self) -> None:
        """Raise AssertionError unless states, sums and slabs agree."""
        self.pool.check_invariants()
        self.tally.check_invariants()

    def __repr__(self) -> str:
        return f"<Ledger of {len(self.accounts)} models: {self.tally!r}>"

    # -- under the lock ----------------------------------------------------------------------------------------------

    def _open_record(self, unit: int) -> UnitRecord:
        record = self.units.get(unit)
        reason = self._closed if record is None else self._closed or record.account.closed
        if isinstance(reason, ClosedError):
            raise ClosedError(reason.problem, cure=reason.cure) from reason
        if record is None or reason is not None:
            raise ClosedError("the model was closed", cure="Build it again to use it again") from reason
        return record

    def _thread_is_outside(self, thread: ThreadLeases, account: Account, seconds: float) -> None:
        account.counters.inside_seconds += seconds
        self.outlook.leave(thread)

    def _thread_has_ended(self, thread: ThreadLeases) -> None:
        self.wants.drop(thread)
        self.outlook.forget(thread)

    def _has_moved(self, record: UnitRecord) -> None:
        if self.observer is not None:
            self.observer.moved(record.id, record.state, record.nbytes)

    def _note_access(self, mine: ThreadLeases, record: UnitRecord) -> None:
        record.account.counters.accesses += 1
        self.wants.met(mine, record.id)
        surprise = self.outlook.record(mine, record.id, record.nbytes)
        if surprise is not None:
            record.account.counters.mispredictions += not record.on_demand  # nobody predicts these at first
            for unit in tuple(self.tally.ahead) if surprise.jumped else surprise.skipped:
                if unit in self.tally.ahead:
                    self.tally.not_ahead(self.units[unit])  # it may never be used
        if record.ahead:
            self.tally.not_ahead(record)

    def _evict(self, record: UnitRecord) -> None:
        self.tally.move(record, State.ABSENT)
        record.account.counters.evictions += 1
        if record.slab is not None:
            self.pool.mark_leaving(record.slab, record.name)
            record.slab = None
        self.outlook.note_eviction(record.id)

    # -- after a fork ------------------------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In the child: if another thread was in here, the books cannot be used any more."""
        pool_is_whole = self.pool.after_fork()
        if is_held_by_nobody_here(self.lock):
            self.lock = threading.RLock()
            self._changing = False
            pool_is_whole = False
        if not pool_is_whole:
            self.close_forked()

    def close_forked(self) -> None:
        """In the child: no more accesses. Wakes nobody: those who wait are in the parent."""
        self._closed = self._closed or was_forked()
        self._chooser.reads_ahead = False

    # -- after an interrupt ------------------------------------------------------------------------------------------

    def _mend(self) -> None:
        """From the states, slabs and waiters of the units and the leases of the threads. Predictions begin anew."""
        records = self.units.values()
        self._leases.recount(records)
        for record in records:
            if record.slab is not None and record.state in (State.ABSENT, State.FAILED):
                self.pool.mark_leaving(record.slab, record.name)
                record.slab = None
        self.tally.recount()
        self.wants.drop_all()
        self.roster.begin_anew()
        for thread in self._leases.inside():
            self.outlook.enter(thread)
        for unit in self.tally.residents:
            self.outlook.note_present(unit)

    # -- what passes have shown --------------------------------------------------------------------------------------

    @whole
    def recent_pass(self, account: Account) -> tuple[int, ...]:
        """The places of a model's units in the order in which they are expected from now on, once around."""
        records = (self.units.get(unit) for unit in self.outlook.recent_pass())
        return tuple(record.place for record in records if record is not None and record.account is account)
