"""Memory by reference: who holds a slab, when it is free, and what is done with it then."""

import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from odewei.scheduler.budget import Budget
from odewei.scheduler.host_memory import PAGE, round_up
from odewei.scheduler.slab import ALIGNMENT, Slab
from odewei.scheduler.slabs import SlabPool

from .fakes import Forward

KIB = 1 << 10


def address(slab: Slab) -> int:
    return slab.view().ctypes.data


def lent_tensor(pool: SlabPool, slab: Slab) -> torch.Tensor:
    """A tensor that is the only reference to what ``slab`` was lent for."""
    return torch.frombuffer(pool.lend(slab), dtype=torch.uint8)


def acquired(pool: SlabPool, nbytes: int, **options: bool) -> Slab:
    slab = pool.acquire("unit", nbytes, **options)
    assert slab is not None
    return slab


@pytest.mark.parametrize(
    ("nbytes", "alignment"),
    [(0, 1), (64, 64), (4032, ALIGNMENT), (4096, PAGE), (12288, PAGE), (2 << 20, 2 << 20), (5 << 20, 2 << 20)],
)
def test_slabs_begin_where_their_use_needs_it(nbytes: int, alignment: int) -> None:
    """Small slabs start at a multiple of 64, those read into directly at a page, large ones at a huge page."""
    slabs = [acquired(SlabPool(Budget(nbytes)), nbytes) for _ in range(3)]
    for slab in slabs:
        assert slab.view().nbytes == nbytes
        assert address(slab) % alignment == 0


def test_a_view_of_a_tensor_keeps_the_slab() -> None:
    """Not before the last view of the last tensor over it has died is a slab free; what it holds stays as it was."""
    pool = SlabPool(Budget(8 * KIB))
    slab = acquired(pool, 8 * KIB)
    slab.view()[:] = 7
    tensor = lent_tensor(pool, slab)
    part = tensor[100:].view(torch.int8)[5:6]
    del tensor
    assert pool.room_bytes() == 0
    assert pool.acquire("other", 8 * KIB) is None
    assert part.item() == 7
    del part
    assert pool.room_bytes() == 8 * KIB
    pool.check_invariants()


def test_a_graph_keeps_the_slab() -> None:
    """A weight that autograd has saved for the backward pass keeps its memory."""
    pool = SlabPool(Budget(8 * KIB))
    weight = lent_tensor(pool, acquired(pool, 8 * KIB)).view(torch.float32)
    x = torch.ones(2 * KIB, requires_grad=True)
    y = (x * weight).sum()
    del weight
    assert pool.room_bytes() == 0
    y.backward()
    del y
    assert pool.room_bytes() == 8 * KIB


def test_a_slab_of_the_same_size_is_used_again() -> None:
    """Its pages have been touched already: the same address comes back, under the new owner's name."""
    pool = SlabPool(Budget(20 * KIB))
    slab = acquired(pool, 8 * KIB)
    where = address(slab)
    lent_tensor(pool, slab)
    again = pool.acquire("second", 8 * KIB)
    assert again is not None
    assert address(again) == where
    assert again.reservation.owner == "second"
    assert pool.budget.used_bytes == 8 * KIB


def test_a_free_slab_is_unmapped_when_another_size_needs_the_room() -> None:
    """Free slabs count as room for all sizes; the largest go first, and no more of them than needed."""
    pool = SlabPool(Budget(20 * KIB))
    for slab in [acquired(pool, size * KIB) for size in (4, 4, 12)]:
        pool.release(slab)
    assert (pool.room_bytes(), pool.budget.used_bytes) == (20 * KIB, 20 * KIB)
    acquired(pool, 8 * KIB)
    assert pool.budget.used_bytes == 16 * KIB
    assert pool.room_bytes() == 12 * KIB
    pool.check_invariants()


@pytest.mark.parametrize(("first", "second"), [(1024, 1536), (1536, 1024), (1025, 1536), (1536, 1025), (1281, 1537)])
def test_a_large_slab_is_made_to_fit(first: int, second: int) -> None:
    """For another size (here in pages) of about its own a large slab keeps its huge pages."""
    pool = SlabPool(Budget(9 << 20))
    slab = acquired(pool, first * PAGE)
    slab.view()[:] = 7
    pool.release(slab)
    again = acquired(pool, second * PAGE)
    assert again is slab
    assert again.view().nbytes == again.nbytes == again.reservation.nbytes == second * PAGE
    assert address(again) % (2 << 20) == 0
    assert bool((again.view()[: 4 << 20] == 7).all())
    again.view()[:] = 8
    assert pool.budget.used_bytes == second * PAGE
    pool.check_invariants()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what is in huge pages")
