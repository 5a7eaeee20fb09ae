"""What to fetch next and what leaves for it. Pure functions over plain values: no locks, no clock, no memory.

The rules are those of Cao, Felten, Karlin and Li, "A Study of Integrated Prefetching and Caching Strategies"
(SIGMETRICS 1995), over Belady's MIN: fetch the first missing unit of the predicted future; for it evicts the
resident, unleased unit whose next use is furthest; never evict what is needed sooner than what is fetched; act at the
first possible moment.

One rule is added. Fetching as early as possible evicts as early as possible, and in a loop that turns every unit into
a miss. So at most a *window* of units is fetched ahead of its use: the rest of the budget holds what is worth
keeping, and a loop over S bytes under a budget of B reads S - B bytes plus the window a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Candidate", "Decision", "Window", "Wish", "choose_victims", "decide", "window_for"]

_WINDOW_BYTES = 256 << 20  # enough in flight to keep a fast disk busy


class Candidate(NamedTuple):
    """A resident, unleased unit that may leave. ``distance``: accesses before its next use."""

    unit: int
    nbytes: int
    distance: float


class Wish(NamedTuple):
    """A missing unit. ``distance``: accesses before it is needed; a demanded one is waited for by a forward now."""

    unit: int
    nbytes: int
    distance: float
    demanded: bool


class Decision(NamedTuple):
    """Evict these, then read that, if anything.

    ``beyond_limit``: no order of evictions makes room, and a forward waits.
    """

    fetch: int | None
    evict: tuple[int, ...] = ()
    beyond_limit: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """How far to fetch ahead: so many units (None: any number) and so many bytes, whichever comes first.

    One unit may always be ahead unless ``depth`` is 0, however large it is.
    """

    depth: int | None
    nbytes: int

    def is_open(self, ahead_units: int, ahead_bytes: int, next_nbytes: int) -> bool:
        """Whether a unit of ``next_nbytes`` bytes may join those fetched and not yet used."""
        if self.depth is not None and ahead_units >= self.depth:
            return False
        return ahead_units == 0 or ahead_bytes + next_nbytes <= self.nbytes

    def most_bytes(self, largest_bytes: int) -> int:
        """What may be ahead at a time, in units of at most ``largest_bytes``."""
        if self.depth is None:
            return max(self.nbytes, largest_bytes)
        return min(self.nbytes, self.depth * largest_bytes)


def window_for(depth: int | None, limit_bytes: int, largest_bytes: int) -> Window:
    """The window of ``depth`` units; for "auto" (None) what keeps a disk busy, at most half of the budget."""
    if depth is not None:
        return Window(depth, limit_bytes)
    return Window(None, min(limit_bytes // 2, max(_WINDOW_BYTES, 2 * largest_bytes)))


def choose_victims(needed_bytes: int, best_to_leave: Iterable[Candidate]) -> tuple[int, ...] | None:
    """Units whose leaving frees at least ``needed_bytes``; None if all of them together do not.

    The first candidates leave. What the last, large victim made needless stays after all.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in best_to_leave:
        chosen.append(candidate)
        freed += candidate.nbytes
        if freed >= needed_bytes:
            break
    if freed < needed_bytes:
        return None
    for candidate in reversed(chosen[:-1]):
        if freed - candidate.nbytes >= needed_bytes:
            freed -= candidate.nbytes
            chosen.remove(candidate)
    return tuple(candidate.unit for candidate in chosen)


def decide(
    wish: Wish | None,
    *,
    room_bytes: int,
    reading_bytes: int,
    leaving_bytes: int,
    best_to_leave: Callable[[float], Iterable[Candidate]],
) -> Decision | None:
    """The next thing to do, or None: wait until something changes.

    ``wish`` is the most urgent missing unit: one that a forward waits for, else the first of the predicted future.
    ``room_bytes`` can be had at once. ``reading_bytes`` are being read for nobody in particular, so that they can be
    evicted when they have arrived: a demanded unit waits for that rather than going beyond the limit.
    ``leaving_bytes`` were evicted and are still held by somebody: worth waiting for when prefetching, but never when
    a forward waits, which may be the very holder. Negative room (the budget has shrunk, or a forward had to go beyond
    it) is won back first, unless a forward waits.
    """
    if room_bytes + leaving_bytes < 0 and not (wish is not None and wish.demanded):
        victims = choose_victims(-room_bytes - leaving_bytes, best_to_leave(-1))
        if victims is None:
            victims = tuple(candidate.unit for candidate in best_to_leave(-1))
        return Decision(None, victims) if victims else None
    if wish is None:
        return None
    lacking = wish.nbytes - room_bytes
    if lacking <= 0:
        return Decision(wish.unit)
    if not wish.demanded and lacking <= leaving_bytes:
        return None
    victims = choose_victims(lacking, best_to_leave(-1 if wish.demanded else wish.distance))
    if victims is not None:
        return Decision(wish.unit, victims)
    if wish.demanded and reading_bytes == 0:
        return Decision(wish.unit, tuple(candidate.unit for candidate in best_to_leave(-1)), beyond_limit=True)
    return None
