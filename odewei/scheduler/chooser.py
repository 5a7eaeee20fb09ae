"""What to fetch next, and what may leave for it: the books as ``plan.decide`` wants to see them.

Not thread-safe by itself: the ledger calls it under its lock.
"""

from __future__ import annotations

from collections.abc import Iterator

from odewei.scheduler.leases import LeaseBook
from odewei.scheduler.plan import Candidate, Decision, Wish, decide
from odewei.scheduler.records import UnitRecord
from odewei.scheduler.roster import Roster
from odewei.scheduler.states import State
from odewei.scheduler.tally import Tally
from odewei.scheduler.wants import Wants

__all__ = ["Chooser"]


class Chooser:
    """Looks at all units of one ledger. ``reads_ahead``: False when nothing is to be read that nobody waits for."""

    def __init__(self, roster: Roster, tally: Tally, wants: Wants, leases: LeaseBook) -> None:
        self.reads_ahead = True
        self._roster, self._units, self._outlook, self._pool = roster, roster.units, roster.outlook, roster.pool
        self._tally, self._wants, self._leases = tally, wants, leases

    def wish(self) -> Wish | None:
        """The most urgent missing unit: what a forward waits for, then what one said that it will enter, then the first
        that is expected. One that failed and is waited for is tried again.
        """
        for record in self._tally.demanded.values():
            if record.state is State.FAILED:
                self._tally.move(record, State.ABSENT)
                self._outlook.note_missing(record.id)
            if record.state is State.ABSENT:
                return Wish(record.id, record.nbytes, 0, True)
        if not self.reads_ahead or all(account.window.depth == 0 for account in self._roster.accounts):
            return None
        wanted = self._wants.first_missing(self._units) if self._wants else None
        if wanted is not None:
            return Wish(wanted.id, wanted.nbytes, 0, False)
        found = self._outlook.first_missing(self._is_missing)
        if found is None or not self._may_fetch_ahead(self._units[found[0]]):
            return None
        unit, distance = found
        return Wish(unit, self._units[unit].nbytes, distance, False)

    def decide(self, wish: Wish | None) -> Decision | None:
        """The next thing to do; without a wish, what leaves because the budget has shrunk."""
        return decide(
            wish,
            room_bytes=self._pool.room_bytes(),
            reading_bytes=self._tally.reading_bytes,
            leaving_bytes=self._pool.leaving_bytes(),
            best_to_leave=self._candidates,
        )

    def _is_missing(self, unit: int) -> bool:
        """Whether the unit is worth fetching ahead."""
        record = self._units[unit]
        return record.state is State.ABSENT and record.account.window.depth != 0

    def _may_fetch_ahead(self, record: UnitRecord) -> bool:
        """Whether the window is open, or there is empty room: only where something is driven out has haste a price."""
        account = record.account
        if account.window.is_open(len(self._tally.ahead), self._tally.ahead_bytes, record.nbytes):
            return True
        return account.depth is None and record.nbytes <= self._pool.room_bytes()

    def _candidates(self, beyond: float) -> Iterator[Candidate]:
        for unit, distance in self._outlook.best_to_leave(self._may_leave, self._tally.residents, beyond):
            yield Candidate(unit, self._units[unit].nbytes, distance)

    def _may_leave(self, unit: int) -> bool:
        record = self._units.get(unit)
        if record is None or record.state is not State.RESIDENT or record.leases or record.stays:
            return False
        if self._leases.lingers(record) or unit in self._wants:
            return False
        if record.account.is_held(record.place):
            return False
        record.stays = record.account.was_written(record.place)
        return not record.stays

    def __repr__(self) -> str:
        return f"<Chooser from {self._tally!r}>"
