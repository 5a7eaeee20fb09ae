"""What was noted, as spans of time on lanes, and as levels of memory. Pure.

Computing is told from what a thread entered and left: from entering a unit until leaving it, less what it waited and
what it spent in units entered meanwhile. So every moment of a thread belongs to one unit at most, its innermost one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from odewei.profiling.recorder import Copied, Entered, Left, LookedUp, Moved, Note, Read, Stalled
from odewei.scheduler.states import State

__all__ = ["BETWEEN", "Kind", "Level", "Span", "level_changes", "spans_of"]

BETWEEN = "(between units)"
"""Where a thread is that is inside a model and in none of its units."""


class Kind(Enum):
    """What a span is. A PASS holds the thread's others; of all others no two of one lane overlap."""

    READ = "read"
    COPY = "copy"
    COMPUTE = "compute"  # on the device, where there is one beside the processor, and in the forward's thread elsewhere
    LAUNCH = "launch"  # in the forward's thread, where a device computes
    STALL = "stall"
    PASS = "pass"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time. ``lane``: the thread, or the device's queue. Seconds since recording began."""

    kind: Kind
    lane: str
    name: str
    begin: float
    end: float
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Level:
    """Memory from ``at`` on: bytes of weights that are there, and of those on their way; the budget."""

    at: float
    resident_bytes: int
    moving_bytes: int
    budget_bytes: int


@dataclass(slots=True)
class _Thread:
    """What a thread is inside of, innermost last: units, and models as None, with the moments of entering; and when it
    told something last.
    """

    stack: list[tuple[int | None, float]] = field(default_factory=list)
    since: float = 0.0


def spans_of(
    notes: Iterable[Note], names: Mapping[int, str], lanes: Mapping[int, str], start: float, end: float
) -> list[Span]:
    """All spans, in order of their beginnings, cut to what lies between ``start`` and ``end``.

    ``names`` of units and ``lanes`` of threads by their ids. A lease that was left behind by an interrupt ends with the
    last thing its thread did. What is still open at the end is left out.
    """
    notes = list(notes)
    host = Kind.LAUNCH if any(isinstance(note, Copied) and note.nbytes is None for note in notes) else Kind.COMPUTE
    found = []
    for span in _all(notes, names, lanes, host):
        begin, until = max(span.begin, start), min(span.end, end)
        if begin < until:
            found.append(Span(span.kind, span.lane, span.name, begin - start, until - start, span.nbytes))
    return sorted(found, key=lambda span: span.begin)


def _all(notes: Sequence[Note], names: Mapping[int, str], lanes: Mapping[int, str], host: Kind) -> Iterator[Span]:
    threads: dict[int, _Thread] = {}
    for note in notes:
        match note:
            case Entered() | Left() | Stalled() | LookedUp():
                lane = lanes[note.thread]
                yield from _forward(threads.setdefault(note.thread, _Thread()), lane, note, names, host)
            case Read():
                yield Span(Kind.READ, lanes[note.thread], names[note.unit], note.began, note.ended, note.nbytes)
            case Copied() if note.nbytes is not None:
                yield Span(Kind.COPY, "copies", names[note.unit], note.began, note.ended, note.nbytes)
            case Copied():
                yield Span(Kind.COMPUTE, "device", names[note.unit], note.began, note.ended)


def _forward(
    thread: _Thread, lane: str, note: Entered | Left | Stalled | LookedUp, names: Mapping[int, str], host: Kind
) -> Iterator[Span]:
    """What a forward's thread did until this note."""
    stack = thread.stack
    began = note.at if isinstance(note, Entered | Left) else note.began
    is_behind = isinstance(note, Entered) and len(stack) >= note.depth  # an interrupt: until when is not known
    if stack and began > thread.since and not is_behind:
        inside = stack[-1][0]
        yield Span(host, lane, BETWEEN if inside is None else names[inside], thread.since, began)
    thread.since = began
    match note:
        case Entered():
            del stack[note.depth - 1 :]
            stack.extend([(None, -math.inf)] * (note.depth - 1 - len(stack)))  # entered before recording began
            stack.append((note.unit, note.at))
        case Left():
            at = None
            while at is None and any(what == note.unit for what, _ in stack):
                what, entered = stack.pop()
                at = entered if what == note.unit else None
            if note.unit is None and at is not None:
                yield Span(Kind.PASS, lane, "pass", at, note.at)
        case Stalled():
            yield Span(Kind.STALL, lane, names[note.unit], note.began, note.ended)
            thread.since = note.ended
        case LookedUp():
            yield Span(Kind.STALL, lane, note.weight, note.began, note.ended)
            yield Span(Kind.READ, lane, note.weight, note.began, note.ended, note.nbytes)
            thread.since = note.ended


def level_changes(
    notes: Iterable[Note], before: Mapping[int, tuple[State, int]], start: float, budget_bytes: int
) -> list[Level]:
    """Memory at the beginning, given states and bytes of the units then, and after each change of it."""
    states = dict(before)
    there = sum(nbytes for state, nbytes in states.values() if state is State.RESIDENT)
    moving = sum(nbytes for state, nbytes in states.values() if state in _MOVING)
    found = [Level(0.0, there, moving, budget_bytes)]
    for note in notes:
        if not isinstance(note, Moved):
            continue
        old, old_nbytes = states.get(note.unit, (State.ABSENT, 0))
        states[note.unit] = note.state, note.nbytes
        there += note.nbytes * (note.state is State.RESIDENT) - old_nbytes * (old is State.RESIDENT)
        moving += note.nbytes * (note.state in _MOVING) - old_nbytes * (old in _MOVING)
        level = Level(max(0.0, note.at - start), there, moving, note.budget_bytes)
        if replace(level, at=found[-1].at) != found[-1]:
            found.append(level)
    return found


_MOVING = (State.READING, State.STAGED, State.COPYING)
