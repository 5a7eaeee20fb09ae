"""The report as text, from a record and its verdicts. Pure: no files, no clocks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.record import Record, Row
from benchmarks.verdicts import AUTO_WINDOW_UNITS, Verdict, last_unit_seconds, wrong_bits

__all__ = ["render", "summary"]


def render(record: Record, verdicts: Sequence[Verdict], picture: str | None) -> str:
    """The whole report, in Markdown. ``picture`` is the name of the plot's file."""
    machine = [f"- {name}: {value}" for name, value in record.machine.items()]
    parts = [
        f"# Benchmark: {record.weight_bytes / 1e9:.2f} GB of weights",
        "\n".join([f"- command: `{record.command}`", *machine]),
        "## Promises",
        _wrong(record),
        _table(("promise", "measured", "bar", "", "detail"), map(_verdict, verdicts)),
        _how(record),
    ]
    if picture is not None:
        parts.append(f"![time a pass against the budget]({picture})")
    for part, title in _TITLES.items():
        rows = list(record.all(part))
        if rows:
            parts += [f"## {title}", _table(_COLUMNS, (_figures(row, record) for row in rows))]
    for name, text in record.reports.items():
        if text:
            parts += [f"## What {name} says of itself, under the limit", f"```text\n{text}\n```"]
    parts += ["## Raw figures", _table(("part", "contender", "tokens", "seconds of each pass"), map(_raw, record.rows))]
    return "\n\n".join(parts) + "\n"


def summary(record: Record, verdicts: Sequence[Verdict]) -> str:
    """The promises, for a terminal."""
    lines = []
    for verdict in verdicts:
        what, value, bar, reached, detail = _verdict(verdict)
        lines.append(f"  {what:<58} {value:>8}  {bar:<8} {reached}{f'  ({detail})' if detail else ''}")
    return "\n".join([*lines, *(f"  WRONG BITS: {line}" for line in wrong_bits(record))])


_TITLES = {
    "main": "Under the limit: resident (no limit), odewei and its plain twin",
    "peer": "Peers under the same limit",
    "sweep": "Budgets",
    "fits": "Everything fits",
    "cold": "Cold start: build and first pass of a fresh process",
}
_COLUMNS = (
    "contender", "tokens", "limit, GB", "budget, GB", "passes", "median, s", "least–most, s", "read a pass, GB",
    "plain read, GB/s", "peak, GB", "compared with, s",
)  # fmt: skip


def _verdict(verdict: Verdict) -> tuple[str, str, str, str, str]:
    bar = "" if verdict.bar is None else f"{'≤' if verdict.at_most else '≥'} {verdict.bar:g}"
    if verdict.value is None:
        return verdict.what, "–", bar, "not measured", verdict.detail
    reached = "" if verdict.bar is None else "reached" if verdict.reached else f"missed by {verdict.missed_by:.1%}"
    return verdict.what, f"{verdict.value:.3f}", bar, reached, verdict.detail


def _figures(row: Row, record: Record) -> Iterator[str]:
    yield row.contender
    yield str(row.tokens)
    yield _gigabytes(row.limit_bytes)
    yield _gigabytes(row.budget_bytes)
    seconds = [each for passes in row.rounds for each in passes]
    if not seconds:
        yield from ("0", row.why_not or "not run")
        return
    yield str(len(seconds))
    yield f"{row.median_seconds:.3f}"
    yield f"{min(seconds):.3f}–{max(seconds):.3f}"
    yield _gigabytes(row.median_bytes)
    yield f"{statistics.median(row.bandwidths) / 1e9:.2f}" if row.bandwidths else "–"
    yield _gigabytes(row.peak_bytes)
    yield f"{statistics.median(row.beside):.3f}" if row.beside else "–"


def _raw(row: Row) -> tuple[str, str, str, str]:
    part = row.part if row.percent is None else f"{row.part} {row.percent} %"
    return part, row.contender, str(row.tokens), ", ".join(f"{s:.3f}" for passes in row.rounds for s in passes) or "–"


def _wrong(record: Record) -> str:
    wrong = wrong_bits(record)
    if not any(row.contender == "resident" and row.bits for row in record.rows):
        return "**odewei's bits were compared with nothing**: the resident model did not run."
    if not wrong:
        return "odewei's output had the resident model's bits wherever both were measured."
    return "**Wrong bits:** " + "; ".join(wrong)


def _how(record: Record) -> str:
    resident = record.find("main", "resident", record.tokens[0])
    compute = None if resident is None else resident.median_seconds
    last = "" if compute is None else f", here {last_unit_seconds(record, compute) * 1000:.0f} ms"
    lines = [
        "The floor is the larger of computing with all weights resident and of the bytes that odewei read, at the "
        "bandwidth of a plain parallel direct read right before and after; the figure is the median over "
        f"{record.passes} passes, the n-th of odewei with the n-th of the resident model.",
        "odewei, its plain twin and the resident model make one pass each in turn, so that what the machine does "
        "meanwhile hits all alike; in two groups, the larger one before the peers and the other after them. Right "
        "before each counted pass of odewei is one that is not counted, for it reads ahead while the others have their "
        "turn; the others make one at the start of each group.",
        "A peer runs alone in its process, its page cache empty at the start; its first pass is not counted, then "
        f"{record.passes} at each number of tokens are. It is compared with the median of odewei's passes before and "
        "after the peers. Its column of the plain read is the mean of the reads before and after it.",
        f"The bound on bytes is weights − budget + unit × ({AUTO_WINDOW_UNITS} + 1): a unit is "
        f'{record.unit_bytes / 1e6:.0f} MB, and the window of prefetch_depth="auto" is taken as '
        f"{AUTO_WINDOW_UNITS} units.",
        "The cold start is measured in fresh processes after their imports, which begin with an empty page cache (the "
        "checkpoint's is emptied once more before the clock starts); its bar is the checkpoint's bytes at the "
        f"plain read's bandwidth and the computing of the last layer (its share of the weights{last}).",
        "Everything fits: odewei and the resident model by turns in one process, the median of the ratios of pairs.",
        "Before a contender builds its model, as much memory as it may use is touched and freed by another process: a "
        "virtual machine that has given idle memory back to its host would pay for it at the first touch.",
        *record.notes,
    ]
    return "\n".join(f"- {line}" for line in lines)


def _gigabytes(nbytes: float | None) -> str:
    return "–" if nbytes is None else f"{nbytes / 1e9:.3f}"


def _table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
