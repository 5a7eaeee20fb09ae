"""What a fork leaves of objects with locks: only the thread that forked goes on in the child.

A lock that another thread had at that moment is never given back there, and what it guarded may be half changed. So
objects that are watched are told in the child, before anything else runs there. Knows nothing of what they are.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol

from odewei.errors import ClosedError

__all__ = ["Forkable", "is_held_by_nobody_here", "was_forked", "watch"]


class Forkable(Protocol):
    """Has something that a fork may have torn."""

    def after_fork(self) -> None:
        """In the child: replace locks that nobody will ever give back."""


_watched: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(thing: Forkable) -> None:
    """Tell ``thing``, which is not kept alive, of every fork."""
    _watched.add(thing)


def is_held_by_nobody_here(lock: Any) -> bool:
    """Whether a thread that is not in this process has the lock."""
    if not lock.acquire(blocking=False):
        return True
    lock.release()
    return False


def was_forked() -> ClosedError:
    """Why a model takes no accesses in a forked child."""
    return ClosedError(
        "the process was forked, and the thread that reads the weights stayed behind",
        cure="Build the model in the child, or start processes with the method 'spawn'",
    )


def _tell_all() -> None:
    for thing in list(_watched):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
