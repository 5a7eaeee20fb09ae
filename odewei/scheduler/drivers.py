"""Doing what the ledger decides: shared by the plain, synchronous way and the prefetching one.

A driver is the only one who moves units; the forward thread takes leases and waits. Models join it with an account and
leave it; it serves all models under one budget, and ends when the last one leaves. Knows nothing of modules.
"""

from __future__ import annotations

import errno
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from types import FrameType

import torch

from odewei.errors import ClosedError, ModelError, OdeweiError, WeightReadError
from odewei.scheduler.budget import format_nbytes
from odewei.scheduler.forks import watch
from odewei.scheduler.host_memory import Bytes
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.observer import torch_range
from odewei.scheduler.plan import Decision
from odewei.scheduler.reader import FileTable, Job, Resized, UnitReader
from odewei.scheduler.records import Account, UnitRecord, Waiter
from odewei.scheduler.slab import Slab
from odewei.scheduler.states import State
from odewei.scheduler.transforms import untransformed

__all__ = ["Driver", "was_closed"]


class Driver(ABC):
    """Makes room, reads, publishes."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        watch(self)

    def after_fork(self) -> None:
        """In a forked child, which has none of this driver's threads."""
        self.ledger.after_fork()

    # -- models come and go ------------------------------------------------------------------------------------------

    def join(self, account: Account, units: Sequence[tuple[str, UnitReader]]) -> bool:
        """A model comes, with names and readers of its units. False if the driver has ended."""
        return self.ledger.join(account, units)

    @abstractmethod
    def start(self) -> None:
        """Begin to work, before the first access. May be called again when another model has joined."""

    @abstractmethod
    def leave_for_good(self, account: Account) -> None:
        """A model goes: its forwards raise ClosedError, its files close. The last one ends the driver.

        May be called twice, and by any thread at any moment, as a finalizer.
        """

    # -- the forward thread ------------------------------------------------------------------------------------------

    def enter(self, unit: int, frame: FrameType, *, lingers: bool = False) -> None:
        """Take a lease of ``unit`` for the call that runs in ``frame``; return when it is resident and bound.

        ``lingers``: within a forward pass, nothing is read ahead in its place before this thread enters another unit.

        Raises WeightReadError if it cannot be read, ClosedError after ``close``; then no lease is held.
        """
        waiter = self.ledger.enter(unit, frame, lingers)  # by position: the guard around it makes a dictionary of names
        if waiter is None:
            self.poke()
            return
        try:
            with torch_range("wait", self._name(unit)):
                self._serve(waiter)
            if waiter.error is not None:
                raise self._as_seen_by_forward(unit, waiter.take_error())
        except BaseException:
            self.ledger.give_up(waiter)
            self.ledger.leave(unit)
            raise
        self.ledger.note_stall(unit, waiter.since, time.perf_counter())

    def leave(self, unit: int) -> None:
        """Return the lease."""
        self.ledger.leave(unit)
        self.poke()

    def enter_pass(self, account: Account, frame: FrameType) -> bool:
        """This thread enters a model, whose call runs in ``frame``. Whether it was outside of every model."""
        return self.ledger.enter_pass(account, frame)

    def leave_pass(self, account: Account) -> None:
        """This thread leaves a model, whether by return or by exception."""
        self.ledger.leave_pass(account)

    def hold(self, waiter: Waiter) -> None:
        """Take a lease of the waiter's unit that belongs to no frame, until ``let_go``. The waiter is told when the
        unit is here, or why it is not; where nothing is read ahead, before this returns.
        """
        self.ledger.hold(waiter)
        if waiter.done.is_set():
            self.poke()
        else:
            self._begin_to_serve(waiter)

    def let_go(self, waiter: Waiter) -> None:
        """Return the lease that ``hold`` took, if it did."""
        self.ledger.give_up(waiter)
        self.ledger.let_go(waiter)
        self.poke()

    def settle(self) -> None:  # noqa: B027  (most have nothing to do)
        """Bring counters up to what is known by now."""

    def want(self, units: Sequence[int]) -> None:
        """This thread will enter these units next, in this order: read them together. An empty sequence: no more.

        A hint. It holds until the thread wants something else or is outside of every model.
        """
        self.ledger.want(units)
        self.poke()

    @abstractmethod
    def poke(self) -> None:
        """Something has changed: there may be something to decide."""

    @abstractmethod
    def _begin_to_serve(self, waiter: Waiter) -> None:
        """Somebody waits for a unit: see to it that the waiter is told."""

    @abstractmethod
    def _serve(self, waiter: Waiter) -> None:
        """Return when the waiter is done."""

    def close(self) -> None:
        """Stop for good: threads end, files close, waiting forwards raise ClosedError. May be called twice."""
        self.ledger.close(was_closed())
        while self.ledger.accounts:
            self.ledger.accounts.pop().end()
        self.ledger.pool.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.ledger!r}>"

    def _name(self, unit: int) -> str:
        record = self.ledger.units.get(unit)
        return "" if record is None else record.name

    def _used_by_its_reader(self) -> ModelError:
        return ModelError(
            "a reader used a weight of the model that it reads for, and would wait for itself",
            cure="A weights_loader_fn must not use the model",
        )

    def _as_seen_by_forward(self, unit: int, error: BaseException) -> OdeweiError:
        made = self._with_name(error, self._name(unit) or None)
        made.__cause__ = error
        return made

    @staticmethod
    def _with_name(error: BaseException, name: str | None) -> OdeweiError:
        if isinstance(error, ClosedError):
            return ClosedError(error.problem, module=name, cure=error.cure)
        if isinstance(error, OdeweiError):
            return type(error)(
                error.problem, module=error.module or name, weight=error.weight, file=error.file, cure=error.cure
            )
        return WeightReadError(
            f"reading the weights failed: {type(error).__name__}: {error}",
            module=name,
            cure="See the cause above; the next call tries again",
        )

    # -- the driving thread ------------------------------------------------------------------------------------------

    def _make_room(self, decision: Decision) -> Slab | None:
        """Let the victims go, then take a slab for what is to be fetched.

        None: there is nothing to fetch, or somebody still holds their memory. Decide again.
        """
        for unit in decision.evict:
            victim = self.ledger.units[unit]
            victim.account.client.retract(victim.place)
        if decision.fetch is None:
            return None
        record = self.ledger.units[decision.fetch]
        try:
            return self.ledger.pool.acquire(record.name, record.nbytes, beyond_limit=decision.beyond_limit)
        except (MemoryError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError is one, and so is a lost device
            limit = self.ledger.pool.budget.limit_bytes
            if not is_out_of_memory(error) or not self.ledger.shrink_for(record.id):
                self.ledger.begin_read(record.id, None)
                self.ledger.fail(record.id, no_memory(record, limit, error))
            return None

    def _mend(self, under_way: Container[int] = ()) -> None:
        """An interrupt has ended this thread's work somewhere: units on their way are absent again but those that
        somebody else has in hand; who is absent is unbound, and memory that was taken for nobody is free.
        """
        for record in tuple(self.ledger.units.values()):
            if record.id not in under_way:
                self.ledger.restart(record.id)
                if record.state in (State.ABSENT, State.FAILED):
                    record.account.client.retract(record.place)
        self.ledger.pool.reclaim({record.slab for record in self.ledger.units.values()})

    def _run_job(self, record: UnitRecord, job: Job, slab: Bytes, files: FileTable) -> int:
        """Run one job of a unit, in the thread that reads. Returns the bytes read."""
        began = time.perf_counter()
        with torch_range("read", record.name):
            nbytes = job.run(slab, files)
        if (observer := self.ledger.observer) is not None:
            observer.read(record.id, began, time.perf_counter(), nbytes)
        return nbytes

    def _publish(self, record: UnitRecord, slab: Slab, nbytes_read: int) -> None:
        """All bytes are in the slab: bind, then say so."""
        if record.account.closed is not None:
            self._give_up(record, slab, record.account.closed, nbytes_read)
            return
        self.ledger.finish_read(record.id, nbytes_read)
        try:
            with untransformed():
                record.account.client.publish(record.place, record.reader.tensors(self.ledger.pool.lend(slab)))
                record.account.client.bind(record.place)
        except Exception as error:
            self._take_back(record, slab, error)
        else:
            self.ledger.arrive(record.id)

    def _take_back(self, record: UnitRecord, slab: Slab, error: Exception) -> None:
        """Publishing has failed at some place, or was ended there by a signal's handler: the slab is free again."""
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error must not keep the tensors
        record.account.client.retract(record.place)
        self.ledger.fail(record.id, error)
        if not slab.is_lent or slab.is_over:
            self.ledger.pool.release(slab)

    def _give_up(self, record: UnitRecord, slab: Slab, error: BaseException, nbytes_read: int) -> None:
        """The read did not succeed; the slab is free again."""
        if isinstance(error, Resized):
            self.ledger.abandon_read(record.id, nbytes_read)
            self.ledger.resize(record.id, error.nbytes)
        else:
            self.ledger.fail(record.id, error, nbytes_read)
        self.ledger.pool.release(slab)


def was_closed() -> ClosedError:
    """Why a model that was closed takes no more accesses."""
    return ClosedError("the model was closed", cure="Build it again to use it again")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system, or the device, has no memory left; not some other trouble."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def no_memory(record: UnitRecord, limit_bytes: int, error: BaseException) -> OdeweiError:
    """Why a unit did not get its memory."""
    if not is_out_of_memory(error):
        return WeightReadError(
            f"the memory for the unit cannot be had: {type(error).__name__}: {error}",
            module=record.name,
            cure="See the cause above; the next call tries again",
        )
    return WeightReadError(
        f"there is no memory for a unit of {record.nbytes} bytes ({format_nbytes(record.nbytes)}) within a budget of "
        f"{limit_bytes} bytes ({format_nbytes(limit_bytes)}), also after others have left: {error}",
        module=record.name,
        cure="Pass a smaller memory_budget, or raise the limit on memory (ulimit -v); the next call tries again",
    )
