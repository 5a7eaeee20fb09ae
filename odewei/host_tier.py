"""The host's side of a model on an accelerator: its units in host memory, under a budget of their own.

Knows the scheduler's parts and puts them together. Knows nothing of modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from odewei.errors import BudgetTooSmallError
from odewei.memory_budget import MemoryBudget
from odewei.scheduler.accelerator import Accelerator
from odewei.scheduler.budget import format_nbytes
from odewei.scheduler.device_units import DeviceUnit, HostUnit, Shelf
from odewei.scheduler.drivers import Driver
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.reader import FileTable, UnitReader
from odewei.scheduler.records import Account

__all__ = ["HostTier"]


class HostTier:
    """``units`` are those of the device's tier, in the order of ``readers``; ``account`` is the host's."""

    def __init__(
        self,
        budget: MemoryBudget,
        accelerator: Accelerator,
        names: Sequence[str],
        readers: Sequence[UnitReader],
        files: FileTable,
    ) -> None:
        """``readers`` read the units called ``names`` into host memory, from ``files``."""
        self.budget = budget
        self._accelerator = accelerator
        self._names = names
        self._readers = [HostUnit(reader) for reader in readers]
        shelf = Shelf()
        self.units = [DeviceUnit(reader, shelf, place) for place, reader in enumerate(readers)]
        self.account = Account(shelf, files, None, on_closed=shelf.clear)
        self._driver: Driver | None = None

    def join(self, depth: int | None, ahead: int, *, synchronous: bool) -> None:
        """Have it served. ``depth``, ``ahead``: see Account. Raises BudgetTooSmallError if not even one unit fits."""
        account, sizes = self.account, [reader.nbytes for reader in self._readers]
        account.depth, account.ahead = depth, ahead
        account.least_bytes, account.most_bytes = max(sizes, default=1), sum(sizes)
        limit = self.budget.expect(account.most_bytes)
        if account.least_bytes > limit:
            raise BudgetTooSmallError(
                f"the host_budget of {limit} bytes ({format_nbytes(limit)}) cannot hold the largest unit, which passes "
                f"through it",
                module=self._names[sizes.index(account.least_bytes)],
                cure=f"The smallest host_budget that works is {account.least_bytes} bytes "
                f"({format_nbytes(account.least_bytes)})",
            )
        named = list(zip(self._names, self._readers, strict=True))
        self._driver = self.budget.join(account, named, synchronous=synchronous)
        for unit, record in zip(self.units, account.units, strict=True):
            unit.host = record
        self._driver.start()
        self._driver.poke()

    @property
    def ledger(self) -> Ledger:
        """Of the host's tier, after ``join``."""
        assert self._driver is not None, "nobody serves the host's tier yet"
        return self._driver.ledger

    def seed(self, order: Sequence[int]) -> None:
        """Expect the units in this order, by their places."""
        if self._driver is not None:
            self._driver.ledger.seed(self.account, order)
            self._driver.poke()

    @property
    def has_clock(self) -> bool:
        """Whether the device says when it computed."""
        return self._accelerator.has_streams

    def report(self) -> dict[str, Any]:
        """What a Report says of it."""
        counters, budget = self.account.counters, self.budget.pool.budget
        return {
            "device_note": self._accelerator.note(),
            "host_budget_bytes": budget.limit_bytes,
            "host_resident_bytes": sum(record.nbytes for record in self.account.units if record.slab is not None),
            "host_peak_bytes": budget.peak_bytes,
            "host_hits": counters.hits,
            "host_accesses": counters.accesses,
        }

    def leave(self) -> None:
        """For good; after the device's tier has left. May be called twice, and by a finalizer."""
        if self._driver is not None:
            self._driver.leave_for_good(self.account)

    def __repr__(self) -> str:
        return f"<HostTier of {len(self.units)} units, {self.budget!r}>"
