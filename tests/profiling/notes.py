"""Recordings written down by hand: threads 1 and 2, and a reader, with times of their own choosing."""

from __future__ import annotations

from odewei.profiling.recorder import Copied, Entered, Left, LookedUp, Moved, Note, Read, Stalled
from odewei.profiling.spans import Kind, Level, Span, spans_of
from odewei.profiling.summary import Counted, Summary, summarize
from odewei.scheduler.states import State

NAMES = {0: "outer", 1: "inner", 2: "next"}
LANES = {1: "one", 2: "two", 9: "reader"}

__all__ = [
    "LANES",
    "NAMES",
    "Copied",
    "Entered",
    "Left",
    "LookedUp",
    "Moved",
    "Read",
    "Stalled",
    "State",
    "look",
    "short",
    "summary_of",
]


def look(*notes: Note, until: float = 100.0) -> list[Span]:
    """The spans of a recording from 0 on."""
    return spans_of(notes, NAMES, LANES, 0.0, until)


def short(spans: list[Span], *kinds: Kind) -> list[tuple[str, str, float, float]]:
    """(lane, name, begin, end) of the spans of these kinds."""
    return [(span.lane, span.name, span.begin, span.end) for span in spans if span.kind in kinds]


def summary_of(*notes: Note, budget: int = 100, weights: int = 300, counted: Counted | None = None) -> Summary:
    """The sums of a recording from 0 to 100 seconds."""
    return summarize(
        look(*notes),
        notes,
        [Level(0.0, 0, 0, budget)],
        seconds=100.0,
        weight_bytes=weights,
        counted=counted or Counted(0, 0, 0),
    )
