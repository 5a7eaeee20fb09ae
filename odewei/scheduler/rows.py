"""Reads single rows of a table that is only looked up, and keeps the hot ones. In the thread that asks.

A row is a few KiB somewhere in a file, and a look-up waits for it, so what counts is how many reads are in flight. The
rows are announced to the kernel (``POSIX_FADV_WILLNEED``) some way ahead of being copied out of its page cache: that
keeps the disk's queue full from one thread, without waking any other. The cache's
pages are the kernel's, not the budget's: it takes them back whenever it needs them.

Knows a file, rows, slots. Knows nothing of modules, units or the scheduler, and starts no thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from odewei.errors import ClosedError, OdeweiError
from odewei.loaders.base import Span
from odewei.loaders.remote_file import RemoteFile
from odewei.scheduler.file_table import FileTable, OpenFile
from odewei.scheduler.host_memory import Bytes
from odewei.scheduler.observer import Observer
from odewei.scheduler.row_slots import Ids, RowSlots
from odewei.scheduler.slab import Slab, slab_bytes
from odewei.scheduler.slabs import SlabPool

__all__ = ["RowCounters", "RowTable", "TablePlace", "runs_of"]

_LONGEST_READ = 1 << 20
_AHEAD_READS = 256  # a disk has no longer queue
_AHEAD_BYTES = 16 << 20  # what the kernel may have to keep for us at a time
_SLOT_BYTES = 16  # what a slot costs besides its row

_will_need = getattr(os, "POSIX_FADV_WILLNEED", None)


@dataclass(frozen=True, slots=True)
class TablePlace:
    """Where a table lies: ``rows`` rows of ``columns`` elements of dtype ``stored``, one after another in ``span``.

    They are handed out in ``dtype``. ``weight`` and ``module`` are names for messages.
    """

    weight: str
    module: str
    span: Span
    rows: int
    columns: int
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def stored_row_bytes(self) -> int:
        return self.columns * self.stored.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as handed out."""
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def slots_in(self, nbytes: int) -> int:
        """How many rows can be kept in so many bytes; all of them if the table fits."""
        return self.rows if nbytes >= self.nbytes else nbytes // (self.row_bytes + _SLOT_BYTES)


@dataclass
class RowCounters:
    """What happened so far: rows asked for (repeats within a look-up included) and rows read, bytes and seconds of
    reading, and look-ups that had to read.
    """

    looked_up: int = 0
    read: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    stalls: int = 0

    @classmethod
    def total(cls, tables: Iterable[RowTable]) -> RowCounters:
        """The sums over several tables."""
        found = cls()
        for counters in (table.counters for table in tables):
            for name, value in vars(counters).items():
                setattr(found, name, getattr(found, name) + value)
        return found


def runs_of(rows: Ids, longest: int) -> list[tuple[int, int, int]]:
    """Cut rows, in rising order, into runs of neighbours: (position in ``rows``, first row, number of rows <= longest).

    Pure. The runs cover every position once, in order.
    """
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1).tolist()
    return [
        (position, int(rows[position]), min(longest, end - position))
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)
        for position in range(start, end, longest)
    ]


