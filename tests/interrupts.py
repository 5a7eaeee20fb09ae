"""Interrupts at a chosen place of the library's code, as a signal handler that raises would make them.

Python runs the handlers of signals in the main thread between any two calls. A profiler is told of the same places, and
what it raises is raised there: so one can count them, and try each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn

import odewei
from odewei.runtime import runtime_of

__all__ = ["Alarm", "Interrupt", "Interrupter", "Lost", "kept_for_nobody"]

_OURS = os.path.dirname(odewei.__file__) + os.sep


class Interrupt(BaseException):
    """What the handler of a signal raises, as that of Ctrl-C does."""


class Alarm(Exception):
    """What the handlers of timeouts raise: code that catches errors catches it."""


class Interrupter:
    """Raises ``kind`` at place number ``at`` of this thread's way through the library, from 0 on; None: only counts.

    ``seen`` is the number of places so far, ``where`` the one that was interrupted.
    """

    def __init__(self, at: int | None = None, kind: type[BaseException] = Interrupt) -> None:
        self._at = at
        self._kind = kind
        self.seen = 0
        self.where = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Only what happens meanwhile counts."""
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)

    @property
    def fired(self) -> bool:
        return bool(self.where)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(_OURS):
            return
        self.seen += 1
        if self._at is not None and self.seen > self._at:
            self.where = f"{frame.f_code.co_filename.removeprefix(_OURS)}:{frame.f_lineno}"
            raise self._kind(self.where)


class Lost:
    """Counts what Python drops because it was raised in a finalizer, and keeps none of it, as pytest would."""

    def __enter__(self) -> Lost:
        self.count = 0
        self._before = sys.unraisablehook
        sys.unraisablehook = self._note
        return self

    def _note(self, _: object) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._before


def kept_for_nobody(streamed: nn.Module) -> list[str]:
    """Whose memory is in use although it is the one of no unit that is here or on its way. While nothing is decided."""
    ledger = runtime_of(streamed).driver.ledger
    with ledger.lock:
        ledger.pool.room_bytes()  # notes what has come back
        here = {record.slab for record in ledger.units.values()}
        return [slab.reservation.owner for slab in ledger.pool._in_use if slab not in here]