@pytest.mark.parametrize("before", [None, 8 << 20])
def test_a_large_slab_takes_its_own_pages_only(before: int | None) -> None:
    """The last huge page of a slab that does not fill it is none, also where there was one before."""
    pool = SlabPool(Budget(9 << 20))
    if before is not None:
        slab = acquired(pool, before)
        slab.view()[:] = 7
        pool.release(slab)
        del slab
    slab = acquired(pool, (4 << 20) + PAGE)
    slab.view()[:] = 7
    last = address(slab) + slab.nbytes
    maps = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/smaps").read_text(), re.MULTILINE)
    assert not any(int(begin, 16) < last < int(end, 16) for begin, end in maps)


def test_a_large_slab_that_is_looked_at_stays_where_it_is() -> None:
    """Pages that somebody still sees are not moved: another slab takes their room."""
    pool = SlabPool(Budget(9 << 20))
    slab = acquired(pool, 4 << 20)
    seen = slab.view()
    seen[:] = 7
    pool.release(slab)
    again = acquired(pool, 6 << 20)
    again.view()[:] = 8
    assert bool((seen == 7).all())
    pool.check_invariants()


def test_going_beyond_the_limit_is_asked_for_and_counted() -> None:
    """Without being asked the pool refuses; what comes back while overdrawn is given to the system, not kept."""
    pool = SlabPool(Budget(8 * KIB))
    first = lent_tensor(pool, acquired(pool, 8 * KIB))
    assert pool.acquire("more", 4 * KIB) is None
    assert pool.budget.overdrafts == 0
    second = lent_tensor(pool, acquired(pool, 4 * KIB, beyond_limit=True))
    assert (pool.budget.overdrafts, pool.budget.worst_overdraft_bytes) == (1, 4 * KIB)
    assert pool.room_bytes() == -4 * KIB
    del first
    assert (pool.room_bytes(), pool.budget.used_bytes) == (4 * KIB, 4 * KIB)
    del second
    assert (pool.room_bytes(), pool.budget.used_bytes) == (8 * KIB, 4 * KIB)
    pool.check_invariants()


def test_the_last_reference_may_die_in_any_thread_and_under_the_lock() -> None:
    """The finalizer takes no lock: it runs while its own or another thread holds the pool's."""
    pool = SlabPool(Budget(8 * KIB))
    woken = threading.Event()
    pool.on_return = woken.set
    held = [lent_tensor(pool, acquired(pool, 4 * KIB)), lent_tensor(pool, acquired(pool, 4 * KIB))]
    with pool.lock:
        held.pop()
        assert woken.is_set()
        woken.clear()
        assert Forward(held.clear).join() is None
    assert woken.is_set()
    assert pool.room_bytes() == 8 * KIB
    pool.check_invariants()


def test_spares_are_dropped_for_room_the_newest_first() -> None:
    """A spare is kept while there is room, counts as room, and goes when a slab needs it."""
    pool = SlabPool(Budget(12 * KIB))
    assert pool.keep_spare("a", "thing a", 4 * KIB)
    assert pool.keep_spare("b", "thing b", 4 * KIB)
    assert not pool.keep_spare("a", "another", 1)
    assert not pool.keep_spare("c", "too large", 5 * KIB)
    assert pool.room_bytes() == 12 * KIB
    acquired(pool, 8 * KIB)
    pool.check_invariants()
    assert pool.take_spare("b") is None
    assert pool.take_spare("a") == "thing a"
    assert pool.take_spare("a") is None
    assert pool.budget.used_bytes == 8 * KIB


def test_escaped_slabs_are_counted_once() -> None:
    """What is held beyond its unit's eviction is expected back, until the room is needed; then it is an escape."""
    pool = SlabPool(Budget(8 * KIB))
    slab = acquired(pool, 4 * KIB)
    tensor = lent_tensor(pool, slab)
    pool.mark_leaving(slab, "unit")
    assert pool.leaving_bytes() == 4 * KIB
    pool.stop_expecting_leaving()
    pool.stop_expecting_leaving()
    assert (pool.leaving_bytes(), pool.escapes) == (0, 1)
    del tensor
    assert pool.room_bytes() == 8 * KIB


