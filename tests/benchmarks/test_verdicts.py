"""The promises of the benchmark: what counts as reached, and by how much one is missed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.record import PLAIN_TWIN, Record, Row
from benchmarks.verdicts import Verdict, verdicts, wrong_bits


def _record(*rows: Row) -> Record:
    return Record(
        machine={},
        command="make bench",
        weight_bytes=4000,
        file_bytes=4000,
        unit_bytes=100,
        tokens=(1,),
        passes=2,
        notes=(),
        reports={},
        rows=rows,
    )


_RESIDENT = Row(part="main", contender="resident", tokens=1, rounds=[[1.0], [1.0]], bits=["right"])
_ODEWEI = Row(
    part="main",
    contender="odewei",
    tokens=1,
    budget_bytes=1000,
    rounds=[[3.0, 3.3], [3.15, 3.15]],
    read_bytes=[3000, 3000],
    bandwidths=[1000, 1000],
    bits=["right"],
)


def _named(record: Record, text: str) -> Verdict:
    return next(verdict for verdict in verdicts(record) if text in verdict.what)


def test_floor_is_reading_where_reading_is_longer() -> None:
    """Passes of 3.15 s that read 3 s' worth of bytes are 1.05 times the floor, and that is reached."""
    verdict = _named(_record(_RESIDENT, _ODEWEI), "over the floor")
    assert verdict.value == pytest.approx(1.05)
    assert replace(verdict, value=1.05).reached is True


def test_floor_is_computing_where_computing_is_longer() -> None:
    """Where computing takes 6 s, reading of 3 s does not count."""
    resident = replace(_RESIDENT, rounds=[[6.0], [6.0]])
    assert _named(_record(resident, _ODEWEI), "over the floor").value == pytest.approx(3.15 / 6)


def test_each_round_has_its_own_floor() -> None:
    """A round in which the disk was half as fast and odewei took twice as long has the same ratio."""
    odewei = replace(_ODEWEI, rounds=[[3.15], [6.3]], bandwidths=[1000, 500])
    assert _named(_record(_RESIDENT, odewei), "over the floor").value == pytest.approx(1.05)


def test_missed_bar_says_by_how_much() -> None:
    """Twice as fast where three times is promised misses by a third."""
    peer = Row(part="peer", contender="accelerate", tokens=1, rounds=[[6.0]], beside=[3.0, 3.0])
    verdict = _named(_record(_RESIDENT, _ODEWEI, peer), "accelerate")
    assert (verdict.value, verdict.bar, verdict.reached) == (2.0, 3.0, False)
    assert verdict.missed_by == pytest.approx(1 / 3)


def test_peer_that_did_not_run_is_not_slow() -> None:
    """A peer without figures has no value and no verdict, but a reason."""
    peer = Row(part="peer", contender="airllm", tokens=1, why_not="not run: no such module")
    verdict = _named(_record(_RESIDENT, _ODEWEI, peer), "airllm")
    assert (verdict.value, verdict.reached, verdict.detail) == (None, None, "not run: no such module")


def test_bytes_are_bounded_by_budget_and_window() -> None:
    """Of 4000 bytes under 2000, with units of 100, no more than 2300 may be read a pass."""
    row = replace(_ODEWEI, part="sweep", percent=50, budget_bytes=2000, read_bytes=[2300, 2300])
    assert _named(_record(row), "bytes read").reached is True
    assert _named(_record(replace(row, read_bytes=[2301, 2301])), "bytes read").reached is False


def test_time_falls_with_budget() -> None:
    """A larger budget that takes longer breaks the promise."""
    small = replace(_ODEWEI, part="sweep", percent=25)
    large = replace(small, percent=50, rounds=[[3.5], [3.5]])
    assert _named(_record(small, large), "time over that at 25 %").reached is False


def test_accelerate_at_three_quarters_has_a_bar_of_its_own() -> None:
    """At 75 % of the weights and 1 token, odewei has to be seven times faster."""
    peer = Row(part="sweep", contender="accelerate", tokens=1, percent=75, rounds=[[7.0]], beside=[1.0])
    verdict = _named(_record(peer), "budget 75 %, 1 tokens")
    assert (verdict.value, verdict.bar, verdict.reached) == (7.0, 7.0, True)


def test_twin_is_shown_without_a_bar() -> None:
    """What prefetch gains is a figure, not a promise."""
    twin = replace(_ODEWEI, contender=PLAIN_TWIN, rounds=[[6.3], [6.3]])
    verdict = _named(_record(_ODEWEI, twin), "prefetch_depth=0")
    assert (verdict.value, verdict.bar, verdict.reached) == (pytest.approx(2.0), None, None)


def test_fits_compares_neighbours() -> None:
    """The median of paired ratios is not moved by a slow minute that hits both."""
    row = Row(part="fits", contender="odewei", tokens=1, rounds=[[1.01], [1.01], [9.09]], beside=[1.0, 1.0, 9.0])
    assert _named(_record(row), "all fits").value == pytest.approx(1.01)


def test_cold_start_counts_reading_and_the_last_layer() -> None:
    """4 s of reading and 0.025 s of computing the last layer are the bar of a cold start."""
    row = Row(part="cold", contender="odewei", tokens=1, rounds=[[4.025]], bandwidths=[1000])
    assert _named(_record(_RESIDENT, row), "cold start").value == pytest.approx(1.0)


def test_wrong_bits_of_odewei_are_found() -> None:
    """Bits that the resident model did not give are reported, for odewei and its twin and for no peer."""
    peer = Row(part="peer", contender="mmap", tokens=1, rounds=[[1.0]], bits=["other"])
    assert wrong_bits(_record(_RESIDENT, _ODEWEI, peer)) == []
    twin = replace(_ODEWEI, contender=PLAIN_TWIN, part="sweep", bits=["right", "other"])
    assert len(wrong_bits(_record(_RESIDENT, _ODEWEI, twin))) == 1
