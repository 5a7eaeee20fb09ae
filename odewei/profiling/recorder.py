"""Notes what the scheduler tells, as plain tuples, with as little work as can be.

Knows times, threads and unit ids. What the notes mean is said in ``spans``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from odewei.scheduler.budget import Budget
from odewei.scheduler.states import State

__all__ = ["Copied", "Entered", "Left", "LookedUp", "Moved", "Note", "OfHost", "Read", "Recorder", "Stalled"]

_MOST_NOTES = 2_000_000  # some 250 bytes each; what comes later is counted only


class Entered(NamedTuple):
    """A thread took a lease of a unit (None: of a model), its ``depth``-th."""

    thread: int
    at: float
    unit: int | None
    depth: int


class Left(NamedTuple):
    """A thread returned its innermost lease of a unit (None: of a model)."""

    thread: int
    at: float
    unit: int | None


class Stalled(NamedTuple):
    """A thread waited for a unit."""

    thread: int
    unit: int
    began: float
    ended: float


class Read(NamedTuple):
    """A thread read a part of a unit."""

    thread: int
    unit: int
    began: float
    ended: float
    nbytes: int


class LookedUp(NamedTuple):
    """A thread read rows of a table for itself."""

    thread: int
    weight: str
    began: float
    ended: float
    nbytes: int


class Moved(NamedTuple):
    """A unit of ``nbytes`` bytes changed its state, under a budget of ``budget_bytes``."""

    at: float
    unit: int
    state: State
    nbytes: int
    budget_bytes: int


class Copied(NamedTuple):
    """The device copied (``nbytes``) or computed (``nbytes`` is None)."""

    unit: int
    began: float
    ended: float
    nbytes: int | None


Note = Entered | Left | Stalled | Read | LookedUp | Moved | Copied


class OfHost:
    """The observer of the host's tier, where models are on a device: reading is done there, everything else is not.

    Its units' numbers are told from those of the device's tier by ``number``.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @staticmethod
    def number(unit: int) -> int:
        """What a unit of the host's tier is noted as."""
        return -1 - unit

    def read(self, unit: int, began: float, ended: float, nbytes: int) -> None:
        self._recorder.read(self.number(unit), began, ended, nbytes)

    def entered(self, unit: int | None, depth: int) -> None:
        pass

    def left(self, unit: int | None) -> None:
        pass

    def stalled(self, unit: int, began: float, ended: float) -> None:
        pass

    def moved(self, unit: int, state: State, nbytes: int) -> None:
        pass

    def copied(self, unit: int, began: float, ended: float, nbytes: int) -> None:
        pass

    def computed(self, unit: int, began: float, ended: float) -> None:
        pass

    def looked_up(self, weight: str, began: float, ended: float, nbytes: int) -> None:
        pass


class Recorder:
    """The scheduler's observer (``odewei.scheduler.observer``). Methods may be called from any thread.

    ``notes`` are in the order in which they were told: that of time within one thread, but for what tells late.
    ``threads`` are the names of those that told something. After ``most_notes`` the rest is counted in ``lost``.
    """

    def __init__(
        self, budget: Budget, *, clock: Callable[[], float] = time.perf_counter, most_notes: int = _MOST_NOTES
    ) -> None:
        self.notes: list[Note] = []
        self.threads: dict[int, str] = {}
        self.lost = 0
        self._budget = budget
        self._clock = clock
        self._most_notes = most_notes

    def entered(self, unit: int | None, depth: int) -> None:
        self._note(Entered(self._thread(), self._clock(), unit, depth))

    def left(self, unit: int | None) -> None:
        self._note(Left(self._thread(), self._clock(), unit))

    def stalled(self, unit: int, began: float, ended: float) -> None:
        self._note(Stalled(self._thread(), unit, began, ended))

    def read(self, unit: int, began: float, ended: float, nbytes: int) -> None:
        self._note(Read(self._thread(), unit, began, ended, nbytes))

    def looked_up(self, weight: str, began: float, ended: float, nbytes: int) -> None:
        self._note(LookedUp(self._thread(), weight, began, ended, nbytes))

    def moved(self, unit: int, state: State, nbytes: int) -> None:
        self._note(Moved(self._clock(), unit, state, nbytes, self._budget.limit_bytes))

    def copied(self, unit: int, began: float, ended: float, nbytes: int) -> None:
        self._note(Copied(unit, began, ended, nbytes))

    def computed(self, unit: int, began: float, ended: float) -> None:
        self._note(Copied(unit, began, ended, None))

    def _thread(self) -> int:
        ident = threading.get_ident()
        if ident not in self.threads:
            self.threads[ident] = threading.current_thread().name.removeprefix("odewei-")
        return ident

    def _note(self, note: Note) -> None:
        if len(self.notes) < self._most_notes:
            self.notes.append(note)
        else:
            self.lost += 1

    def __repr__(self) -> str:
        return f"<Recorder of {len(self.notes)} notes by {len(self.threads)} threads>"
