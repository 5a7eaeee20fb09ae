"""Device memory under a budget: one allocation a unit, freed by reference, reused by torch.

The memory of a unit goes back to torch when the last tensor over it has died. Torch gives it to the next unit on the
copy stream at once; so before that stream allocates it waits for what was computed until then. Whoever computes, and
evicts at the end of a layer, evicts there: then that is what was computed up to this layer, and no more.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch

from odewei.scheduler.accelerator import Accelerator, Copy
from odewei.scheduler.budget import Budget, Reservation
from odewei.scheduler.slab import Slab
from odewei.scheduler.slabs import SlabPool

__all__ = ["DevicePool", "DeviceSlab"]


class DeviceSlab(Slab):
    """``nbytes`` bytes of the device for one unit. ``copy`` fills it; ``shown``: whoever computes may use it."""

    __slots__ = ("copy", "memory", "shown")

    def __init__(self, nbytes: int, reservation: Reservation, memory: torch.Tensor) -> None:
        self.nbytes = nbytes
        self.reservation = reservation
        self.begin()
        self.memory: torch.Tensor | None = memory
        self.copy: Copy | None = None
        self.shown = False

    def about_to_fill(self) -> None:
        pass

    def unmap(self) -> None:
        self.memory = None

    def __repr__(self) -> str:
        return f"<DeviceSlab of {self.nbytes} bytes for {self.reservation.owner}>"


class DevicePool(SlabPool):
    """All device memory of units under one budget. Methods may be called from any thread."""

    def __init__(self, budget: Budget, accelerator: Accelerator) -> None:
        super().__init__(budget, accelerator.memory)
        self.accelerator = accelerator
        self._died: deque[object] = deque()  # whose memory came back since the copy stream last waited

    def lend(self, slab: Slab) -> torch.Tensor:  # type: ignore[override]
        """The slab's bytes. When every tensor over them has died, the slab is free."""
        assert isinstance(slab, DeviceSlab)
        memory, slab.memory = slab.memory, None
        assert memory is not None, "a slab is lent once"
        slab.note_lent(memory.untyped_storage(), self._died.append)
        weakref.finalize(memory.untyped_storage(), self._give_back, slab, slab.uses).atexit = False
        return memory

    def _new(self, nbytes: int, reservation: Reservation) -> Slab:
        self._catch_up()
        memory = self.accelerator.allocate(nbytes)
        self._catch_up()  # it may be what came back meanwhile
        return DeviceSlab(nbytes, reservation, memory)

    def _catch_up(self) -> None:
        """Have the copy stream wait for all that may have computed with memory that came back."""
        count = len(self._died)
        if count:
            self.accelerator.wait_for_computing()
        for _ in range(count):  # not before: an interrupt must not have them forgotten
            self._died.popleft()

    def _recycle(self, slab: Slab) -> None:
        self._unmap(slab)
