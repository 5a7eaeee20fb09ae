"""One slab: memory that a unit's bytes are read into. Knows where its memory is from, and who has reserved it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np

from odewei.scheduler.budget import Reservation
from odewei.scheduler.host_memory import HUGE_PAGE, PAGE, Bytes, HostMemory, round_up

__all__ = ["ALIGNMENT", "Slab", "slab_bytes"]

ALIGNMENT = 64
"""Every tensor lies at a multiple of this many bytes: CPU kernels give other last bits when a weight does not."""


def slab_bytes(nbytes: int) -> int:
    """The size of the slab that ``nbytes`` bytes need."""
    return round_up(nbytes, PAGE if nbytes >= PAGE else ALIGNMENT)


class Slab:
    """``nbytes`` bytes of host memory for one unit. Pages start at a page, small slabs at a multiple of 64."""

    __slots__ = ("_lent", "_memory", "_offset", "_source", "nbytes", "reservation", "uses")

    def __init__(self, nbytes: int, reservation: Reservation, source: HostMemory | None = None) -> None:
        """``source``: where its memory comes from."""
        self.nbytes = nbytes
        self.reservation = reservation
        self.begin()
        self._source = source or HostMemory()
        self._memory, self._offset = self._source.allocate(nbytes)

    def view(self) -> Bytes:
        """The slab's bytes, for filling and reading. Whoever holds it, or anything made from it, keeps the memory."""
        return np.frombuffer(self._memory, np.uint8, self.nbytes, self._offset)

    def about_to_fill(self) -> None:
        """The processor is going to write into it."""
        self._source.about_to_fill(self._memory)

    def begin(self) -> None:
        """It was never acquired yet."""
        self.uses = 0  # how often it was acquired
        self._lent: weakref.ref[object] | None = None

    def note_lent(self, thing: object, on_death: Callable[[object], object] | None = None) -> None:
        """``is_over`` asks about it. ``on_death`` is called with a weak reference when it dies, by any thread at any
        moment. A signal's handler that raises can end it before it has done anything, unless it is written in C.
        """
        self._lent = weakref.ref(thing, on_death)

    @property
    def is_lent(self) -> bool:
        """Whether it was lent since it was acquired."""
        return self._lent is not None

    @property
    def is_over(self) -> bool:
        """Whether what it was lent for is gone."""
        return self._lent is not None and self._lent() is None

    def begin_use(self, owner: str) -> None:
        """It is acquired."""
        self.uses += 1
        self.reservation.owner = owner
        self._lent = None

    def try_resize(self, nbytes: int, reservation: Reservation) -> bool:
        """Make a free slab with huge pages another size, keeping its pages: fresh ones have to be cleared first."""
        large = min(self.nbytes, nbytes) >= HUGE_PAGE
        if not large or len(self._memory) != self.nbytes or not self._source.resize(self._memory, nbytes):
            return False
        self.nbytes, self.reservation = nbytes, reservation
        return True

    def unmap(self) -> None:
        """Give the memory back to the system, at once or as soon as the view whose finalizer is running is gone."""
        memory, self._memory = self._memory, bytearray()
        self._source.free(memory)

    def __repr__(self) -> str:
        return f"<Slab of {self.nbytes} bytes for {self.reservation.owner}>"
