"""The prefetching driver: what is read when, who is woken, and how it ends. The test decides when reads go on."""

import asyncio
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from odewei.errors import ClosedError, ModelError, WeightReadError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo
from odewei.scheduler.prefetcher import PrefetchingDriver
from odewei.scheduler.reader import FileTable, PlannedUnit
from odewei.scheduler.reads import ReadSettings, Wanted

from .fakes import PATIENCE, Forward, Setup, running_frame, started

PAGE = 4096


def gate(*units: int) -> Callable[[Setup], None]:
    """Reads of these units wait until the test lets them go on."""

    def prepare(setup: Setup) -> None:
        for unit in units:
            setup.units[unit].gate = threading.Event()

    return prepare


def let_go(setup: Setup, *units: int) -> None:
    for unit in units:
        (setup.units[unit].gate or threading.Event()).set()


def wait_started(setup: Setup, *units: int) -> None:
    for unit in units:
        assert setup.units[unit].started.wait(PATIENCE), f"unit {unit} is not read"


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What threads have died of, instead of a warning."""
    found: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: found.append(hook.exc_value))
    return found


def end_by_force(driver: PrefetchingDriver) -> None:
    """Let the threads of a driver that hangs end, for the sake of the next tests."""

    def cancel_all() -> None:
        for task in asyncio.all_tasks(driver._loop):
            task.cancel()

    driver._loop.call_soon_threadsafe(cancel_all)
    driver._thread.join(PATIENCE)


def test_the_first_units_are_read_before_anybody_enters() -> None:
    """In the order of the seed, as many as the window is deep, and no more until one is used."""
    with started([PAGE] * 6, 6 * PAGE, lambda setup: setup.seed([3, 1, 5, 0, 2, 4]), depth=2) as setup:
        setup.client.wait_until_bound(3, 1)
        assert setup.reads == [3, 1]
        setup.visit(3)
        setup.client.wait_until_bound(5)
        assert setup.reads == [3, 1, 5]


def test_reading_goes_on_while_a_forward_computes() -> None:
    """While a forward is inside a unit the next one is read; entering that is a hit and no stall."""
    with started([PAGE] * 3, 3 * PAGE, gate(1), depth=1) as setup:
        setup.enter(0)
        wait_started(setup, 1)
        let_go(setup, 1)
        setup.client.wait_until_bound(1)  # the forward is still inside unit 0
        setup.driver.leave(0)
        hits = setup.account.counters.hits
        setup.visit(1)
        assert setup.account.counters.hits == hits + 1
        assert setup.account.counters.stalls <= 1


def test_a_forward_waits_for_its_own_unit_only() -> None:
    """A unit that is there can be entered while the read of another one hangs; the stall is that of the other."""
    with started([PAGE] * 3, 3 * PAGE, gate(1), depth=1, num_readers=2) as setup:
        setup.visit(0)
        wait_started(setup, 1)
        setup.visit(0)
        stalls = setup.account.counters.stalls
        forward = Forward(lambda: setup.visit(1))
        let_go(setup, 1)
        assert forward.join() is None
        assert setup.account.counters.stalls <= stalls + 1


def test_what_a_forward_waits_for_is_read_first() -> None:
    """With one reader, busy, a demanded unit goes before those that were queued ahead of it."""
    with started([PAGE] * 6, 6 * PAGE, gate(0), depth=3) as setup:
        wait_started(setup, 0)  # 1 and 2 are queued behind it
        forward = Forward(lambda: setup.visit(5))
        while 5 not in setup.driver._queue._batches:
            assert forward._thread.is_alive()
        let_go(setup, 0)
        assert forward.join() is None
        assert setup.reads[1] == 5


def test_several_readers_read_at_once() -> None:
    """As many units are on their way as there are readers."""
    with started([PAGE] * 4, 4 * PAGE, gate(0, 1, 2), depth=3, num_readers=3) as setup:
        wait_started(setup, 0, 1, 2)
        let_go(setup, 2)
        setup.client.wait_until_bound(2)
        let_go(setup, 0, 1)
        setup.run_pass()


def test_a_unit_that_fails_ahead_of_its_use_disturbs_nobody() -> None:
    """Others are read and used; the failing one is tried again when, and only when, a forward needs it."""

    def break_one(setup: Setup) -> None:
        setup.units[1].fault = lambda: OSError("broken")

    with started([PAGE] * 4, 4 * PAGE, break_one, depth=2) as setup:
        setup.client.wait_until_bound(0, 2)
        setup.run_pass([0, 2, 3, 0, 2, 3])
        assert setup.reads.count(1) == 1
        with pytest.raises(WeightReadError, match="broken"):
            setup.visit(1)
        assert setup.reads.count(1) == 2
        setup.units[1].fault = None
        setup.visit(1)


def test_closing_wakes_forwards_that_wait() -> None:
    """close() while reads are running and forwards wait: they raise ClosedError, the reads end, the threads too."""
    setup = Setup([PAGE] * 4, 4 * PAGE, depth=2, num_readers=2)
    gate(0, 1)(setup)
    setup.driver.start()
    wait_started(setup, 0, 1)
    forwards = [Forward(lambda unit=unit: setup.visit(unit)) for unit in (0, 1, 3)]
    while len(setup.ledger.tally.demanded) < 3:
        assert all(forward._thread.is_alive() for forward in forwards)
    closing = Forward(setup.driver.close)
    errors = [forward.join() for forward in forwards]  # while the reads still hang
    assert all(isinstance(error, ClosedError) for error in errors)
    assert {error.module for error in errors if isinstance(error, ClosedError)} == {"unit0", "unit1", "unit3"}
    let_go(setup, 0, 1)
    assert closing.join() is None
    setup.check()
    setup.client.bound.clear()  # as the model's side does after closing
    setup.pool.close()
    assert setup.budget.used_bytes == 0, "what was being read has not come back"


@pytest.mark.parametrize("where", ["publish", "read"])
def test_the_last_reference_may_be_dropped_by_a_thread_of_the_driver(where: str) -> None:
    """close() by the scheduler's own thread or by a reader does not wait for itself; the driver ends all the same."""
    setup = Setup([PAGE] * 2, 2 * PAGE, depth=1)

    def close(*_: object) -> None:
        setup.driver.close()

    if where == "publish":
        setup.client.fault = close
    else:
        setup.units[0].fault = lambda: close() or ValueError("closed meanwhile")
    setup.driver.start()
    error = Forward(lambda: setup.visit(0)).join()
    assert isinstance(error, ClosedError | WeightReadError | None)
    assert Forward(setup.driver.close).join() is None
    with pytest.raises(ClosedError):
        setup.visit(1)
    assert setup.ledger.leases() == 0


