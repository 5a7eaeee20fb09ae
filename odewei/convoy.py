"""Passes of several threads that begin together, so that they share what is read from the first layer to the last.

Passes that wait for the disk stay together by themselves: whoever is ahead has to wait for a layer, and the others
catch up. But those that begin at different moments stay apart as well, and then each of them has a stream of weights of
its own (on the tests' virtual clock: eight passes begun at odd moments were 1.7 times as fast as one, and 5.9 times
when they had waited for each other). So a pass of a convoy waits at its beginning until all others of it are there.

Never for long, and never for nothing: one who takes more than twice as long as passes usually take (a long prompt) is
not waited for until it comes by itself, and where a whole round has read nothing, nobody waits.

Knows threads, moments and bytes. Knows nothing of models: those who run a pass tell (``pass_begins``, ``pass_ends``).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Convoy", "pass_begins", "pass_ends"]

_REMEMBERED = 16  # passes
_PATIENCE = 2.0  # times a usual pass
_LEAST_PATIENCE_SECONDS = 0.02  # threads of passes that take microseconds are not woken as fast
_FIRST_PATIENCE_SECONDS = 1.0  # while it is not known how long a pass takes

_mine = threading.local()


def pass_begins(bytes_read: int) -> None:
    """This thread begins a pass of a model of which so much has been read until now. Waits for its convoy, if any."""
    convoy: Convoy | None = getattr(_mine, "convoy", None)
    if convoy is not None:
        convoy.begin(bytes_read)


def pass_ends() -> None:
    """This thread has ended a pass, by whatever."""
    convoy: Convoy | None = getattr(_mine, "convoy", None)
    if convoy is not None:
        convoy.end()


class Convoy:
    """At most ``size`` calls at a time, each in a thread and with any number of passes. Methods are for any thread.

    It sets out when it is told that the first calls are all expected.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._calls = 0  # expected, and not ended
        self._members: set[int] = set()  # threads in a call
        self._away: set[int] = set()  # of these, those that nobody waits for
        self._waiting: set[int] = set()  # of these, those at the beginning of a pass
        self._round = 0
        self._bytes_read: int | None = None  # when the last round began
        self._latest_bytes_read = 0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._is_complete = False
        self._over = False

    def expect(self) -> None:
        """A call will be made as soon as a thread is free."""
        with self._changed:
            self._calls += 1

    def set_out(self) -> None:
        """As many calls are expected as there are for now: nobody waits for more. May be called again."""
        if not self._is_complete:
            with self._changed:
                self._is_complete = True
                self._go_if_all_are_here()

    @contextmanager
    def call(self) -> Iterator[None]:
        """This thread makes one of the calls that were expected."""
        me = threading.get_ident()
        with self._changed:
            self._members.add(me)
        _mine.convoy, _mine.depth = self, 0
        try:
            yield
        finally:
            _mine.convoy = None
            with self._changed:
                self._members.discard(me)
                self._away.discard(me)
                self._calls -= 1
                self._go_if_all_are_here()

    def dissolve(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def begin(self, bytes_read: int) -> None:
        """A member begins a pass. One within a pass waits for nobody."""
        _mine.depth += 1
        if _mine.depth == 1:
            if bytes_read != self._bytes_read:  # else the last round has read nothing
                self._wait(threading.get_ident(), bytes_read)
            _mine.since = time.perf_counter()

    def end(self) -> None:
        """A member has ended a pass."""
        _mine.depth = max(0, _mine.depth - 1)
        if not _mine.depth:
            self._seconds.append(time.perf_counter() - _mine.since)

    def _wait(self, me: int, bytes_read: int) -> None:
        with self._changed:
            self._away.discard(me)
            self._waiting.add(me)
            self._latest_bytes_read = bytes_read
            self._go_if_all_are_here()
            this_round = self._round
            if me in self._waiting and not self._changed.wait_for(
                lambda: self._over or self._round != this_round, self._patience_seconds()
            ):
                self._away |= self._members - self._waiting
                self._go()

    def _go_if_all_are_here(self) -> None:
        awaited = min(self._size, self._calls) - len(self._away)
        if self._is_complete and self._waiting and len(self._waiting) >= awaited:
            self._go()

    def _go(self) -> None:
        self._waiting.clear()
        self._round += 1
        self._bytes_read = self._latest_bytes_read
        self._changed.notify_all()

    def _patience_seconds(self) -> float:
        seconds = self._seconds.copy()  # others append
        if not seconds:
            return _FIRST_PATIENCE_SECONDS
        return max(_LEAST_PATIENCE_SECONDS, _PATIENCE * statistics.median(seconds))

    def __repr__(self) -> str:
        return f"<Convoy of {len(self._members)}, {len(self._waiting)} waiting, {len(self._away)} away>"
