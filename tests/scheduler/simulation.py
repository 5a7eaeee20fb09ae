"""A disk and a model with a virtual clock around the real ledger: overlap can be asserted exactly, without waiting.

Everything that decides is the real thing (ledger, plan, outlook, slab pool). Only time is not: computing a unit and
reading a byte take as long as they are said to, and deciding takes none.
"""

from __future__ import annotations

import heapq
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, pairwise

from odewei.scheduler.budget import Budget
from odewei.scheduler.host_memory import Bytes
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.plan import Window
from odewei.scheduler.reader import FileTable
from odewei.scheduler.records import Account, Waiter
from odewei.scheduler.slab import Slab
from odewei.scheduler.slabs import SlabPool

from .fakes import FakeClient, FakeUnit

__all__ = ["Access", "Disk", "Outcome", "Simulation"]

Access = tuple[int, float]
"""A unit, and the seconds that computing with it takes."""


@dataclass(frozen=True)
class Disk:
    """``bandwidth`` bytes a second over all ``readers``, each of which reads a chunk at a time at its share of it.

    ``chunks``: into how many pieces a unit is cut. One reader and one chunk: a disk that is busy or not.
    """

    bandwidth: float
    readers: int = 1
    chunks: int = 1

    def seconds(self, nbytes: int) -> float:
        """The time that one reader takes."""
        return nbytes / self.bandwidth * self.readers


@dataclass
class Outcome:
    """What a pass took and read. Seconds of virtual time; ``idle`` is the time during which no reader was busy."""

    seconds: float = 0.0
    computing: float = 0.0
    bytes_read: int = 0
    stalls: int = 0
    stalled: float = 0.0
    idle: float = 0.0


@dataclass
class _Thread:
    """A thread of execution. ``local``: what the ledger knows it by."""

    passes: Iterator[Iterable[Access]]
    local: threading.local = field(default_factory=threading.local)
    accesses: Iterator[Access] = field(default_factory=lambda: iter(()))
    account: Account | None = None
    unit: int | None = None
    seconds: float = 0.0
    waiter: Waiter | None = None
    since: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)


