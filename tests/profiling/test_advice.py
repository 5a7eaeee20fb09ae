"""Advice from figures: what is said, and what is promised."""

from __future__ import annotations

from dataclasses import replace

from odewei.profiling.advice import advise
from odewei.profiling.summary import Summary

GIB = 2**30

DISK = Summary(
    seconds=45.0, passes=10, most_at_once=1, inside_seconds=41.0, compute_seconds=10.0, exposed_seconds=31.0,
    idle_seconds=0.5, read_seconds=40.0, hidden_seconds=10.0, copy_seconds=0.0, bytes_read=80 * GIB, bytes_copied=0,
    uses=320, hits=20, evictions=300, mispredictions=0, overdrafts=0, budget_bytes=4 * GIB, peak_bytes=4 * GIB,
    weight_bytes=12 * GIB,
)  # fmt: skip


def test_a_disk_bound_model_is_told_the_budget_and_the_gain() -> None:
    """8 GiB a pass at 2 GiB/s and one second of computing: 6 GiB more, and a pass takes three seconds less."""
    first, second = advise(DISK)
    assert first.startswith("disk-bound: a pass reads 8.00 GiB in 4 s and computes for 1 s")
    assert "raise the budget from 4.00 GiB to 10.0 GiB to save about 3 s a pass (computing takes as long then)" in first
    assert "0.5 s with each GiB" in first
    assert "4 inputs in work at once (odewei.map" in second


def test_nobody_is_told_to_have_a_budget_beyond_the_weights() -> None:
    """Where all weights would fit before computing takes longer, the advice is that much and no more."""
    first, _ = advise(replace(DISK, weight_bytes=9 * GIB))
    assert "to 9.00 GiB to save about 2.5 s a pass (all weights stay in memory then)" in first


def test_a_compute_bound_model_has_nothing_to_gain() -> None:
    """Where reading hides behind computing, and where nothing is read, a larger budget is not advised."""
    hidden = replace(DISK, compute_seconds=40.0, exposed_seconds=1.0, read_seconds=20.0)
    (only,) = advise(hidden)
    assert only.startswith("compute-bound: of 4.1 s a pass, 4 s compute")
    assert only.endswith("a larger budget has nothing to gain")
    (only,) = advise(replace(hidden, bytes_read=0, read_seconds=0.0))
    assert only == "compute-bound: nothing had to be read; a larger budget has nothing to gain"


def test_waits_in_processing_are_named() -> None:
    """Seconds with nothing read and nothing computed are not the disk's."""
    found = advise(replace(DISK, idle_seconds=20.0))
    assert found[0].startswith("disk-bound")
    assert found[-1].startswith("waits in processing: 2 s a pass went by with nothing being read or computed")


def test_late_reads_are_told_from_a_slow_disk() -> None:
    """Stalls although computing takes longer than reading: mispredictions, one pass alone, or uneven layers."""
    late = replace(DISK, compute_seconds=30.0, exposed_seconds=11.0, read_seconds=20.0)
    assert "try a larger prefetch_depth or budget" in advise(late)[0]
    assert "100 of 320 layers came in an order that was not expected" in advise(replace(late, mispredictions=100))[0]
    assert "one pass alone" in advise(replace(late, passes=1))[0]


def test_no_pass_and_a_budget_that_was_exceeded() -> None:
    """Both are said, in words."""
    assert advise(replace(DISK, passes=0)) == (
        "no pass ended while this was recorded: call the model inside of the with statement",
    )
    assert "the budget was exceeded 3 times" in advise(replace(DISK, overdrafts=3))[-1]
