"""Long runs: models that come and go, passes without end, budgets that shrink and grow. Nothing may grow with them."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import odewei
from odewei.runtime import runtime_of
from odewei.scheduler.machine import SECONDS_BETWEEN_LOOKS, AutoLimit
from odewei.torch import ShardedWeightsLoader, init_on_demand_weights_model
from tests.soak.subject import Net, Subject, resident, save_shards, subject
from tests.soak.table import Row, Wrong, fault

_ALL_THREADS = 6  # this one, the scheduler's and four readers, which start when there is work for them
_RSS_MAY_GROW = 24 << 20  # bytes, over a whole run: allocators keep some


@dataclass(frozen=True)
class Figures:
    """What a process has."""

    threads: int
    files: int
    rss_mib: float
    mapped_mib: float
    maps: int

    @classmethod
    def now(cls) -> Figures:
        gc.collect()
        size, rss = (int(number) for number in Path("/proc/self/statm").read_text().split()[:2])
        page = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        return cls(threading.active_count(), len(os.listdir("/proc/self/fd")), rss * page, size * page, maps)

    def __str__(self) -> str:
        return (
            f"{self.threads} threads, {self.files} files, RSS {self.rss_mib:.1f} MiB, mapped {self.mapped_mib:.1f} MiB "
            f"in {self.maps} maps"
        )


def _must_not_grow(row: Row, label: str, before: Figures, after: Figures) -> None:
    row.notes.append(f"{label}, before: {before}")
    row.notes.append(f"{label}, after:  {after}")
    if after.threads > max(before.threads, _ALL_THREADS) or after.files > before.files:
        raise Wrong(f"{label}: threads or files have grown")
    if (after.rss_mib - before.rss_mib) * (1 << 20) > _RSS_MAY_GROW:
        raise Wrong(f"{label}: the resident set has grown")
    if after.maps > before.maps + 20:
        raise Wrong(f"{label}: maps have grown")


@fault("models made, used and dropped", "long runs")
def models(row: Row, full: bool) -> None:
    model = resident()
    with tempfile.TemporaryDirectory() as scratch:
        index = save_shards(model, Path(scratch))
        budget = int(0.4 * sum(parameter.nbytes for parameter in model.parameters()))
        shared = odewei.MemoryBudget(budget)

        def one(number: int) -> None:
            options = {
                "memory_budget": shared if number % 3 == 0 else budget,
                "prefetch_depth": (0, "auto")[number % 2],
            }
            loader = ShardedWeightsLoader(str(index), scratch)
            streamed = init_on_demand_weights_model(Net, loader, **options).eval()  # type: ignore[arg-type]
            own = runtime_of(streamed).budget
            row.note(fired=True, end=Subject(model, streamed, Path(scratch), row).passes(number % 3))
            del streamed
            if own.used_bytes:
                raise Wrong(f"{own.used_bytes} bytes of the budget are left")

        for number in range(30 if full else 10):
            one(number)
        before = Figures.now()
        count = 1000 if full else 15
        for number in range(count):
            one(number)
        _must_not_grow(row, f"{count} models", before, Figures.now())


@fault("passes without end", "long runs")
def passes(row: Row, full: bool) -> None:
    """Every hundredth is compared."""
    for depth in ("auto", 0):
        with (
            tempfile.TemporaryDirectory() as scratch,
            subject(row, Path(scratch) / "model", prefetch_depth=depth) as one,
        ):
            _passes(one, 100 if full else 20)
            before = Figures.now()
            count = (15_000 if depth == "auto" else 5_000) if full else 60
            _passes(one, count)
            one.recovered()
            _must_not_grow(row, f"{count} passes, prefetch_depth={depth!r}", before, Figures.now())
            row.notes.append(f"budget {one.budget!r}")


def _passes(one: Subject, count: int) -> None:
    import torch

    from tests.soak.subject import ids

    inputs = ids(0)
    with torch.no_grad():
        for number in range(count):
            if number % 100 == 0:
                one.row.note(fired=True, end=one.passes(1))
            else:
                one.streamed(inputs)


@fault("a shared budget that shrinks and grows", "long runs")
def resized(row: Row, full: bool) -> None:
    rng = random.Random(2)
    with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model") as one:
        runtime = runtime_of(one.streamed)
        pool, account = runtime.driver.ledger.pool, runtime.account
        least = account.least_bytes + account.pinned_bytes
        limit = pool.budget.limit_bytes
        before = Figures.now()
        for _ in range(500 if full else 15):
            pool.set_limit(rng.randint(least, 2 * limit))
            row.note(fired=True, end=one.passes(3))
            if pool.budget.used_bytes > pool.budget.limit_bytes:
                raise Wrong(f"over the budget: {pool.budget!r}")
        pool.set_limit(limit)
        one.recovered()
        _must_not_grow(row, "changes of a budget", before, Figures.now())


@fault('a budget "auto" on a machine whose memory comes and goes', "long runs")
def auto(row: Row, full: bool) -> None:
    rng = random.Random(3)
    spare, now = [1 << 20], [0.0]
    budget = odewei.MemoryBudget("auto")
    budget._auto = AutoLimit(lambda: spare[0], lambda: now[0])
    with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", memory_budget=budget) as one:
        before, limits = Figures.now(), set()
        for _ in range(400 if full else 20):
            spare[0] = rng.choice([0, 1 << 18, 1 << 20, 1 << 22])
            now[0] += SECONDS_BETWEEN_LOOKS
            row.note(fired=True, end=one.passes(2))
            limits.add(budget.limit_bytes)
        if len(limits) < 3:
            raise Wrong(f"the budget did not follow: {limits}")
        row.notes.append(f"limits from {min(limits)} to {max(limits)} bytes")
        one.recovered()
        _must_not_grow(row, "changes of the machine", before, Figures.now())
