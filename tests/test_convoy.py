"""Passes that begin together: who waits for whom, and who for nobody."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import odewei
from odewei.convoy import Convoy, pass_begins, pass_ends
from tests.traps import Blocks, rows, twins

PATIENCE = 60.0


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        os.sched_yield()


class Fixed(Convoy):
    """A convoy of so much patience, whatever passes take."""

    def __init__(self, size: int, patience: float = PATIENCE) -> None:
        super().__init__(size)
        self.patience = patience

    def _patience_seconds(self) -> float:
        return self.patience


class Members:
    """Threads in calls of a convoy that begin and end passes when they are told to."""

    def __init__(self, convoy: Convoy, count: int) -> None:
        self.convoy = convoy
        self.begun: list[int] = []
        self._turns = [threading.Semaphore(0) for _ in range(count)]
        self._todo: list[list[Callable[[], None]]] = [[] for _ in range(count)]
        self._stopped = False
        self._pool = ThreadPoolExecutor(count)
        for _ in range(count):
            convoy.expect()
        self._ends = [self._pool.submit(self._run, member) for member in range(count)]
        convoy.set_out()
        _until(lambda: len(convoy._members) == count)

    def _run(self, member: int) -> None:
        with self.convoy.call():
            while True:
                assert self._turns[member].acquire(timeout=PATIENCE)
                if not self._todo[member]:
                    return
                self._todo[member].pop(0)()

    def do(self, member: int, *what: Callable[[], None]) -> None:
        self._todo[member] += what
        self._turns[member].release(len(what))

    def begin(self, member: int, bytes_read: int = 1) -> None:
        self.do(member, lambda: pass_begins(bytes_read), lambda: self.begun.append(member))

    def end(self, member: int) -> None:
        self.do(member, pass_ends)

    def leave(self, member: int) -> None:
        self._turns[member].release()
        self._ends[member].result(PATIENCE)

    def waiting(self, count: int) -> None:
        _until(lambda: len(self.convoy._waiting) == count)

    def have_begun(self, *members: int) -> None:
        """Exactly these, in any order, since this was asked last."""
        _until(lambda: len(self.begun) >= len(members))
        assert sorted(self.begun) == sorted(members)
        self.begun.clear()


@contextmanager
def _members(count: int, patience: float = PATIENCE) -> Iterator[Members]:
    convoy = Fixed(count, patience)
    members = Members(convoy, count)
    try:
        yield members
    finally:
        convoy.dissolve()
        for turn in members._turns:
            turn.release(100)
        members._pool.shutdown()
    assert not convoy._members


def test_a_pass_begins_when_all_are_there() -> None:
    """Two of three wait for the third, in every round."""
    with _members(3) as members:
        for bytes_read in (1, 2, 3):
            members.begin(0, bytes_read)
            members.begin(1, bytes_read)
            members.waiting(2)
            assert members.begun == []
            members.begin(2, bytes_read)
            members.have_begun(0, 1, 2)
            for member in range(3):
                members.end(member)


def test_it_sets_out_when_all_first_calls_are_known() -> None:
    """A thread that is faster than whoever hands out the calls waits for those that are still to be handed out."""
    convoy = Fixed(2)
    begun = threading.Event()

    def call() -> None:
        with convoy.call():
            pass_begins(1)
            begun.set()

    convoy.expect()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(call)
        _until(lambda: convoy._waiting)
        convoy.expect()
        convoy.set_out()
        assert not begun.is_set()
        pool.submit(call)
    assert begun.is_set()


def test_a_call_that_has_ended_is_not_waited_for() -> None:
    """When the third one's call ends, the other two begin."""
    with _members(3) as members:
        members.begin(0)
        members.begin(1)
        members.waiting(2)
        members.leave(2)
        members.have_begun(0, 1)


def test_who_takes_too_long_is_not_waited_for_until_it_comes() -> None:
    """After the patience of one round the others go without it; when it comes it waits for them, and they for it."""
    with _members(2, patience=0.0) as members:
        members.begin(0, 1)
        members.have_begun(0)
        assert len(members.convoy._away) == 1
        members.begin(1, 2)
        members.have_begun(1)
        assert len(members.convoy._away) == 1, "now it is the first that is away"
        members.begin(0, 3)  # from within its pass: a pass within a pass
        members.have_begun(0)


def test_patience_is_twice_a_usual_pass() -> None:
    """It comes from the passes that have ended; a second before, and never so little that no thread can make it."""
    convoy = Convoy(2)
    assert convoy._patience_seconds() == 1.0
    convoy._seconds.extend([1e-5, 2e-5, 30.0])
    assert convoy._patience_seconds() == 0.02
    convoy._seconds.extend([2.0, 2.0, 2.0, 2.0])
    assert convoy._patience_seconds() == 4.0


def test_a_pass_within_a_pass_waits_for_nobody() -> None:
    """The inner one begins at once; the next outer one waits again."""
    with _members(2) as members:
        members.begin(0, 1)
        members.begin(1, 1)
        members.have_begun(0, 1)
        members.begin(0, 2)
        members.have_begun(0)
        members.end(0)
        members.end(0)
        members.begin(0, 3)
        members.waiting(1)
        assert members.begun == []


def test_where_nothing_is_read_nobody_waits() -> None:
    """A round that has read nothing is followed by passes that begin as they come, until something is read again."""
    with _members(2) as members:
        members.begin(0, 5)
        members.begin(1, 5)
        members.have_begun(0, 1)
        members.end(0)
        members.begin(0, 5)
        members.have_begun(0)
        members.end(0)
        members.begin(0, 6)
        members.waiting(1)
        assert members.begun == []


def test_a_convoy_that_is_over_lets_everybody_go() -> None:
    """Those who wait begin, and those who come later as well."""
    with _members(3) as members:
        members.begin(0)
        members.waiting(1)
        members.convoy.dissolve()
        members.have_begun(0)
        members.begin(1, 9)
        members.have_begun(1)


def test_a_thread_of_no_convoy_is_let_alone() -> None:
    """Passes outside of map begin at once, whatever convoys there are."""
    with _members(2) as members:
        members.begin(0)
        members.waiting(1)
        pass_begins(1)
        pass_ends()


def test_passes_of_a_map_form_a_convoy(tmp_path: Path) -> None:
    """Threads of a map are members while they call and wait where each pass begins; a failure frees the others."""
    seen: list[int] = []

    class Watched(Convoy):
        def begin(self, bytes_read: int) -> None:
            seen.append(len(self._members))
            super().begin(bytes_read)

    class Fails(Blocks):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = super().forward(hidden)
            if hidden.shape[0] == 1:
                raise ValueError("one row")
            return hidden

    original = odewei.throughput.Convoy
    odewei.throughput.Convoy = Watched  # type: ignore[misc]
    try:
        with twins(Fails, tmp_path) as (_, streamed), torch.no_grad():
            results = odewei.map(streamed, [rows(0), rows(1), rows(2, 1), rows(3)], concurrency=2)
            assert [next(results).shape[0] for _ in range(2)] == [3, 3]
            with pytest.raises(ValueError, match="one row"):
                next(results)
    finally:
        odewei.throughput.Convoy = original  # type: ignore[misc]
    assert len(seen) >= 3
    assert set(seen) <= {1, 2}
