"""The cache of blocks: what it gives is what was kept, and it never takes more than it may."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odewei.loaders.range_cache import RangeCache, stored_nbytes

BLOCK = 5000
COST = stored_nbytes(BLOCK)


def block(key: str, number: int) -> bytes:
    return random.Random(f"{key}/{number}").randbytes(BLOCK)


def store(cache: RangeCache, key: str, number: int, **options: bool) -> bool:
    content = memoryview(block(key, number))
    return cache.store(key, number, [content[:7], content[7:]], **options)


def load(cache: RangeCache, key: str, number: int) -> bool:
    """Whether the block is there; it is the right one then."""
    found = bytearray(BLOCK)
    there = cache.load(key, number, [memoryview(found)[:3000], memoryview(found)[3000:]])
    assert not there or bytes(found) == block(key, number)
    return there


def taken(folder: Path) -> int:
    """What is on the disk."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.glob("*/*"))


def age(folder: Path) -> None:
    """Make all blocks ones that were used long ago, the first by name first."""
    for number, file in enumerate(sorted(folder.glob("*/*"))):
        os.utime(file, (number + 1, number + 1))


def test_blocks_come_back(tmp_path: Path) -> None:
    """What was kept is there, in another cache of the folder and after pickling too; what was not is not."""
    cache = RangeCache(tmp_path / "cache", 100 * COST)
    assert not load(cache, "k", 1)
    assert store(cache, "k", 1)
    for other in (cache, RangeCache(tmp_path / "cache", 1), pickle.loads(pickle.dumps(cache))):
        assert load(other, "k", 1)
        assert not load(other, "k", 2)
        assert not load(other, "l", 1)


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    """Blocks from before this cache was made are thrown out, in the order of their last use, as many as needed."""
    before = RangeCache(tmp_path, 16 * COST)
    for number in range(16):
        assert store(before, "old", number)
    age(tmp_path)
    cache = RangeCache(tmp_path, 16 * COST)
    assert load(cache, "old", 0)  # used again
    assert store(cache, "new", 0)
    assert not load(cache, "old", 1)
    assert all(load(cache, "old", number) for number in (0, *range(2, 16)))
    assert taken(tmp_path) <= 16 * COST


def test_what_was_used_since_stays_and_the_new_one_goes(tmp_path: Path) -> None:
    """A loop over more than fits finds in each round what was kept in the first."""
    cache = RangeCache(tmp_path, 4 * COST)
    found = []
    for _ in range(3):
        hits = 0
        for number in range(8):
            if load(cache, "k", number):
                hits += 1
            else:
                store(cache, "k", number)
        found.append(hits)
    assert found == [0, 4, 4]
    assert taken(tmp_path) <= 4 * COST


def test_at_any_cost_everything_else_goes(tmp_path: Path) -> None:
    """All of one file can be kept, whatever was used, but not more than fits."""
    cache = RangeCache(tmp_path, 4 * COST)
    for number in range(4):
        assert store(cache, "k", number)
    for number in range(4):
        assert store(cache, "whole", number, at_any_cost=True)
    assert not store(cache, "whole", 4, at_any_cost=True)
    assert all(load(cache, "whole", number) for number in range(4))
    assert taken(tmp_path) <= 4 * COST


DAMAGE = {
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "longer": lambda content: content + b"x",
    "another kind": lambda content: b"x" + content[1:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_is_not_there(damage: str, tmp_path: Path) -> None:
    """It is deleted, and can be kept again."""
    cache = RangeCache(tmp_path, 100 * COST)
    store(cache, "k", 1)
    (file,) = tmp_path.glob("k/*")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert not load(cache, "k", 1)
    assert not file.exists()
    assert store(cache, "k", 1)
    assert load(cache, "k", 1)


def test_a_block_under_another_number_is_not_there(tmp_path: Path) -> None:
    """A block knows its number."""
    cache = RangeCache(tmp_path, 100 * COST)
    store(cache, "k", 1)
    os.rename(tmp_path / "k" / "1", tmp_path / "k" / "2")
    assert not load(cache, "k", 2)


@pytest.mark.parametrize("total", ["", "nonsense", "-1"])
def test_a_sum_that_is_lost_is_counted_again(total: str, tmp_path: Path) -> None:
    """What a crash has left is no reason to exceed the bound."""
    cache = RangeCache(tmp_path, 4 * COST)
    for number in range(4):
        store(cache, "k", number)
    (tmp_path / "lock").write_text(total)
    (tmp_path / "partial").write_bytes(b"half a block")
    assert not store(cache, "k", 5)
    assert taken(tmp_path) == 4 * COST


def test_a_folder_that_cannot_be_used_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is kept, and nothing fails."""
    (tmp_path / "file").write_text("")
    cache = RangeCache(tmp_path / "file", 100 * COST)
    for number in range(3):
        assert not store(cache, "k", number)
        assert not load(cache, "k", number)
    assert caplog.text.count("not used any more") == 1


def test_nothing_is_made_before_it_is_used(tmp_path: Path) -> None:
    """A cache that nobody reads through leaves no folder; the folder is nobody else's."""
    cache = RangeCache(tmp_path / "a" / "b", 100)
    assert not (tmp_path / "a").exists()
    load(cache, "k", 1)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


@settings(max_examples=60, deadline=None, database=None)
@given(
    room=st.integers(1, 6),
    steps=st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=40),
)
def test_whatever_happens_it_keeps_within_its_bound(
    room: int, steps: list[tuple[int, str, int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two caches of one folder: never more than the bound on the disk, never other bytes."""
    folder = tmp_path_factory.mktemp("cache")
    caches = [RangeCache(folder, room * COST), RangeCache(folder, room * COST)]
    for which, key, number, at_any_cost in steps:
        if not load(caches[which], key, number):
            store(caches[which], key, number, at_any_cost=at_any_cost)
        assert taken(folder) <= room * COST


def _work(folder: Path, seed: int, bound: int) -> None:
    """Another process: load and store at random, checking what comes."""
    chance = random.Random(seed)
    for _ in range(3):
        cache = RangeCache(folder, bound)
        for _ in range(100):
            key, number = chance.choice("abc"), chance.randrange(6)
            if not load(cache, key, number):
                store(cache, key, number, at_any_cost=chance.random() < 0.3)
            with cache._alone("lock"):
                assert taken(folder) <= bound


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Two processes that keep and throw out at once get right blocks or none, and stay within the bound together."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(tmp_path, seed, 7 * COST)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert taken(tmp_path) <= 7 * COST
