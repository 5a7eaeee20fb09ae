"""The futures of all threads, merged: what is missing first, and what should leave first.

Knows unit ids, their bytes and threads' names only. Not thread-safe: the ledger calls it under its lock.

A thread counts while it is inside a forward pass, and the latest one always: what an idle thread would need next must
neither hold memory nor fetch any. Distances are accesses of all these threads: where one of them makes a third of the
accesses, what it needs in ten accesses of its own is thirty away. With one such thread a question costs O(log n) in
the number of units; with several, some candidates of each are compared.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from itertools import chain, islice

from odewei.scheduler.history import NEVER, History, Surprise
from odewei.scheduler.regularity import RareFirst, Regularity
from odewei.scheduler.spacing import Spacing

__all__ = ["Outlook"]

_BATCH = 16  # candidates of each of several threads that are compared at a time
_SHARE_MEMORY = 32  # accesses that a thread's share of them is over, about

Candidates = Iterator[tuple[int, float]]


class Outlook:
    """One history a thread, and what they say together. ``order`` is the guess for the first pass."""

    def __init__(self, order: Sequence[int] = ()) -> None:
        self._order = tuple(order)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all that was seen."""
        self._regularity = Regularity()
        self._spacing = Spacing()
        self._rare = RareFirst(self._regularity)  # present and irregular
        self._histories: dict[Hashable, History] = {}
        self._initial = History(self._order, self._regularity)
        self._live: dict[Hashable, History] = {None: self._initial}
        self._shares: dict[Hashable, float] = {None: 1.0}
        self._unmarked: list[History] = []  # live ones that do not know yet who is present
        self._inside: set[Hashable] = set()
        self._latest: Hashable = None
        self._step = 0  # accesses seen

    def seed(self, order: Sequence[int]) -> None:
        """Replace the guess of one pass (by a trace) for every thread."""
        self._order = tuple(order)
        self._initial = History(self._order, self._regularity)
        self._histories = {thread: History(self._order, self._regularity) for thread in self._histories}
        self._choose_live()

    # -- threads -----------------------------------------------------------------------------------------------------

    def record(self, thread: Hashable, unit: int, nbytes: int = 1) -> Surprise | None:
        """A thread enters a unit. None if that was predicted, and all other predictions stand."""
        if thread not in self._histories:
            self._histories[thread] = self._new_history()
        if thread is not self._latest:
            self._latest = thread
            self._choose_live()
        self._step += 1
        if len(self._live) > 1:
            for other in self._shares:
                self._shares[other] += ((other is thread) - self._shares[other]) / _SHARE_MEMORY
        self._spacing.note_access(unit, nbytes)
        self._regularity.note_access(unit, self._step)
        present = self._rare.discard(unit)
        if not self._regularity.is_irregular(unit):
            surprise = self._histories[thread].record(unit)
        else:
            surprise = Surprise(jumped=False)
        if present:
            self.note_present(unit)
        while self._regularity.turned:
            self._take_out(self._regularity.turned.pop())
        return surprise

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

    def expect_at_random(self, unit: int) -> None:
        """This new unit is used when somebody asks for it, as far as is known."""
        self._regularity.distrust(unit, self._step)

    # -- units -------------------------------------------------------------------------------------------------------

    def note_present(self, unit: int) -> None:
        """A unit has arrived."""
        if self._regularity.is_irregular(unit):
            self._rare.put(unit)
        else:
            for history in self._live.values():
                history.mark(unit)

    def note_missing(self, unit: int) -> None:
        """A unit is absent, or absent again."""
        self._rare.discard(unit)
        for history in self._live.values():
            history.unmark(unit)

    def note_eviction(self, unit: int) -> None:
        """A unit leaves for another one."""
        self._spacing.note_eviction(unit)
        self.note_missing(unit)

    def next_use(self, unit: int) -> float:
        """Accesses before the next one of ``unit``, the nearest over all live threads; NEVER if none is predicted."""
        if self._regularity.is_irregular(unit):
            return self._regularity.interval(unit)
        return min(history.next_use(unit) * self._pace(thread) for thread, history in self._live.items())

    def first_missing(self, is_missing: Callable[[int], bool]) -> tuple[int, float] | None:
        """The first unit of the predicted future that is missing, and the accesses before it. None may also mean that
        it was not looked for far enough: ask again after the next access.
        """
        found = [
            (hit[0], hit[1] * self._pace(thread))
            for thread, history in self._live.items()
            if (hit := history.first_missing(is_missing)) is not None
        ]
        return min(found, key=lambda hit: hit[1], default=None)

    def recent_pass(self) -> Sequence[int]:
        """What the latest thread is expected to enter from now on, once around; the guess if nothing is predicted."""
        latest = self._histories.get(self._latest)
        return tuple(latest.upcoming()) if latest is not None and latest.period else self._order

    def best_to_leave(
        self, evictable: Callable[[int], bool], residents: Collection[int], beyond: float = -1
    ) -> Candidates:
        """Evictable units that are used after more than ``beyond`` accesses, with their distances.

        In falling order of distance, except that spare units go before one that stays, if they are of the same loop.
        """
        self._mark_all(residents)
        allowed = ((unit, distance) for unit, distance in self._furthest_first() if evictable(unit))
        furthest = next(allowed, None)
        if furthest is None or furthest[1] <= beyond:
            return
        instead = set()
        if furthest[1] < NEVER and self._spacing.stays(furthest[0]):
            for unit, distance in self._spare_of_same_loop(*furthest):
                if distance > beyond and evictable(unit):
                    instead.add(unit)
                    yield unit, distance
        for unit, distance in chain([furthest], allowed):
            if distance <= beyond:
                return
            if unit not in instead:
                yield unit, distance

    def keep(self, nbytes: int) -> None:
        """Of loops that do not fit, so many bytes can stay."""
        self._spacing.keep(nbytes)

    def _spare_of_same_loop(self, staying: int, distance: float) -> Candidates:
        """Units that may leave instead of one that stays, for the same number of reads: they are used as often."""
        loop = distance + self._step - self._regularity.last_use(staying)
        if abs(self._regularity.interval(staying) - loop) > loop / 8:
            return  # it was decided for another loop
        for unit in self._spacing.spare():
            distance = self.next_use(unit)
            both = (distance + self._step - self._regularity.last_use(unit), self._regularity.interval(unit))
            if all(abs(each - loop) <= loop / 8 for each in both):
                yield unit, distance

    # -- merging -----------------------------------------------------------------------------------------------------

    def _furthest_first(self) -> Candidates:
        regular = next(iter(self._live.values())).furthest_first() if len(self._live) == 1 else self._several_futures()
        if not self._rare:
            return regular
        return heapq.merge(regular, self._rare.rarest_first(self._step), key=lambda item: -item[1])

    def _several_futures(self) -> Candidates:
        streams = [history.furthest_first() for history in self._live.values()]
        seen: set[int] = set()
        while batch := {unit for stream in streams for unit, _ in islice(stream, _BATCH)} - seen:
            seen |= batch
            yield from sorted(((unit, self.next_use(unit)) for unit in batch), key=lambda item: -item[1])

    def _mark_all(self, residents: Collection[int]) -> None:
        """Tell histories that have become live who is present."""
        for unit in residents if self._unmarked else ():
            if not self._regularity.is_irregular(unit):
                for history in self._unmarked:
                    history.mark(unit)
            elif unit not in self._rare:
                self._rare.put(unit)
        self._unmarked.clear()

    def _take_out(self, unit: int) -> None:
        """A unit has become irregular: histories know nothing of it any more."""
        marked = [history.unmark(unit) for history in self._live.values()]  # in all of them
        if any(marked):
            self._rare.put(unit)

    def _pace(self, thread: Hashable) -> float:
        return 1.0 if len(self._live) == 1 else 1.0 / max(self._shares[thread], 1e-3)

    def _new_history(self) -> History:
        if not self._histories:
            return self._initial
        return History(self.recent_pass(), self._regularity)

    def _choose_live(self) -> None:
        live = {
            thread: self._histories[thread] for thread in self._inside | {self._latest} if thread in self._histories
        }
        live = live or {None: self._initial}
        if live == self._live:
            return
        old, new = list(self._live.values()), list(live.values())
        for history in old:
            if history not in new:
                history.unmark_all()
        self._unmarked = [history for history in new if history not in old or history in self._unmarked]
        self._live = live
        self._shares = dict.fromkeys(live, 1.0 / len(live))

    def __repr__(self) -> str:
        return f"<Outlook of {len(self._histories)} threads, {len(self._live)} live>"
