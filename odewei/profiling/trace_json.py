"""A timeline in the Trace Event Format, which Perfetto and chrome://tracing open.

Source: "Trace Event Format", Google, 2016: complete events (``"ph": "X"``), counters (``"C"``) and names of tracks
(``"M"``), times in microseconds. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from odewei.profiling.spans import Kind, Level, Span

__all__ = ["trace_events"]

Event = dict[str, object]

_PROCESS = 1
_TRACKS = {  # in this order from top to bottom
    Kind.READ: "reading",
    Kind.COPY: "copying",
    Kind.COMPUTE: "computing",
    Kind.LAUNCH: "launching",
    Kind.STALL: "waiting",
    Kind.PASS: "passes",
}
_COLOURS = {  # of the format's reserved names
    Kind.READ: "thread_state_iowait",
    Kind.COPY: "rail_load",
    Kind.COMPUTE: "thread_state_running",
    Kind.LAUNCH: "thread_state_runnable",
    Kind.STALL: "terrible",
    Kind.PASS: "grey",
}


def trace_events(spans: Sequence[Span], levels: Sequence[Level], seconds: float, facts: dict[str, object]) -> Event:
    """The whole file as one value for ``json``. ``seconds``: when recording ended; ``facts`` are kept in it beside."""
    return {
        "displayTimeUnit": "ms",
        "otherData": facts,
        "traceEvents": [*_spans(spans), *_counters(levels, seconds)],
    }


def _spans(spans: Sequence[Span]) -> Iterator[Event]:
    tracks = sorted({(list(_TRACKS).index(span.kind), span.lane) for span in spans})
    numbers = {track: number for number, track in enumerate(tracks, 1)}
    yield _name("process_name", "odewei", 0)
    for (kind, lane), number in numbers.items():
        what = _TRACKS[list(_TRACKS)[kind]]
        yield _name("thread_name", what if lane in ("copies", "device") else f"{what}: {lane}", number)
        yield {**_name("thread_sort_index", "", number), "args": {"sort_index": number}}
    for span in spans:
        yield {
            "name": span.name or "(model)",
            "cat": span.kind.value,
            "ph": "X",
            "ts": span.begin * 1e6,
            "dur": span.seconds * 1e6,
            "pid": _PROCESS,
            "tid": numbers[list(_TRACKS).index(span.kind), span.lane],
            "cname": _COLOURS[span.kind],
            "args": {"bytes": span.nbytes} if span.nbytes else {},
        }


def _counters(levels: Sequence[Level], seconds: float) -> Iterator[Event]:
    """Stacked: what is there and what is on its way; the budget on a track of its own, on the same scale."""
    for level in [*levels, *([Level(seconds, *_bytes_of(levels[-1]))] if levels else [])]:
        there = {"resident": level.resident_bytes, "on its way": level.moving_bytes}
        for name, values in (("bytes of weights", there), ("budget", {"budget": level.budget_bytes})):
            yield {"name": name, "ph": "C", "ts": level.at * 1e6, "pid": _PROCESS, "tid": 0, "args": values}


def _bytes_of(level: Level) -> tuple[int, int, int]:
    return level.resident_bytes, level.moving_bytes, level.budget_bytes


def _name(kind: str, name: str, number: int) -> Event:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": number, "args": {"name": name}}
