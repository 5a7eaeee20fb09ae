"""Sums over spans: of the whole recording, and a row for each layer. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from odewei.profiling.intervals import Interval, length, union, without
from odewei.profiling.recorder import Entered, Note, Stalled
from odewei.profiling.spans import BETWEEN, Kind, Level, Span

__all__ = ["Counted", "Layer", "Summary", "layers_of", "summarize"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One unit, in the order of first use. Bytes are bytes, times seconds, of the whole recording.

    - ``nbytes``: its size in memory; 0 for rows of a table. ``uses``: how often it was entered, of which ``hits``
      found it in memory.
    - ``read_seconds``: a reader was at it, of which ``hidden_seconds`` while no forward waited for anything.
    - ``exposed_seconds``: forwards waited for it, summed over threads.
    - ``compute_seconds``: inside it, without what was spent waiting and in units inside it; summed over threads.
    """

    name: str
    nbytes: int
    uses: int
    hits: int
    bytes_read: int
    read_seconds: float
    hidden_seconds: float
    exposed_seconds: float
    compute_seconds: float

    @property
    def hit_rate(self) -> float:
        """Of its uses, how many found it in memory; 1 where there was none."""
        return self.hits / self.uses if self.uses else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything together. Times in seconds; each is the time during which it was so for at least one thread.

    - ``seconds``: of the recording. ``inside_seconds``: a pass was running. ``compute_seconds``: one computed.
    - ``exposed_seconds``: a pass was running and none computed. ``idle_seconds``: of these, while nothing was being
      read or copied: waits in processing.
    - ``read_seconds``: something was being read, ``hidden_seconds`` of it while something computed.
    - ``peak_bytes``: of weights that were there and on their way. ``weight_bytes``: of all units.
    """

    seconds: float
    passes: int
    most_at_once: int
    inside_seconds: float
    compute_seconds: float
    exposed_seconds: float
    idle_seconds: float
    read_seconds: float
    hidden_seconds: float
    copy_seconds: float
    bytes_read: int
    bytes_copied: int
    uses: int
    hits: int
    evictions: int
    mispredictions: int
    overdrafts: int
    budget_bytes: int
    peak_bytes: int
    weight_bytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second while something was being read; 0 if nothing was."""
        return self.bytes_read / self.read_seconds if self.read_seconds else 0.0

    @property
    def floor_seconds(self) -> float:
        """``max(compute, missed bytes / measured bandwidth)``: no scheduler could have been faster with these reads."""
        return max(self.compute_seconds, self.read_seconds, self.copy_seconds)

    @property
    def ratio_to_floor(self) -> float:
        """Time inside the model over the floor; reading before and between passes can make it smaller than 1."""
        return self.inside_seconds / self.floor_seconds if self.floor_seconds else 0.0

    def as_dict(self) -> dict[str, float]:
        """All figures by name, for JSON."""
        derived = ("bandwidth", "floor_seconds", "ratio_to_floor")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True, slots=True)
class Counted:
    """What the scheduler counts by itself, up to now or in a while."""

    evictions: int
    mispredictions: int
    overdrafts: int

    def since(self, earlier: Counted) -> Counted:
        """What came after ``earlier``."""
        return Counted(
            self.evictions - earlier.evictions,
            self.mispredictions - earlier.mispredictions,
            self.overdrafts - earlier.overdrafts,
        )


def layers_of(
    spans: Sequence[Span], notes: Iterable[Note], names: Mapping[int, str], sizes: Mapping[str, int]
) -> list[Layer]:
    """A row for each unit and each table of rows that anything happened to, in order of first use."""
    uses: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for note in notes:
        if isinstance(note, Entered) and note.unit is not None:
            uses[names[note.unit]] += 1
        elif isinstance(note, Stalled):
            waits[names[note.unit]] += 1
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind is not Kind.PASS:
            by_name[span.name].append(span)
    waiting = _covered(spans, lambda span: span.kind is Kind.STALL)
    found = []
    others = [name for name in by_name if name not in uses and name != BETWEEN]
    for name in (*uses, *others, BETWEEN):
        own = by_name[name]
        reading = _covered(own, lambda span: span.kind is Kind.READ)
        found.append(
            Layer(
                name=name,
                nbytes=sizes.get(name, 0),
                uses=uses[name],
                hits=max(0, uses[name] - waits[name]),
                bytes_read=sum(span.nbytes for span in own if span.kind is Kind.READ),
                read_seconds=length(reading),
                hidden_seconds=length(without(reading, waiting)),
                exposed_seconds=sum(span.seconds for span in own if span.kind is Kind.STALL),
                compute_seconds=sum(span.seconds for span in own if span.kind is Kind.COMPUTE),
            )
        )
    return found if by_name[BETWEEN] else found[:-1]


def summarize(
    spans: Sequence[Span],
    notes: Sequence[Note],
    levels: Sequence[Level],
    *,
    seconds: float,
    weight_bytes: int,
    counted: Counted,
) -> Summary:
    """The sums. ``levels`` has at least one."""
    inside = _covered(spans, lambda span: span.kind is Kind.PASS)
    computing = _covered(spans, lambda span: span.kind is Kind.COMPUTE)
    reading = _covered(spans, lambda span: span.kind is Kind.READ)
    copying = _covered(spans, lambda span: span.kind is Kind.COPY)
    exposed = without(inside, computing)
    uses = sum(isinstance(note, Entered) and note.unit is not None for note in notes)
    return Summary(
        seconds=seconds,
        passes=sum(span.kind is Kind.PASS for span in spans),
        most_at_once=_most_at_once(spans),
        inside_seconds=length(inside),
        compute_seconds=length(computing),
        exposed_seconds=length(exposed),
        idle_seconds=length(without(exposed, union([*reading, *copying]))),
        read_seconds=length(reading),
        hidden_seconds=length(reading) - length(without(reading, computing)),
        copy_seconds=length(copying),
        bytes_read=sum(span.nbytes for span in spans if span.kind is Kind.READ),
        bytes_copied=sum(span.nbytes for span in spans if span.kind is Kind.COPY),
        uses=uses,
        hits=max(0, uses - sum(isinstance(note, Stalled) for note in notes)),
        evictions=counted.evictions,
        mispredictions=counted.mispredictions,
        overdrafts=counted.overdrafts,
        budget_bytes=levels[-1].budget_bytes,
        peak_bytes=max(level.resident_bytes + level.moving_bytes for level in levels),
        weight_bytes=weight_bytes,
    )


def _covered(spans: Iterable[Span], which: Callable[[Span], bool]) -> list[Interval]:
    return union((span.begin, span.end) for span in spans if which(span))


def _most_at_once(spans: Iterable[Span]) -> int:
    """The most threads that were inside a pass at the same time."""
    lanes: dict[str, list[Interval]] = defaultdict(list)
    for span in spans:
        if span.kind is Kind.PASS:
            lanes[span.lane].append((span.begin, span.end))
    edges = sorted(
        (at, step) for lane in lanes.values() for begin, end in union(lane) for at, step in ((begin, 1), (end, -1))
    )
    most = now = 0
    for _, step in edges:
        now += step
        most = max(most, now)
    return most
