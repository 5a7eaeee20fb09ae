"""What the states of all units add up to, and the one place where a state changes.

Knows unit records and waiters only. Not thread-safe by itself: the ledger calls it under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from odewei.scheduler.records import UnitRecord, Waiter
from odewei.scheduler.states import State, check_move

__all__ = ["Tally"]


class Tally:
    """Sums over ``units``, which others add and take away.

    ``residents`` are by id. ``demanded`` are those that somebody waits for, the one that was asked for first comes
    first. ``ahead`` were fetched before their use and not used since. ``failed`` and ``idle`` are numbers of units;
    idle ones are absent and only there on demand.
    """

    def __init__(self, units: Mapping[int, UnitRecord], on_move: Callable[[UnitRecord], None]) -> None:
        """``on_move`` is told of each unit whose state has changed."""
        self._units, self._on_move = units, on_move
        self.residents: set[int] = set()
        self.demanded: dict[int, UnitRecord] = {}
        self.ahead: set[int] = set()
        self.ahead_bytes = 0
        self.reading_bytes = 0
        self.failed = 0
        self.idle = 0

    def come(self, records: Iterable[UnitRecord]) -> None:
        """Units come, all absent."""
        self.idle += sum(record.on_demand for record in records)

    def go(self, records: Iterable[UnitRecord]) -> None:
        """Units go, all absent."""
        self.idle -= sum(record.on_demand for record in records)

    def lacks_any(self) -> bool:
        """Whether there is a unit that is neither resident nor failed, nor idle."""
        return len(self.residents) + self.failed + self.idle < len(self._units)

    def move(self, record: UnitRecord, state: State) -> None:
        """Change the state of a unit. Raises IllegalMoveError."""
        old = record.state
        check_move(record.name, old, state)
        self.failed += (state is State.FAILED) - (old is State.FAILED)
        self.idle += record.on_demand * ((state is State.ABSENT) - (old is State.ABSENT))
        self.reading_bytes += record.nbytes * ((state is State.READING) - (old is State.READING))
        if state is State.RESIDENT:
            self.residents.add(record.id)
        elif old is State.RESIDENT:
            self.residents.remove(record.id)
        record.state = state
        self._on_move(record)
        if state in (State.ABSENT, State.FAILED):
            self.not_ahead(record)

    def resize(self, record: UnitRecord, nbytes: int) -> None:
        """A unit takes other room than was thought."""
        if record.state is State.READING:
            self.reading_bytes += nbytes - record.nbytes
        if record.ahead:
            self.ahead_bytes += nbytes - record.nbytes
        record.nbytes = nbytes

    def fetched_ahead(self, record: UnitRecord) -> None:
        """A unit is being fetched before its use."""
        record.ahead = True
        self.ahead.add(record.id)
        self.ahead_bytes += record.nbytes

    def not_ahead(self, record: UnitRecord) -> None:
        """A unit has been used, or has left, or may never be used."""
        if record.ahead:
            record.ahead = False
            self.ahead.discard(record.id)
            self.ahead_bytes -= record.nbytes

    def demand(self, record: UnitRecord, waiter: Waiter) -> None:
        """Somebody waits for a unit."""
        record.waiters += (waiter,)
        self.demanded[record.id] = record

    def give_up(self, record: UnitRecord, waiter: Waiter) -> None:
        """Somebody waits no more. Nothing happens if nobody did."""
        if waiter in record.waiters:
            record.waiters = tuple(other for other in record.waiters if other is not waiter)
            if not record.waiters:
                self.demanded.pop(record.id, None)

    def wake(self, record: UnitRecord, error: BaseException | None) -> None:
        """Tell all who wait for a unit that it is here, or why it is not."""
        for waiter in record.waiters:
            waiter.finish(error)
        record.waiters = ()
        self.demanded.pop(record.id, None)

    def recount(self) -> None:
        """Everything from the states and waiters of the units, after an interrupt in the middle of a change. Those who
        wait for what is here are told so; nothing is ahead.
        """
        records = self._units.values()
        for record in records:
            record.ahead = False
            if record.waiters and record.state is State.RESIDENT:
                self.wake(record, None)
        self.ahead.clear()
        self.ahead_bytes = 0
        self.residents = {record.id for record in records if record.state is State.RESIDENT}
        self.demanded = {record.id: record for record in records if record.waiters}
        self.reading_bytes = sum(record.nbytes for record in records if record.state is State.READING)
        self.failed = sum(record.state is State.FAILED for record in records)
        self.idle = sum(record.state is State.ABSENT for record in records if record.on_demand)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the sums are those of the units."""
        records = self._units.values()
        ahead = [record for record in records if record.ahead]
        assert self.residents == {record.id for record in records if record.state is State.RESIDENT}
        assert self.reading_bytes == sum(record.nbytes for record in records if record.state is State.READING)
        assert self.ahead == {record.id for record in ahead}
        assert self.ahead_bytes == sum(record.nbytes for record in ahead)
        assert self.failed == sum(record.state is State.FAILED for record in records)
        assert self.idle == sum(record.state is State.ABSENT for record in records if record.on_demand)
        assert set(self.demanded) == {record.id for record in records if record.waiters}
        for record in records:
            assert record.leases >= 0
            assert record.slab is None or record.state not in (State.ABSENT, State.FAILED)
            assert not record.waiters or record.state is not State.RESIDENT

    def __repr__(self) -> str:
        return f"<Tally of {len(self._units)} units, {len(self.residents)} resident, {len(self.demanded)} demanded>"
