"""How much memory the machine, the process's cgroups and the process itself leave for weights, now and later.

Knows ``/proc`` and ``/sys/fs/cgroup``. Knows nothing of models.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from odewei.errors import OptionsError
from odewei.scheduler.budget import format_nbytes

__all__ = ["FOR_WEIGHTS", "SECONDS_BETWEEN_LOOKS", "AutoLimit", "Ceiling", "available_bytes", "ceilings", "check_room"]

_log = logging.getLogger("odewei")

FOR_WEIGHTS = 0.8
"""The part of the available memory that "auto" gives to weights; the rest is for activations and everybody else."""

SECONDS_BETWEEN_LOOKS = 1.0
"""How often an "auto" budget looks at what is available, at most."""

_WORTH_A_CHANGE = 1 / 16  # of the limit; activations come and go, and no unit should with them


class AutoLimit:
    """A limit that follows what is available. Not thread-safe: the ledger calls it under its lock.

    Memory that weights hold already counts as available to them. ``available`` gives the bytes that the process could
    still take; ``clock`` gives seconds.
    """

    def __init__(self, available: Callable[[], int] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._available = available_bytes if available is None else available
        self._clock = clock
        self._looked = -SECONDS_BETWEEN_LOOKS

    def fitting(self, used_bytes: int) -> int:
        """The limit that fits now, when weights hold ``used_bytes``."""
        self._looked = self._clock()
        return int((self._available() + used_bytes) * FOR_WEIGHTS)

    def changed(self, limit_bytes: int, used_bytes: int, *, least_bytes: int, most_bytes: int) -> int | None:
        """Another limit than ``limit_bytes``, between least and most, if it is time to look and worth a change."""
        if self._clock() - self._looked < SECONDS_BETWEEN_LOOKS:
            return None
        wanted = max(least_bytes, min(most_bytes, self.fitting(used_bytes)))
        if abs(wanted - limit_bytes) <= limit_bytes * _WORTH_A_CHANGE and wanted not in (least_bytes, most_bytes):
            return None
        return wanted if wanted != limit_bytes else None


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the process can never go beyond, ``what`` in words.

    Of ``limit_bytes`` this process has taken ``mine_bytes``; ``left_bytes`` can still be had now, by whoever is first.
    """

    what: str
    limit_bytes: int
    mine_bytes: int
    left_bytes: int

    @property
    def room_bytes(self) -> int:
        """What this process could have besides, if nobody else had anything."""
        return self.limit_bytes - self.mine_bytes


def available_bytes() -> int:
    """Memory that this process can still have: what the machine, the process's cgroups and its own limits leave."""
    return max(0, min(ceiling.left_bytes for ceiling in ceilings()))


def check_room(needed_bytes: int, used_bytes: int, found: Sequence[Ceiling] | None = None) -> None:
    """Whether a budget that was asked for can be had, for weights that hold ``used_bytes`` of it already.

    Raises OptionsError if it never can: beyond a cgroup's limit the kernel ends the process without a word. Warns if
    others have too much of it at the moment. ``found`` are the ceilings.
    """
    found = ceilings() if found is None else found
    lowest = min(found, key=lambda ceiling: ceiling.room_bytes)
    if needed_bytes > lowest.room_bytes + used_bytes:
        most = format_nbytes(max(0, lowest.room_bytes + used_bytes))
        raise OptionsError(
            f"weights would take {format_nbytes(needed_bytes)} of the budget, but {lowest.what} is "
            f"{format_nbytes(lowest.limit_bytes)}, of which this process already has "
            f"{format_nbytes(lowest.mine_bytes - used_bytes)} for other things",
            cure=f'Use memory_budget="auto" or less than {most}, or raise the limit',
        )
    scarcest = min(found, key=lambda ceiling: ceiling.left_bytes)
    if needed_bytes > scarcest.left_bytes + used_bytes:
        _log.warning(
            "weights may take %s of the budget, but of %s only %s are left now: free memory, or use a smaller "
            'memory_budget or "auto"',
            format_nbytes(needed_bytes),
            scarcest.what,
            format_nbytes(scarcest.left_bytes + used_bytes),
        )


def ceilings() -> list[Ceiling]:
    """The machine's memory, the process's memory cgroups (v1 and v2) and its own limits."""
    status = _kilobytes("/proc/self/status")
    anonymous = status.get("RssAnon", 0)
    return [_machine(anonymous), *_cgroups(anonymous), *_own_limits(status)]


def _machine(anonymous: int) -> Ceiling:
    found = _kilobytes("/proc/meminfo")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = found.get("MemAvailable", total // 2)
    return Ceiling("the machine's memory with its swap", total + found.get("SwapTotal", 0), anonymous, left)


def _own_limits(status: Mapping[str, int]) -> Iterator[Ceiling]:
    for name, field, flag in (("RLIMIT_AS", "VmSize", "-v"), ("RLIMIT_DATA", "VmData", "-d")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and field in status:
            yield Ceiling(f"the process's limit (ulimit {flag})", limit, status[field], limit - status[field])


def _kilobytes(file: str) -> dict[str, int]:
    """The lines ``Name:  number kB`` of a file of the kernel, in bytes."""
    try:
        text = Path(file).read_text()
    except OSError:
        return {}
    return {name: int(number) * 1024 for name, number in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def _cgroups(anonymous: int) -> Iterator[Ceiling]:
    """What each memory cgroup above this process allows and leaves. Reclaimable page cache counts as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if root == folder or root in folder.parents:
                yield from _limit_of(folder, limit, usage, anonymous)


def _limit_of(folder: Path, limit: str, usage: str, anonymous: int) -> Iterator[Ceiling]:
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if allowed == "max" or int(allowed) >= 1 << 60:
        return
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    left = int(allowed) - max(0, used - cache)
    yield Ceiling(f"the memory limit of the control group {folder}", int(allowed), anonymous, left)
