"""Several callers at once, and callers that stop half way: right, no hang, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import WeightReadError
from odewei.runtime import runtime_of
from tests import models as zoo
from tests.interrupts import Alarm, Interrupt, Interrupter, kept_for_nobody
from tests.traps import DEPTHS, Blocks, assert_same, assert_streams, linears, rows, twins


def _leases(streamed: nn.Module) -> int:
    return runtime_of(streamed).driver.ledger.leases()


def _bytes_of(streamed: nn.Module, work: Callable[[], object]) -> int:
    before = odewei.report(streamed).bytes_read
    work()
    return odewei.report(streamed).bytes_read - before


@pytest.mark.parametrize("depth", DEPTHS)
def test_four_threads_share_the_stream(depth: int | str, tmp_path: Path) -> None:
    """200 passes by four threads are right and read less than half way from the bytes of 50 to those of 200."""
    with twins(Blocks, tmp_path, depth, fraction=0.5) as (model, streamed), torch.no_grad():
        streamed(rows(0))  # the order is known now
        expected = [model(rows(seed)) for seed in range(8)]
        together = threading.Barrier(4)
        right: list[bool] = []

        def work(thread: int) -> None:
            with torch.no_grad():
                for index in range(50):
                    together.wait(timeout=60)
                    seed = (thread + 3 * index) % 8
                    right.append(torch.equal(streamed(rows(seed)), expected[seed]))

        def at_once() -> None:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(work, range(4)))

        alone = _bytes_of(streamed, lambda: [streamed(rows(0)) for _ in range(50)])
        shared = _bytes_of(streamed, at_once)
        assert right == [True] * 200
        assert alone > 0
        most = 2.5 if depth == "auto" else 4  # who reads only on demand shares what happens to be there
        assert shared < most * alone, (shared, alone)
        assert _leases(streamed) == 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_tasks_in_threads(depth: int | str, tmp_path: Path) -> None:
    """Forwards that asyncio runs in threads, from tasks that wait for each other, are right."""
    with twins(Blocks, tmp_path, depth) as (model, streamed):

        def call(seed: int) -> torch.Tensor:
            with torch.inference_mode():
                return streamed(rows(seed))

        async def several(start: int) -> list[torch.Tensor]:
            return [await asyncio.to_thread(call, start + step) for step in range(4)]

        async def everything() -> list[list[torch.Tensor]]:
            return await asyncio.gather(*(several(4 * task) for task in range(6)))

        found = [one for task in asyncio.run(everything()) for one in task]
        assert zoo.same_bits(found, [model(rows(seed)) for seed in range(24)])
        assert _leases(streamed) == 0


class Steps(nn.Module):
    """Runs its layers one by one and shows what it has in between, within its forward and as a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def steps(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            hidden = torch.tanh(nn.functional.linear(layer(hidden), layer.weight))
            yield hidden

    def forward(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        return self.steps(hidden)


@pytest.mark.parametrize("how", ["closed", "dropped", "thrown into", "kept"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_generator_that_is_left_half_way(how: str, depth: int | str, tmp_path: Path) -> None:
    """A generator over layers that ends early, or never, holds no lease, and other passes are right meanwhile."""
    with twins(Steps, tmp_path, depth) as (model, streamed), torch.no_grad():
        kept = []
        for steps in (3, 1, 7):
            running = streamed(rows(steps))
            expected = list(model(rows(steps)))
            assert zoo.same_bits([next(running) for _ in range(steps)], expected[:steps])
            assert _leases(streamed) == 0
            assert zoo.same_bits(list(streamed(rows(9))), list(model(rows(9))))
            if how == "closed":
                running.close()
            elif how == "thrown into":
                with pytest.raises(KeyboardInterrupt):
                    running.throw(KeyboardInterrupt)
            elif how == "kept":
                kept.append((running, expected[steps:]))
            del running
            assert zoo.same_bits(list(streamed(rows(10))), list(model(rows(10))))
            assert _leases(streamed) == 0
        for running, rest in reversed(kept):
            assert zoo.same_bits(list(running), rest)


class Fails(nn.Module):
    """Nested blocks of which one does what it is told in the middle of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.blocks, self.after = Blocks(), nn.ModuleList([Blocks()]), linears(2)
        self.act: Callable[[], None] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.before(hidden)
        for block in self.blocks[0].blocks:
            hidden = block(hidden)
            if self.act is not None and block is self.blocks[0].blocks[4]:
                self.act()
        return self.after[1](self.after[0](hidden))


ENDS = [ValueError("no"), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_pass_that_ends_in_the_middle(error: BaseException, depth: int | str, tmp_path: Path) -> None:
    """Whatever ends a pass, in this thread or in another, comes out as it is; later passes are right."""
    with twins(Fails, tmp_path, depth, granularity="leaf") as (model, streamed):
        assert_same(model, streamed, [rows(1)])
        caught: list[tuple[BaseException, int]] = []

        def end(*_: object) -> None:
            assert _leases(streamed) > 0
            raise error

        def call() -> None:
            try:
                streamed(rows(2))
            except BaseException as raised:
                caught.append((raised, _leases(streamed)))

        handle = streamed.blocks[0].blocks[4].up.register_forward_pre_hook(end)
        call()
        handle.remove()
        assert caught[0][0] is error
        assert not isinstance(error, Exception) or caught[0][1] == 0, "torch has called the hooks"
        error.__traceback__ = None  # it holds the frames of the pass
        assert_same(model, streamed, [rows(3)])
        assert _leases(streamed) == 0
        handle = streamed.blocks[0].blocks[4].up.register_forward_pre_hook(end)
        for work in (call, handle.remove, lambda: assert_same(model, streamed, [rows(3)], [rows(1)])):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            error.__traceback__ = None
        assert caught[1][0] is error
        assert_same(model, streamed, [rows(4)])
        assert _leases(streamed) == 0
        assert_streams(streamed)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_pass_within_a_pass(depth: int | str, tmp_path: Path) -> None:
    """A forward that calls the whole model again, or another thread that does and is waited for, is right."""
    with twins(Fails, tmp_path, depth) as (model, streamed), torch.no_grad():
        inner: list[torch.Tensor] = []

        def again() -> None:
            streamed.act = None
            with ThreadPoolExecutor(1) as pool, torch.no_grad():
                inner.append(pool.submit(streamed, rows(5)).result(timeout=60))
                inner.append(streamed(rows(6)))

        streamed.act = again
        outer = streamed(rows(4))
        assert zoo.same_bits([outer, *inner], [model(rows(seed)) for seed in (4, 5, 6)])
        assert _leases(streamed) == 0


def _interrupted_everywhere(
    streamed: nn.Module,
    call: Callable[[], object],
    check: Callable[[], None],
    step: int,
    kind: type[BaseException] = Interrupt,
) -> tuple[int, int]:
    """Interrupt a call at each ``step``-th place of the library's code that it comes by; interrupts, and lost ones."""
    at = fired = lost = 0
    while True:
        interrupter = Interrupter(at, kind)
        try:
            with interrupter.watching():
                call()
            if not interrupter.fired:
                return fired, lost
            lost += 1  # in a finalizer, where Python drops every exception
        except (kind, WeightReadError) as interrupt:
            if kind not in (type(interrupt), type(interrupt.__cause__)):
                raise
            interrupt.__traceback__ = None  # it holds the frames of the pass
            fired += 1
        check()
        assert _leases(streamed) == 0, interrupter.where
        runtime_of(streamed).driver.ledger.check_invariants()
        at += step


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # those that are lost
@pytest.mark.parametrize("kind", [Interrupt, Alarm])
@pytest.mark.parametrize("depth", DEPTHS)
def test_an_interrupt_anywhere_in_a_pass(depth: int | str, kind: type[BaseException], tmp_path: Path) -> None:
    """A signal's handler that raises at any place of the library leaves no lease, no bytes and no wrong number."""
    with twins(Blocks, tmp_path, depth) as (model, streamed), torch.no_grad():
        expected = model(rows(1))

        def check() -> None:
            assert torch.equal(streamed(rows(1)), expected)

        check()
        step = 211 if depth == 0 else 67
        fired, lost = _interrupted_everywhere(streamed, lambda: streamed(rows(0)), check, step, kind)
        assert fired > 10
        assert lost <= fired / 5
        assert_streams(streamed)


class Pair(nn.Module):
    """Of its two layers one is in memory at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(hidden))
        return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # those that are lost
@pytest.mark.parametrize("kind", [Interrupt, Alarm])
def test_an_interrupt_at_every_place_of_reading(kind: type[BaseException], tmp_path: Path) -> None:
    """Where one unit leaves and the next comes, nothing stays in memory that is no unit's, also if it is caught."""
    with twins(Pair, tmp_path, 0) as (model, streamed), torch.no_grad():
        expected = model(rows(1))

        def check() -> None:
            for layer in (streamed.second, streamed.first):  # each may have been leaving
                layer(rows(1))
                assert kept_for_nobody(streamed) == []
            assert torch.equal(streamed(rows(1)), expected)

        check()
        fired, lost = _interrupted_everywhere(streamed, lambda: streamed(rows(0)), check, 1, kind)
        assert fired > 200
        assert lost <= fired / 5
        assert_streams(streamed)