class RowTable:
    """One table. ``cache_bytes`` of the pool are taken for hot rows at once and kept until ``close``; none if the pool
    has no room.

    Methods may be called from any thread. After a fork, parent and child each have their own lock, files and
    knowledge of what is cached.
    """

    def __init__(self, place: TablePlace, pool: SlabPool, cache_bytes: int) -> None:
        self.place = place
        self.counters = RowCounters()
        self.busy: AbstractContextManager[Any] = nullcontext()  # entered while reading
        self.observer: Observer | None = None
        self._pool = pool
        slots = RowSlots(place.slots_in(cache_bytes), place.rows).count
        owner = f"rows of {place.weight}"
        self._slab = pool.acquire(owner, slab_bytes(slots * place.row_bytes)) if slots else None
        self._slots = slots if self._slab else 0
        self._here: dict[int, _Here] = {}
        self._mine()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the budget taken for hot rows."""
        return self._slab.nbytes if self._slab else 0

    def look_up(self, rows: Ids) -> torch.Tensor:
        """The rows, in the order asked for, repeats and all, in fresh memory: ``len(rows)`` by ``columns``.

        ``rows`` has one dimension and lies within the table. Raises WeightReadError; ClosedError after ``close``.
        """
        here = self._mine()
        try:
            with here:
                found, slots = self._gather(here, rows)
                if slots is not None:
                    self._fill_in(here, found, rows, slots < 0)
                return found
        except OdeweiError as error:
            raise self._named(error) from error

    def hold(self) -> None:
        """Go on reading the file as it is, if it is replaced by another."""
        here = self._mine()
        with here:
            here.files.hold([self.place.span.file])

    def keep_none(self) -> None:
        """The whole table is wanted: what hot rows took of the budget makes room for it, for good."""
        self._slots, self._slab = 0, None
        self._mine().keep_none()

    def close(self) -> None:
        """No more look-ups: they raise ClosedError. Files close and memory goes back when the last one under way ends.

        Any thread, any moment: a finalizer may call it.
        """
        self._mine().close()

    # -- one look-up -------------------------------------------------------------------------------------------------

    def _gather(self, here: _Here, rows: Ids) -> tuple[torch.Tensor, Ids | None]:
        """The rows that are cached, and the slots; None in place of these if all are. Other rows have no meaning."""
        place = self.place
        with here.lock:
            if here.torn:
                here.slots = RowSlots(here.slots.count, place.rows)
                here.torn = False
            slots = here.slots.find(rows)
            self.counters.looked_up += len(rows)
            missing = len(rows) and slots.min() < 0
            if missing and slots.max() < 0:
                return torch.empty((len(rows), place.columns), dtype=place.dtype, device="cpu"), slots
            wanted = torch.from_numpy(slots.clip(0) if missing else slots)
            found = torch.index_select(here.memory, 0, wanted).view(place.dtype)  # under the lock: none is overwritten
        return found, slots if missing else None

    def _fill_in(self, here: _Here, found: torch.Tensor, rows: Ids, missing: npt.NDArray[np.bool_]) -> None:
        """Read what is missing, put it where it belongs in ``found``, and keep what there is room for."""
        wanted, inverse = np.unique(rows[missing], return_inverse=True)
        started = time.perf_counter()
        with self.busy:
            read = self._read(here.files, wanted)
        seconds = time.perf_counter() - started
        if self.observer is not None:
            nbytes = len(wanted) * self.place.stored_row_bytes
            self.observer.looked_up(self.place.weight, started, started + seconds, nbytes)
        items = _items(read)
        if len(inverse) == len(found):
            np.take(items, inverse, out=_items(found), mode="clip")  # the same without a copy between
        else:
            _items(found)[missing] = items[inverse]
        with here.lock:
            here.torn = True  # what ends this half way may leave slots without their rows
            slots = here.slots.put(wanted)
            if len(new := np.flatnonzero(slots >= 0)):
                _items(here.memory)[slots[new]] = items[new]
            here.torn = False
            self.counters.read += len(wanted)
            self.counters.bytes_read += len(wanted) * self.place.stored_row_bytes
            self.counters.seconds += seconds
            self.counters.stalls += 1

    def _read(self, files: FileTable, rows: Ids) -> torch.Tensor:
        """The rows, named once each and in rising order, read from the file and cast."""
        place, size = self.place, self.place.stored_row_bytes
        file, start = place.span.file, place.span.offset
        made = torch.empty((len(rows), place.columns), dtype=place.stored, device="cpu")
        target: Bytes = made.view(torch.uint8).numpy().reshape(-1)
        reads = [
            (position * size, start + first * size, count * size)
            for position, first, count in runs_of(rows, max(1, _LONGEST_READ // size))
        ]
        if isinstance(file, RemoteFile):
            for at, offset, nbytes in reads:
                files.read(file, [target[at : at + nbytes]], offset, nbytes)
            return made if place.stored == place.dtype else made.to(place.dtype)

        def fill(opened: OpenFile) -> None:
            for at, offset, nbytes in _announced(opened.fd, reads):
                part = target[at : at + nbytes]
                try:
                    count = os.preadv(opened.fd, [part.data], offset)
                except OSError:
                    count = 0
                if count != nbytes:
                    files.read(file, [part], offset, nbytes)  # knows what to do about it
            files.check(file, opened)  # after reading: rows of another file are never handed on

        files.use(file, fill)
        return made if place.stored == place.dtype else made.to(place.dtype)

    def _named(self, error: OdeweiError) -> OdeweiError:
        place = self.place
        file = error.file or str(place.span.file.path)
        return type(error)(error.problem, module=place.module, weight=place.weight, file=file, cure=error.cure)

    # -- its life ----------------------------------------------------------------------------------------------------

    def _mine(self) -> _Here:
        """This process's part: a lock or a half-made change of another thread must not be inherited by a fork."""
        process = os.getpid()
        here = self._here.get(process)
        return here or self._here.setdefault(process, _Here(self.place, self._slots, self._slab, self._pool))

    def __repr__(self) -> str:
        return f"<RowTable {self.place.weight!r}: {self._mine().slots!r}>"


