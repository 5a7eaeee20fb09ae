"""When a device computed, and when it waited for a unit, by events in the streams; read when they have happened.

Nobody waits for the device here: what has not happened yet is looked at again later.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from odewei.scheduler.accelerator import Accelerator, Copy
from odewei.scheduler.records import Account

__all__ = ["DeviceTime"]


@dataclass(slots=True)
class _Span:
    account: Account
    begin: torch.Event
    end: torch.Event
    waited: bool


class DeviceTime:
    """Adds to the counters of accounts. Methods may be called from any thread."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._spans: deque[_Span] = deque()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._first: torch.Event | None = None
        self._offset = float("-inf")  # what the host's clock showed at the first event, at least

    def begin(self) -> None:
        """This thread enters a pass, from outside of every model."""
        self._local.since = self._accelerator.mark()

    def end(self, account: Account) -> None:
        """This thread is outside again."""
        self._add(account, self._accelerator.mark(), waited=False)
        self._local.since = None
        self.collect()

    @contextmanager
    def waiting(self, account: Account) -> Iterator[None]:
        """What is put into this thread's stream meanwhile is a wait for a copy."""
        self._add(account, self._accelerator.mark(), waited=False)
        yield
        self._add(account, self._accelerator.mark(), waited=True)

    def landed(self, account: Account, copy: Copy) -> None:
        """A copy is over."""
        account.counters.copies += 1
        account.counters.copy_seconds += copy.seconds()

    def on_host(self, copy: Copy) -> tuple[float, float] | None:
        """When a copy that has landed began and ended, by ``time.perf_counter``; None where the device has no clock.

        No copy begins before it is submitted; one that finds its stream idle begins then: so the clocks are compared
        without waiting. One thread calls.
        """
        if copy.started is None or copy.done is None or not copy.done.query():
            return None
        self._first = self._first or copy.started
        began = self._first.elapsed_time(copy.started) / 1e3
        self._offset = max(self._offset, copy.submitted - began)
        return self._offset + began, self._offset + began + copy.seconds()

    def collect(self) -> None:
        """Add up what has happened by now."""
        with self._lock:
            while self._spans and self._spans[0].end.query():
                span = self._spans.popleft()
                seconds = span.begin.elapsed_time(span.end) / 1e3
                if span.waited:
                    span.account.counters.device_wait_seconds += seconds
                else:
                    span.account.counters.device_compute_seconds += seconds

    def _add(self, account: Account, now: torch.Event | None, *, waited: bool) -> None:
        """From the last mark of this thread until now."""
        since: torch.Event | None = getattr(self._local, "since", None)
        if since is not None and now is not None:
            self._spans.append(_Span(account, since, now, waited))
            self._local.since = now