class Defect(BaseException):
    """What no ordinary handler catches."""


@pytest.mark.parametrize("kind", [Defect, SystemExit])
def test_the_death_of_the_thread_wakes_everybody(kind: type[BaseException], deaths: list[BaseException | None]) -> None:
    """Forwards that wait and those that come later raise ClosedError that says why; close() still works."""
    setup = Setup([PAGE] * 3, 3 * PAGE, depth=1)
    gate(0)(setup)
    setup.client.fault = lambda unit: kind("a bug")
    setup.driver.start()
    forwards = [Forward(lambda unit=unit: setup.visit(unit)) for unit in (0, 2)]
    while len(setup.ledger.tally.demanded) < 2:
        assert all(forward._thread.is_alive() for forward in forwards)
    let_go(setup, 0)
    for forward in forwards:
        error = forward.join()
        assert isinstance(error, ClosedError)
        assert re.search("has died.*a bug", str(error))
    with pytest.raises(ClosedError):
        setup.visit(1)
    setup.driver.close()
    assert [type(error) for error in deaths if error is not None] in ([kind], [])


@pytest.mark.parametrize(
    "error",
    [
        StopIteration("empty"),
        asyncio.CancelledError("late"),
        GeneratorExit("odd"),
        SystemExit(3),
        KeyError("w"),
        TimeoutError("late"),
        StopAsyncIteration("odd"),
    ],
    ids=repr,
)
def test_any_error_of_a_read_reaches_the_forward(error: BaseException, deaths: list[BaseException | None]) -> None:
    """Errors that mean something to generators or event loops are errors like any other."""
    setup = Setup([PAGE], PAGE, depth=1)
    setup.units[0].fault = lambda: error
    setup.driver.start()
    forward = Forward(lambda: setup.visit(0))
    forward._thread.join(2.0)
    if forward._thread.is_alive():  # close would hang, too
        end_by_force(setup.driver)
        raise AssertionError("a forward waits for a read that has ended")
    setup.driver.close()
    found = forward.join()
    assert isinstance(found, WeightReadError)
    cause = found.__cause__
    assert cause is not None
    assert (type(cause), cause.args) == (type(error), error.args) or cause.__cause__ is error


def test_a_reader_must_not_use_the_model_that_it_reads_for() -> None:
    """It would wait for itself: it gets an error, and so does the forward."""

    def use_the_model() -> BaseException:
        try:
            setup.visit(1)
        except ModelError as error:
            return error
        return AssertionError("it could be used")

    setup = Setup([PAGE] * 2, 2 * PAGE, depth=0)  # read ahead, the error would be over before the forward comes
    setup.units[0].fault = use_the_model
    setup.seed([0])
    setup.driver.start()
    error = Forward(lambda: setup.visit(0)).join()
    setup.driver.close()
    assert isinstance(error, ModelError)
    assert "must not use the model" in str(error)


