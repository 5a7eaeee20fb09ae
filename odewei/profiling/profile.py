"""Records what a streamed model does while a with statement runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from odewei.errors import OptionsError
from odewei.profiling.recorder import OfHost, Recorder
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
    costs a few microseconds more while it is recorded, and the test of an attribute otherwise.

    Raises OptionsError for a model that is not streamed, or is being recorded already.
    """
    runtime = runtime_of(model)
    ledger, tables = runtime.driver.ledger, list(runtime.tables.values())
    host = None if runtime.host is None else runtime.host.ledger
    recorder = Recorder(ledger.pool.budget)
    with ledger.lock:
        if ledger.observer is not None:
            raise OptionsError("the model is being profiled already", cure="Use the timeline of the outer profile")
        timeline = Timeline(recorder, _scene(ledger, host), lambda: _scene(ledger, host))
        ledger.observer = recorder
    for table in tables:
        table.observer = recorder
    if host is not None:
        host.observer = OfHost(recorder)
    try:
        yield timeline
    finally:
        if host is not None:
            host.observer = None
        for table in tables:
            table.observer = None
        with ledger.lock:
            ledger.observer = None
            timeline.finish()


def _scene(ledger: Ledger, host: Ledger | None) -> Scene:
    names = {} if host is None else {OfHost.number(unit): name for unit, name in _names(host).items()}
    with ledger.lock:
        counters = [account.counters for account in ledger.accounts]
        budget = ledger.pool.budget
        return Scene(
            time.perf_counter(),
            names | _names(ledger),
            {record.id: (record.state, record.nbytes) for record in ledger.units.values()},
            budget.limit_bytes,
            Counted(
                sum(each.evictions for each in counters),
                sum(each.mispredictions for each in counters),
                budget.overdrafts,
            ),
        )


def _names(ledger: Ledger) -> dict[int, str]:
    """Of all units by their ids; where there are several models, with the number of theirs."""
    with ledger.lock:
        accounts = {account: f"{number}: " for number, account in enumerate(ledger.accounts, 1)}
        if len(accounts) == 1:
            accounts = dict.fromkeys(accounts, "")
        return {record.id: accounts.get(record.account, "") + record.name for record in ledger.units.values()}
