"""Whether a file is still the one that was looked at, on file systems that number and date files in odd ways.

Size, time of writing and inode number tell files apart where the numbers stay. User-space and network file systems may
number a file anew at every look, or after they have forgotten it, round times, or make up the time of the last change.
Each of these is believed only where it can be seen: that a number moves though nothing happened, or that the time of
the last change, which nobody can set, is the same. Where neither can be seen, another number is another file.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from odewei.loaders.told import tell_once

__all__ = ["ctime_to_keep", "has_unsteady_ctime", "has_unsteady_inode", "is_same_time", "is_still"]

_UNITS = (100, 1000, 10**6, 10**7, 10**9, 2 * 10**9)  # in which file systems keep times, in nanoseconds
_FINE = 10**6  # a time that is no multiple of this comes from a clock that ticks every 10 ms at least
_SETTLED_NS = (50 * 10**6, 3 * 10**9)  # with such a clock, and with any other: that of FAT has 2 s
_LOOKS = 3


def ctime_to_keep(found: os.stat_result) -> int:
    """When the file was last changed, if a later change would have another time; 0 if it was changed only just now."""
    settled = _SETTLED_NS[0] if found.st_ctime_ns % _FINE else _SETTLED_NS[1]
    return found.st_ctime_ns if time.time_ns() - found.st_ctime_ns > settled else 0


def is_same_time(one: int, other: int) -> bool:
    """Whether two times are the same, or one is the other rounded down, as after a file system wrote it to its disk."""
    if one == other:
        return True
    late, early = max(one, other), min(one, other)
    return any(early % unit == 0 and late - late % unit == early for unit in _UNITS)


def is_still(
    path: object,
    size: int,
    mtime_ns: int,
    inode: int,
    ctime_ns: int,
    now: os.stat_result,
    look: Callable[[], os.stat_result],
) -> bool:
    """Whether ``now`` is of the file that had these; ``look`` asks the system again. Raises OSError of ``look``."""
    if now.st_size != size:
        return False
    if (now.st_mtime_ns, now.st_ino) == (mtime_ns, inode):
        return True
    if ctime_ns and is_same_time(ctime_ns, now.st_ctime_ns) and is_same_time(mtime_ns, now.st_mtime_ns):
        what = "gives files other numbers at times" if now.st_ino != inode else "rounds the times of files"
        _tell(path, what, "size and times")
        return True
    if now.st_mtime_ns != mtime_ns:
        return False
    has_numbers = bool(now.st_ino and inode)  # 0 is none
    if has_numbers and not has_unsteady_inode(look) and not _is_numbered_by_opening(path):
        return False
    if ctime_ns and now.st_ctime_ns != ctime_ns and not has_unsteady_ctime(look):
        return False  # something was done to it
    _tell(path, "gives a file another number at every look, or none", "size and time")
    return True


def has_unsteady_inode(look: Callable[[], os.stat_result]) -> bool:
    """Whether one file, looked at several times at once, has several numbers."""
    return len({look().st_ino for _ in range(_LOOKS)}) > 1


def _is_numbered_by_opening(path: object) -> bool:
    """Whether a file has another number when it is open than at its path, without having been replaced there."""
    if not isinstance(path, str | os.PathLike):
        return False
    for _ in range(2):  # that it is replaced between a pair of looks, each time, is not to be thought of
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return False
        finally:
            os.close(fd)
    return True


def has_unsteady_ctime(look: Callable[[], os.stat_result]) -> bool:
    """Whether the time of the last change moves at every look, faster than any clock that files are dated with."""
    looks = [look() for _ in range(_LOOKS)]
    return len({one.st_ctime_ns for one in looks}) == _LOOKS and len({one.st_mtime_ns for one in looks}) == 1


def _tell(path: object, what: str, instead: str) -> None:
    folder = os.path.dirname(os.fspath(path)) if isinstance(path, str | os.PathLike) else ""
    tell_once(
        f"the file system of {folder!r} {what}: files in it are told from others by their {instead}",
        level=logging.WARNING,
    )
