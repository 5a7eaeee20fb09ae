"""What the ledger writes down: a unit, a forward that waits for one, and the sums of what happened. Plain data."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from odewei.scheduler.slabs import Slab
from odewei.scheduler.states import State

__all__ = ["Counters", "UnitRecord", "Waiter"]


class Waiter:
    """One forward pass waiting for one unit. ``error`` is set before ``done`` when the read failed."""

    __slots__ = ("done", "error", "since", "unit")

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.since = time.perf_counter()


@dataclass(eq=False, slots=True)
class UnitRecord:
    """What the scheduler knows of one unit. ``nbytes`` is the size of its slab."""

    id: int
    name: str
    nbytes: int
    on_demand: bool = False  # not expected to be used; read only when a forward asks for it
    state: State = State.ABSENT
    leases: int = 0
    ahead: bool = False  # fetched before its use, and not used since
    stays: bool = False  # never evicted (written to in place, or for good)
    slab: Slab | None = None
    waiters: list[Waiter] = field(default_factory=list)


@dataclass
class Counters:
    """What happened so far. Times in seconds. ``stall``: a forward waited for the bytes of its unit.

    ``inside_seconds``: from a thread's first lease to its last, stalls included, summed over threads.
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
