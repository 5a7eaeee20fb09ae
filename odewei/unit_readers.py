"""How the units of one model get into memory: from places in files, or by a function of the user.

Knows units, loaders and how much one reader does at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from odewei.loaders.base import CheckpointFile, WeightInfo, WeightsLoader
from odewei.loaders.plain_callable import CallableLoader
from odewei.loaders.remote_file import RemoteFile
from odewei.scheduler.callable_unit import CallableUnit, Expected
from odewei.scheduler.host_memory import PAGE, Bytes, round_up
from odewei.scheduler.read_plan import size_without_plan
from odewei.scheduler.reader import FileTable, Job, PlannedUnit, Resized, UnitReader
from odewei.scheduler.reads import Placement, ReadSettings, Wanted
from odewei.scheduler.slabs import SlabPool
from odewei.stock import Stock
from odewei.survey import Weight
from odewei.units import Unit

__all__ = ["SCRATCH_BYTES", "UnitReaders"]

SCRATCH_BYTES = 1 << 20
"""Of each reader thread."""

_CHUNK_BYTES = 32 << 20
_SMALLEST_CHUNK = 4 << 20


class UnitReaders:
    """Makes the reader of each unit."""

    def __init__(
        self,
        source: WeightsLoader | CallableLoader,
        stock: Stock,
        infos: Mapping[str, WeightInfo],
        pool: SlabPool,
        *,
        num_readers: int,
        direct: bool,
    ) -> None:
        self._source, self._stock, self._infos, self._pool = source, stock, infos, pool
        self._num_readers = num_readers
        self._direct = direct
        self._sizes: dict[int, int] = {}  # thousands of units have the same
        self._expected = frozenset(weight.name for weight in stock.weights) if not infos else frozenset()

    def make(self, unit: Unit) -> UnitReader:
        """The reader of one unit."""
        if isinstance(self._source, CallableLoader):
            expected = [Expected(weight.name, weight.shape, weight.dtype) for weight in unit.weights]
            stock, load = self._stock, self._source.load
            return CallableUnit(unit.hooked[0], expected, load, self._pool, stock.cast, self._expected.__contains__)
        wanted = self.wanted_of(unit.weights)
        nbytes = size_without_plan(wanted)
        if nbytes is not None:
            return _SmallUnit(self, unit.weights, self._sizes.setdefault(nbytes, nbytes))
        per_reader = sum(weight.nbytes for weight in wanted) // self._num_readers
        chunk = round_up(min(max(per_reader, _SMALLEST_CHUNK), _CHUNK_BYTES), PAGE)
        return PlannedUnit(wanted, self._settings(wanted, chunk), self._source)

    def planned_once(self, weights: Sequence[Weight]) -> PlannedUnit:
        """How these few bytes are read, for one time."""
        assert isinstance(self._source, WeightsLoader), "what a function delivers is planned by itself"
        wanted = self.wanted_of(weights)
        return PlannedUnit(wanted, self._settings(wanted, _SMALLEST_CHUNK), self._source, once=True)

    def planned_anew(self, weights: Sequence[Weight], infos: Mapping[str, WeightInfo], nbytes: int) -> UnitReader:
        """How weights are read from other places than before, as they are stored there. ``nbytes`` is the size of the
        memory that the unit had until now.
        """
        wanted = [Wanted(weight.name, infos[weight.name], infos[weight.name].dtype) for weight in weights]
        source = self._source if isinstance(self._source, WeightsLoader) else _NoLoader()
        return _Moved(PlannedUnit(wanted, _settings(self._direct, _SMALLEST_CHUNK), source), nbytes)

    def _settings(self, wanted: Sequence[Wanted], chunk_bytes: int) -> ReadSettings:
        return _settings(self._direct or any(map(_is_remote, wanted)), chunk_bytes)

    def wanted_of(self, weights: Sequence[Weight]) -> list[Wanted]:
        """Where weights are, and as what they are wanted."""
        infos = [self._infos[weight.name] for weight in weights]
        bound = self._stock.bound
        return [Wanted(weight.name, info, bound(info)) for weight, info in zip(weights, infos, strict=True)]


class _SmallUnit:
    """A unit of so few bytes that what is known of its reading would be larger: that is made anew for each read, and
    kept from ``jobs`` to ``tensors``.
    """

    __slots__ = ("_planned", "_readers", "_weights", "nbytes")

    def __init__(self, readers: UnitReaders, weights: Sequence[Weight], nbytes: int) -> None:
        self._readers, self._weights, self.nbytes = readers, weights, nbytes
        self._planned: PlannedUnit | None = None

    def jobs(self) -> Sequence[Job]:
        self._planned = planned = self._readers.planned_once(self._weights)
        return planned.jobs()

    @property
    def placements(self) -> Sequence[Placement]:
        return self._last().placements

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        return self._last().tensors(slab)

    def _last(self) -> PlannedUnit:
        """How it was read, for the last time that anybody asks."""
        planned, self._planned = self._planned, None
        return planned or self._readers.planned_once(self._weights)


class _NoLoader(WeightsLoader):
    """For units that lie in files all of them."""

    def weights(self) -> Mapping[str, WeightInfo]:
        return {}

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        raise AssertionError("all bytes are in files")


class _Moved:
    """A unit that lies elsewhere than before, and may need another size than the one it is known with."""

    def __init__(self, reader: PlannedUnit, nbytes: int) -> None:
        self._reader, self._known = reader, nbytes

    @property
    def nbytes(self) -> int:
        return self._reader.nbytes

    def jobs(self) -> Sequence[Job]:
        if self._known != self._reader.nbytes:
            self._known = self._reader.nbytes
            return [_Resize(self._known)]
        return self._reader.jobs()

    @property
    def placements(self) -> Sequence[Placement]:
        return self._reader.placements

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        return self._reader.tensors(slab)


class _Resize:
    """A job that asks for memory of another size."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def files(self) -> Sequence[CheckpointFile]:
        return ()

    def run(self, slab: Bytes, files: FileTable) -> int:
        raise Resized(self._nbytes)


def _is_remote(weight: Wanted) -> bool:
    """Whether each read of it is a request to somebody far away: few large ones, as for direct reads, are best then."""
    return weight.info.span is not None and isinstance(weight.info.span.file, RemoteFile)


@functools.cache
def _settings(direct: bool, chunk_bytes: int) -> ReadSettings:
    return ReadSettings(direct=direct, chunk_bytes=chunk_bytes, scratch_bytes=SCRATCH_BYTES)
