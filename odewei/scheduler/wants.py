"""What forward passes have said that they will enter next, in order: routed experts, known before the first is used.

Knows unit records and threads' names only. Not thread-safe by itself: the ledger calls it under its lock.

It is more than a prediction and less than a demand. What is wanted is read before what is predicted and leaves for
nothing that nobody waits for; but nobody waits for it, so it goes when a forward's own unit needs its room.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from odewei.scheduler.records import Account, UnitRecord
from odewei.scheduler.states import State

__all__ = ["Wants"]

_BUSY_BYTES = 64 << 20


class Wants:
    """Units by thread, in the order in which each will enter them."""

    def __init__(self) -> None:
        self._of: dict[Hashable, dict[int, None]] = {}

    def put(self, thread: Hashable, units: Sequence[int]) -> None:
        """The thread will enter these next, and nothing else that it said before."""
        self.drop(thread)
        if units:
            self._of[thread] = dict.fromkeys(units)

    def met(self, thread: Hashable, unit: int) -> None:
        """The thread has entered a unit: its lease holds it from now on."""
        wanted = self._of.get(thread)
        if wanted is not None:
            wanted.pop(unit, None)
            if not wanted:
                del self._of[thread]

    def drop(self, thread: Hashable) -> None:
        """The thread wants nothing any more."""
        self._of.pop(thread, None)

    def drop_all(self) -> bool:
        """Nobody wants anything any more. True if anybody did."""
        found = bool(self._of)
        self._of.clear()
        return found

    def first_missing(self, units: Mapping[int, UnitRecord]) -> UnitRecord | None:
        """The first unit to be fetched. Of each thread what keeps a disk busy may be there before its use, within the
        window: more would only drive out what is used by others, for room that this thread's used units leave soon.

        One that could not be read is left to the forward that needs it, and to its error.
        """
        for wanted in self._of.values():
            ahead_bytes = 0
            for unit in wanted:
                record = units.get(unit)
                if record is None or record.state is State.FAILED or not _may_be_read(record.account):
                    continue
                if record.state is State.ABSENT:
                    beyond = ahead_bytes + record.nbytes > record.account.window.nbytes
                    if ahead_bytes >= _BUSY_BYTES or (ahead_bytes and beyond):
                        break
                    return record
                ahead_bytes += record.nbytes
        return None

    def __contains__(self, unit: object) -> bool:
        return any(unit in wanted for wanted in self._of.values())

    def __bool__(self) -> bool:
        return bool(self._of)

    def __repr__(self) -> str:
        return f"<Wants of {len(self._of)} threads>"


def _may_be_read(account: Account) -> bool:
    return account.closed is None and account.window.depth != 0
