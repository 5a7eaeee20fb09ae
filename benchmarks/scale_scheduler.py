"""What a decision and an access cost with 1,000, 10,000 and 100,000 units, and what is kept in memory for each.

Run with: python benchmarks/scale_scheduler.py
"""

from __future__ import annotations

import statistics
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from odewei.scheduler.outlook import Outlook
from odewei.scheduler.plan import Window
from tests.scheduler.simulation import Disk, Simulation


def measure(units: int) -> str:
    """Medians in microseconds over a pass in which every second unit is missing."""
    simulation = Simulation([64] * units, 32 * units, Window(2, 32 * units), Disk(64.0))
    ledger, access, decide = simulation.ledger, [], []
    simulation.run([[(unit, 1.0) for unit in range(units)]] * 2)
    frame = simulation._frame
    decided = ledger.next_decision

    def timed() -> object:
        start = time.perf_counter()
        decision = decided()
        decide.append(time.perf_counter() - start)
        return decision

    ledger.next_decision = timed  # type: ignore[method-assign,assignment]
    simulation.run([[(unit, 1.0) for unit in range(min(units, 5000))]])
    del ledger.next_decision
    for unit in sorted(ledger._residents)[:5000]:
        start = time.perf_counter()
        ledger.enter(unit, frame)
        ledger.leave(unit)
        access.append(time.perf_counter() - start)
    tracemalloc.start()
    outlook = Outlook(range(units))
    for unit in [*range(units)] * 2:
        outlook.record("thread", unit, 64)
    nbytes = tracemalloc.get_traced_memory()[0] / units
    tracemalloc.stop()
    micro = [statistics.median(each) * 1e6 for each in (access, decide)]
    return f"{units:>7} units: enter+leave {micro[0]:.1f} us, next_decision {micro[1]:.1f} us, {nbytes:.0f} B a unit"


if __name__ == "__main__":
    for count in (1_000, 10_000, 100_000):
        print(measure(count), flush=True)
