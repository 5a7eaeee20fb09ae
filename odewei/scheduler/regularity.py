"""Which units come as predicted, and which come at random: routed experts, layers that are skipped now and then.

Knows unit ids and steps (accesses counted) only. Every unit has a small counter: a wrong prediction of the unit
raises it, a right one lowers it. A unit whose counter has reached a limit is *irregular*: it is kept out of the
predicted sequence, so that it neither disturbs it nor is fetched in vain, and all that is said of it is how often it
was used lately. It is regular again when its uses have come at even intervals for a while.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

__all__ = ["RareFirst", "Regularity"]

_IRREGULAR_FROM = 4
_IRREGULAR_AT_FIRST = 8  # so many even intervals less _IRREGULAR_FROM make it regular again
_WORST = 12
_REGULAR_AGAIN = 1
_EVEN = 1 / 8  # intervals that differ by less than this part are the same
_MEMORY = 4  # intervals that the mean is over, about


class Regularity:
    """A counter and a mean interval for each unit; 17 bytes a unit."""

    def __init__(self) -> None:
        self.turned: list[int] = []  # units that have become irregular; whoever acts on that empties it
        self._blame = bytearray()
        self._irregular = 0
        self._last = array("q")
        self._interval = array("d")

    def is_irregular(self, unit: int) -> bool:
        """Whether the unit is used at random."""
        return bool(self._irregular) and unit < len(self._blame) and self._blame[unit] >= _IRREGULAR_FROM

    def blame(self, unit: int) -> None:
        """The unit came unexpectedly, or did not come when it was expected."""
        self._reserve(unit)
        blame = min(self._blame[unit] + 1, _WORST)
        if blame == _IRREGULAR_FROM:
            blame = _IRREGULAR_AT_FIRST
            self._irregular += 1
            self.turned.append(unit)
        self._blame[unit] = blame

    def distrust(self, unit: int, step: int) -> None:
        """Nobody knows when this new unit will be used: irregular until it proves regular. Its first interval is as
        long as it takes until its first use.
        """
        self._reserve(unit)
        self._irregular += self._blame[unit] < _IRREGULAR_FROM
        self._blame[unit] = _IRREGULAR_AT_FIRST
        self._last[unit] = step

    def forgive(self, unit: int) -> None:
        """The unit came as expected."""
        blame = self._blame[unit] if unit < len(self._blame) else 0
        if blame == _IRREGULAR_FROM:
            blame = _REGULAR_AGAIN + 1
            self._irregular -= 1
        if blame:
            self._blame[unit] = blame - 1

    def note_access(self, unit: int, step: int) -> None:
        """The unit is used now. An irregular one is judged by its interval: nobody expects it."""
        if unit >= len(self._blame):
            self._reserve(unit)
        interval = step - self._last[unit] if self._last[unit] >= 0 else 0
        self._last[unit] = step
        mean = self._interval[unit] or interval
        self._interval[unit] = mean + (interval - mean) / _MEMORY
        if self.is_irregular(unit):
            if abs(interval - mean) <= mean * _EVEN:
                self.forgive(unit)
            else:
                self.blame(unit)

    def interval(self, unit: int) -> float:
        """The mean number of accesses from one use of the unit to the next; 0 if it is not known."""
        return self._interval[unit] if unit < len(self._interval) else 0.0

    def last_use(self, unit: int) -> int:
        """The step of the last use; -1 if there was none."""
        return self._last[unit] if unit < len(self._last) else -1

    def _reserve(self, unit: int) -> None:
        lacking = unit + 1 - len(self._blame)
        if lacking > 0:
            self._blame.extend(bytes(lacking))
            self._last.extend([-1] * lacking)
            self._interval.extend([0.0] * lacking)

    def __repr__(self) -> str:
        return f"<Regularity: {self._irregular} irregular units>"


class RareFirst:
    """Irregular units that are present, in the order in which they should leave: the rarest first.

    Among those that are about as rare, the one used last leaves first: in a loop its next chance is the furthest. One
    that has not been used for four of its intervals counts as rarer than it was.
    """

    def __init__(self, regularity: Regularity) -> None:
        self._regularity = regularity
        self._classes: dict[int, dict[int, None]] = {}  # by twice the logarithm of the interval; least recent first
        self._class_of: dict[int, int] = {}

    def put(self, unit: int) -> None:
        """The unit is present and was just used, or fetched for its use."""
        self._put(unit, self._regularity.interval(unit))

    def discard(self, unit: int) -> bool:
        """The unit leaves, or is irregular no more. True if it was in here."""
        rarity = self._class_of.pop(unit, None)
        if rarity is None:
            return False
        del self._classes[rarity][unit]
        if not self._classes[rarity]:
            del self._classes[rarity]
        return True

    def rarest_first(self, step: int) -> Iterator[tuple[int, float]]:
        """Units with the accesses that are expected before their next use, from the rarest on."""
        self._age(step)
        for rarity in sorted(self._classes, reverse=True):
            for unit in reversed(self._classes[rarity]):
                yield unit, 2.0 ** (rarity / 2)

    def _age(self, step: int) -> None:
        for rarity, units in list(self._classes.items()):
            oldest = next(iter(units))
            unused = step - self._regularity.last_use(oldest)
            if unused > 4 * 2.0 ** (rarity / 2):
                self._put(oldest, unused)

    def _put(self, unit: int, interval: float) -> None:
        self.discard(unit)
        rarity = int(max(1.0, interval) ** 2).bit_length()  # half octaves, rounded up
        self._class_of[unit] = rarity
        self._classes.setdefault(rarity, {})[unit] = None

    def __contains__(self, unit: int) -> bool:
        return unit in self._class_of

    def __len__(self) -> int:
        return len(self._class_of)

    def __repr__(self) -> str:
        return f"<RareFirst of {len(self)} units>"
