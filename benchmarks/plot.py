"""Time a pass against the budget, as a picture: odewei, its plain twin, each peer, and the floor. Needs matplotlib."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from benchmarks.record import Record, Row
from benchmarks.settings import ALLOWANCE_BYTES
from benchmarks.verdicts import floor_seconds

__all__ = ["draw"]


def draw(record: Record, file: Path) -> None:
    """Write ``file``, a PNG. A peer has no budget: it is drawn where its memory limit leaves as much for weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens = record.tokens[0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in record.rows:
        seconds = row.median_seconds
        if (
            row.tokens == tokens
            and row.part in ("main", "peer", "sweep", "fits")
            and seconds
            and row.contender != "resident"
        ):
            lines.setdefault(row.contender, []).append((_budget_bytes(row, record) / 1e9, seconds))
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, points), marker in zip(lines.items(), itertools.cycle("osD^vP"), strict=False):
        points.sort()
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, alpha=0.8, label=name)
    floor = _floor(record, tokens)
    if floor:
        axes.plot([x for x, _ in floor], [y for _, y in floor], color="black", linestyle="--", label="floor")
    axes.set(
        xlabel="memory for weights, GB",
        ylabel="seconds a pass (log)",
        title=f"{record.weight_bytes / 1e9:.2f} GB of weights, {tokens} token{'s' if tokens > 1 else ''} a pass",
        yscale="log",
    )
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    figure.savefig(file, dpi=120)


def _budget_bytes(row: Row, record: Record) -> float:
    if row.budget_bytes is not None:
        return min(row.budget_bytes, record.weight_bytes)
    return max(0, (row.limit_bytes or record.weight_bytes) - ALLOWANCE_BYTES)


def _floor(record: Record, tokens: int) -> list[tuple[float, float]]:
    """The floor at every twentieth of the weights, with the medians of the run."""
    resident = record.find("main", "resident", tokens)
    compute = None if resident is None else resident.median_seconds
    widths = [width for row in record.rows if row.part in ("main", "sweep") for width in row.bandwidths]
    if compute is None or not widths:
        return []
    width, whole = statistics.median(widths), record.weight_bytes
    kept = [whole * step / 20 for step in range(21)]
    return [(bytes_ / 1e9, floor_seconds(compute, whole - bytes_, width)) for bytes_ in kept]
