"""Which forward passes are inside which units. Knows units, threads and frames.

Not thread-safe by itself: the ledger calls it under its lock.

A *lease* says that a forward pass is inside a unit, so that it cannot be evicted. Leases decide what stays, never
whether numbers are right: memory is freed by reference. A lease belongs to a frame. torch runs exit hooks for
``Exception`` only, so a ``KeyboardInterrupt`` leaves leases behind; one whose frame has ended is returned when its
thread next enters a unit, or when the room is needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType

from odewei.scheduler.records import Account, UnitRecord

__all__ = ["Lease", "LeaseBook", "ThreadLeases"]


@dataclass(slots=True)
class Lease:
    """A thread is inside ``unit``; None: inside the model of ``account``. It ends with ``frame`` at the latest."""

    account: Account
    unit: UnitRecord | None
    frame: FrameType

    @property
    def what(self) -> int | Account:
        return self.account if self.unit is None else self.unit.id

    def is_stale(self) -> bool:
        """Whether the frame has ended without returning the lease. Clears the locals of a frame that has."""
        try:
            self.frame.clear()
        except RuntimeError:  # still executing
            return False
        return True


class ThreadLeases:
    """The leases of one thread, innermost last.

    ``lingering`` is a unit that its forward has taken a weight of by itself, without entering the module, and has
    perhaps not used yet: until it enters another unit nothing drives that one out but a forward that waits. Entering
    the same one changes nothing: a forward that loops over views of a weight has the module compute with each.
    """

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.leases: list[Lease] = []
        self.since = 0.0  # when it took the outermost
        self.lingering: UnitRecord | None = None


class LeaseBook:
    """All leases, by thread.

    ``on_outside`` is called with a thread that has returned its last lease, the account of its first, and the seconds
    since then; ``on_ended`` with one that has ended, whose leases have been returned.
    """

    def __init__(
        self, on_outside: Callable[[ThreadLeases, Account, float], None], on_ended: Callable[[ThreadLeases], None]
    ) -> None:
        self._on_outside = on_outside
        self._on_ended = on_ended
        self._threads: set[ThreadLeases] = set()
        self._local = threading.local()

    def mine(self) -> ThreadLeases:
        """The calling thread's leases. A new thread's call clears up after those that have ended."""
        mine: ThreadLeases | None = getattr(self._local, "leases", None)
        if mine is None:
            for ended in [other for other in self._threads if not other.thread.is_alive()]:
                self._forget(ended)
            mine = ThreadLeases()
            self._threads.add(mine)  # first: those that are not known cannot be counted
            self._local.leases = mine
        return mine

    def is_inside(self) -> bool:
        """Whether the calling thread has a lease that it has not left behind."""
        mine: ThreadLeases | None = getattr(self._local, "leases", None)
        return mine is not None and bool(mine.leases) and not mine.leases[0].is_stale()

    def take(
        self, mine: ThreadLeases, account: Account, unit: UnitRecord | None, frame: FrameType, *, lingers: bool = False
    ) -> None:
        """A lease of ``unit`` for the call that runs in ``frame``, after what earlier calls left behind is returned.

        ``lingers``: it has an effect beyond its end, see ThreadLeases.
        """
        if mine.leases and mine.leases[-1].is_stale():
            self._return_stale(mine)
        mine.lingering = unit if lingers or mine.lingering is unit else None
        if not mine.leases:
            mine.since = time.perf_counter()
        mine.leases.append(Lease(account, unit, frame))
        if unit is not None:
            unit.leases += 1

    def give_back(self, mine: ThreadLeases, what: int | Account) -> None:
        """Return the innermost lease of a unit (by its id) or of a model. Leases above it were left behind and go too.

        Nothing happens when there is none.
        """
        leases = mine.leases
        if leases and leases[-1].what == what:  # nearly always
            self._return_last(mine)
        elif any(lease.what == what for lease in leases):
            while self._return_last(mine).what != what:
                pass

    def inside(self) -> list[ThreadLeases]:
        """The threads that have leases."""
        return [thread for thread in self._threads if thread.leases]

    def recount(self, units: Iterable[UnitRecord]) -> None:
        """Count the leases of all units anew, after an interrupt in the middle of a change."""
        for unit in units:
            unit.leases = len(unit.holders)
        for thread in self._threads:
            thread.lingering = None
            for lease in thread.leases:
                if lease.unit is not None:
                    lease.unit.leases += 1

    def lingers(self, unit: UnitRecord) -> bool:
        """Whether a thread has just taken a weight of it."""
        return any(thread.lingering is unit for thread in self._threads)

    def end_lingering(self) -> bool:
        """A forward waits for room. True if anything lingered."""
        found = False
        for thread in self._threads:
            found |= thread.lingering is not None
            thread.lingering = None
        return found

    def return_all_stale(self) -> bool:
        """Return what any thread has left behind. True if there was anything."""
        found = False
        for thread in self._threads:
            found |= self._return_stale(thread)
        return found

    def _return_stale(self, mine: ThreadLeases) -> bool:
        found = False
        while mine.leases and mine.leases[-1].is_stale():
            self._return_last(mine)
            found = True
        return found

    def _return_last(self, mine: ThreadLeases) -> Lease:
        lease = mine.leases.pop()
        if lease.unit is not None:
            lease.unit.leases -= 1
        if not mine.leases:
            mine.lingering = None
            self._on_outside(mine, lease.account, time.perf_counter() - mine.since)
        return lease

    def _forget(self, ended: ThreadLeases) -> None:
        while ended.leases:
            self._return_last(ended)
        self._threads.discard(ended)
        self._on_ended(ended)
