"""Reading and keeping single rows of a table: what is read, what stays, and what happens when files misbehave."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odewei.errors import ClosedError, WeightReadError
from odewei.loaders.base import CheckpointFile, Span
from odewei.scheduler import rows as rows_module
from odewei.scheduler.budget import Budget
from odewei.scheduler.row_slots import RowSlots
from odewei.scheduler.rows import RowCounters, RowTable, TablePlace, runs_of
from odewei.scheduler.slabs import SlabPool

ROWS, COLUMNS, OFFSET = 600, 48, 40
Preadv = Callable[[int, Sequence[memoryview], int], int]


def numbers(*rows: int) -> np.ndarray:
    return np.array(rows, np.int64)


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(values: torch.Tensor, tmp_path: Path) -> CheckpointFile:
    path = tmp_path / "table.bin"
    path.write_bytes(bytes(OFFSET) + values.numpy().tobytes() + b"the end")
    return CheckpointFile.stat(path)


Make = Callable[..., RowTable]


@pytest.fixture
def make(file: CheckpointFile) -> Iterator[Make]:
    made: list[RowTable] = []

    def table(cache_bytes: int = 1 << 20, dtype: torch.dtype = torch.float32, limit_bytes: int = 1 << 30) -> RowTable:
        span = Span(file, OFFSET, ROWS * COLUMNS * 4)
        place = TablePlace("embed.weight", "embed", span, ROWS, COLUMNS, torch.float32, dtype)
        made.append(RowTable(place, SlabPool(Budget(limit_bytes)), cache_bytes))
        return made[-1]

    yield table
    for one in made:
        one.close()
        one._pool.check_invariants()
        assert not one._pool._in_use, "the memory for hot rows goes back"


class Disk:
    """Stands before ``os.preadv`` and ``os.posix_fadvise``: writes down, fails, and gives less than was asked for."""

    def __init__(self, preadv: Preadv) -> None:
        self._preadv = preadv
        self.faults: list[int] = []
        self.most = 1 << 30
        self.log: list[tuple[str, int, int]] = []  # what, offset, bytes
        self.meanwhile: Callable[[], None] = lambda: None

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.log.append(("read", offset, sum(len(buffer) for buffer in buffers)))
        self.meanwhile()
        if self.faults:
            raise OSError(self.faults[0], os.strerror(self.faults.pop(0)))
        return self._preadv(fd, [buffers[0][: self.most]], offset)

    def announce(self, fd: int, offset: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        self.log.append(("announced", offset, nbytes))

    def reads(self) -> list[tuple[int, int]]:
        return [(offset, nbytes) for what, offset, nbytes in self.log if what == "read"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    fake = Disk(os.preadv)
    monkeypatch.setattr(os, "preadv", fake.preadv)
    monkeypatch.setattr(os, "posix_fadvise", fake.announce)
    return fake


# -- pure: runs and slots --------------------------------------------------------------------------------------------


@given(rows=st.sets(st.integers(0, 60)).map(sorted), longest=st.integers(1, 9))
def test_runs_cover_all_rows_and_are_as_few_as_can_be(rows: list[int], longest: int) -> None:
    """Every row is in one run, runs are neighbours in the file and not too long, and no two could have been one."""
    runs = runs_of(np.array(rows, np.int64), longest)
    assert [row for _, first, count in runs for row in range(first, first + count)] == rows
    assert [position for position, _, _ in runs] == [rows.index(first) for _, first, _ in runs]
    assert all(1 <= count <= longest for _, _, count in runs)
    for (_, first, count), (_, following, _) in itertools.pairwise(runs):
        assert first + count < following or count == longest


class Model:
    """RowSlots, row by row over plain lists: a set is a list of [row, when it was used]."""

    def __init__(self, slots: int, rows: int) -> None:
        self.ways = 1 if slots >= rows else min(16, slots)
        self.sets = [[[-1, 0] for _ in range(self.ways)] for _ in range(min(slots, rows) // self.ways)]
        self.now = 0

    def find(self, rows: list[int]) -> list[int]:
        self.now += 1
        return [self._find(row) for row in rows]

    def put(self, rows: list[int]) -> list[int]:
        self.now += 1
        before = {row: self._where(row) for row in rows}
        return [self._put(row) if before[row] < 0 else -1 for row in rows]

    def _where(self, row: int) -> int:
        index = row % len(self.sets)
        ways = [way for way, (kept, _) in enumerate(self.sets[index]) if kept == row]
        return index * self.ways + ways[0] if ways else -1

    def _find(self, row: int) -> int:
        slot = self._where(row)
        if slot >= 0:
            self.sets[slot // self.ways][slot % self.ways][1] = self.now
        return slot

    def _put(self, row: int) -> int:
        index = row % len(self.sets)
        way = min(range(self.ways), key=lambda way: self.sets[index][way][1])
        if self.sets[index][way][1] == self.now:
            return -1  # all of them were put in by this call
        self.sets[index][way] = [row, self.now]
        return index * self.ways + way


@given(
    slots=st.integers(1, 70),
    rows=st.integers(1, 90),
    steps=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1000), max_size=80)), max_size=12),
)
@settings(deadline=None)
def test_slots_are_those_of_a_plain_model(slots: int, rows: int, steps: list[tuple[bool, list[int]]]) -> None:
    """Array by array, the same rows are found, put and driven out as row by row; no row is in two slots."""
    real, model = RowSlots(slots, rows), Model(slots, rows)
    assert real.count <= slots
    for puts, numbers_ in steps:
        asked = [number % rows for number in numbers_]
        if puts:
            asked = list(dict.fromkeys(asked))
            found = real.put(np.array(asked, np.int64)).tolist()
            assert found == model.put(asked)
            filled = [slot for slot in found if slot >= 0]
            assert len(set(filled)) == len(filled)
        else:
            assert real.find(np.array(asked, np.int64)).tolist() == model.find(asked)
    kept = [row for ways in model.sets for row, _ in ways if row >= 0]
    assert sorted(real._rows[real._rows >= 0].tolist()) == sorted(set(kept))
    assert real.kept == len(kept)


def test_the_least_recently_used_row_leaves() -> None:
    """What was looked up last stays; what was not is the first to go."""
    slots = RowSlots(4, 100)
    slots.put(numbers(1, 2, 3, 4))
    slots.find(numbers(2, 1, 3))
    slots.put(numbers(50))
    assert (slots.find(numbers(1, 2, 3, 50, 4)) >= 0).tolist() == [True, True, True, True, False]


@given(st.integers(1, 200), st.integers(0, 50))
def test_with_a_slot_for_every_row_none_leaves(rows: int, more: int) -> None:
    """Whatever the number of rows, all of them fit into as many slots."""
    slots = RowSlots(rows + more, rows)
    everything = np.arange(rows, dtype=np.int64)
    for part in (everything[::2], everything[1::2]):
        assert (slots.put(part) >= 0).all()
    assert len(set(slots.find(everything).tolist())) == rows == slots.kept


def test_no_slots_keep_nothing() -> None:
    """Without room there is nothing to find, and nothing goes wrong."""
    slots = RowSlots(0, 10)
    assert slots.count == slots.kept == 0
    assert slots.put(numbers(1, 2)).tolist() == slots.find(numbers(1, 2)).tolist() == [-1, -1]


# -- look-ups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [0, 200, 5_000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(asked=st.lists(st.lists(st.integers(0, ROWS - 1), max_size=40), max_size=6))
@settings(deadline=None, max_examples=15)
def test_look_ups_are_right_whatever_is_kept(
    cache_bytes: int,
    dtype: torch.dtype,
    asked: list[list[int]],
    values: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each look-up returns the table's rows in order, cast as torch casts, whether they are read or kept."""
    path = tmp_path_factory.mktemp("rows") / "table.bin"
    path.write_bytes(bytes(OFFSET) + values.numpy().tobytes())
    span = Span(CheckpointFile.stat(path), OFFSET, ROWS * COLUMNS * 4)
    place = TablePlace("w", "m", span, ROWS, COLUMNS, torch.float32, dtype)
    pool = SlabPool(Budget(1 << 22))
    table = RowTable(place, pool, cache_bytes)
    for rows in asked:
        found = table.look_up(np.array(rows, np.int64))
        assert torch.equal(found, values[rows].to(dtype))
        assert found.dtype is dtype
        assert found.is_contiguous()
    pool.check_invariants()
    assert pool.budget.peak_bytes == table.cache_bytes <= max(cache_bytes, place.nbytes + 4096)
    table.close()


