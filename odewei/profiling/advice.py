"""What the figures mean, in words: what a pass waits for, and what would make it faster. Pure."""

from __future__ import annotations

import math

from odewei.profiling.summary import Summary
from odewei.scheduler.budget import format_nbytes

__all__ = ["advise"]

_LITTLE = 0.1  # of a pass: what is not worth a word


def advise(summary: Summary) -> tuple[str, ...]:
    """Sentences, the most important first; at least one.

    What is promised of a larger budget: in a loop over the weights, each byte more that stays is one less to be read a
    pass, at the bandwidth that was measured, until computing takes longer than reading.
    """
    if not summary.passes:
        return ("no pass ended while this was recorded: call the model inside of the with statement",)
    lost = summary.exposed_seconds > _LITTLE * summary.inside_seconds
    if not summary.bytes_read:
        found = ["compute-bound: nothing had to be read; a larger budget has nothing to gain"]
    elif summary.read_seconds > (1 + _LITTLE) * summary.compute_seconds and lost:
        found = list(_disk_bound(summary))
    elif not lost:
        found = [_compute_bound(summary)]
    else:
        found = [_late(summary)]
    if summary.bytes_read and summary.idle_seconds > _LITTLE * summary.inside_seconds:
        found.append(_processing(summary))
    if summary.overdrafts:
        found.append(
            f"the budget was exceeded {_times(summary.overdrafts)}, because a forward needed a layer when nothing "
            "could leave: give it more, or run fewer passes at once"
        )
    return tuple(found)


def _disk_bound(summary: Summary) -> tuple[str, ...]:
    passes = summary.passes
    compute, read = summary.compute_seconds / passes, summary.read_seconds / passes
    nbytes = summary.bytes_read / passes
    excess = max(0.0, nbytes - compute * summary.bandwidth)
    whole = min(summary.budget_bytes + excess, max(summary.weight_bytes, summary.budget_bytes))
    more = whole - summary.budget_bytes
    saved = min(summary.exposed_seconds / passes, more / summary.bandwidth)
    gib = 2**30 / summary.bandwidth
    first = f"disk-bound: a pass reads {format_nbytes(nbytes)} in {read:.3g} s and computes for {compute:.3g} s"
    if more > 0:
        until = "all weights stay in memory then" if whole >= summary.weight_bytes else "computing takes as long then"
        first += (
            f"; raise the budget from {format_nbytes(summary.budget_bytes)} to {format_nbytes(whole)} to save about "
            f"{saved:.2g} s a pass ({until})"
        )
        if more > 2**30:
            first += f", or {gib:.2g} s with each GiB on the way there"
    at_once = summary.most_at_once * math.ceil(read / compute) if compute else 64
    second = (
        f"or have {min(64, at_once)} inputs in work at once (odewei.map, odewei.generate_many, or a batch): they share "
        "what is read"
    )
    return first, second


def _compute_bound(summary: Summary) -> str:
    passes = summary.passes
    return (
        f"compute-bound: of {summary.inside_seconds / passes:.3g} s a pass, {summary.compute_seconds / passes:.3g} s "
        f"compute, and reading hides behind it but for {summary.exposed_seconds / passes:.2g} s: a larger budget has "
        "nothing to gain"
    )


def _late(summary: Summary) -> str:
    """The disk would have had the time."""
    passes = summary.passes
    found = (
        f"waits that need not be: a pass computes for {summary.compute_seconds / passes:.3g} s and reads for "
        f"{summary.read_seconds / passes:.3g} s, and yet {summary.exposed_seconds / passes:.2g} s of it were neither "
        "computing nor hidden"
    )
    if summary.passes == 1:
        return found + "; one pass alone has nothing read ahead of it: record more of them"
    if summary.mispredictions > summary.uses * _LITTLE:
        return found + (
            f"; {summary.mispredictions} of {summary.uses} layers came in an order that was not expected: see "
            "odewei.trace, and whether the passes differ"
        )
    return found + "; the layers are uneven, or the window is small: try a larger prefetch_depth or budget"


def _processing(summary: Summary) -> str:
    return (
        f"waits in processing: {summary.idle_seconds / summary.passes:.2g} s a pass went by with nothing being read "
        "or computed: putting weights into place (odewei align makes that less), casting, Python, other programs"
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
