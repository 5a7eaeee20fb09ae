"""The prefetching driver: one daemon thread with an asyncio loop, and a pool of reader threads.

The loop's thread alone moves units. It decides as long as there is something to decide, starts reads, and sleeps
until a forward thread, a finished read or a returned slab wakes it. Files are opened and read through aiofiles in the
reader pool. Reads are cut into jobs that wait in one queue across units and passes, and a reader takes one after the
other, so that the disk is never idle between two layers; the jobs of a unit that a forward waits for go first.

Nothing here holds a model: when it dies, its finalizer has its account leave. Accounts are closed by the loop's thread,
under no lock; the last one ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import aiofiles.os

from odewei.errors import ClosedError, ModelError, WeightReadError
from odewei.loaders.base import CheckpointFile
from odewei.scheduler.drivers import Driver, was_closed
from odewei.scheduler.forks import was_forked
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.machine import SECONDS_BETWEEN_LOOKS
from odewei.scheduler.read_queue import Batch, ReadQueue
from odewei.scheduler.reader import FileTable
from odewei.scheduler.records import Account, UnitRecord, Waiter
from odewei.scheduler.slab import Slab

__all__ = ["PrefetchingDriver"]


class PrefetchingDriver(Driver):
    """Reads ahead on its own thread. ``start`` starts it; ``close`` ends it and its readers."""

    def __init__(self, ledger: Ledger, *, num_readers: int, name: str) -> None:
        super().__init__(ledger)
        self._num_readers = num_readers
        self._reader_prefix = f"odewei-reader-{name}_"
        self._pool = ThreadPoolExecutor(num_readers, thread_name_prefix=self._reader_prefix[:-1])
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._run, name=f"odewei-scheduler-{name}", daemon=True)
        self._awake = asyncio.Event()
        self._queue = ReadQueue()
        self._queued = asyncio.Semaphore(0)
        self._opening: dict[tuple[FileTable, CheckpointFile], asyncio.Lock] = {}
        self._reads: set[asyncio.Task[None]] = set()
        self._process = os.getpid()
        self._leaving: deque[Account] = deque()
        self._closing = False
        self._poked = False
        self.ledger.pool.on_return = self._wake

    # -- any thread --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        with self.ledger.lock:
            if self._thread.ident is None:
                try:
                    self._thread.start()
                except RuntimeError as error:
                    raise _cannot_start(error) from error

    def poke(self) -> None:
        if self.ledger.needs_driver():
            self._wake()

    def after_fork(self) -> None:
        super().after_fork()
        self._poked = True  # for ever: what wakes the loop is the parent's, too

    def _wake(self) -> None:
        """Wake the loop. Takes no lock: finalizers call it."""
        if self._poked or self._closing:
            return
        self._poked = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: its thread has told everybody so
            self._loop.call_soon_threadsafe(self._awake.set)

    def _serve(self, waiter: Waiter) -> None:
        if self._is_own_thread():
            raise self._used_by_its_reader()
        if os.getpid() != self._process:
            raise was_forked()
        self._begin_to_serve(waiter)
        waiter.done.wait()

    def _begin_to_serve(self, waiter: Waiter) -> None:
        self._queue.hurry(waiter.unit)
        self._poked = False  # an interrupt may have hit the last wake-up half way
        self._wake()

    def leave_for_good(self, account: Account) -> None:
        if os.getpid() != self._process:
            return  # the loop, its descriptors included, is the parent's
        if self._thread.ident is None:
            self.close()
            return
        self._leaving.append(account)
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._awake.set)
        if self._may_wait():
            account.gone.wait()
            if self._closing:
                self._thread.join()

    def close(self) -> None:
        """May run in any thread at any moment, as a finalizer: the loop's thread does the work, under no lock."""
        if os.getpid() != self._process:
            return
        if self._thread.ident is None:
            self._pool.shutdown()
            self._loop.close()
            super().close()
            return
        self._closing = True
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._awake.set)
        if self._may_wait():
            self._thread.join()

    def _may_wait(self) -> bool:
        """Whether the caller may wait for the loop's thread: it is not part of it, and holds nothing that it needs."""
        return not self._is_own_thread() and not self.ledger.is_held_by_caller()

    def _is_own_thread(self) -> bool:
        """Whether the caller is the loop's thread or a reader, which must wait for neither."""
        current = threading.current_thread()
        return current is self._thread or current.name.startswith(self._reader_prefix)

    # -- the loop's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:  # also what asyncio lets end the loop without a word to its tasks
            self.ledger.close(_death(error))
            raise
        finally:
            self._closing = True
            self._queue.close(was_closed())
            self._pool.shutdown()
            self._loop.close()
            super().close()
            while self._leaving:
                self._leaving.popleft().end()

    async def _main(self) -> None:
        if self.ledger.adapts:
            self._look_again()
        workers = [asyncio.create_task(self._work()) for _ in range(self._num_readers)]
        reason = was_closed()
        try:
            while not self._closing:
                self._awake.clear()
                self._poked = False
                self._let_leave()
                self._decide()
                for task in (*workers, *self._reads):
                    if task.done():
                        task.result()  # a defect in here ends the thread, loudly
                await self._awake.wait()
        except BaseException as error:
            reason = _death(error)
            raise
        finally:
            self._closing = True
            self.ledger.close(reason)  # first of all, so that nobody waits for what follows
            await self._end(workers)

    def _look_again(self) -> None:
        """Wake up once a second, for a budget that follows what the machine can spare."""
        if not self._closing:
            self._awake.set()
            self._loop.call_later(SECONDS_BETWEEN_LOOKS, self._look_again)

    async def _end(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """Let the readers end what they are doing, and drop the rest. Nothing is cancelled half way."""
        self._queue.close(was_closed())
        for _ in workers:
            self._queued.release()
        await asyncio.gather(*workers, *self._reads, return_exceptions=True)

    def _let_leave(self) -> None:
        """Close the accounts that leave, each as soon as nothing of it is on its way. The last one ends the loop."""
        for _ in range(len(self._leaving)):
            account = self._leaving.popleft()
            if account.gone.is_set():
                continue
            if not self.ledger.depart(account, was_closed()):
                self._closing = True
                self._awake.set()
            elif account.is_reading():
                self._leaving.append(account)  # the end of its read wakes the loop
            else:
                self.ledger.forget(account)
                account.end()

    def _decide(self) -> None:
        self.ledger.adapt()
        while not self._closing and (decision := self.ledger.next_decision()) is not None:
            slab = self._make_room(decision)
            if slab is None or decision.fetch is None:
                continue
            self.ledger.begin_read(decision.fetch, slab)
            self._begin(self.ledger.units[decision.fetch], slab)

    def _begin(self, record: UnitRecord, slab: Slab) -> None:
        task = asyncio.create_task(self._read(record, slab))
        self._reads.add(task)
        task.add_done_callback(self._read_done)

    def _read_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._reads.discard(task)
        self._awake.set()

    async def _read(self, record: UnitRecord, slab: Slab) -> None:
        """All jobs of a unit, then publish it or tell who waits that it failed."""
        with record.account.busy:
            nbytes, error = await self._read_jobs(record, slab)
        if error is None:
            self._publish(record, slab, nbytes)
        else:
            self._give_up(record, slab, error, nbytes)

    async def _read_jobs(self, record: UnitRecord, slab: Slab) -> tuple[int, BaseException | None]:
        """The bytes that were read, and the first error."""
        files = record.account.files
        try:
            jobs = record.reader.jobs()
            for file in {file: None for job in jobs for file in job.files()}:
                await self._open(files, file)
        except Exception as error:
            return 0, error
        if not jobs:
            return 0, None
        done = asyncio.Event()
        run = functools.partial(self._run_job, record)
        batch = Batch(jobs, slab.view(), files, lambda: self._loop.call_soon_threadsafe(done.set), run)
        self._queue.put(record.id, batch, urgent=bool(record.waiters))
        for _ in range(min(len(jobs), self._num_readers)):
            self._queued.release()
        await done.wait()
        return batch.nbytes, batch.error

    async def _work(self) -> None:
        """One reader: have it work when there is something to read."""
        drain = aiofiles.os.wrap(self._queue.drain)
        while not self._closing:
            await self._queued.acquire()
            if self._queue:
                try:
                    await drain(executor=self._pool)
                except RuntimeError as error:
                    if str(error).startswith(_NO_THREAD):
                        self._without_thread(error)
                    elif str(error).startswith(_INTERPRETER_ENDS):
                        self._closing = True
                        self._awake.set()
                    else:
                        raise

    def _without_thread(self, error: RuntimeError) -> None:
        """The system gives no thread to read with. Where there is one already it does the work of all."""
        if not self._pool._threads:
            reason = WeightReadError(
                f"no thread can be started to read with: {error}",
                cure="Raise the limits on threads and memory (ulimit -u, -v), or use prefetch_depth=0; the next use "
                "tries again",
            )
            reason.__cause__ = error
            self._queue.abandon(reason)

    async def _open(self, files: FileTable, file: CheckpointFile) -> None:
        """Open it ahead of its use, if that works."""
        if files.is_open(file):
            return
        try:
            async with self._opening.setdefault((files, file), asyncio.Lock()):
                if not files.is_open(file):
                    await aiofiles.os.wrap(files.opened)(file, executor=self._pool)
        except (OSError, RuntimeError):  # no file, no descriptor, no thread
            pass  # the job that reads it tries again, and its error names the weight
        finally:
            self._opening.pop((files, file), None)


_NO_THREAD = "can't start new thread"  # what threading says
_INTERPRETER_ENDS = "cannot schedule new futures after"  # what concurrent.futures says; nobody here shuts the pool down


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.new_event_loop()
    except OSError as error:
        raise _cannot_start(error) from error


def _cannot_start(error: Exception) -> ModelError:
    return ModelError(
        f"the thread that reads the weights cannot be started: {error}",
        cure="Raise the limits on open files, threads and memory (ulimit -n, -u, -v), or use prefetch_depth=0",
    )


def _death(error: BaseException) -> ClosedError:
    reason = ClosedError(
        f"the thread that reads the weights has died: {type(error).__name__}: {error}",
        cure="This is a defect of odewei: please report it with the cause above, and build the model again",
    )
    reason.__cause__ = error
    return reason
