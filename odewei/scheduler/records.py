"""What the ledger writes down: a unit, a model's account, a forward that waits, and the sums of what happened.

Plain data. Knows nothing of modules: ``UnitClient`` is all that the scheduler sees of a model.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from odewei.scheduler.forks import watch
from odewei.scheduler.plan import Window
from odewei.scheduler.reader import FileTable, UnitReader
from odewei.scheduler.slab import Slab
from odewei.scheduler.states import State

__all__ = ["Account", "BusyTime", "Counters", "UnitClient", "UnitRecord", "Waiter"]


class UnitClient(Protocol):
    """The model's side of a unit, which it knows by its number among the model's own units.

    All are called by the driver, never under a lock of the scheduler.
    """

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """The unit's tensors are here. They are the only references that keep its slab."""

    def bind(self, unit: int) -> None:
        """The published tensors of a unit may be used by anybody from now on. Any thread; may come more than once, or
        when the unit is gone again.
        """

    def retract(self, unit: int) -> None:
        """The unit leaves: drop every reference to its tensors. After an interrupt it may be told so twice."""


class _Flag:
    """What threading.Event is to one thread that waits, without its Python code, which a signal handler that raises may
    end in the middle.
    """

    __slots__ = ("_closed",)

    def __init__(self) -> None:
        self._closed = threading.Lock()
        self._closed.acquire()

    def set(self) -> None:
        """Once, or again."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._closed.release()

    def is_set(self) -> bool:
        return not self._closed.locked()

    def wait(self) -> None:
        """To be called by one thread, once."""
        self._closed.acquire()
        self.set()


class Waiter:
    """Somebody, a forward pass mostly, waiting for one unit. ``error`` is set before ``done`` when the read failed.

    ``on_done`` is called then, by whoever knows, under the ledger's lock.
    """

    __slots__ = ("_on_done", "done", "error", "since", "unit")

    def __init__(self, unit: int, on_done: Callable[[], object] | None = None) -> None:
        self.unit = unit
        self.done = _Flag()
        self.error: BaseException | None = None
        self.since = time.perf_counter()
        self._on_done = on_done

    def finish(self, error: BaseException | None = None) -> None:
        """The waiting is over."""
        self.error = error
        self.done.set()
        if self._on_done is not None:
            self._on_done()

    def take_error(self) -> BaseException:
        """The error, once. Where the one who waits has read itself, its frames are the error's: who kept it in them
        would keep the whole pass, with its tensors, until the next garbage collection.
        """
        error, self.error = self.error, None
        assert error is not None, "nothing has failed"
        return error


@dataclass
class Counters:
    """What happened so far. Times in seconds. ``stall``: a forward waited for the bytes of its unit.

    ``inside_seconds``: from a thread's first lease to its last, stalls included, summed over threads. On a device
    ``bytes_read`` are copied to it, in ``copies`` that took ``copy_seconds`` of its time; its streams computed for
    ``device_compute_seconds`` and waited for copies for ``device_wait_seconds``.
    """

    passes: int = 0
    inside_seconds: float = 0.0
    accesses: int = 0
    hits: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    bytes_read: int = 0
    units_read: int = 0
    evictions: int = 0
    mispredictions: int = 0
    copies: int = 0
    copy_seconds: float = 0.0
    device_compute_seconds: float = 0.0
    device_wait_seconds: float = 0.0


class BusyTime:
    """Seconds during which at least one read was running. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._ended = 0.0
        self._running = 0
        self._since = 0.0
        self._lock = threading.Lock()
        watch(self)

    def after_fork(self) -> None:
        """In the child: no read of the parent's is one of its own."""
        self._lock = threading.Lock()
        self._running = 0

    @property
    def seconds(self) -> float:
        """Up to now: reads may follow each other without a gap for as long as a model runs."""
        with self._lock:
            return self._ended + (time.perf_counter() - self._since if self._running else 0.0)

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._ended += time.perf_counter() - self._since


@dataclass(eq=False, slots=True)
class Account:
    """One model's part in a scheduler. Units are known to ``client`` by their place in ``units``.

    Under the ledger's lock ``is_held`` is asked before a unit may be evicted: whether somebody has a tensor of it,
    which would keep its memory; and ``was_written`` then. ``on_closed`` is called once, by the thread that
    closes, when nothing of the account is read any more. ``closed`` is why it takes no more accesses; ``gone`` is set
    when everything of it has been given back. ``depth``: how many units ahead, None: "auto". ``least_bytes`` must be in
    memory at one moment; ``most_bytes`` hold all of its weights. ``pinned_bytes`` of the pool are taken until
    ``on_closed``. The first ``ahead`` units, None for all, are expected to be used; the others are only read when
    somebody asks.
    """

    client: UnitClient
    files: FileTable
    depth: int | None
    least_bytes: int = 0
    most_bytes: int = 0
    pinned_bytes: int = 0
    ahead: int | None = None
    window: Window = field(default_factory=lambda: Window(0, 0))
    was_written: Callable[[int], bool] = lambda unit: False
    is_held: Callable[[int], bool] = lambda unit: False
    on_closed: Callable[[], None] = lambda: None
    counters: Counters = field(default_factory=Counters)
    busy: BusyTime = field(default_factory=BusyTime)
    units: list[UnitRecord] = field(default_factory=list)
    order: tuple[int, ...] = ()
    closed: BaseException | None = None
    gone: threading.Event = field(default_factory=threading.Event)

    def is_reading(self) -> bool:
        """Whether any of its units is on its way."""
        return any(record.state in (State.READING, State.STAGED) for record in self.units)

    def end(self) -> None:
        """Close its files and let the model's side go, once."""
        self.files.close()
        if not self.gone.is_set():
            self.on_closed()
        self.gone.set()


@dataclass(eq=False, slots=True)
class UnitRecord:
    """What the scheduler knows of one unit. ``nbytes`` is the size of its slab, ``place`` that in its account."""

    id: int
    name: str
    nbytes: int
    account: Account
    place: int
    reader: UnitReader
    on_demand: bool = False  # not expected to be used
    state: State = State.ABSENT
    leases: int = 0
    holders: tuple[Waiter, ...] = ()  # whose leases of those belong to no frame
    unasked: bool = False  # its read began when nobody waited for it
    ahead: bool = False  # fetched before its use, and not used since
    stays: bool = False  # never evicted (written to in place, or for good)
    slab: Slab | None = None
    waiters: tuple[Waiter, ...] = ()
