"""The report as text."""

from __future__ import annotations

from benchmarks.record import Record, Row
from benchmarks.report import render, summary
from benchmarks.verdicts import verdicts


def _record(*rows: Row) -> Record:
    return Record(
        machine={"disk": "sda"},
        command="make bench",
        weight_bytes=4000,
        file_bytes=4000,
        unit_bytes=100,
        tokens=(1,),
        passes=5,
        notes=("A note.",),
        reports={"odewei": "budget 1 | 2"},
        rows=rows,
    )


_RESIDENT = Row(part="main", contender="resident", tokens=1, rounds=[[1.0]] * 3, bits=["right"])
_ODEWEI = Row(
    part="main", contender="odewei", tokens=1, rounds=[[3.0], [5.0], [4.0]], read_bytes=[2e9, 4e9, 3e9],
    bandwidths=[4e9] * 3, beside=[2.0, 8.0, 2.5], bits=["right"],
)  # fmt: skip


def _text(*rows: Row) -> str:
    record = _record(*rows)
    return render(record, verdicts(record), "plot.png")


def test_row_shows_medians_and_the_range() -> None:
    """Seconds, bytes and what a row is compared with are medians; the range is over all passes."""
    assert "| odewei | 1 | – | – | 3 | 4.000 | 3.000–5.000 | 3.000 | 4.00 | – | 2.500 |" in _text(_ODEWEI)


def test_contender_without_figures_shows_its_reason() -> None:
    """Where nothing was measured the reason stands in the place of the figures, and cannot break the table."""
    peer = Row(part="peer", contender="mmap", tokens=1, why_not="killed | by\nthe kernel")
    assert "| mmap | 1 | – | – | 0 | killed \\| by the kernel |" in _text(peer)


def test_wrong_bits_stand_at_the_top() -> None:
    """Bits that differ from the resident model's are named before any figure, and in the summary."""
    wrong = Row(
        part="main",
        contender="odewei",
        tokens=1,
        rounds=[[1.0]] * 3,
        read_bytes=[1] * 3,
        bandwidths=[1] * 3,
        bits=["bad"],
    )
    text = _text(_RESIDENT, wrong)
    assert text.index("**Wrong bits:**") < text.index("| promise |")
    assert "WRONG BITS" in summary(_record(_RESIDENT, wrong), [])


def test_bits_compared_with_nothing_are_said_to_be() -> None:
    """Without the resident model no promise of equal bits is printed."""
    assert "compared with nothing" in _text(_ODEWEI)
    assert "had the resident model's bits" in _text(_RESIDENT)


def test_only_what_was_measured_has_a_section() -> None:
    """Parts without rows have no heading; notes, odewei's report and the raw passes are there."""
    text = _text(_RESIDENT, _ODEWEI)
    assert "## Budgets" not in text
    for part in ("- A note.", "budget 1 | 2", "| main | odewei | 1 | 3.000, 5.000, 4.000 |", "(plot.png)"):
        assert part in text
