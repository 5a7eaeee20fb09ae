"""The garbage collector, paused while odewei builds. Knows nothing of what is built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collector"]


@contextmanager
def without_collector() -> Iterator[None]:
    """No garbage collections meanwhile: of 100,000 units none is garbage, and looking takes longer than making them.

    Not for running the user's code, which may make garbage.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
