"""Shards that say by their names which of how many they are. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["ShardSet", "shard_sets"]

_SHARD = re.compile(r"(?P<stem>.+?)[-_.](?P<number>\d{1,6})-of-(?P<count>\d{1,6})(?P<end>(?:\.[A-Za-z][A-Za-z0-9_]*)+)")
_MOST = 100_000


@dataclass(frozen=True, slots=True)
class ShardSet:
    """Files of one checkpoint: ``names`` by their numbers, of which there should be ``count``."""

    pattern: str
    count: int
    names: Mapping[int, str]

    @property
    def first(self) -> int:
        """The number that counting begins with: 1, or 0 where there is a shard of that number."""
        return 0 if 0 in self.names else 1

    @property
    def missing(self) -> list[int]:
        """The numbers that should be there and are not."""
        return [number for number in range(self.first, self.first + self.count) if number not in self.names]

    @property
    def surplus(self) -> list[str]:
        """Names whose numbers should not be."""
        return [name for number, name in self.names.items() if not self.first <= number < self.first + self.count]

    def in_order(self) -> list[str]:
        """The names, by their numbers."""
        return [self.names[number] for number in sorted(self.names)]


def shard_sets(names: Iterable[str]) -> tuple[list[ShardSet], list[str]]:
    """The sets among ``names``, and the names that belong to none.

    Two spellings of one number (1 and 01) make two sets.
    """
    found: dict[tuple[str, str, str, int], dict[int, str]] = {}
    others = []
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is None or not 1 <= int(match["count"]) <= _MOST:
            others.append(name)
        else:
            key = (match["stem"], match["count"], match["end"], len(match["number"]))
            found.setdefault(key, {})[int(match["number"])] = name
    sets = [
        ShardSet(f"{stem}-*-of-{count}{end}", int(count), numbers) for (stem, count, end, _), numbers in found.items()
    ]
    return sets, others
