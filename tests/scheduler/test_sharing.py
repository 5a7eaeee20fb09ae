"""Passes at once share one stream of weights: on a virtual clock, with the real ledger."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from odewei.scheduler.plan import Window

from .simulation import Access, Disk, Simulation

UNITS, NBYTES, PASSES = 36, 30, 6


def _run(threads: int, *, fraction: float, slowest: float = 1.0) -> tuple[float, float]:
    """Seconds and bytes a pass: each unit takes a second to read and a twentieth to compute with, times ``slowest`` for
    the last thread.
    """

    def program(pace: float) -> Iterator[list[Access]]:
        for _ in range(PASSES):
            yield [(unit, 0.05 * pace) for unit in range(UNITS)]

    sim = Simulation(
        [NBYTES] * UNITS, int(UNITS * NBYTES * fraction), Window(None, 4 * NBYTES), Disk(NBYTES, readers=4, chunks=4)
    )
    sim.run(*(program(slowest if thread == threads - 1 else 1.0) for thread in range(threads)))
    return sim.now / threads / PASSES, sim._bytes_read() / threads / PASSES


@pytest.mark.parametrize("threads", [2, 4, 8])
@pytest.mark.parametrize("slowest", [1.0, 10.0])
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_passes_that_begin_together_stay_together(threads: int, slowest: float, fraction: float) -> None:
    """K passes at once read 1/K of the bytes a pass each, and take 1/K of the time, but for a tenth; also where one of
    them computes ten times as slowly, as long as the disk is slower still.
    """
    seconds, nbytes = _run(1, fraction=fraction)
    shared_seconds, shared_bytes = _run(threads, fraction=fraction, slowest=slowest)
    assert shared_bytes < 1.1 / threads * nbytes
    assert shared_seconds < 1.1 / threads * seconds
