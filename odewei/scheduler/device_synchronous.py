"""What drivers of a device's tier share, and the plain one, which reads, copies and waits. See ``device_copy``."""

from __future__ import annotations

import contextlib
from collections.abc import Container
from types import FrameType

import torch

from odewei.errors import OdeweiError, WeightReadError
from odewei.scheduler.accelerator import Accelerator, Copy
from odewei.scheduler.device_pool import DevicePool, DeviceSlab
from odewei.scheduler.device_time import DeviceTime
from odewei.scheduler.device_units import DeviceUnit
from odewei.scheduler.drivers import Driver
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.reader import Resized
from odewei.scheduler.records import Account, UnitRecord, Waiter
from odewei.scheduler.slab import Slab
from odewei.scheduler.synchronous import SynchronousDriver

__all__ = ["OnDevice", "SynchronousCopyingDriver"]


class OnDevice(Driver):
    """What both drivers do on a device."""

    accelerator: Accelerator
    host: Driver
    time: DeviceTime

    def _set_up(self, host: Driver) -> None:
        """``host`` drives the other tier."""
        assert isinstance(self.ledger.pool, DevicePool)
        self.accelerator = self.ledger.pool.accelerator
        self.host = host
        self.time = DeviceTime(self.accelerator)

    def enter_pass(self, account: Account, frame: FrameType) -> bool:
        self.accelerator.note_stream()
        outermost = self.ledger.enter_pass(account, frame)
        if outermost:
            self.time.begin()
        return outermost

    def leave_pass(self, account: Account) -> None:
        if self.ledger.leave_pass(account):
            self.time.end(account)

    def settle(self) -> None:
        self.time.collect()

    def enter(self, unit: int, frame: FrameType, *, lingers: bool = False) -> None:
        super().enter(unit, frame, lingers=lingers)
        self.accelerator.note_stream()
        record = self.ledger.units[unit]
        slab = record.slab
        if isinstance(slab, DeviceSlab) and not slab.shown:
            self._show(record, slab)

    def _show(self, record: UnitRecord, slab: DeviceSlab) -> None:
        """Somebody is about to compute with a unit whose copy may be under way."""
        assert slab.copy is not None
        if not slab.copy.landed:
            with self.time.waiting(record.account):
                self.accelerator.let_use(slab.copy)
        self._bind(record, slab)

    def _bind(self, record: UnitRecord, slab: DeviceSlab) -> None:
        record.account.client.bind(record.place)
        slab.shown = True

    def _note_copied(self, record: UnitRecord, copy: Copy) -> None:
        """A copy is over: count its time, and tell who watches."""
        self.time.landed(record.account, copy)
        if self.ledger.observer is not None and (span := self.time.on_host(copy)) is not None:
            self.ledger.observer.copied(record.id, *span, copy.nbytes)

    def _copy(self, record: UnitRecord, slab: Slab) -> Copy | None:
        """Begin the copy of a unit whose host unit is leased, and publish it. None: it failed, which is told."""
        if record.account.closed is not None:
            self._give_up(record, slab, record.account.closed, 0)
            return None
        assert isinstance(slab, DeviceSlab)
        assert isinstance(record.reader, DeviceUnit)
        copy = None
        try:
            source = record.reader.source()
            assert slab.memory is not None
            if source.numel():
                copy = self.accelerator.copy(slab.memory, source)
            else:
                copy = Copy(0, source)
                copy.landed = True
        except Resized as error:
            self._give_up(record, slab, error, 0)
            return None
        except RuntimeError as error:
            self._give_up(record, slab, _cannot_copy(self.accelerator.device, error), 0)
            return None
        slab.copy = copy
        self.ledger.finish_read(record.id, copy.nbytes)
        self.ledger.begin_copy(record.id)
        try:
            record.account.client.publish(record.place, record.reader.tensors(self.ledger.pool.lend(slab)))
        except Exception as error:
            self._take_back(record, slab, error)
        else:
            self.ledger.arrive(record.id)
        return copy


def _cannot_copy(device: torch.device, error: RuntimeError) -> OdeweiError:
    made = WeightReadError(
        f"copying to {device} failed: {error}",
        cure="If the device itself is in trouble, start the process again",
    )
    made.__cause__ = error
    return made


class SynchronousCopyingDriver(OnDevice, SynchronousDriver):
    """The plain twin on a device: read, copy, wait, compute. Serves one model; ``host`` is synchronous too."""

    def __init__(self, ledger: Ledger, host: Driver) -> None:
        super().__init__(ledger)
        self._set_up(host)
        self._holds: Waiter | None = None

    def _mend(self, under_way: Container[int] = ()) -> None:
        with contextlib.suppress(RuntimeError):  # the device is in trouble, which whoever computes will hear
            self.accelerator.wait_for_copies()  # one may read from memory on the host that is free
        if self._holds is not None:
            self.host.let_go(self._holds)
            self._holds = None
        super()._mend(under_way)

    def _read(self, record: UnitRecord, slab: Slab) -> None:
        self.ledger.begin_read(record.id, slab)
        assert isinstance(record.reader, DeviceUnit)
        assert record.reader.host is not None
        self._holds = waiter = Waiter(record.reader.host.id)
        try:
            with record.account.busy:
                self.host.hold(waiter)
                if waiter.error is not None:
                    self._give_up(record, slab, waiter.take_error(), 0)
                    return
                copy = self._copy(record, slab)
                if copy is not None:
                    self.accelerator.wait(copy)
                    copy.landed = True
                    self._note_copied(record, copy)
        finally:
            self.host.let_go(waiter)
            self._holds = None