class _Here:
    """What one process knows of a table's rows: which are cached (under ``lock``), the open file. Entered by whoever is
    at work: after ``close`` the file stays open until nobody is.
    """

    def __init__(self, place: TablePlace, slots: int, slab: Slab | None, pool: SlabPool) -> None:
        self.lock = threading.RLock()  # a finalizer may close the table in a thread that holds it
        self.slots = RowSlots(slots, place.rows)
        self.torn = False
        self.files = FileTable(direct=False, scratch_bytes=1)
        self.memory = _matrix(slab, slots, place.row_bytes)
        self._slab = slab
        self._pool = pool
        self._at_work = 0
        self._closed = False

    def __enter__(self) -> None:
        with self.lock:
            if self._closed:
                raise ClosedError("the model was closed", cure="Build it again to use it again")
            self._at_work += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self._at_work -= 1
            over = self._closed and not self._at_work
        if over:
            self.files.close()

    def keep_none(self) -> None:
        with self.lock:  # whoever copies rows holds it
            slab, self._slab = self._slab, None
            self.slots, self.memory = RowSlots(0, 1), self.memory[:0].clone()
        if slab is not None:
            self._pool.release(slab)  # not under the lock: the pool has one, and finalizers may hold it

    def close(self) -> None:
        self.keep_none()
        with self.lock:
            self._closed = True
            over = not self._at_work
        if over:
            self.files.close()


def _matrix(slab: Slab | None, rows: int, row_bytes: int) -> torch.Tensor:
    """The slab's bytes as ``rows`` rows."""
    if slab is None:
        return torch.empty((0, row_bytes), dtype=torch.uint8, device="cpu")
    with torch.inference_mode(False):
        flat = torch.frombuffer(slab.view(), dtype=torch.uint8, count=rows * row_bytes)
        return flat.view(rows, row_bytes)


def _items(matrix: torch.Tensor) -> npt.NDArray[np.void]:
    """A contiguous matrix as one NumPy item a row, which is copied as a whole; shares its memory."""
    raw = matrix.view(torch.uint8).numpy()
    return raw.view(f"V{raw.shape[1]}")[:, 0]


def _announced(fd: int, reads: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """The reads one by one, telling the kernel of those that follow some way ahead."""
    if len(reads) == 1 or _will_need is None:
        yield from reads
        return
    announced = ahead_bytes = 0
    for index, read in enumerate(reads):
        while announced < len(reads) and announced - index < _AHEAD_READS and ahead_bytes < _AHEAD_BYTES:
            _, offset, nbytes = reads[announced]
            os.posix_fadvise(fd, offset, nbytes, _will_need)
            announced, ahead_bytes = announced + 1, ahead_bytes + nbytes
        ahead_bytes -= read[2]
        yield read
