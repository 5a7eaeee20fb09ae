"""How much memory the machine, the process's cgroups and the process itself leave for weights, now and later.

Knows ``/proc`` and ``/sys/fs/cgroup``. Knows nothing of models.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["FOR_WEIGHTS", "SECONDS_BETWEEN_LOOKS", "AutoLimit", "available_bytes"]

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


def available_bytes() -> int:
    """Memory that this process can still have: the smaller of what the machine and the process's cgroups leave."""
    return max(0, min([_machine_available(), *_cgroup_available()]))


def _machine_available() -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match is not None:
        return int(match[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_available() -> list[int]:
    """What each memory cgroup above this process leaves, v1 and v2. Reclaimable page cache counts as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
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
                found.extend(_left_in(folder, limit, usage))
    return found


def _left_in(folder: Path, limit: str, usage: str) -> list[int]:
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if allowed == "max" or int(allowed) >= 1 << 60:
        return []
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return [int(allowed) - max(0, used - cache)]
