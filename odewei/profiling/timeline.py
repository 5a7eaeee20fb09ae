"""What ``odewei.profile`` yields: a recording, and the ways to look at it.

Knows notes and what is made of them. Knows nothing of models; who records hands over names and states.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from odewei.profiling.advice import advise
from odewei.profiling.recorder import Recorder
from odewei.profiling.spans import Level, Span, level_changes, spans_of
from odewei.profiling.summary import Counted, Layer, Summary, layers_of, summarize
from odewei.profiling.table import text_of
from odewei.profiling.trace_json import trace_events
from odewei.scheduler.states import State

__all__ = ["Scene", "Timeline"]


@dataclass(frozen=True, slots=True)
class Scene:
    """How things stood when recording began or ended: units' names, states and sizes by their ids, and the clock."""

    at: float
    names: Mapping[int, str]
    states: Mapping[int, tuple[State, int]]
    budget_bytes: int
    counted: Counted


class Timeline:
    """What happened between two moments; complete when the with statement has ended, and up to now before that.

    ``print`` it for a table, with advice. Methods may be called from any thread. Times are seconds since recording
    began.
    """

    def __init__(self, recorder: Recorder, begin: Scene, now: Callable[[], Scene]) -> None:
        self._recorder = recorder
        self._begin = begin
        self._now = now
        self._end: Scene | None = None
        self._made: _Made | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """Everything that took time, in order of beginning."""
        return self._look().spans

    @property
    def levels(self) -> tuple[Level, ...]:
        """Bytes of weights in memory and on their way, from the beginning on, a value at each change."""
        return self._look().levels

    @property
    def layers(self) -> tuple[Layer, ...]:
        """A row for each layer, in order of first use."""
        return self._look().layers

    @property
    def summary(self) -> Summary:
        """The sums."""
        return self._look().summary

    @property
    def advice(self) -> tuple[str, ...]:
        """What the passes wait for, and what would make them faster, in sentences."""
        return advise(self.summary)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open. Raises OSError."""
        made = self._look()
        facts: dict[str, object] = {"summary": made.summary.as_dict(), "advice": list(self.advice)}
        trace = trace_events(made.spans, made.levels, made.summary.seconds, facts)
        Path(path).write_text(json.dumps(trace, separators=(",", ":")), encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw it; the name's suffix says the format, ``.png`` say. Needs the extra ``plot``.

        Raises OptionsError where matplotlib is missing, OSError where the file cannot be written.
        """
        from odewei.profiling.picture import draw

        made = self._look()
        draw(Path(path), made.spans, made.levels, made.summary)

    def finish(self) -> None:
        """Recording has ended. For whoever records."""
        self._end = self._end or self._now()

    def _look(self) -> _Made:
        if self._made is not None:
            return self._made
        end = self._end or self._now()
        made = _make(self._recorder, self._begin, end)
        if self._end is not None:
            self._made = made
        return made

    def __str__(self) -> str:
        return text_of(self.summary, self.layers, self.advice, self._recorder.lost)

    def __repr__(self) -> str:
        state = "recording" if self._end is None else "complete"
        return f"<Timeline, {state}: {self._recorder!r}>"


@dataclass(frozen=True, slots=True)
class _Made:
    spans: tuple[Span, ...]
    levels: tuple[Level, ...]
    layers: tuple[Layer, ...]
    summary: Summary


def _make(recorder: Recorder, begin: Scene, end: Scene) -> _Made:
    notes = recorder.notes[:]
    names = _Names({**begin.names, **end.names})
    spans = spans_of(notes, names, recorder.threads, begin.at, end.at)
    levels = level_changes(notes, begin.states, begin.at, begin.budget_bytes)
    sizes = {names[unit]: nbytes for unit, (_, nbytes) in {**begin.states, **end.states}.items()}
    summary = summarize(
        spans,
        notes,
        levels,
        seconds=end.at - begin.at,
        weight_bytes=sum(sizes.values()),
        counted=end.counted.since(begin.counted),
    )
    return _Made(tuple(spans), tuple(levels), tuple(layers_of(spans, notes, names, sizes)), summary)


class _Names(dict[int, str]):
    """A model that came and went while recording has left no names."""

    def __missing__(self, unit: int) -> str:
        return f"unit {unit}"
