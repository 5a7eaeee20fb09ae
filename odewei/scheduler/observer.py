"""Who may watch the scheduler: told of what happened, in the thread that did it. And ranges for torch's profiler.

Knows unit ids, states and times. Knows nothing of what is made of them. While nobody watches, each of these places
costs one test of an attribute.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch.autograd import profiler

from odewei.scheduler.states import State

__all__ = ["Observer", "torch_range"]

_NOTHING = nullcontext()


class Observer(Protocol):
    """All times are those of ``time.perf_counter``.

    The methods are called by any thread, several at once, also under the ledger's lock: they may note, and nothing
    else. They take no lock, wait for nobody and raise nothing.
    """

    def entered(self, unit: int | None, depth: int) -> None:
        """This thread has taken a lease, of a model where ``unit`` is None, and has ``depth`` of them now."""

    def left(self, unit: int | None) -> None:
        """This thread has returned its innermost lease of that, and all above it."""

    def stalled(self, unit: int, began: float, ended: float) -> None:
        """This thread has waited for the unit that it entered last."""

    def read(self, unit: int, began: float, ended: float, nbytes: int) -> None:
        """This thread has read a part of a unit."""

    def moved(self, unit: int, state: State, nbytes: int) -> None:
        """A unit of ``nbytes`` bytes is in this state from now on; from RESIDENT to ABSENT it was evicted."""

    def copied(self, unit: int, began: float, ended: float, nbytes: int) -> None:
        """A unit was copied to the device. May be told late and in any order."""

    def computed(self, unit: int, began: float, ended: float) -> None:
        """The device has computed with a unit. May be told late and in any order."""

    def looked_up(self, weight: str, began: float, ended: float, nbytes: int) -> None:
        """This thread has read rows of a table for itself."""


def torch_range(what: str, name: str) -> AbstractContextManager[object]:
    """The range ``odewei.<what> <name>`` for torch's profiler, if one is running; else nothing at next to no cost.

    torch shows only ranges of threads that it profiles: of reader threads with ``profile_all_threads`` alone.
    """
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return torch.profiler.record_function(f"odewei.{what} {name}")