def test_only_the_rows_asked_for_are_read_and_once(make: Make, disk: Disk) -> None:
    """Neighbours are one read, repeats are none, and what is kept is not read again."""
    table, size = make(), COLUMNS * 4
    table.look_up(numbers(7, 300, 8, 7, 9))
    assert disk.reads() == [(OFFSET + 7 * size, 3 * size), (OFFSET + 300 * size, size)]
    table.look_up(numbers(300, 7))
    assert len(disk.reads()) == 2
    table.look_up(numbers(9, 10))
    assert disk.reads()[2:] == [(OFFSET + 10 * size, size)]
    assert table.counters == RowCounters(9, 5, 5 * size, table.counters.seconds, 2)
    assert table.counters.seconds > 0


def test_long_runs_are_cut(make: Make, disk: Disk, monkeypatch: pytest.MonkeyPatch, values: torch.Tensor) -> None:
    """No read is longer than it should be, however many neighbours are asked for."""
    monkeypatch.setattr(rows_module, "_LONGEST_READ", 10 * COLUMNS * 4 + 3)
    assert torch.equal(make().look_up(np.arange(25, dtype=np.int64)), values[:25])
    assert [nbytes // (COLUMNS * 4) for _, nbytes in disk.reads()] == [10, 10, 5]


def test_reads_are_announced_some_way_ahead(
    make: Make, disk: Disk, monkeypatch: pytest.MonkeyPatch, values: torch.Tensor
) -> None:
    """The kernel knows of several reads before the first is waited for, each once, and never of too many."""
    monkeypatch.setattr(rows_module, "_AHEAD_READS", 5)
    rows = np.arange(0, 60, 2, dtype=np.int64)
    assert torch.equal(make().look_up(rows), values[::2][:30])
    announced = [(offset, nbytes) for what, offset, nbytes in disk.log if what == "announced"]
    assert announced == disk.reads()
    assert [what for what, _, _ in disk.log[:7]] == ["announced"] * 5 + ["read", "announced"]
    disk.log.clear()
    monkeypatch.setattr(rows_module, "_AHEAD_BYTES", 1)
    make().look_up(rows)
    assert [what for what, _, _ in disk.log] == ["announced", "read"] * 30


def test_a_system_that_cannot_be_told_is_read_from_all_the_same(
    make: Make, disk: Disk, monkeypatch: pytest.MonkeyPatch, values: torch.Tensor
) -> None:
    """Where there is no such advice, rows are read one after another."""
    monkeypatch.setattr(rows_module, "_will_need", None)
    assert torch.equal(make().look_up(numbers(5, 1)), values[[5, 1]])
    assert {what for what, _, _ in disk.log} == {"read"}


def test_rows_are_kept_within_their_part_of_the_budget(make: Make) -> None:
    """However much is looked up, no more memory is taken than was given; and none at all if there is no room."""
    table = make(cache_bytes=50 * COLUMNS * 4)
    for start in range(0, ROWS, 100):
        table.look_up(np.arange(start, start + 100, dtype=np.int64))
    assert 0 < table._mine().slots.kept <= 50
    assert table._pool.budget.peak_bytes == table.cache_bytes <= 50 * COLUMNS * 4
    assert make(limit_bytes=100).cache_bytes == 0


def test_results_are_the_callers_own(make: Make, values: torch.Tensor) -> None:
    """What a look-up returned is not touched by later ones, and writing into it changes nothing that is kept."""
    table = make(cache_bytes=8 * COLUMNS * 4)
    first = table.look_up(numbers(1, 2, 2))
    again = table.look_up(numbers(1, 2, 2))
    for rows in (first, again):
        rows.zero_()
        assert torch.equal(table.look_up(numbers(1, 2)), values[[1, 2]])
    kept = table.look_up(numbers(1, 2))
    for start in range(100, 600, 50):
        table.look_up(np.arange(start, start + 50, dtype=np.int64))
    assert torch.equal(kept, values[[1, 2]])


def test_modes_of_torch_do_not_matter(make: Make, values: torch.Tensor) -> None:
    """Rows kept under inference mode are found outside of it, and results are what the caller's mode makes."""
    table = make()
    with torch.inference_mode():
        assert table.look_up(numbers(1)).is_inference()
        assert table.look_up(numbers(1, 4)).is_inference()
    for rows in ([1], [1, 4, 9], [4]):
        found = table.look_up(np.array(rows))
        assert not found.is_inference()
        assert torch.equal(found, values[rows])


def test_threads_at_once(make: Make, values: torch.Tensor) -> None:
    """Four threads that drive each other's rows out of a small cache all get the right ones."""
    table = make(cache_bytes=40 * COLUMNS * 4)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            rows = rng.integers(0, 90, rng.integers(1, 30))
            if not torch.equal(table.look_up(rows), values[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert table.counters.read < table.counters.looked_up


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [COLUMNS * 4 - 1, 100, 1])
def test_short_reads_go_on(make: Make, disk: Disk, most: int, values: torch.Tensor) -> None:
    """However few bytes come at a time, all of a row arrive."""
    disk.most = most
    assert torch.equal(make().look_up(numbers(3, 77)), values[[3, 77]])


def test_a_passing_disk_error_is_survived(make: Make, disk: Disk, values: torch.Tensor) -> None:
    """An EIO or two are tried again."""
    disk.faults = [errno.EIO, errno.EIO]
    assert torch.equal(make().look_up(numbers(3)), values[[3]])


def test_a_lasting_disk_error_names_the_weight(
    make: Make, disk: Disk, file: CheckpointFile, values: torch.Tensor
) -> None:
    """It names module, weight and file; nothing of the failed look-up is kept, and the next one is right."""
    table = make()
    disk.faults = [errno.EIO] * 9
    with pytest.raises(WeightReadError, match=os.strerror(errno.EIO)) as caught:
        table.look_up(numbers(3, 4))
    assert (caught.value.module, caught.value.weight, caught.value.file) == ("embed", "embed.weight", str(file.path))
    assert isinstance(caught.value.__cause__, WeightReadError)
    disk.faults = []
    assert table._mine().slots.kept == 0
    assert torch.equal(table.look_up(numbers(4, 3)), values[[4, 3]])


def cut(path: Path) -> None:
    os.truncate(path, OFFSET + 100)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("change", [cut, touch, remove])
def test_a_changed_file_is_noticed(
    make: Make, file: CheckpointFile, change: Callable[[Path], None], opened: bool, values: torch.Tensor
) -> None:
    """Rows of a file that is not the same any more are never handed out; rows read before it changed still are."""
    table = make()
    if opened:
        table.look_up(numbers(1))
    change(file.path)
    if not (opened and change is remove):  # an open file lives on
        with pytest.raises(WeightReadError) as caught:
            table.look_up(numbers(2, 1))
        assert caught.value.file == str(file.path)
        assert caught.value.weight == "embed.weight"
    if opened:
        assert torch.equal(table.look_up(numbers(1)), values[[1]])


# -- the end ---------------------------------------------------------------------------------------------------------


def test_after_close(make: Make) -> None:
    """A closed table says so, has no file open and no memory taken; it may be closed twice."""
    table = make()
    table.look_up(numbers(1))
    for _ in range(2):
        table.close()
        with pytest.raises(ClosedError, match="closed") as caught:
            table.look_up(numbers(1))
        assert caught.value.weight == "embed.weight"
    assert table._pool.room_bytes() == table._pool.budget.limit_bytes


def test_closing_lets_look_ups_end(make: Make, disk: Disk, file: CheckpointFile, values: torch.Tensor) -> None:
    """A look-up that is under way when the table is closed returns its rows; only then does the file close."""
    table = make()
    disk.meanwhile = table.close
    assert torch.equal(table.look_up(numbers(1, 5)), values[[1, 5]])
    disk.meanwhile = lambda: None
    assert not table._mine().files.is_open(file)
    with pytest.raises(ClosedError):
        table.look_up(numbers(1))


def test_a_fork_begins_anew(make: Make, monkeypatch: pytest.MonkeyPatch, values: torch.Tensor) -> None:
    """Another process does not wait for a lock that a thread held when it was forked, nor trust half-made changes."""
    table = make()
    table.look_up(numbers(1, 2))
    with table._mine().lock:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        thread = threading.Thread(target=lambda: results.append(table.look_up(numbers(2, 1))))
        results: list[torch.Tensor] = []
        thread.start()
        thread.join()
    table._here.pop(-1).files.close()
    assert torch.equal(results[0], values[[2, 1]])
    assert table.counters.read == 4
    monkeypatch.undo()


def test_everybody_says_what_it_is(make: Make) -> None:
    """A table tells its weight and what it keeps."""
    table = make(cache_bytes=32 * COLUMNS * 4)
    table.look_up(numbers(1, 2))
    assert "embed.weight" in repr(table)
    assert "2 rows in 16 slots" in repr(table)
    assert RowCounters.total([table, table]).looked_up == 4
