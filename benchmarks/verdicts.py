"""The promises, computed from what was measured. Pure: numbers in, verdicts out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.record import PLAIN_TWIN, Record, Row

__all__ = ["AUTO_WINDOW_UNITS", "Verdict", "floor_seconds", "last_unit_seconds", "verdicts", "wrong_bits"]

AUTO_WINDOW_UNITS = 2
"""How many units ``prefetch_depth="auto"`` is taken to read ahead, in the bound on the bytes read."""

_FLOOR = 1.05
_FITS = 1.02
_COLD = 1.15
_SWEEP_TIMES = 7.0
_SWEEP_PERCENT = 75
_TIMES = {
    "accelerate": {1: 3.0, 128: 3.0, 512: 2.0},
    "airllm": {1: 8.0, 128: 8.0, 512: 4.0},
    "mmap": {1: 2.5, 128: 2.5, 512: 1.9},
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise. ``value`` None: not measured. ``at_most``: ``bar`` is an upper one. ``bar`` None: no promise."""

    what: str
    value: float | None
    bar: float | None
    at_most: bool = True
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        """None where nothing was measured or promised."""
        if self.value is None or self.bar is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    @property
    def missed_by(self) -> float:
        """By which part of the bar it was missed; 0 where it was not."""
        if self.value is None or self.bar is None or self.reached:
            return 0.0
        return abs(self.value / self.bar - 1)


def floor_seconds(compute_seconds: float, missed_bytes: float, bandwidth: float) -> float:
    """The larger of computing and of reading what is not in memory."""
    return max(compute_seconds, missed_bytes / bandwidth)


def last_unit_seconds(record: Record, compute_seconds: float) -> float:
    """Computing that no reading can hide: the last unit's, taken as its share of the weights."""
    return compute_seconds * record.unit_bytes / record.weight_bytes


def wrong_bits(record: Record) -> list[str]:
    """Where odewei's output differs from that of the resident model: never, or the run has failed."""
    expected: dict[int, set[str]] = {}
    for row in record.rows:
        if row.contender == "resident":
            expected.setdefault(row.tokens, set()).update(row.bits)
    return [
        f"{row.contender}, {row.part}, {row.tokens} tokens: {', '.join(row.bits)} instead of "
        f"{', '.join(sorted(expected[row.tokens]))}"
        for row in record.rows
        if row.is_odewei and expected.get(row.tokens) and not set(row.bits) <= expected[row.tokens]
    ]


def verdicts(record: Record) -> list[Verdict]:
    """Every promise, in the order of the report."""
    return [*_floors(record), *_peers(record), *_sweep(record), *_twins(record), *_fits(record), *_cold(record)]


def _floors(record: Record) -> Iterator[Verdict]:
    for tokens in record.tokens:
        row, resident = record.find("main", "odewei", tokens), record.find("main", "resident", tokens)
        what = f"{tokens} tokens: odewei over the floor"
        if row is None or resident is None or not row.rounds or not resident.rounds:
            yield Verdict(what, None, _FLOOR)
            continue
        kept = record.weight_bytes - (row.budget_bytes or 0)
        measured = list(zip(row.seconds, resident.seconds, row.read_bytes, row.bandwidths, strict=True))
        value = statistics.median(s / floor_seconds(c, nbytes, width) for s, c, nbytes, width in measured)
        strict = statistics.median(s / floor_seconds(c, kept, width) for s, c, _, width in measured)
        yield Verdict(what, value, _FLOOR, detail=f"{strict:.3f} if only weights − budget had been read")


def _peers(record: Record) -> Iterator[Verdict]:
    for row in record.all("peer"):
        bar = _TIMES.get(row.contender, {}).get(row.tokens)
        yield Verdict(f"{row.tokens} tokens: times faster than {row.contender}", _times(row), bar, False, row.why_not)


def _times(row: Row) -> float | None:
    seconds = row.median_seconds
    return seconds / statistics.median(row.beside) if seconds is not None and row.beside else None


def _sweep(record: Record) -> Iterator[Verdict]:
    tokens = record.tokens[0]
    before: Row | None = None
    for row in record.all("sweep", "odewei"):
        bound = record.weight_bytes - (row.budget_bytes or 0) + record.unit_bytes * (AUTO_WINDOW_UNITS + 1)
        nbytes = row.median_bytes
        value = None if nbytes is None else nbytes / bound
        detail = "" if nbytes is None else f"{nbytes / 1e9:.3f} GB of {bound / 1e9:.3f} GB"
        yield Verdict(f"budget {row.percent} %: bytes read a pass over the bound", value, 1.0, True, detail)
        if before is not None:
            ratio = _ratio(row.median_seconds, before.median_seconds)
            yield Verdict(f"budget {row.percent} %: time over that at {before.percent} %", ratio, 1.0)
        before = row
    for row in record.all("sweep"):
        if not row.is_odewei and row.contender != "resident":
            promised = (row.contender, row.percent, row.tokens) == ("accelerate", _SWEEP_PERCENT, 1)
            what = f"budget {row.percent} %, {tokens} tokens: times faster than {row.contender}"
            yield Verdict(what, _times(row), _SWEEP_TIMES if promised else None, False, row.why_not)


def _twins(record: Record) -> Iterator[Verdict]:
    for row in record.rows:
        if row.contender == PLAIN_TWIN:
            ahead = record.find(row.part, "odewei", row.tokens, row.percent)
            ratio = _rounds_ratio(row.seconds, [] if ahead is None else ahead.seconds)
            where = f"{row.tokens} tokens" if row.percent is None else f"budget {row.percent} %"
            yield Verdict(f"{where}: prefetch_depth=0 over prefetch", ratio, None)


def _fits(record: Record) -> Iterator[Verdict]:
    for row in record.all("fits", "odewei"):
        what = f"all fits, {row.tokens} tokens: odewei over resident"
        yield Verdict(what, _rounds_ratio(row.seconds, row.beside), _FITS, detail=row.why_not)


def _cold(record: Record) -> Iterator[Verdict]:
    row, resident = record.find("cold", "odewei"), record.find("main", "resident", record.tokens[0])
    compute = resident.median_seconds if resident is not None else None
    if row is None or compute is None or not row.rounds:
        yield Verdict("cold start over reading all and the last layer", None, _COLD)
        return
    last = last_unit_seconds(record, compute)
    bars = [record.file_bytes / bandwidth + last for bandwidth in row.bandwidths]
    value = _rounds_ratio(row.seconds, bars)
    yield Verdict("cold start over reading all and the last layer", value, _COLD)


def _ratio(value: float | None, over: float | None) -> float | None:
    return None if value is None or over is None else value / over


def _rounds_ratio(values: Sequence[float], over: Sequence[float]) -> float | None:
    """The median of ratios of neighbours; None where there are none."""
    pairs = list(zip(values, over, strict=False))
    return statistics.median(value / other for value, other in pairs) if pairs else None
