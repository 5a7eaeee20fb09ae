"""Slabs: host memory that a unit's bytes are read into. Freed by reference, reused by size.

A slab goes back to its pool when the last tensor over it has died, not when the scheduler says so: a forward may return
a view of its weight, a user may keep one, autograd saves them. Every load exposes its slab through a fresh NumPy view;
tensors made with ``torch.frombuffer`` keep that view alive, and a finalizer on it runs when the last of them is gone.

The finalizer runs in whichever thread drops the last reference, at any moment, also while that thread holds locks; so
it only appends to a deque. Everybody who looks at the pool drains that deque first.

Large slabs are anonymous memory maps with huge pages: reading into 4 KiB pages costs the processor time that the model
computes with, and fresh pages have to be cleared first, which is why slabs are kept and used again, for another size by
remapping their pages. A free slab still occupies its bytes of the budget until another size needs them.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable

from odewei.scheduler.budget import Budget, Reservation
from odewei.scheduler.forks import is_held_by_nobody_here
from odewei.scheduler.host_memory import HUGE_PAGE, Bytes, HostMemory
from odewei.scheduler.slab import Slab
from odewei.scheduler.whole import Books, whole

__all__ = ["SlabPool"]


class SlabPool(Books):
    """All slabs under one budget. Methods may be called from any thread.

    A slab is *in use* from ``acquire`` until the last view from ``lend`` has died, and *free* afterwards. It is
    *leaving* while its unit has been evicted but somebody still holds a tensor over it.
    """

    def __init__(self, budget: Budget, source: HostMemory | None = None) -> None:
        """``source``: where the memory of slabs comes from."""
        self.budget = budget
        self.source = source or HostMemory()
        self.on_return: Callable[[], None] | None = None  # called by a finalizer: may take no lock
        self.lock = threading.RLock()  # a finalizer may close the pool in a thread that holds it
        self._free: dict[int, list[Slab]] = {}
        self._free_bytes = 0
        self._in_use: set[Slab] = set()
        self._leaving: set[Slab] = set()  # of those in use
        self._spare: dict[str, tuple[object, Reservation]] = {}
        self._spare_bytes = 0
        self._others: set[Reservation] = set()  # of memory that is not the pool's
        self._returned: deque[tuple[Slab, int]] = deque()  # with its use, which may be over already
        self._closed = False
        self.escapes = 0  # slabs that outlived their unit's eviction when the room was needed

    @whole
    def room_bytes(self) -> int:
        """What ``acquire`` can deliver without going beyond the budget: unreserved bytes and those of free slabs."""
        self._drain()
        return self.budget.free_bytes + self._unneeded_bytes()

    @whole
    def leaving_bytes(self) -> int:
        """Bytes of evicted units that somebody still holds on to."""
        self._drain()
        return sum(slab.nbytes for slab in self._leaving)

    @whole
    def acquire(self, owner: str, nbytes: int, *, beyond_limit: bool = False) -> Slab | None:
        """A slab of exactly ``nbytes`` bytes; None if there is no room and ``beyond_limit`` was not asked for.

        Raises OSError, or torch.OutOfMemoryError for a device, if the system has no memory for it.
        """
        self._drain()
        slab = self._take_free(nbytes)
        if slab is None:
            if nbytes > self.budget.free_bytes + self._unneeded_bytes() and not beyond_limit:
                return None
            slab = self._resized(owner, nbytes)
        if slab is None:
            if nbytes > self.budget.free_bytes + self._unneeded_bytes():
                self._find_lost(self._in_use)
                self._drain()
            self._unmap_free(nbytes)
            reservation = self.budget.reserve(owner, nbytes, beyond_limit=beyond_limit)
            try:
                slab = self._new(nbytes, reservation)
            except BaseException:
                self.budget.release(reservation)
                raise
        slab.about_to_fill()
        slab.begin_use(owner)
        self._in_use.add(slab)
        return slab

    @whole
    def lend(self, slab: Slab) -> Bytes:
        """A fresh view of a filled slab. When it and every tensor over it have died, the slab is free."""
        view = slab.view()
        slab.note_lent(view)
        weakref.finalize(view, self._give_back, slab, slab.uses).atexit = False
        return view

    @whole
    def release(self, slab: Slab) -> None:
        """Give back a slab that was never lent (reading into it failed), or is not any more."""
        self._returned.append((slab, slab.uses))
        self._drain()

    @whole
    def reclaim(self, kept: Container[Slab | None]) -> None:
        """After an interrupt, while nothing is acquired: all slabs that were never lent are free, but those ``kept``,
        and so are those whose finalizer it has ended.
        """
        self._returned.extend((slab, slab.uses) for slab in self._in_use if not slab.is_lent and slab not in kept)
        self._find_lost(self._in_use)
        self._drain()

    @whole
    def mark_leaving(self, slab: Slab, owner: str) -> None:
        """The unit in ``slab`` was evicted: its bytes come back as soon as nobody holds them, or are back already."""
        self._drain()
        if slab in self._in_use and slab.reservation.owner == owner:
            self._leaving.add(slab)

    @whole
    def stop_expecting_leaving(self) -> None:
        """Those who hold memory of evicted units keep it (views that escaped): it counts as used until it is back."""
        self._find_lost(self._leaving)
        self._drain()
        self.escapes += len(self._leaving)
        self._leaving.clear()

    @whole
    def keep_spare(self, name: str, thing: object, nbytes: int) -> bool:
        """Keep something of ``nbytes`` bytes under ``name`` until the room is needed. False if there is no room now."""
        self._drain()
        if name in self._spare or nbytes > self.budget.free_bytes:
            return False
        self._spare[name] = (thing, self.budget.reserve(name, nbytes))
        self._spare_bytes += nbytes
        return True

    @whole
    def take_spare(self, name: str) -> object | None:
        """What was kept under ``name``, no longer counted; None if it is gone."""
        return self._drop_spare(name) if name in self._spare else None

    @whole
    def count(self, owner: str, nbytes: int, instead_of: Reservation | None = None) -> Reservation:
        """Count memory that is not the pool's, as weights that a user has put in the place of others are: there is less
        room, and if there is none the budget is overdrawn.
        """
        self.uncount(instead_of)
        self._drain()
        self._unmap_free(nbytes)
        reservation = self.budget.reserve(owner, nbytes, beyond_limit=True)
        self._others.add(reservation)
        return reservation

    @whole
    def uncount(self, reservation: Reservation | None) -> None:
        """It is not there any more."""
        if reservation is not None and reservation in self._others:
            self._others.remove(reservation)
            self.budget.release(reservation)

    @whole
    def set_limit(self, limit_bytes: int) -> None:
        """Change the budget, and unmap free slabs that a smaller one has no room for."""
        self.budget.set_limit(limit_bytes)
        self._drain()
        self._unmap_free(0)

    @whole
    def reopen(self) -> None:
        """Use the pool again after ``close``."""
        self._closed = False

    @whole
    def close(self) -> None:
        """Unmap every free slab; those in use follow when their last tensor dies."""
        self._closed = True
        self._find_lost(self._in_use)
        self._drain()
        self._unmap_free(None)

    def is_held_by_caller(self) -> bool:
        """Whether this thread is inside a method of the pool."""
        return self.lock._is_owned()  # type: ignore[no-any-return]

    def after_fork(self) -> bool:
        """In the child: whether the pool is whole, because no other thread was in here."""
        if not is_held_by_nobody_here(self.lock):
            return True
        self.lock = threading.RLock()
        self._changing = False
        return False

    @whole
    def check_invariants(self) -> None:
        """Raise AssertionError unless every reserved byte is that of exactly one slab or other reservation."""
        self._drain()
        self.budget.check_invariants()
        free = [slab for slabs in self._free.values() for slab in slabs]
        assert sum(slab.nbytes for slab in free) == self._free_bytes
        assert not self._in_use.intersection(free), "a slab is free and in use"
        assert self._leaving <= self._in_use
        assert self._spare_bytes == sum(reservation.nbytes for _, reservation in self._spare.values())
        in_use = sum(slab.nbytes for slab in self._in_use)
        others = sum(reservation.nbytes for reservation in self._others)
        assert in_use + self._unneeded_bytes() + others == self.budget.used_bytes, "a reserved byte has no owner"

    def _give_back(self, slab: Slab, use: int) -> None:
        """Finalizer of a lent view: any thread, any moment; it waits for no lock."""
        self._returned.append((slab, use))
        if self._closed:
            slab.unmap()
            if not self.is_held_by_caller() and self.lock.acquire(blocking=False):
                try:
                    self._drain()  # nobody else may ever come by
                finally:
                    self.lock.release()
        elif self.on_return is not None:
            self.on_return()

    def _drain(self) -> None:
        while self._returned:
            slab, use = self._returned.popleft()
            if slab not in self._in_use or slab.uses != use:
                continue  # it was found before
            self._in_use.remove(slab)
            self._leaving.discard(slab)
            self._recycle(slab)

    def _recycle(self, slab: Slab) -> None:
        """A slab is not in use any more."""
        if self._closed or self.budget.free_bytes < 0:
            self._unmap(slab)
        else:
            self._free.setdefault(slab.nbytes, []).append(slab)
            self._free_bytes += slab.nbytes

    def _new(self, nbytes: int, reservation: Reservation) -> Slab:
        return Slab(nbytes, reservation, self.source)

    def _find_lost(self, slabs: Iterable[Slab]) -> None:
        """An interrupt in a finalizer ends it: the slab is free all the same."""
        self._returned.extend((slab, slab.uses) for slab in slabs if slab.is_over)

    def _mend(self) -> None:
        """From the slabs in use, the free ones and the spares; one that is none of these any more is gone."""
        free = {slab for slabs in self._free.values() for slab in slabs} - self._in_use
        self._free = {}
        for slab in free:
            self._free.setdefault(slab.nbytes, []).append(slab)
        self._free_bytes = sum(slab.nbytes for slab in free)
        self._leaving &= self._in_use
        self._spare_bytes = sum(reservation.nbytes for _, reservation in self._spare.values())
        spare = [reservation for _, reservation in self._spare.values()]
        self.budget.restate([*(slab.reservation for slab in self._in_use | free), *spare, *self._others])
        self._find_lost(self._in_use)

    def _take_free(self, nbytes: int) -> Slab | None:
        slabs = self._free.get(nbytes)
        if not slabs:
            return None
        self._free_bytes -= nbytes
        slab = slabs.pop()
        if not slabs:
            del self._free[nbytes]
        return slab

    def _resized(self, owner: str, nbytes: int) -> Slab | None:
        """A large free slab of about the size, made to fit; None if there is none, or room without touching any."""
        if nbytes <= self.budget.free_bytes:
            return None
        near = [size for size in self._free if nbytes // 2 < size < 2 * nbytes]
        slab = self._take_free(max(near)) if near and nbytes >= HUGE_PAGE else None
        if slab is None:
            return None
        self.budget.release(slab.reservation)
        self._unmap_free(nbytes)
        if nbytes <= self.budget.free_bytes:
            reservation = self.budget.reserve(owner, nbytes)
            if slab.try_resize(nbytes, reservation):
                return slab
            self.budget.release(reservation)
        slab.unmap()
        return None

    def _unmap_free(self, needed_bytes: int | None) -> None:
        """Unmap free slabs, the largest first, then drop spares, the newest first, until ``needed_bytes`` can be
        reserved.

        None: all of them.
        """
        while self._free and (needed_bytes is None or self.budget.free_bytes < needed_bytes):
            slab = self._take_free(max(self._free))
            assert slab is not None
            self._unmap(slab)
        while self._spare and (needed_bytes is None or self.budget.free_bytes < needed_bytes):
            self._drop_spare(next(reversed(self._spare)))

    def _drop_spare(self, name: str) -> object:
        thing, reservation = self._spare.pop(name)
        self._spare_bytes -= reservation.nbytes
        self.budget.release(reservation)
        return thing

    def _unneeded_bytes(self) -> int:
        return self._free_bytes + self._spare_bytes

    def _unmap(self, slab: Slab) -> None:
        self.budget.release(slab.reservation)
        slab.unmap()

    def __repr__(self) -> str:
        return f"<SlabPool: {len(self._in_use)} in use, {self._free_bytes} bytes free, {self.budget!r}>"
