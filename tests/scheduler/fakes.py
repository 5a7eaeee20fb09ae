"""Units, a client and threads for tests, without models and files. Everything waits for events, nothing for time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from odewei.loaders.base import CheckpointFile
from odewei.scheduler.budget import Budget
from odewei.scheduler.drivers import Driver
from odewei.scheduler.host_memory import Bytes
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.plan import Window
from odewei.scheduler.prefetcher import PrefetchingDriver
from odewei.scheduler.reader import FileTable, Job, Resized, tensors_over
from odewei.scheduler.reads import Placement
from odewei.scheduler.records import Account
from odewei.scheduler.slabs import SlabPool
from odewei.scheduler.states import State
from odewei.scheduler.synchronous import SynchronousDriver

PATIENCE = 20.0  # seconds; only a failing test waits this long


class FakeUnit:
    """A unit of one weight whose bytes all are its number. Is its own, only job.

    ``gate``: when set to an Event, a read waits for it. ``fault`` makes the error that a read raises; None: there is
    none.
    """

    def __init__(self, unit: int, nbytes: int, log: list[int]) -> None:
        self.unit, self.nbytes, self.log = unit, nbytes, log
        self.started = threading.Event()
        self.gate: threading.Event | None = None
        self.fault: Callable[[], BaseException] | None = None

    def jobs(self) -> Sequence[Job]:
        return [self]

    def files(self) -> Sequence[CheckpointFile]:
        return ()

    def run(self, slab: Bytes, files: FileTable) -> int:
        self.log.append(self.unit)
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE), f"nobody let the read of unit {self.unit} go on"
        if self.fault is not None:
            raise self.fault()
        if len(slab) != self.nbytes:
            raise Resized(self.nbytes)
        slab[:] = self.unit
        return self.nbytes

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        return tensors_over(slab, [Placement("w", 0, torch.uint8, (self.nbytes,), None)])


class FakeClient:
    """Keeps what is published until it is retracted. ``fault`` makes the error that publishing a unit raises."""

    def __init__(self) -> None:
        self.bound: dict[int, Mapping[str, torch.Tensor]] = {}
        self.fault: Callable[[int], BaseException | None] = lambda unit: None
        self._changed = threading.Condition()

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        error = self.fault(unit)
        if error is not None:
            raise error
        with self._changed:
            assert unit not in self.bound, f"unit {unit} is published twice"
            self.bound[unit] = tensors
            self._changed.notify_all()

    def bind(self, unit: int) -> None:
        assert unit in self.bound, f"unit {unit} is bound and was not published"

    def retract(self, unit: int) -> None:
        with self._changed:
            self.bound.pop(unit, None)
            self._changed.notify_all()

    def weight(self, unit: int) -> torch.Tensor:
        """The tensor of a published unit, right or the test fails."""
        tensor = self.bound[unit]["w"]
        assert bool((tensor == unit).all()), f"unit {unit} has the bytes of another"
        return tensor

    def wait_until_bound(self, *units: int) -> None:
        """Return when all these are published."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.bound.keys() >= set(units), PATIENCE), (
                f"{units} were expected, {sorted(self.bound)} are there"
            )


class Setup:
    """A ledger over fake units under a budget, with its driver. ``reads`` logs the units in order of reading."""

    def __init__(self, sizes: Sequence[int], limit: int, *, depth: int | None = 0, num_readers: int = 1) -> None:
        self.reads: list[int] = []
        self.budget = Budget(limit)
        self.pool = SlabPool(self.budget)
        self.ledger = Ledger(self.pool)
        self.units = [FakeUnit(unit, nbytes, self.reads) for unit, nbytes in enumerate(sizes)]
        self.client = FakeClient()
        self.driver = self._make_driver(depth, num_readers)
        self.account = Account(self.client, FileTable(direct=False, scratch_bytes=4096), depth)
        assert self.driver.join(self.account, [(f"unit{unit.unit}", unit) for unit in self.units])
        self.account.window = Window(depth, limit)

    def _make_driver(self, depth: int | None, num_readers: int) -> Driver:
        if depth == 0:
            return SynchronousDriver(self.ledger)
        return PrefetchingDriver(self.ledger, num_readers=num_readers, name=f"test{id(self)}")

    def seed(self, order: Sequence[int]) -> None:
        """Expect the units in this order."""
        self.ledger.seed(self.account, order)

    def enter(self, unit: int) -> None:
        """Enter a unit as a forward does, and look whether it is there. The lease belongs to the caller's frame."""
        self.driver.enter(unit, sys._getframe(1))
        assert self.ledger.units[unit].state is State.RESIDENT
        self.client.weight(unit)

    def visit(self, unit: int) -> None:
        """Enter and leave."""
        self.enter(unit)
        self.driver.leave(unit)

    def run_pass(self, order: Sequence[int] | None = None) -> None:
        """One forward pass over the units."""
        self.ledger.enter_pass(self.account, sys._getframe())
        for unit in range(len(self.units)) if order is None else order:
            self.visit(unit)
        self.ledger.leave_pass(self.account)

    @property
    def resident_bytes(self) -> int:
        return sum(slab.nbytes for slab in self.ledger.resident_slabs())

    def prefetch(self) -> None:
        """What a prefetching driver's thread does, here and now. For the synchronous one, whose window is closed."""
        assert isinstance(self.driver, SynchronousDriver)
        while (decision := self.ledger.next_decision()) is not None:
            slab = self.driver._make_room(decision)
            if slab is not None and decision.fetch is not None:
                self.driver._read(self.ledger.units[decision.fetch], slab)

    def check(self) -> None:
        """Everything adds up."""
        self.ledger.check_invariants()
        assert self.budget.overdrafts or self.budget.peak_bytes <= self.budget.limit_bytes
        assert self.budget.overdrafts or self.resident_bytes <= self.budget.limit_bytes


def running_frame() -> FrameType:
    """A frame that outlives every lease of a test: the outermost one."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    return frame


def enter_and_get_lost(setup: Setup, unit: int) -> None:
    """What an interrupt does: the call ends, its lease stays behind."""
    setup.driver.enter(unit, sys._getframe())


@contextmanager
def started(
    sizes: Sequence[int], limit: int, prepare: Callable[[Setup], None] = lambda setup: None, **options: int | None
) -> Iterator[Setup]:
    """A setup that is prepared, started, and closed afterwards; then all its bytes are accounted for."""
    setup = Setup(sizes, limit, **options)
    prepare(setup)
    setup.driver.start()
    try:
        yield setup
    finally:
        for unit in setup.units:
            if unit.gate is not None:
                unit.gate.set()
        setup.driver.close()
    setup.ledger.check_invariants()


class Forward:
    """A thread that runs ``work``. ``join`` returns its error, None if there was none."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def join(self, patience: float = PATIENCE) -> BaseException | None:
        self._thread.join(patience)
        assert not self._thread.is_alive(), "a forward hangs"
        return self._error
