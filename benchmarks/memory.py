"""Memory that the machine has at hand. Knows the kernel's numbers and nothing of what the memory is for."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np

__all__ = ["available_bytes", "touch"]

_SPARE = 1_000_000_000


def available_bytes() -> int:
    """What could be taken without swapping, as the kernel estimates it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) * 1024


def touch(nbytes: int) -> None:
    """Touch and free ``nbytes`` of memory, or what there is of it less a gigabyte, with two threads.

    A virtual machine gives idle memory back to its host and pays about a second a gigabyte at the next touch. A
    contender that meets such memory first would pay for all that follow it.
    """
    half = max(0, min(nbytes, available_bytes() - _SPARE)) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    if not half:
        return
    threads = [threading.Thread(target=_touch, args=(half,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _touch(nbytes: int) -> None:
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
