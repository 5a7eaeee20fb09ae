"""From host memory to the device: the same drivers, whose reading is a copy.

An accelerator has two tiers, each a ledger with its own budget and rules (``plan``): the device's, whose units models
are bound to, and the host's, whose units are flat stretches of (pinned) memory read from the checkpoint. A unit that
the device misses is an access of the host's tier, which so predicts by itself what to read ahead and what to keep.

The way of a unit: the device's ledger decides that it is next and takes memory for it → its host unit is leased, after
a read if it is not there → one flat copy on the copy stream → it is bound when somebody enters it, whose stream waits
for the copy, on the device → it leaves, and its memory is free when its last tensor has died. The host unit's lease is
returned when the copy is known to be over.

Decisions are made by whoever enters or leaves a unit, in its own thread, because memory is used again after what was
computed *until it was taken*: were it taken later, by another thread, the copy would wait for layers that have nothing
to do with it. Everything else is done by the driver's own thread; no forward pass waits for the device.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence

from odewei.errors import OdeweiError
from odewei.scheduler.accelerator import Copy
from odewei.scheduler.device_pool import DeviceSlab
from odewei.scheduler.device_synchronous import OnDevice
from odewei.scheduler.device_units import DeviceUnit
from odewei.scheduler.drivers import Driver
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.prefetcher import PrefetchingDriver
from odewei.scheduler.records import UnitRecord, Waiter
from odewei.scheduler.slab import Slab

__all__ = ["CopyingDriver"]


class CopyingDriver(OnDevice, PrefetchingDriver):
    """Copies ahead on the copy stream. One more thread, which waits for copies only while somebody waits for the
    memory that they hold on the host.
    """

    def __init__(self, ledger: Ledger, host: Driver, *, name: str) -> None:
        super().__init__(ledger, num_readers=1, name=name)
        self._set_up(host)
        self._deciding = threading.RLock()  # one thread at a time
        self._torn = False  # an interrupt has ended a decision
        self._begun: deque[tuple[UnitRecord, Slab]] = deque()
        self._reading: set[int] = set()  # units; only the loop's thread changes it
        self._flying: deque[tuple[UnitRecord, DeviceSlab, Copy, Waiter]] = deque()  # in the order of the copy stream
        self._waiting = 0  # reads that wait for their host unit
        self._watcher: asyncio.Task[None] | None = None

    # -- any thread --------------------------------------------------------------------------------------------------

    def poke(self) -> None:
        if not self.ledger.needs_driver() and not self._flying:
            return
        if not self._is_own_thread() and not self._deciding._is_owned():  # type: ignore[attr-defined]
            self._decide_whole()
        self._wake()

    def _decide_whole(self) -> None:
        """Until this has ended as it should, it counts as interrupted: then nobody has in hand what it began."""
        with self._deciding:
            if self._torn:
                begun = self._begun.copy()  # first: the loop's thread adds to the others before it takes from here
                self._mend(self._reading | {record.id for record, _ in begun})
            self._torn = True
            super()._decide()
            self._torn = False

    def _begin(self, record: UnitRecord, slab: Slab) -> None:
        self._begun.append((record, slab))

    def _may_wait(self) -> bool:
        return super()._may_wait() and not self._deciding._is_owned()  # type: ignore[attr-defined]

    # -- the loop's thread -------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        self._note_landed()
        self._decide_whole()
        while self._begun:
            self._reading.add(self._begun[0][0].id)
            super()._begin(*self._begun.popleft())

    async def _read(self, record: UnitRecord, slab: Slab) -> None:
        try:
            await self._hold_and_copy(record, slab)
        finally:
            self._reading.discard(record.id)

    async def _hold_and_copy(self, record: UnitRecord, slab: Slab) -> None:
        assert isinstance(record.reader, DeviceUnit)
        assert record.reader.host is not None
        with record.account.busy:
            waiter = await self._hold(record.reader.host.id)
        if waiter.error is not None:
            self.host.let_go(waiter)
            self._give_up(record, slab, waiter.take_error(), 0)
            return
        copy = self._copy(record, slab)
        if copy is None:
            self.host.let_go(waiter)
            return
        assert isinstance(slab, DeviceSlab)
        self._flying.append((record, slab, copy, waiter))
        self._note_landed()
        self._watch()

    async def _hold(self, unit: int) -> Waiter:
        """The host unit's lease, when it is there. An error is the waiter's."""
        told = asyncio.Event()
        waiter = Waiter(unit, lambda: self._loop.call_soon_threadsafe(told.set))
        self._waiting += 1
        try:
            self.host.hold(waiter)
            if not waiter.done.is_set():
                self._watch()
                await told.wait()
        except OdeweiError as error:
            waiter.error = error
        finally:
            self._waiting -= 1
        return waiter

    def _note_landed(self) -> None:
        """Give the memory of copies that are over back to the host's tier, and let everybody use what arrived."""
        while self._flying:
            record, slab, copy, waiter = self._flying[0]
            try:
                if not copy.landed and not self.accelerator.has_landed(copy):
                    return
            except RuntimeError:
                copy.done = None  # the device is in trouble, which whoever computes will hear
            self._flying.popleft()
            copy.landed = True
            copy.source = None
            self._note_copied(record, copy)
            if not slab.shown and record.slab is slab:
                self._bind(record, slab)
            self.host.let_go(waiter)

    def _watch(self) -> None:
        """See to it that copies are waited for while somebody waits for the host."""
        if self._flying and self._waiting and (self._watcher is None or self._watcher.done()):
            self._watcher = asyncio.create_task(self._wait_for_copies())
            self._reads.add(self._watcher)
            self._watcher.add_done_callback(self._read_done)

    async def _wait_for_copies(self) -> None:
        while self._flying and self._waiting and not self._closing:
            copy = self._flying[0][2]
            try:
                await self._loop.run_in_executor(self._pool, self.accelerator.wait, copy)
            except RuntimeError:
                copy.done = None
                copy.landed = True
            self._note_landed()

    async def _end(self, workers: Sequence[asyncio.Task[None]]) -> None:
        await super()._end(workers)
        while self._begun:
            record, slab = self._begun.popleft()
            self.ledger.fail(record.id, self.ledger.reason())
            self.ledger.pool.release(slab)
        while self._flying:  # the host's memory stays until the device has it
            copy = self._flying[0][2]
            try:
                self.accelerator.wait(copy)
            except RuntimeError:
                copy.done = None
            copy.landed = True
            self._note_landed()
