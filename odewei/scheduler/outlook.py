"""The futures of all threads, merged: what is missing first, and what is needed last.

Knows unit ids and threads' names only. Not thread-safe: the ledger calls it under its lock.

A thread counts while it is inside a forward pass, and the latest one always: what an idle thread would need next must
neither hold memory nor fetch any. With one such thread a question costs O(log n) in the number of units: the absolute
step of a unit's next use does not change while predictions are right, so the residents stay in a heap, and the search
for the first missing unit goes on where it stopped. A wrong prediction, or several threads at once, makes both start
anew.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

from odewei.scheduler.history import NEVER, History

__all__ = ["Outlook"]


class Outlook:
    """One history a thread, and what they say together. ``order`` is the guess for the first pass."""

    def __init__(self, order: Sequence[int] = ()) -> None:
        self._order = tuple(order)
        self._histories: dict[Hashable, History] = {}
        self._live: dict[Hashable, History] = {}
        self._inside: set[Hashable] = set()
        self._latest: Hashable = None
        self._initial = History(self._order)
        self._step = 0  # accesses seen, while exactly one history is live
        self._scanned = 0  # the absolute step before which nothing is missing
        self._heap: list[tuple[float, int, int]] = []  # (-absolute next use, last use, unit)
        self._entries: dict[int, tuple[float, int, int]] = {}  # the heap's valid entry of a unit
        self._last_use: dict[int, int] = {}
        self._stale = True

    def seed(self, order: Sequence[int]) -> None:
        """Replace the guess of one pass (by a trace) for every thread."""
        self._order = tuple(order)
        self._initial = History(self._order)
        self._histories = {thread: History(self._order) for thread in self._histories}
        self._live = {thread: self._histories[thread] for thread in self._live}
        self._forget_predictions()

    def record(self, thread: Hashable, unit: int) -> bool:
        """A thread enters a unit. True if it was predicted, and all other predictions stand."""
        if thread not in self._histories:
            self._histories[thread] = History(self.recent_pass())
        if thread is not self._latest:
            self._latest = thread
            self._choose_live()
        right = self._histories[thread].record(unit)
        self._step += 1
        self._last_use[unit] = self._step
        if not right:
            self._forget_predictions()
        return right

    def enter(self, thread: Hashable) -> None:
        """The thread is inside a forward pass from now on."""
        self._inside.add(thread)
        self._choose_live()

    def leave(self, thread: Hashable) -> None:
        """The thread is outside of every forward pass."""
        self._inside.discard(thread)
        self._choose_live()

    def forget(self, thread: Hashable) -> None:
        """The thread has ended."""
        self._inside.discard(thread)
        if thread is not self._latest:
            self._histories.pop(thread, None)
        self._choose_live()

    def next_use(self, unit: int) -> float:
        """Accesses before the next one of ``unit``, the nearest over all live threads; NEVER if none is predicted."""
        return min((history.next_use(unit) for history in self._futures()), default=NEVER)

    def first_missing(self, is_missing: Callable[[int], bool]) -> tuple[int, int] | None:
        """The first unit of the predicted future that is missing, and the accesses before it."""
        found = [hit for history in self._futures() if (hit := self._first_missing_of(history, is_missing)) is not None]
        return min(found, key=lambda hit: hit[1], default=None)

    def note_missing(self, unit: int) -> None:
        """A unit has become missing: the search must not start beyond its next use."""
        distance = self.next_use(unit)
        if distance is not NEVER:
            self._scanned = min(self._scanned, self._step + int(distance))
        self._entries.pop(unit, None)

    def note_evictable(self, unit: int) -> None:
        """A resident unit has become free to leave, or its next use has changed."""
        if self._stale:
            return
        entry = (-(self._step + self.next_use(unit)), self._last_use.get(unit, 0), unit)
        self._entries[unit] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 1024:  # mostly outdated entries
            self._stale = True

    def furthest_first(
        self, evictable: Callable[[int], bool], residents: Collection[int]
    ) -> Iterator[tuple[int, float]]:
        """Evictable units with the distance to their next use, the furthest first; never-used ones by least recent
        use.
        """
        if self._stale or len(self._live) > 1:
            self._rebuild(residents)
        seen: list[tuple[float, int, int]] = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                unit = entry[2]
                if self._entries.get(unit) != entry:
                    continue
                seen.append(entry)
                if evictable(unit):
                    yield unit, -entry[0] - self._step
        finally:
            for entry in seen:
                heapq.heappush(self._heap, entry)

    def recent_pass(self) -> Sequence[int]:
        """What the latest thread is expected to enter from now on, once around; the guess if nothing is predicted."""
        latest = self._histories.get(self._latest)
        return latest.recent_pass() if latest is not None and latest.period else self._order

    def _futures(self) -> Collection[History]:
        return self._live.values() if self._live else (self._initial,)

    def _first_missing_of(self, history: History, is_missing: Callable[[int], bool]) -> tuple[int, int] | None:
        alone = len(self._live) <= 1
        start = max(0, self._scanned - self._step) if alone else 0
        for distance, unit in enumerate(history.upcoming(start), start):
            if is_missing(unit):
                if alone:
                    self._scanned = self._step + distance
                return unit, distance
        if alone:
            self._scanned = self._step + history.period
        return None

    def _choose_live(self) -> None:
        live = self._inside | {self._latest}
        if live != self._live.keys():
            self._live = {thread: self._histories[thread] for thread in live if thread in self._histories}
            self._forget_predictions()

    def _forget_predictions(self) -> None:
        self._stale = True
        self._scanned = self._step

    def _rebuild(self, residents: Collection[int]) -> None:
        self._heap, self._entries, self._stale = [], {}, False
        for unit in residents:
            self.note_evictable(unit)

    def __repr__(self) -> str:
        return f"<Outlook of {len(self._histories)} threads, {len(self._live)} live>"
