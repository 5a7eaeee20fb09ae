"""Which models there are, with their units, windows and expected orders, and how large a budget they share.

Knows accounts and sizes. Not thread-safe by itself: the ledger calls it under its lock.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from odewei.scheduler.machine import AutoLimit
from odewei.scheduler.outlook import Outlook
from odewei.scheduler.plan import window_for
from odewei.scheduler.reader import UnitReader
from odewei.scheduler.records import Account, UnitRecord
from odewei.scheduler.slabs import SlabPool

__all__ = ["Roster"]


class Roster:
    """The accounts of one ledger. Ids of units are never used again."""

    def __init__(self, pool: SlabPool, outlook: Outlook, auto: AutoLimit | None) -> None:
        self.accounts: list[Account] = []
        self.units: dict[int, UnitRecord] = {}
        self.auto = auto
        self.pool = pool
        self.outlook = outlook
        self._ids = itertools.count()

    def add(self, account: Account, units: Sequence[tuple[str, UnitReader]]) -> None:
        """A model comes. Its units are expected in the order given, those that are only there on demand not at all."""
        for place, (name, reader) in enumerate(units):
            on_demand = account.ahead is not None and place >= account.ahead
            number = next(self._ids)
            number = place if number == place else number  # one object instead of two
            record = UnitRecord(number, name, reader.nbytes, account, place, reader, on_demand)
            self.units[record.id] = record
            account.units.append(record)
            if on_demand:
                self.outlook.expect_at_random(record.id)
        self.accounts.append(account)
        self._set_windows()
        self.seed(account, range(len(units))[: account.ahead])

    def seed(self, account: Account, order: Sequence[int]) -> None:
        """Expect the units of a model, by their places, in this order, and models in the order in which they came."""
        account.order = tuple(account.units[place].id for place in order)
        self._expect()

    def remove(self, account: Account) -> None:
        """A model is not expected any more. Its units stay until they are struck."""
        self.accounts.remove(account)
        self._expect()

    def strike(self, account: Account) -> list[UnitRecord]:
        """Forget the units of a model that was removed; those that were here."""
        struck = [record for record in account.units if self.units.pop(record.id, None) is not None]
        account.units.clear()
        return struck

    def adapt(self) -> None:
        """Have an "auto" budget follow what is available, now and then."""
        if self.auto is None:
            return
        budget = self.pool.budget
        limit = self.auto.changed(
            budget.limit_bytes,
            budget.used_bytes,
            least_bytes=self.least_bytes,
            most_bytes=max(1, sum(account.most_bytes for account in self.accounts)),
        )
        if limit is not None:
            self.limit(limit)

    @property
    def least_bytes(self) -> int:
        """What the models need at one moment, whatever happens."""
        pinned = sum(account.pinned_bytes for account in self.accounts)
        return pinned + max((account.least_bytes for account in self.accounts), default=1)

    def limit(self, nbytes: int) -> None:
        """Another budget."""
        self.pool.set_limit(nbytes)
        self._set_windows()

    def begin_anew(self) -> None:
        """Have the outlook know nothing but what is expected of these models."""
        self.outlook.begin_anew()
        for record in self.units.values():
            if record.on_demand:
                self.outlook.expect_at_random(record.id)
        self._set_windows()
        self._expect()

    def _expect(self) -> None:
        self.outlook.seed([unit for account in self.accounts for unit in account.order])

    def _set_windows(self) -> None:
        limit = self.pool.budget.limit_bytes
        largest = max((record.nbytes for record in self.units.values() if not record.on_demand), default=0)
        for account in self.accounts:
            account.window = window_for(account.depth, limit, largest)
        self.space_out(largest)

    def space_out(self, largest_bytes: int) -> None:
        """What is used now and what is ahead has to move; the rest may stay. Without a window only bytes count."""
        limit = self.pool.budget.limit_bytes
        moving = max((account.window.most_bytes(largest_bytes) for account in self.accounts), default=0)
        self.outlook.keep(max(0, limit - moving - largest_bytes) if moving else 0)

    def __repr__(self) -> str:
        return f"<Roster of {len(self.accounts)} models, {len(self.units)} units>"