def test_memory_that_comes_back_wakes_the_driver() -> None:
    """A hint that waited for a user's tensor to go is carried out when it goes, without any access."""
    with started([PAGE] * 2, PAGE, depth=1) as setup:
        setup.client.wait_until_bound(0)
        setup.enter(0)
        kept = [setup.client.weight(0)]
        setup.driver.leave(0)  # now 1 is wanted, in the place of 0
        while 0 in setup.client.bound:
            assert setup.driver._thread.is_alive()
        assert 1 not in setup.client.bound
        kept.clear()
        setup.client.wait_until_bound(1)
        assert (setup.pool.escapes, setup.budget.overdrafts) == (0, 0)


class NoThreads:
    """The system starts no thread whose name begins with ``prefix``, as long as ``on``."""

    def __init__(self, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefix, self.on, self.refused = prefix, True, 0
        self._start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self.start(thread))

    def start(self, thread: threading.Thread) -> None:
        if self.on and thread.name.startswith(self.prefix):
            self.refused += 1
            raise RuntimeError("can't start new thread")
        self._start(thread)


def test_without_reader_threads_a_forward_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets an error with the cure instead of waiting for ever; when there is a thread again it goes on."""
    system = NoThreads("odewei-reader", monkeypatch)
    with started([PAGE] * 3, 3 * PAGE, depth=1) as setup:
        for unit in (0, 2):
            error = Forward(lambda unit=unit: setup.visit(unit)).join()
            assert isinstance(error, WeightReadError)
            assert "ulimit -u" in str(error)
        assert system.refused
        system.on = False
        setup.run_pass()


def test_one_reader_thread_does_the_work_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system starts one reader and refuses the others, every read is done."""
    system = NoThreads("odewei-reader", monkeypatch)
    system.on = False
    with started([PAGE] * 4, 4 * PAGE, gate(0), depth=3, num_readers=3) as setup:
        wait_started(setup, 0)
        system.on = True
        forwards = [Forward(lambda unit=unit: setup.visit(unit)) for unit in range(4)]
        let_go(setup, 0)
        assert [forward.join() for forward in forwards] == [None] * 4


@pytest.mark.parametrize("what", ["thread", "loop"])
def test_a_scheduler_that_cannot_start_says_so(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread, or no descriptors for its loop: an error with the cure, and nothing is left behind."""

    def no_loop() -> asyncio.AbstractEventLoop:
        raise OSError(24, "Too many open files")

    if what == "loop":
        monkeypatch.setattr(asyncio, "new_event_loop", no_loop)
        with pytest.raises(ModelError, match="ulimit -n"):
            Setup([PAGE], PAGE, depth=1)
        return
    NoThreads("odewei-scheduler", monkeypatch)
    setup = Setup([PAGE], PAGE, depth=1)
    with pytest.raises(ModelError, match="ulimit -n"):
        setup.driver.start()
    setup.driver.close()
    assert setup.budget.used_bytes == 0


@pytest.mark.parametrize("exists", [True, False])
def test_files_are_opened_and_read_in_reader_threads(tmp_path: Path, exists: bool) -> None:
    """Weights in files arrive whole; a file that is gone is an error that names it, and the next try finds it again."""
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 64)
    info = WeightInfo("w", torch.uint8, (PAGE,), Span(CheckpointFile.stat(path), 256, PAGE))
    unit = PlannedUnit([Wanted("w", info, torch.uint8)], ReadSettings(direct=True), None)  # type: ignore[arg-type]
    setup = Setup([unit.nbytes], unit.nbytes, depth=1)
    files = FileTable(direct=True, scratch_bytes=4 * PAGE)
    driver = setup.driver
    setup.account.files = files
    setup.ledger.units[0].reader = unit
    aside = path.with_suffix(".aside")
    if not exists:
        path.rename(aside)
    driver.start()
    try:
        if not exists:
            failed = Forward(lambda: driver.enter(0, running_frame())).join()
            assert isinstance(failed, WeightReadError)
            assert (failed.file, failed.module) == (str(path), "unit0")
            aside.rename(path)
        driver.enter(0, running_frame())
        assert bytes(setup.client.bound[0]["w"].numpy()) == path.read_bytes()[256 : 256 + PAGE]
        assert PAGE <= setup.account.counters.bytes_read <= 3 * PAGE
    finally:
        driver.close()
    assert not files._open
