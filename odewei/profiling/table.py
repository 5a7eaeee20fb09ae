"""A timeline as text: what the passes did, a row a layer, and what it means."""

from __future__ import annotations

from collections.abc import Sequence

from odewei.profiling.summary import Layer, Summary
from odewei.scheduler.budget import format_nbytes

__all__ = ["text_of"]

_MOST_ROWS = 60
_LONGEST_NAME = 48
_HEAD = ("layer", "size", "uses", "hits", "read", "reading s", "hidden s", "exposed s", "computing s")


def text_of(summary: Summary, layers: Sequence[Layer], advice: Sequence[str], lost: int) -> str:
    """All of it. Of more than sixty layers, those that most time went into, in their order."""
    shown = _costliest(layers)
    rows = [_row(layer) for layer in shown]
    if len(shown) < len(layers):
        rows.append((f"and {len(layers) - len(shown)} others", *[""] * (len(_HEAD) - 1)))
    rows.append(_row(_total(layers)))
    widths = [max(len(row[column]) for row in [_HEAD, *rows]) for column in range(len(_HEAD))]
    lines = [_line(_HEAD, widths), "  ".join("─" * width for width in widths)]
    lines += [_line(row, widths) for row in rows]
    lines += ["", *_facts(summary), ""]
    lines += [f"→ {sentence}" for sentence in advice]
    if lost:
        lines.append(f"{lost} more events were not recorded: record fewer passes")
    return "\n".join(lines)


def _costliest(layers: Sequence[Layer]) -> list[Layer]:
    if len(layers) <= _MOST_ROWS:
        return list(layers)
    by_cost = sorted(layers, key=lambda layer: -(layer.exposed_seconds + layer.read_seconds + layer.compute_seconds))
    chosen = {layer.name for layer in by_cost[:_MOST_ROWS]}
    return [layer for layer in layers if layer.name in chosen]


def _row(layer: Layer) -> tuple[str, ...]:
    name = layer.name
    if len(name) > _LONGEST_NAME:
        name = "…" + name[1 - _LONGEST_NAME :]
    return (
        name,
        format_nbytes(layer.nbytes) if layer.nbytes else "",
        f"{layer.uses}" if layer.uses else "",
        f"{layer.hit_rate:.0%}" if layer.uses else "",
        format_nbytes(layer.bytes_read) if layer.bytes_read else "",
        *(
            f"{seconds:.4f}" if seconds else ""
            for seconds in (layer.read_seconds, layer.hidden_seconds, layer.exposed_seconds, layer.compute_seconds)
        ),
    )


def _total(layers: Sequence[Layer]) -> Layer:
    return Layer(
        "sum",
        sum(layer.nbytes for layer in layers),
        sum(layer.uses for layer in layers),
        sum(layer.hits for layer in layers),
        sum(layer.bytes_read for layer in layers),
        sum(layer.read_seconds for layer in layers),
        sum(layer.hidden_seconds for layer in layers),
        sum(layer.exposed_seconds for layer in layers),
        sum(layer.compute_seconds for layer in layers),
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *figures = (
        cell.ljust(width) if not column else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([name, *figures]).rstrip()


def _facts(summary: Summary) -> list[str]:
    at_once = f", up to {summary.most_at_once} at once" if summary.most_at_once > 1 else ""
    copied = (
        f", {format_nbytes(summary.bytes_copied)} copied in {summary.copy_seconds:.2f} s"
        if summary.bytes_copied
        else ""
    )
    return [
        f"{summary.passes} passes in {summary.inside_seconds:.2f} s{at_once}: {summary.compute_seconds:.2f} s "
        f"computing, {summary.exposed_seconds:.2f} s not",
        f"{format_nbytes(summary.bytes_read)} read in {summary.read_seconds:.2f} s "
        f"({summary.bandwidth / 1e9:.2f} GB/s), {summary.hidden_seconds:.2f} s of it hidden by computing{copied}",
        f"floor {summary.floor_seconds:.2f} s, reached to a factor of {summary.ratio_to_floor:.2f}",
        f"peak {format_nbytes(summary.peak_bytes)} of a budget of {format_nbytes(summary.budget_bytes)}; "
        f"{summary.hits} of {summary.uses} uses were hits, {summary.evictions} evictions, "
        f"{summary.mispredictions} mispredictions",
    ]
