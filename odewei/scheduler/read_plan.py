"""Where each byte of a unit is read from and put. Pure: no files are opened, no memory is touched.

Every tensor lands at a multiple of 64 bytes (see ``slab.ALIGNMENT``). Files place their tensors at multiples of 8 or
less, so there are two ways for a direct read, which must begin and end at pages of the file and of memory:

- *in place*: large stretches whose tensors all lie at the same distance from multiples of 64 in the file are read
  straight to where they stay, in large chunks; if that distance is not 0, the reader thread moves each chunk down by
  it;
- *copied*: all else is read a scratch buffer at a time, and the reader thread copies each tensor to its place, casting
  on the way if asked.

Few large reads matter more than the copy that they save: while the model computes on every core, each time a reader
has to wake up costs it milliseconds of waiting for a core.

A buffered read can begin anywhere and goes straight to its place unless it casts.

The stretches of a gathered weight go each to its own place, a large one in place too: the whole pages of the slab that
it fills are read from the pages of the file that hold their bytes, and moved down by up to a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from odewei.loaders.base import Span
from odewei.scheduler.gather_plan import cut_at_pages, runs_in_files
from odewei.scheduler.host_memory import PAGE, round_up
from odewei.scheduler.reads import Cast, CopiedRead, LoaderRead, Part, PlacedRead, Placement, Read, ReadSettings, Wanted
from odewei.scheduler.slab import ALIGNMENT, slab_bytes

__all__ = ["UnitReadPlan", "size_without_plan"]

_IN_PLACE_FROM = 1 << 20  # shorter stretches are not worth their page of slack at either end
_LARGEST_GAP = PAGE  # read over a gap this small rather than starting anew
_PLACED_FROM = 1 << 16  # shorter stretches of a gathered weight are copied, many of them with one read

_Item = TypeVar("_Item", "tuple[Wanted, Span]", "tuple[Wanted, Span, int]")


@dataclass(frozen=True, slots=True)
class UnitReadPlan:
    """How one unit gets into a slab of ``nbytes`` bytes. ``jobs`` may run at once, the reads of a job in order."""

    nbytes: int
    placements: tuple[Placement, ...]
    jobs: tuple[tuple[Read, ...], ...]

    @classmethod
    def make(cls, wanted: Sequence[Wanted], settings: ReadSettings) -> UnitReadPlan:
        """The plan for a unit's weights, in any order."""
        return _Layout(settings).plan(wanted)


def size_without_plan(wanted: Sequence[Wanted]) -> int | None:
    """The bytes of the slab that a plan for these weights would have, if it is plain to see: all of them lie in files
    and are too small to be read in place. None otherwise.
    """
    stored = 0
    for weight in wanted:
        if weight.info.span is None:
            return None
        stored += weight.info.nbytes + _LARGEST_GAP
    if stored >= _IN_PLACE_FROM:
        return None
    return slab_bytes(sum(round_up(weight.nbytes, ALIGNMENT) for weight in wanted))