class Simulation:
    """Units of ``sizes`` bytes under a budget of ``limit`` bytes. ``run`` may be called again and goes on.

    ``models``: how many of the units each model has, in their order; all are one model's by default. A pass is one of
    the model that has its first unit.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        limit: int,
        window: Window,
        disk: Disk,
        seed: Sequence[int] | None = None,
        models: Sequence[int] = (),
    ) -> None:
        self.pool = SlabPool(Budget(limit))
        self.ledger = Ledger(self.pool)
        self.disk = disk
        units = iter([(f"unit{unit}", FakeUnit(unit, size, [])) for unit, size in enumerate(sizes)])
        for number in models or [len(sizes)]:
            account = Account(FakeClient(), FileTable(direct=False, scratch_bytes=4096), window.depth)
            assert self.ledger.join(account, list(islice(units, number)))
        for account in self.ledger.accounts:
            account.window = window
        self.account = self.ledger.accounts[0]
        self.ledger.roster.space_out(max(sizes))
        if seed is not None:
            self.ledger.seed(self.account, seed)
        self.now = 0.0
        self.reads: list[int] = []
        self._bound: dict[int, Bytes] = {}
        self._slabs: dict[int, Slab] = {}
        self._missing_chunks: dict[int, int] = {}
        self._queue: list[tuple[int, int]] = []  # unit, bytes of a chunk
        self._free_readers = disk.readers
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._busy_since = 0.0
        self._busy = 0.0
        self._threads: list[_Thread] = []
        self._frame = sys._getframe()
        while self._frame.f_back is not None:
            self._frame = self._frame.f_back

    def run(self, *programs: Iterable[Iterable[Access]]) -> list[Outcome]:
        """Run one program a thread, each a sequence of passes, all at once. Returns the first one's passes."""
        self._threads = [_Thread(iter(program)) for program in programs]
        for thread in self._threads:
            self._at(self.now, lambda thread=thread: self._begin_pass(thread))
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()
            self._decide()
        return self._threads[0].outcomes

    # -- the forward threads -----------------------------------------------------------------------------------------

    def _as(self, thread: _Thread) -> None:
        self.ledger._leases._local = thread.local

    def _begin_pass(self, thread: _Thread) -> None:
        accesses = next(thread.passes, None)
        if accesses is None:
            return
        accesses = list(accesses)
        thread.accesses = iter(accesses)
        thread.account = self.ledger.units[accesses[0][0]].account if accesses else self.account
        self._as(thread)
        self.ledger.enter_pass(thread.account, self._frame)
        totals = Outcome(self.now, 0.0, self._bytes_read(), idle=self._idle_until_now())
        thread.outcomes.append(totals)
        self._next_access(thread)

    def _next_access(self, thread: _Thread) -> None:
        self._as(thread)
        access = next(thread.accesses, None)
        outcome = thread.outcomes[-1]
        if access is None:
            assert thread.account is not None
            self.ledger.leave_pass(thread.account)
            outcome.seconds = self.now - outcome.seconds
            outcome.bytes_read = self._bytes_read() - outcome.bytes_read
            outcome.idle = self._idle_until_now() - outcome.idle
            self._begin_pass(thread)
            return
        thread.unit, thread.seconds = access
        outcome.computing += thread.seconds
        thread.waiter, thread.since = self.ledger.enter(thread.unit, self._frame), self.now
        if thread.waiter is None:
            self._at(self.now + thread.seconds, lambda: self._end_access(thread))

    def _end_access(self, thread: _Thread) -> None:
        self._as(thread)
        assert thread.unit is not None
        self.ledger.leave(thread.unit)
        self._next_access(thread)

    def _wake(self) -> None:
        for thread in self._threads:
            if thread.waiter is not None and thread.waiter.done.is_set():
                assert thread.waiter.error is None
                thread.waiter = None
                thread.outcomes[-1].stalls += 1
                thread.outcomes[-1].stalled += self.now - thread.since
                self._at(self.now + thread.seconds, lambda thread=thread: self._end_access(thread))

    # -- the driver --------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        while (decision := self.ledger.next_decision()) is not None:
            for unit in decision.evict:
                del self._bound[unit]
            if decision.fetch is None:
                continue
            record = self.ledger.units[decision.fetch]
            slab = self.pool.acquire(record.name, record.nbytes, beyond_limit=decision.beyond_limit)
            if slab is not None:
                self._begin_read(decision.fetch, slab)
        self._start_readers()

    def _begin_read(self, unit: int, slab: Slab) -> None:
        self.ledger.begin_read(unit, slab)
        self.reads.append(unit)
        self._slabs[unit] = slab
        chunks = min(self.disk.chunks, max(1, slab.nbytes))
        self._missing_chunks[unit] = chunks
        ends = [slab.nbytes * number // chunks for number in range(chunks + 1)]
        self._queue += [(unit, end - start) for start, end in pairwise(ends)]

    def _start_readers(self) -> None:
        while self._free_readers and self._queue:
            chunk = min(self._queue, key=lambda chunk: not self.ledger.units[chunk[0]].waiters)
            self._queue.remove(chunk)
            if self._free_readers == self.disk.readers:
                self._busy_since = self.now
            self._free_readers -= 1
            self._at(self.now + self.disk.seconds(chunk[1]), lambda unit=chunk[0]: self._end_chunk(unit))

    def _end_chunk(self, unit: int) -> None:
        self._free_readers += 1
        if self._free_readers == self.disk.readers:
            self._busy += self.now - self._busy_since
        self._missing_chunks[unit] -= 1
        if not self._missing_chunks[unit]:
            slab = self._slabs.pop(unit)
            self.ledger.finish_read(unit, slab.nbytes)
            self._bound[unit] = self.pool.lend(slab)
            self.ledger.arrive(unit)
            self._wake()

    def _bytes_read(self) -> int:
        return sum(account.counters.bytes_read for account in self.ledger.accounts)

    def _idle_until_now(self) -> float:
        busy = self._busy + (self.now - self._busy_since if self._free_readers < self.disk.readers else 0.0)
        return self.now - busy

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), act))
