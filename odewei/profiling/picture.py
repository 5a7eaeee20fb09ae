"""A timeline as a picture: reading, copying, computing and waiting above, memory below. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odewei.errors import OptionsError
from odewei.profiling.spans import BETWEEN, Kind, Level, Span
from odewei.profiling.summary import Summary
from odewei.scheduler.budget import format_nbytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_COLOURS = {
    Kind.READ: "#4c78a8",
    Kind.COPY: "#72b7b2",
    Kind.COMPUTE: "#54a24b",
    Kind.LAUNCH: "#a6c96a",
    Kind.STALL: "#e45756",
    Kind.PASS: "#bab0ac",
}
_TITLES = {
    Kind.READ: "reading",
    Kind.COPY: "copying",
    Kind.COMPUTE: "computing",
    Kind.LAUNCH: "launching",
    Kind.STALL: "waiting",
    Kind.PASS: "passes",
}
_MOST_LANES = 24
_WIDTH = 14.0  # inches
_LABEL_WIDTH = 0.035  # of the picture: a narrower span has no name written on it


def draw(path: Path, spans: Sequence[Span], levels: Sequence[Level], summary: Summary) -> None:
    """Write the picture. Raises OptionsError where matplotlib is missing; OSError, ValueError of it for the file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise OptionsError(
            "a picture needs the package matplotlib, which is not installed", cure='pip install "odewei[plot]"'
        ) from error
    lanes = lanes_of(spans)
    figure = Figure(figsize=(_WIDTH, 3.2 + 0.32 * (len(lanes) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[0.32 * (len(lanes) + 1) + 0.4, 2.0])
    _draw_lanes(above, lanes, spans, summary)
    _draw_memory(below, levels, summary)
    figure.suptitle(_title(summary), fontsize=11)
    figure.savefig(path, dpi=110)


def lanes_of(spans: Sequence[Span]) -> list[tuple[Kind, str]]:
    """What gets a line of its own, from top to bottom; at most twenty-four, those that most time went into."""
    seconds: dict[tuple[Kind, str], float] = {}
    for span in spans:
        lane = (span.kind, span.lane)
        seconds[lane] = seconds.get(lane, 0.0) + span.seconds
    chosen = sorted(seconds, key=lambda lane: -seconds[lane])[:_MOST_LANES]
    return sorted(chosen, key=lambda lane: (list(Kind).index(lane[0]), lane[1]))


def _draw_lanes(axes: Axes, lanes: Sequence[tuple[Kind, str]], spans: Sequence[Span], summary: Summary) -> None:
    for row, (kind, lane) in enumerate(lanes):
        own = [span for span in spans if span.kind is kind and span.lane == lane]
        axes.broken_barh(
            [(span.begin, span.seconds) for span in own],
            (row - 0.4, 0.8),
            facecolors=_COLOURS[kind],
            edgecolor="white" if len(own) < 400 else "none",
            linewidth=0.3,
        )
        for span in own:
            if span.seconds > _LABEL_WIDTH * summary.seconds and kind is not Kind.PASS and span.name != BETWEEN:
                name = _short(span.name, round(span.seconds / summary.seconds * 150))
                axes.text(span.begin + span.seconds / 2, row, name, ha="center", va="center", fontsize=6, clip_on=True)
    _draw_floor(axes, len(lanes), spans, summary)
    labels = [f"{_TITLES[kind]}  {_short(lane, 18)}" for kind, lane in lanes]
    axes.set_yticks(range(len(lanes) + 1), [*labels, "floor"], fontsize=7)
    axes.set_ylim(len(lanes) + 0.6, -0.6)
    axes.set_xlim(0, max(summary.seconds, 1e-6))
    axes.grid(axis="x", alpha=0.3)


def _draw_floor(axes: Axes, row: int, spans: Sequence[Span], summary: Summary) -> None:
    """From the beginning of the first pass on, as long as all passes would have taken at the floor."""
    first = min((span.begin for span in spans if span.kind is Kind.PASS), default=None)
    if first is not None and summary.floor_seconds:
        axes.broken_barh([(first, summary.floor_seconds)], (row - 0.4, 0.8), facecolors="#444444", alpha=0.7)
        what = "computing" if summary.floor_seconds == summary.compute_seconds else "reading"
        text = f"{summary.floor_seconds:.2f} s of {what}: reached to a factor of {summary.ratio_to_floor:.2f}"
        axes.text(first, row, f" {text}", va="center", fontsize=6, color="white", clip_on=True)


def _draw_memory(axes: Axes, levels: Sequence[Level], summary: Summary) -> None:
    last = levels[-1]
    times = [level.at for level in levels] + [max(summary.seconds, last.at)]
    scale, unit = _scale(max(summary.budget_bytes, summary.peak_bytes))
    held = [*levels, last]
    resident = [level.resident_bytes / scale for level in held]
    moving = [level.moving_bytes / scale for level in held]
    budget = [level.budget_bytes / scale for level in held]
    _stack(axes, times, resident, moving)
    axes.step(times, budget, where="post", color="#b22222", linestyle="--", linewidth=1.2, label="budget")
    axes.set_ylim(0, 1.12 * max(*budget, *(a + b for a, b in zip(resident, moving, strict=True)), 1e-9))
    axes.set_ylabel(f"weights, {unit}", fontsize=8)
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.99), fontsize=7, ncols=3, frameon=False)


def _stack(axes: Axes, times: Sequence[float], resident: Sequence[float], moving: Sequence[float]) -> None:
    both = [a + b for a, b in zip(resident, moving, strict=True)]
    below: Any = {"step": "post", "linewidth": 0}
    axes.fill_between(times, 0, resident, color="#9ecae9", label="in memory", **below)
    axes.fill_between(times, resident, both, color="#f2b86c", label="being read or copied", **below)


def _scale(nbytes: float) -> tuple[float, str]:
    unit = format_nbytes(nbytes).split()[-1]
    return 1024.0 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit), unit


def _title(summary: Summary) -> str:
    return (
        f"{summary.passes} passes in {summary.inside_seconds:.2f} s · {format_nbytes(summary.bytes_read)} read at "
        f"{summary.bandwidth / 1e9:.2f} GB/s · budget {format_nbytes(summary.budget_bytes)} of "
        f"{format_nbytes(summary.weight_bytes)}"
    )


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[len(name) - max(1, most - 1) :]