def test_a_slab_that_came_back_before_its_eviction_is_not_leaving() -> None:
    """When a user has replaced the weight, its memory is free already: whoever has it next is not leaving."""
    pool = SlabPool(Budget(8 * KIB))
    slab = acquired(pool, 4 * KIB)
    lent_tensor(pool, slab)
    assert pool.room_bytes() == 8 * KIB
    pool.mark_leaving(slab, "unit")
    tensor = lent_tensor(pool, acquired(pool, 4 * KIB))
    assert pool.leaving_bytes() == 0
    del tensor


def test_a_closed_pool_keeps_only_what_is_in_use() -> None:
    """Free slabs go at once; those in use stay whole until their last tensor dies."""
    pool = SlabPool(Budget(8 * KIB))
    pool.release(acquired(pool, 4 * KIB))
    slab = acquired(pool, 2 * KIB)
    slab.view()[:] = 3
    tensor = lent_tensor(pool, slab)
    pool.close()
    assert pool.budget.used_bytes == 2 * KIB
    assert bool((tensor == 3).all())


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain list of tensors: each has its own bytes, and all of them are counted."""

    pool: SlabPool

    @initialize(limit=st.sampled_from([16 * KIB, 9 << 20]))
    def make(self, limit: int) -> None:
        self.limit = limit
        self.pool = SlabPool(Budget(limit))
        self.filling: list[Slab] = []
        self.tensors: list[tuple[torch.Tensor, Slab, int]] = []
        self.spares: set[str] = set()
        self.stamp = 0

    @rule(nbytes=st.sampled_from([64, 960, 4096, 8192, 12288, 2 << 20, 4 << 20, 6 << 20]), beyond_limit=st.booleans())
    def acquire(self, nbytes: int, beyond_limit: bool) -> None:
        room = self.pool.room_bytes()
        slab = self.pool.acquire("unit", nbytes, beyond_limit=beyond_limit)
        assert (slab is not None) == (nbytes <= room or beyond_limit)
        if slab is not None:
            assert slab.nbytes == nbytes
            self.filling.append(slab)

    @precondition(lambda self: self.filling)
    @rule(lend=st.booleans())
    def fill(self, lend: bool) -> None:
        slab = self.filling.pop()
        self.stamp = (self.stamp + 1) % 256
        slab.view()[:] = self.stamp
        if lend:
            self.tensors.append((lent_tensor(self.pool, slab), slab, self.stamp))
        else:
            self.pool.release(slab)

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def mark_leaving(self, data: st.DataObject) -> None:
        self.pool.mark_leaving(data.draw(st.sampled_from([slab for _, slab, _ in self.tensors])), "unit")

    @precondition(lambda self: self.tensors)
    @rule(data=st.data(), elsewhere=st.booleans())
    def drop(self, data: st.DataObject, elsewhere: bool) -> None:
        index = data.draw(st.integers(0, len(self.tensors) - 1))
        drop = partial(self.tensors.pop, index)
        if elsewhere:
            assert Forward(drop).join() is None
        else:
            drop()

    @rule(name=st.sampled_from("ab"), nbytes=st.sampled_from([100, 4096]))
    def keep_spare(self, name: str, nbytes: int) -> None:
        self.pool.keep_spare(name, name, nbytes)

    @rule(name=st.sampled_from("ab"))
    def take_spare(self, name: str) -> None:
        assert self.pool.take_spare(name) in (name, None)

    @rule()
    def stop_expecting_leaving(self) -> None:
        self.pool.stop_expecting_leaving()
        assert self.pool.leaving_bytes() == 0

    @invariant()
    def everything_adds_up(self) -> None:
        self.pool.check_invariants()
        used = sum(slab.nbytes for slab in self.filling) + sum(slab.nbytes for _, slab, _ in self.tensors)
        assert self.pool.room_bytes() == self.limit - used
        assert self.pool.budget.used_bytes <= max(self.limit, used), "free slabs are kept beyond the limit"
        for tensor, _, stamp in self.tensors:
            assert bool((tensor == stamp).all())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("nbytes", "multiple", "expected"), [(0, 64, 0), (1, 64, 64), (64, 64, 64), (65, 64, 128)])
def test_round_up(nbytes: int, multiple: int, expected: int) -> None:
    """The next multiple, or the number itself."""
    assert round_up(nbytes, multiple) == expected
