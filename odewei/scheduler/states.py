"""The states of a unit, as a table. Knows nothing of what the states mean for memory or modules.

    ABSENT ──► READING ──► STAGED ──► RESIDENT ──► ABSENT
       ▲          │  └───────┬─────────► FAILED ──► ABSENT
       └──────────┘          └──► COPYING ──► RESIDENT

READING goes straight back to ABSENT when the unit turned out to need other room than was reserved. COPYING is for
accelerators only.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["MOVES", "IllegalMoveError", "State", "check_move"]


class State(Enum):
    """Where the bytes of a unit are."""

    ABSENT = "absent"  # in the checkpoint only
    READING = "reading"  # a slab is being filled
    STAGED = "staged"  # in host memory, not yet bound
    COPYING = "copying"  # on its way to the device
    RESIDENT = "resident"  # on the execution device and bound
    FAILED = "failed"  # the last read failed; not tried again before a forward needs the unit


MOVES: dict[State, frozenset[State]] = {
    State.ABSENT: frozenset({State.READING}),
    State.READING: frozenset({State.STAGED, State.FAILED, State.ABSENT}),
    State.STAGED: frozenset({State.COPYING, State.RESIDENT, State.FAILED}),
    State.COPYING: frozenset({State.RESIDENT, State.FAILED}),
    State.RESIDENT: frozenset({State.ABSENT}),
    State.FAILED: frozenset({State.ABSENT}),
}


class IllegalMoveError(AssertionError):
    """A unit was asked to make a move that the table does not have: a bug in the scheduler."""


def check_move(name: str, old: State, new: State) -> None:
    """Raise IllegalMoveError unless the table has the move."""
    if new not in MOVES[old]:
        raise IllegalMoveError(f"unit {name!r} cannot go from {old.value} to {new.value}")
