"""Records what a streamed model does while a with statement runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from odewei.errors import OptionsError
from odewei.profiling.recorder import Recorder
from odewei.profiling.summary import Counted
from odewei.profiling.timeline import Scene, Timeline
from odewei.runtime import runtime_of
from odewei.scheduler.ledger import Ledger

__all__ = ["profile"]


@contextmanager
def profile(model: nn.Module, /) -> Iterator[Timeline]:
    """Record what a streamed model does: ``with odewei.profile(model) as timeline: model(...)``.

    All threads are recorded, and all models that share the model's ``MemoryBudget``. ``print(timeline)`` gives a table
    and advice, ``timeline.save("t.json")`` a trace for Perfetto, ``timeline.plot("t.png")`` a picture. A step of a pass
    costs about a microsecond more while it is recorded, and nothing that can be measured otherwise.

    Raises OptionsError for a model that is not streamed, or is being recorded already.
    """
    runtime = runtime_of(model)
    ledger, tables = runtime.driver.ledger, list(runtime.tables.values())
    recorder = Recorder(ledger.pool.budget)
    with ledger.lock:
        if ledger.observer is not None:
            raise OptionsError("the model is being profiled already", cure="Use the timeline of the outer profile")
        timeline = Timeline(recorder, _scene(ledger), lambda: _scene(ledger))
        ledger.observer = recorder
    for table in tables:
        table.observer = recorder
    try:
        yield timeline
    finally:
        for table in tables:
            table.observer = None
        with ledger.lock:
            ledger.observer = None
            timeline.finish()


def _scene(ledger: Ledger) -> Scene:
    with ledger.lock:
        accounts = {account: number for number, account in enumerate(ledger.accounts, 1)}
        records = list(ledger.units.values())
        several = len(accounts) > 1
        counters = [account.counters for account in accounts]
        budget = ledger.pool.budget
        return Scene(
            time.perf_counter(),
            {
                record.id: f"{accounts.get(record.account, 0)}: {record.name}" if several else record.name
                for record in records
            },
            {record.id: (record.state, record.nbytes) for record in records},
            budget.limit_bytes,
            Counted(
                sum(each.evictions for each in counters),
                sum(each.mispredictions for each in counters),
                budget.overdrafts,
            ),
        )
