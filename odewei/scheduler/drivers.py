"""Doing what the ledger decides: shared by the plain, synchronous way and the prefetching one.

A driver is the only one who moves units; the forward thread takes leases and waits. ``UnitClient`` is the model's
side: it binds a unit's tensors when they arrive and lets go of them when the unit leaves. Knows nothing of modules.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Protocol

import torch

from odewei.errors import ClosedError, ModelError, OdeweiError, WeightReadError
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.plan import Decision
from odewei.scheduler.reader import FileTable, Resized, UnitReader
from odewei.scheduler.records import Waiter
from odewei.scheduler.slabs import Slab

__all__ = ["Driver", "SynchronousDriver", "UnitClient"]


class UnitClient(Protocol):
    """The model's side of a unit. Both are called by the driver, never under a lock, for one unit at a time."""

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """The unit's tensors are here: bind them. They are the only references that keep its slab."""

    def retract(self, unit: int) -> None:
        """The unit leaves: drop every reference to its tensors."""


class Driver(ABC):
    """Makes room, reads, publishes. ``readers[unit]`` says how each unit is read."""

    def __init__(self, ledger: Ledger, readers: Sequence[UnitReader], files: FileTable, client: UnitClient) -> None:
        self.ledger = ledger
        self.files = files
        self._readers = readers
        self._client = client
        self.busy = BusyTime()
        self.on_closed: Callable[[], None] = lambda: None  # called last, in the thread that closes

    # -- the forward thread ------------------------------------------------------------------------------------------

    def enter(self, unit: int, frame: FrameType) -> None:
        """Take a lease of ``unit`` for the call that runs in ``frame``; return when it is resident and bound.

        Raises WeightReadError if it cannot be read, ClosedError after ``close``; then no lease is held.
        """
        waiter = self.ledger.enter(unit, frame)
        if waiter is None:
            self.poke()
            return
        try:
            self._serve(waiter)
            if waiter.error is not None:
                raise self._as_seen_by_forward(unit, waiter.error) from waiter.error
        except BaseException:
            self.ledger.give_up(waiter)
            self.ledger.leave(unit)
            raise
        self.ledger.note_stall(time.perf_counter() - waiter.since)

    def leave(self, unit: int) -> None:
        """Return the lease."""
        self.ledger.leave(unit)
        self.poke()

    @abstractmethod
    def start(self) -> None:
        """Begin to work, before the first access."""

    @abstractmethod
    def poke(self) -> None:
        """Something has changed: there may be something to decide."""

    @abstractmethod
    def _serve(self, waiter: Waiter) -> None:
        """Return when the waiter is done."""

    def close(self) -> None:
        """Stop for good: threads end, files close, waiting forwards raise ClosedError. May be called twice."""
        self.ledger.close(ClosedError("the model was closed", cure="Build it again to use it again"))
        self.files.close()
        self.on_closed()
        self.ledger.pool.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.ledger!r}, {self.files!r}>"

    def _used_by_its_reader(self) -> ModelError:
        return ModelError(
            "a reader used a weight of the model that it reads for, and would wait for itself",
            cure="A weights_loader_fn must not use the model",
        )

    def _as_seen_by_forward(self, unit: int, error: BaseException) -> OdeweiError:
        name = self.ledger.units[unit].name
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
        """Let the victims go, then take a slab. None: somebody still holds their memory; decide again."""
        for unit in decision.evict:
            self._client.retract(unit)
        record = self.ledger.units[decision.fetch]
        pool = self.ledger.pool
        return pool.acquire(record.name, record.nbytes, beyond_limit=decision.beyond_limit)

    def _publish(self, unit: int, slab: Slab, nbytes_read: int) -> None:
        """All bytes are in the slab: bind, then say so."""
        self.ledger.finish_read(unit, nbytes_read)
        try:
            self._client.publish(unit, self._readers[unit].tensors(self.ledger.pool.lend(slab)))
        except Exception as error:
            self.ledger.fail(unit, error)
        else:
            self.ledger.arrive(unit)

    def _give_up(self, unit: int, slab: Slab, error: BaseException, nbytes_read: int) -> None:
        """The read did not succeed; the slab is free again."""
        if isinstance(error, Resized):
            self.ledger.abandon_read(unit, nbytes_read)
            self.ledger.resize(unit, error.nbytes)
        else:
            self.ledger.fail(unit, error, nbytes_read)
        self.ledger.pool.release(slab)


class BusyTime:
    """Seconds during which at least one read was running. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self.seconds += time.perf_counter() - self._since


class SynchronousDriver(Driver):
    """The plain twin: the forward thread reads what it needs when it needs it, job after job. Starts no thread."""

    def __init__(self, ledger: Ledger, readers: Sequence[UnitReader], files: FileTable, client: UnitClient) -> None:
        super().__init__(ledger, readers, files, client)
        self._turn = threading.RLock()  # one thread reads at a time
        self._reading = False

    def start(self) -> None:
        pass

    def poke(self) -> None:
        pass

    def _serve(self, waiter: Waiter) -> None:
        with self._turn:
            if self._reading:
                raise self._used_by_its_reader()
            while not waiter.done.is_set():
                decision = self.ledger.next_decision()
                assert decision is not None, "a forward waits, and nothing can be done"
                slab = self._make_room(decision)
                if slab is not None:
                    self._read(decision.fetch, slab)

    def _read(self, unit: int, slab: Slab) -> None:
        self.ledger.begin_read(unit, slab)
        nbytes = 0
        self._reading = True
        try:
            with self.busy:
                view = slab.view()
                for job in self._readers[unit].jobs():
                    nbytes += job.run(view, self.files)
                del view
        except BaseException as error:
            self._give_up(unit, slab, error, nbytes)
            if not isinstance(error, Exception):
                raise
            return
        finally:
            self._reading = False
        self._publish(unit, slab, nbytes)

    def close(self) -> None:
        with self._turn:
            super().close()
