"""How the units of one model get into memory: from places in files, or by a function of the user.

Knows units, loaders and how much one reader does at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.plain_callable import CallableLoader
from odewei.loaders.remote_file import RemoteFile
from odewei.scheduler.callable_unit import CallableUnit, Expected
from odewei.scheduler.read_plan import ReadSettings, Wanted
from odewei.scheduler.reader import PlannedUnit, UnitReader
from odewei.scheduler.slabs import PAGE, SlabPool, round_up
from odewei.stock import Stock
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

    def make(self, unit: Unit) -> UnitReader:
        """The reader of one unit."""
        if isinstance(self._source, CallableLoader):
            expected = [Expected(weight.name, weight.shape, weight.dtype) for weight in unit.weights]
            stock, load = self._stock, self._source.load
            return CallableUnit(unit.hooked[0], expected, load, self._pool, stock.cast, stock.sizes.__contains__)
        wanted = tuple(self._wanted(weight.name) for weight in unit.weights)
        per_reader = sum(weight.nbytes for weight in wanted) // self._num_readers
        chunk = round_up(min(max(per_reader, _SMALLEST_CHUNK), _CHUNK_BYTES), PAGE)
        return PlannedUnit(wanted, _settings(self._direct or any(map(_is_remote, wanted)), chunk), self._source)

    def _wanted(self, name: str) -> Wanted:
        info = self._infos[name]
        return Wanted(name, info, self._stock.bound(info))


def _is_remote(weight: Wanted) -> bool:
    """Whether each read of it is a request to somebody far away: few large ones, as for direct reads, are best then."""
    return weight.info.span is not None and isinstance(weight.info.span.file, RemoteFile)


@functools.cache
def _settings(direct: bool, chunk_bytes: int) -> ReadSettings:
    return ReadSettings(direct=direct, chunk_bytes=chunk_bytes, scratch_bytes=SCRATCH_BYTES)
