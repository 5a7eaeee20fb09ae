"""The queue of reads: order, urgency, errors, and its end."""

import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from odewei.loaders.base import CheckpointFile
from odewei.scheduler.host_memory import Bytes
from odewei.scheduler.read_queue import Batch, ReadQueue
from odewei.scheduler.reader import FileTable, Job

FILES = FileTable(direct=False, scratch_bytes=4096)


class LoggedJob:
    """Writes its name into a log; ``then`` is done while it runs."""

    def __init__(self, name: str, log: list[str], then: Callable[[], None] = lambda: None) -> None:
        self.name, self.log, self.then = name, log, then

    def files(self) -> Sequence[CheckpointFile]:
        return ()

    def run(self, slab: Bytes, files: FileTable) -> int:
        self.log.append(self.name)
        self.then()
        return 10


def run_plainly(job: Job, slab: Bytes, files: FileTable) -> int:
    return job.run(slab, files)


class Log(list[str]):
    """What ran, and which batches are done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def batch(self, name: str, jobs: int = 2, then: Callable[[], None] = lambda: None) -> Batch:
        view = np.zeros(1, np.uint8)
        made = [LoggedJob(f"{name}{index}", self, then) for index in range(jobs)]
        return Batch(made, view, FILES, lambda: self.done.append(name), run_plainly)


def test_batches_are_read_in_order_and_the_urgent_ones_first() -> None:
    """Jobs of a batch go together; what is hurried, before or after it came, goes before what is not."""
    queue, log = ReadQueue(), Log()
    for name in "abc":
        queue.put(name, log.batch(name))
    queue.put("d", log.batch("d"), urgent=True)
    queue.hurry("c")
    queue.hurry("gone")
    assert queue
    queue.drain()
    assert log == ["d0", "d1", "c0", "c1", "a0", "a1", "b0", "b1"]
    assert log.done == ["d", "c", "a", "b"]
    assert not queue


def test_what_comes_while_readers_work_is_read_too() -> None:
    """A reader takes what was put during its job, the urgent before the rest of its batch."""
    queue, log = ReadQueue(), Log()
    queue.put("a", log.batch("a", then=lambda: None if "b0" in log else queue.put("b", log.batch("b"), urgent=True)))
    queue.drain()
    assert log == ["a0", "b0", "b1", "a1"]


@pytest.mark.parametrize("error", [OSError("broken"), StopIteration(), SystemExit(3)], ids=repr)
def test_an_error_ends_its_batch_only(error: BaseException) -> None:
    """The first error is the batch's; its other jobs are left out, other batches are read."""

    def fail() -> None:
        raise error

    queue, log = ReadQueue(), Log()
    bad, good = log.batch("a", 3, fail), log.batch("b")
    queue.put("a", bad)
    queue.put("b", good)
    queue.drain()
    assert log == ["a0", "b0", "b1"]
    assert (bad.error, bad.nbytes, good.error, good.nbytes) == (error, 0, None, 20)
    assert log.done == ["a", "b"]


def test_a_batch_lets_go_of_its_slab_when_it_is_done() -> None:
    """The memory may be used again in the very moment of ``on_done``."""
    view = np.zeros(1, np.uint8)
    alive = weakref.ref(view)
    seen: list[object] = []
    batch = Batch([LoggedJob("a", [])], view, FILES, lambda: seen.append(alive()), run_plainly)
    del view
    queue = ReadQueue()
    queue.put("a", batch)
    queue.drain()
    assert seen == [None]


def test_a_closed_queue_drops_what_nobody_has_taken() -> None:
    """Jobs under way end; all others, and those that come later, are left out with the reason."""
    queue, log = ReadQueue(), Log()
    reason = RuntimeError("closed")
    running = log.batch("a", 3, then=lambda: queue.close(reason))
    waiting, late = log.batch("b"), log.batch("c")
    queue.put("a", running)
    queue.put("b", waiting)
    queue.drain()
    queue.put("c", late)
    queue.drain()
    assert log == ["a0"]
    assert sorted(log.done) == ["a", "b", "c"]
    assert [batch.error for batch in (running, waiting, late)] == [reason] * 3


def test_several_readers_share_the_work() -> None:
    """Every job runs once, in whichever thread, and each batch is done once."""
    queue, log = ReadQueue(), Log()
    names = [f"{index}-" for index in range(50)]
    meet = threading.Barrier(4)
    for name in names:
        queue.put(name, log.batch(name, 7))

    def read() -> None:
        meet.wait()
        queue.drain()

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sorted(log) == sorted(f"{name}{index}" for name in names for index in range(7))
    assert sorted(log.done) == sorted(names)
