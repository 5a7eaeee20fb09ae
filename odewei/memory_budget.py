"""A budget for the weights of one model or of several, and the scheduler that serves them under it.

Knows the scheduler's parts and puts them together. Knows nothing of modules.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence

import torch

from odewei.errors import OptionsError
from odewei.scheduler.accelerator import Accelerator, accelerator_for
from odewei.scheduler.budget import Budget, format_nbytes, parse_nbytes
from odewei.scheduler.device_copy import CopyingDriver
from odewei.scheduler.device_pool import DevicePool
from odewei.scheduler.device_synchronous import SynchronousCopyingDriver
from odewei.scheduler.drivers import Driver
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.machine import AutoLimit, check_room
from odewei.scheduler.prefetcher import PrefetchingDriver
from odewei.scheduler.reader import UnitReader
from odewei.scheduler.records import Account
from odewei.scheduler.slabs import SlabPool
from odewei.scheduler.synchronous import SynchronousDriver

__all__ = ["MemoryBudget"]

_numbers = itertools.count(1)


class MemoryBudget:
    """Bytes of weights in memory at once, in flight included, for all models that are given it.

    Give one object to several models, ``memory_budget=odewei.MemoryBudget("8GiB")``, and they run as one history: a
    text encoder, a U-Net that loops and a decoder, say. What is needed next gets the memory, whichever model it is in.
    One thread and ``num_readers`` reader threads serve them all. They end when the last model is closed; the object
    can be used again. Models are expected to run in the order in which they were built, until they have run once.

    ``nbytes`` is an int, text such as "6GiB", or "auto": what the machine and the process's limits can spare, looked
    at again while the models run. Bytes are kept to, whatever happens; if a limit on the process (a control group's,
    ``ulimit -v``) or the machine itself can never allow them, building a model says so. For models on an accelerator it
    is of the device's memory, and ``host_budget``, of the same kinds, of the host's: memory, pinned, that weights pass
    on their way, and that keeps what it can. All models of one object are on one device. Methods may be called from any
    thread. Raises OptionsError for what cannot work.
    """

    def __init__(self, nbytes: int | str = "auto", *, num_readers: int = 4, host_budget: int | str = "auto") -> None:
        if isinstance(num_readers, bool) or not isinstance(num_readers, int) or num_readers < 1:
            raise OptionsError(f"num_readers={num_readers!r} cannot work", cure="Use at least 1; 4 suits most disks")
        limit = _limit("memory_budget", nbytes)
        _limit("host_budget", host_budget)
        self._asked = host_budget
        self._auto = AutoLimit() if limit is None else None
        self._pool = SlabPool(Budget(1 if limit is None else limit))
        self._device: torch.device | None = None
        self._accelerator: Accelerator | None = None
        self._host: MemoryBudget | None = None
        self._num_readers = num_readers
        self._driver: Driver | None = None
        self._lock = threading.Lock()  # no finalizer takes it
        self._process = os.getpid()

    def another(self) -> MemoryBudget:
        """One like this for itself, without models: what was asked for this one."""
        limit = "auto" if self._auto else self.limit_bytes
        return MemoryBudget(limit, num_readers=self._num_readers, host_budget=self._asked)

    def place(self, device: torch.device) -> None:
        """A model on this device is about to join. Raises OptionsError if others are on another one. For the runtime
        of a model.
        """
        with self._lock:
            if self._device is None and device.type != "cpu":
                self._place_on(accelerator_for(device))
            self._device = self._device or device
            if str(device) not in (str(self._device), self._device.type):
                raise OptionsError(
                    f"a MemoryBudget is for models on one device: it is used on {self._device}, not on {device}",
                    cure="Make one MemoryBudget for each device",
                )

    def _place_on(self, accelerator: Accelerator) -> None:
        self._device, self._accelerator = accelerator.device, accelerator
        self._pool = DevicePool(self._pool.budget, accelerator)
        if self._auto is not None:
            self._auto = AutoLimit(accelerator.available_bytes)
        self._host = MemoryBudget(self._asked, num_readers=self._num_readers)
        self._host._pool = SlabPool(self._host._pool.budget, accelerator.memory)

    @property
    def device(self) -> torch.device:
        """Where the models are; the CPU before the first."""
        return self._device or torch.device("cpu")

    @property
    def accelerator(self) -> Accelerator | None:
        """What ``device`` can do, if it is not the CPU. For the runtime of a model."""
        return self._accelerator

    @property
    def host(self) -> MemoryBudget | None:
        """That of host memory, if the models are on an accelerator. For the runtime of a model."""
        return self._host

    @property
    def limit_bytes(self) -> int:
        """The budget. For "auto", what it is at the moment; 1 before the first model."""
        return self._pool.budget.limit_bytes

    @property
    def used_bytes(self) -> int:
        """What is reserved now, reads in flight and slabs kept for reuse included."""
        return self._pool.budget.used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that ever was."""
        return self._pool.budget.peak_bytes

    @property
    def pinned_bytes(self) -> int:
        """What models keep of it for as long as they live (rows of tables). For the runtime of a model."""
        with self._lock:
            accounts = [] if self._driver is None else list(self._driver.ledger.accounts)
        return sum(account.pinned_bytes for account in accounts)

    @property
    def pool(self) -> SlabPool:
        """For the runtime of a model."""
        return self._pool

    def expect(self, weight_bytes: int) -> int:
        """A model with so many bytes of weights is about to join. The budget in bytes. For the runtime of a model.

        Raises OptionsError if a limit on this process does not allow what the models would take of the budget.
        """
        if os.getpid() != self._process:
            raise OptionsError("this MemoryBudget was made in another process", cure="Make one in the forked child")
        with self._lock:
            others = [] if self._driver is None else list(self._driver.ledger.accounts)
            most = weight_bytes + sum(account.most_bytes for account in others)
            used = self._pool.budget.used_bytes
            if self._auto is not None:
                self._pool.set_limit(max(1, min(most, self._auto.fitting(used))))
            elif self._host is None:  # of host memory
                check_room(min(most, self.limit_bytes), used)
            return self.limit_bytes

    def join(self, account: Account, units: Sequence[tuple[str, UnitReader]], *, synchronous: bool) -> Driver:
        """Have a model served; the driver that does it, not started. ``synchronous``: without any thread, and alone.

        For the runtime of a model.
        """
        with self._lock:
            while self._driver is None or not self._driver.join(account, units):
                if self._driver is not None:
                    self._driver.close()  # it has ended with its last model; wait for its thread
                self._pool.reopen()
                self._driver = self._make_driver(synchronous)
            return self._driver

    def _make_driver(self, synchronous: bool) -> Driver:
        ledger = Ledger(self._pool, self._auto)
        name = str(next(_numbers))
        if self._host is not None:
            assert self._host._driver is not None, "the host's tier is there before the device's"
            host = self._host._driver
            return SynchronousCopyingDriver(ledger, host) if synchronous else CopyingDriver(ledger, host, name=name)
        if synchronous:
            return SynchronousDriver(ledger)
        return PrefetchingDriver(ledger, num_readers=self._num_readers, name=name)

    def __repr__(self) -> str:
        models = 0 if self._driver is None else len(self._driver.ledger.accounts)
        auto = ' ("auto")' if self._auto is not None else ""
        limit, used = format_nbytes(self.limit_bytes), format_nbytes(self.used_bytes)
        return f"<MemoryBudget of {limit}{auto}, {used} used by {models} models>"


def _limit(keyword: str, nbytes: int | str) -> int | None:
    """Bytes; None for "auto"."""
    if nbytes == "auto":
        return None
    found = parse_nbytes(nbytes) if isinstance(nbytes, str) else nbytes
    if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
        raise OptionsError(f"{keyword}={nbytes!r} cannot work", cure='Use bytes, "6GiB" or "auto"')
    return found
