"""Which stretches of files a gathered weight is made of, and how one of them is cut for direct reads. Pure.

Knows spans and offsets; what is read how is ``read_plan``'s to say.
"""

from __future__ import annotations

from odewei.loaders.base import Span, WeightInfo
from odewei.scheduler.host_memory import PAGE, round_up

__all__ = ["cut_at_pages", "runs_in_files"]

_MOST_RUNS = 1024  # of one weight; a plan is kept, so that finer ones would take more memory than they save time


def runs_in_files(info: WeightInfo) -> list[tuple[Span, int]] | None:
    """Where each stretch of a gathered weight is, with the offset in the weight that it goes to, both in bytes.

    None for a weight that is not gathered, and for one that only its loader can gather: a source is not in a file as it
    is, or would fall into very many stretches.
    """
    if not info.parts or sum(part.run_count for part in info.parts) > _MOST_RUNS:
        return None
    runs: list[tuple[Span, int]] = []
    for part in info.parts:
        span = part.source.span
        if span is None or part.source.stride is not None:
            return None
        runs.extend((Span(span.file, span.offset + start, nbytes), at) for start, at, nbytes in part.runs() if nbytes)
    return runs


def cut_at_pages(span: Span, slab_offset: int) -> tuple[tuple[Span, int], ...]:
    """Cut a stretch that goes to ``slab_offset`` where whole pages of the slab begin and end: head, middle, tail, each
    with its offset in the slab. All three may be empty; together they are the stretch.
    """
    end = slab_offset + span.nbytes
    first = min(round_up(slab_offset, PAGE), end)
    last = max(first, end // PAGE * PAGE)
    places = ((slab_offset, first), (first, last), (last, end))
    return tuple((Span(span.file, span.offset + start - slab_offset, stop - start), start) for start, stop in places)
