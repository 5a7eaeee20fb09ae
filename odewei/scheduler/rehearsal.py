"""Forward passes before there is a model: the real ledger, with a clock that is only counted.

What decides is the real thing (ledger, plan, outlook, slab pool), so that what is rehearsed is what will happen. Only
time is not: reading a byte and computing take as long as they are said to, and deciding takes none. Slabs are mapped
and never touched, which takes no memory. Knows unit ids, sizes, seconds. One thread, one model, one disk that
reads unit after unit, those first that are waited for.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch

from odewei.scheduler.budget import Budget
from odewei.scheduler.host_memory import Bytes
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.reader import FileTable, Job
from odewei.scheduler.reads import Placement
from odewei.scheduler.records import Account, Waiter
from odewei.scheduler.slab import Slab
from odewei.scheduler.slabs import SlabPool

__all__ = ["Enter", "Leave", "Rehearsal", "RehearsedPass", "RehearsedUnit", "Step"]


@dataclass(frozen=True, slots=True)
class RehearsedUnit:
    """A unit of which ``read_bytes`` are read into a slab of ``nbytes``."""

    name: str
    nbytes: int
    read_bytes: int

    @property
    def placements(self) -> Sequence[Placement]:
        return _unread()

    def jobs(self) -> Sequence[Job]:
        return _unread()

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        return _unread()


class Enter(NamedTuple):
    """A pass enters a unit, by its place, and computes for so many seconds."""

    unit: int
    seconds: float = 0.0


class Leave(NamedTuple):
    """A pass leaves a unit."""

    unit: int


Step = Enter | Leave


@dataclass(frozen=True, slots=True)
class RehearsedPass:
    """What a pass took and read, in seconds and bytes. ``missed``: the places of the units that were waited for or read
    ahead since the pass before.
    """

    seconds: float
    computing: float
    stalled: float
    bytes_read: int
    missed: frozenset[int]


class Rehearsal:
    """Units under a budget, in the order in which they are expected. ``run_pass`` goes on from where the last ended.

    ``bandwidth``: bytes a second. ``depth``: units ahead, None for "auto". The first ``ahead`` units are expected; of
    the budget ``pinned_bytes`` are not the units'.
    """

    def __init__(
        self,
        units: Sequence[RehearsedUnit],
        *,
        limit_bytes: int,
        bandwidth: float,
        depth: int | None = None,
        ahead: int | None = None,
        pinned_bytes: int = 0,
    ) -> None:
        self._pool = SlabPool(Budget(limit_bytes))
        if pinned_bytes:
            self._pool.budget.reserve("pinned", pinned_bytes)
        self._ledger = Ledger(self._pool)
        files = FileTable(direct=False, scratch_bytes=1)
        self._account = Account(_Nobody(), files, depth, pinned_bytes=pinned_bytes, ahead=ahead)
        self._ledger.join(self._account, [(unit.name, unit) for unit in units])
        self._units = units
        self._bandwidth = bandwidth
        self._now = 0.0
        self._queue: deque[int] = deque()
        self._reading: int | None = None
        self._ends = 0.0
        self._slabs: dict[int, Slab] = {}
        self._bound: dict[int, Bytes] = {}
        self._missed: set[int] = set()

    def run_pass(self, steps: Sequence[Step]) -> RehearsedPass:
        """One pass that enters and leaves units in this order."""
        began, read, self._missed = self._now, self._account.counters.bytes_read, set()
        computing = stalled = 0.0
        frame = sys._getframe()  # runs until the end of the pass
        self._ledger.enter_pass(self._account, frame)
        for step in steps:
            unit = self._account.units[step.unit].id
            if isinstance(step, Enter):
                waiter = self._ledger.enter(unit, frame)
                self._decide()
                stalled += self._wait(waiter) if waiter is not None else 0.0
                computing += step.seconds
                self._compute(step.seconds)
            else:
                self._ledger.leave(unit)
                self._decide()
        self._ledger.leave_pass(self._account)
        bytes_read = self._account.counters.bytes_read - read
        return RehearsedPass(self._now - began, computing, stalled, bytes_read, frozenset(self._missed))

    def close(self) -> None:
        """Unmap all slabs."""
        self._bound.clear()
        self._slabs.clear()
        self._pool.close()

    # -- time --------------------------------------------------------------------------------------------------------

    def _wait(self, waiter: Waiter) -> float:
        """Let reads end until the unit is there; the seconds that took."""
        since = self._now
        if self._reading != waiter.unit and waiter.unit in self._queue:
            self._queue.remove(waiter.unit)
            self._queue.appendleft(waiter.unit)
        while not waiter.done.is_set():
            self._now = max(self._now, self._ends)
            self._end_read()
        return self._now - since

    def _compute(self, seconds: float) -> None:
        until = self._now + seconds
        while self._reading is not None and self._ends <= until:
            self._now = max(self._now, self._ends)
            self._end_read()
        self._now = until

    # -- the driver --------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        while (decision := self._ledger.next_decision()) is not None:
            for unit in decision.evict:
                self._bound.pop(unit, None)
            if decision.fetch is None:
                continue
            record = self._ledger.units[decision.fetch]
            slab = self._pool.acquire(record.name, record.nbytes, beyond_limit=decision.beyond_limit)
            if slab is None:
                continue
            self._ledger.begin_read(decision.fetch, slab)
            self._missed.add(record.place)
            self._slabs[decision.fetch] = slab
            self._queue.append(decision.fetch)
        self._begin_read()

    def _begin_read(self) -> None:
        if self._reading is None and self._queue:
            self._reading = self._queue.popleft()
            place = self._ledger.units[self._reading].place
            self._ends = self._now + self._units[place].read_bytes / self._bandwidth

    def _end_read(self) -> None:
        unit = self._reading
        assert unit is not None, "a pass waits, and nothing is read"
        self._reading = None
        slab = self._slabs.pop(unit)
        self._ledger.finish_read(unit, self._units[self._ledger.units[unit].place].read_bytes)
        self._bound[unit] = self._pool.lend(slab)
        self._ledger.arrive(unit)
        self._decide()

    def __repr__(self) -> str:
        return f"<Rehearsal of {len(self._units)} units at {self._now:.3f} s: {self._ledger!r}>"


class _Nobody:
    """Nobody binds anything."""

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        _unread()

    def bind(self, unit: int) -> None:
        _unread()

    def retract(self, unit: int) -> None:
        _unread()


def _unread() -> NoReturn:
    raise AssertionError("a rehearsal reads nothing")
