"""What the log says of a file that is not what its name says, and is read all the same: once a process each."""

from __future__ import annotations

import logging
import threading

__all__ = ["tell_once"]

_log = logging.getLogger("odewei")
_told: set[str] = set()
_lock = threading.Lock()
_MOST = 10_000


def tell_once(text: str, *, level: int = logging.INFO) -> None:
    """Log ``text``, unless that was done before. Any thread."""
    with _lock:
        if text in _told or len(_told) >= _MOST:
            return
        _told.add(text)
    _log.log(level, "%s", text)