class _Layout:
    """Fills a slab from its start; makes placements and reads."""

    def __init__(self, settings: ReadSettings) -> None:
        self.settings = settings
        self.used = 0
        self.offsets: dict[str, int] = {}
        self.reads: list[Read] = []

    def plan(self, wanted: Sequence[Wanted]) -> UnitReadPlan:
        in_files = [(weight, weight.info.span) for weight in wanted if weight.info.span is not None and weight.nbytes]
        in_place: list[list[tuple[Wanted, Span]]] = []
        others: list[list[tuple[Wanted, Span]]] = []
        for run in _runs((weight, span) for weight, span in in_files if span is not None):
            rest: list[tuple[Wanted, Span]] = []
            for shift, stretch in groupby(run, key=self._shift):
                piece = list(stretch)
                if shift is not None and _length(piece) >= _IN_PLACE_FROM:
                    in_place.append(piece)
                    others.append(rest)
                    rest = []
                else:
                    rest.extend(piece)
            others.append(rest)
        for piece in in_place:  # first, because they need whole pages
            self._read_in_place(piece)
        for piece in filter(None, others):
            self._read_piecewise(piece)
        elsewhere = [weight for weight in wanted if weight.info.span is None and weight.nbytes]
        gathered = [(weight, runs) for weight in elsewhere if (runs := runs_in_files(weight.info)) is not None]
        self._read_gathered(gathered)
        by_loader = [weight for weight in elsewhere if weight.name not in {weight.name for weight, _ in gathered}]
        self._read_from_loader(by_loader)
        placements = tuple(
            Placement(
                weight.name,
                self.offsets.get(weight.name, 0),
                weight.dtype,
                weight.info.shape,
                weight.info.stride,
            )
            for weight in wanted
        )
        size = slab_bytes(self.used)
        return UnitReadPlan(size, placements, tuple(self._jobs(size)))

    def _shift(self, item: tuple[Wanted, Span]) -> int | None:
        """How far a weight read in place lies above a multiple of 64; None: it cannot be read in place."""
        weight, span = item
        return span.offset % ALIGNMENT if self.settings.direct and not weight.casts else None

    def _place(self, weight: Wanted) -> int:
        offset = self.offsets[weight.name] = round_up(self.used, ALIGNMENT)
        self.used = offset + weight.nbytes
        return offset

    def _read_in_place(self, piece: list[tuple[Wanted, Span]]) -> None:
        """Whole pages of the file to whole pages of the slab, in chunks."""
        file = piece[0][1].file
        start, end = piece[0][1].offset, piece[-1][1].offset + piece[-1][1].nbytes
        shift = start % ALIGNMENT
        first = start // PAGE * PAGE
        region = round_up(self.used, PAGE)
        for weight, span in piece:
            self.offsets[weight.name] = region + span.offset - first - shift
        for offset in range(first, end, self.settings.chunk_bytes):
            length = min(self.settings.chunk_bytes, end - offset)
            needed = min(length + shift, end - offset)
            slab_offset = region + offset - first
            self.reads.append(PlacedRead(file, offset, round_up(length, PAGE), needed, slab_offset, shift))
        self.used = region + round_up(end - first, PAGE)

    def _read_piecewise(self, piece: list[tuple[Wanted, Span]]) -> None:
        """Each weight to its place: straight when the read may begin anywhere, through the scratch otherwise."""
        via_scratch: list[tuple[Wanted, Span, int]] = []
        for weight, span in piece:
            offset = self._place(weight)
            if self.settings.direct or weight.casts:
                via_scratch.append((weight, span, offset))
                continue
            self._read_straight(span, offset)
        if via_scratch:
            self.reads.extend(self._copied_reads(via_scratch))

    def _read_straight(self, span: Span, slab_offset: int) -> None:
        """In chunks that begin anywhere, through the page cache."""
        for start in range(0, span.nbytes, self.settings.chunk_bytes):
            length = min(self.settings.chunk_bytes, span.nbytes - start)
            self.reads.append(PlacedRead(span.file, span.offset + start, length, length, slab_offset + start))

    def _read_gathered(self, gathered: Sequence[tuple[Wanted, list[tuple[Span, int]]]]) -> None:
        """Each stretch to its own place; what is copied of all these weights is read in the order of the files."""
        copied: list[tuple[Wanted, Span, int]] = []
        for weight, runs in gathered:
            base = self._place(weight)
            for span, at in runs:
                target = base + at // weight.info.dtype.itemsize * weight.dtype.itemsize
                if weight.casts or span.nbytes < (_IN_PLACE_FROM if self.settings.direct else _PLACED_FROM):
                    copied.append((weight, span, target))
                elif self.settings.direct:
                    head, (middle, place), tail = cut_at_pages(span, target)
                    self._read_pages(middle, place)
                    copied.extend((weight, *end) for end in (head, tail) if end[0].nbytes)
                else:
                    self._read_straight(span, target)
        for piece in _runs(copied):
            self.reads.extend(self._copied_reads(piece))

    def _read_pages(self, span: Span, slab_offset: int) -> None:
        """Whole pages of the slab, in chunks, from wherever their bytes are in the file."""
        shift = span.offset % PAGE
        for start in range(0, span.nbytes, self.settings.chunk_bytes):
            length = min(self.settings.chunk_bytes, span.nbytes - start)
            first = span.offset - shift + start
            self.reads.append(PlacedRead(span.file, first, length, length + shift, slab_offset + start, shift))

    def _copied_reads(self, piece: list[tuple[Wanted, Span, int]]) -> Iterator[CopiedRead]:
        """Cut a stretch of a file into scratches; an element that is cast is never cut in two."""
        page = PAGE if self.settings.direct else 1
        file = piece[0][1].file
        base = piece[0][1].offset // page * page
        end = base
        parts: list[Part] = []
        for weight, span, slab_offset in piece:
            cast = Cast(weight.info.dtype, weight.dtype) if weight.casts else None
            element = weight.info.dtype.itemsize if cast else 1
            done = 0
            while done < span.nbytes:
                position = span.offset + done
                room = (base + self.settings.scratch_bytes - position) // element * element
                if room <= 0 or (position - end > _LARGEST_GAP and parts):
                    yield CopiedRead(file, base, round_up(end - base, page), end - base, tuple(parts))
                    parts, base = [], position // page * page
                    continue
                length = min(room, span.nbytes - done)
                target = slab_offset + done // element * (weight.dtype.itemsize if cast else 1)
                parts.append(Part(position - base, length, target, cast))
                done += length
                end = position + length
        yield CopiedRead(file, base, round_up(end - base, page), end - base, tuple(parts))

    def _read_from_loader(self, weights: Sequence[Wanted]) -> None:
        """One at a time from the loader; all casts share one staging place at the slab's end."""
        placed = [(weight, self._place(weight)) for weight in sorted(weights, key=lambda weight: weight.casts)]
        staging = round_up(self.used, ALIGNMENT)
        for weight, offset in placed:
            cast = Cast(weight.info.dtype, weight.dtype) if weight.casts else None
            self.reads.append(LoaderRead(weight.info, offset, staging if cast else None, cast))
        self.used = max([self.used, *(staging + weight.info.nbytes for weight in weights if weight.casts)])

    def _jobs(self, size: int) -> Iterator[tuple[Read, ...]]:
        """Group short reads; keep those that share the staging place in one job."""
        job: list[Read] = []
        nbytes = 0
        for read in self.reads:
            staged = isinstance(read, LoaderRead) and read.cast is not None
            if job and nbytes + read.nbytes > self.settings.chunk_bytes and not staged:
                yield tuple(job)
                job, nbytes = [], 0
            job.append(read)
            nbytes += read.nbytes
        if job:
            yield tuple(job)


def _runs(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Stretches of one file each, in order of offset, without large gaps or overlaps."""
    run: list[_Item] = []
    for item in sorted(items, key=lambda item: (str(item[1].file.path), item[1].offset, item[1].nbytes)):
        if run:
            last = run[-1][1]
            gap = item[1].offset - (last.offset + last.nbytes)
            if item[1].file != last.file or not 0 <= gap <= _LARGEST_GAP:
                yield run
                run = []
        run.append(item)
    if run:
        yield run


def _length(piece: Sequence[tuple[Wanted, Span]]) -> int:
    return piece[-1][1].offset + piece[-1][1].nbytes - piece[0][1].offset
