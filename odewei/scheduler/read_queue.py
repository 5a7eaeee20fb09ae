"""What waits to be read: batches of jobs in order, the urgent ones first. Knows jobs and threads; nothing of asyncio.

A batch is one unit's jobs. Reader threads take jobs one after another, across batches, without asking anybody in
between: while the model computes on every core, each time one thread has to wake another costs milliseconds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from odewei.scheduler.host_memory import Bytes
from odewei.scheduler.reader import FileTable, Job

__all__ = ["Batch", "ReadQueue"]


class Batch:
    """Jobs that fill one slab, each run by ``run``.

    ``on_done`` is called once, in the reader thread that ends the last of them.
    Then ``error`` is the first error of a job, or None, ``nbytes`` what was read, and nothing here holds the slab.
    After an error the jobs that have not begun are left out. Errors are values: some mean something to coroutines.
    """

    __slots__ = ("_files", "_left", "_lock", "_on_done", "_run", "_view", "_waiting", "error", "nbytes")

    def __init__(
        self,
        jobs: Sequence[Job],
        view: Bytes,
        files: FileTable,
        on_done: Callable[[], object],
        run: Callable[[Job, Bytes, FileTable], int],
    ) -> None:
        self.nbytes = 0
        self.error: BaseException | None = None
        self._waiting = deque(jobs)
        self._left = len(jobs)
        self._view: Bytes | None = view
        self._files = files
        self._on_done = on_done
        self._run = run
        self._lock = threading.Lock()

    @property
    def is_taken(self) -> bool:
        """Whether readers have taken all jobs."""
        return not self._waiting

    def take(self) -> Job | None:
        """The next job, to be run; None if all have been taken."""
        return self._waiting.popleft() if self._waiting else None

    def run(self, job: Job) -> None:
        """Run a job that was taken."""
        nbytes, error = 0, None
        if self.error is None:
            assert self._view is not None
            try:
                nbytes = self._run(job, self._view, self._files)
            except BaseException as caught:
                error = caught
        self._end(1, nbytes, error)

    def abandon(self, reason: BaseException) -> None:
        """Leave out what nobody has taken."""
        count = len(self._waiting)
        self._waiting.clear()
        self._end(count, 0, reason)

    def _end(self, jobs: int, nbytes: int, error: BaseException | None) -> None:
        with self._lock:
            self.nbytes += nbytes
            self.error = self.error or error
            self._left -= jobs
            is_last = jobs and not self._left
        if is_last:
            self._view = None
            self._on_done()


class ReadQueue:
    """Batches that are not yet all taken, by a key. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._batches: dict[object, Batch] = {}
        self._urgent: deque[object] = deque()
        self._closed: BaseException | None = None
        self._lock = threading.Lock()

    def put(self, key: object, batch: Batch, *, urgent: bool = False) -> None:
        """Queue a batch that has jobs."""
        with self._lock:
            if self._closed is None:
                self._batches[key] = batch
                if urgent:
                    self._urgent.append(key)
                return
        batch.abandon(self._closed)

    def hurry(self, key: object) -> None:
        """Somebody waits for this batch: if it is here, it goes before all that nobody waits for."""
        with self._lock:
            if key in self._batches:
                self._urgent.append(key)

    def close(self, reason: BaseException) -> None:
        """Leave out all jobs that nobody has taken, and all that are still to come."""
        with self._lock:
            self._closed = reason
        self.abandon(reason)

    def abandon(self, reason: BaseException) -> None:
        """Leave out all jobs that nobody has taken."""
        with self._lock:
            batches = list(self._batches.values())
            self._batches.clear()
        for batch in batches:
            batch.abandon(reason)

    def drain(self) -> None:
        """In a reader thread: run jobs until none is left."""
        while (taken := self._take()) is not None:
            batch, job = taken
            batch.run(job)
            del taken, batch, job

    def _take(self) -> tuple[Batch, Job] | None:
        with self._lock:
            while self._batches:
                key = self._most_urgent()
                batch = self._batches[key]
                job = batch.take()
                if batch.is_taken:
                    del self._batches[key]
                if job is not None:
                    return batch, job
            return None

    def _most_urgent(self) -> object:
        while self._urgent:
            if self._urgent[0] in self._batches:
                return self._urgent[0]
            self._urgent.popleft()
        return next(iter(self._batches))

    def __bool__(self) -> bool:
        return bool(self._batches)

    def __repr__(self) -> str:
        return f"<ReadQueue of {len(self._batches)} batches>"
