"""Reads one unit into its slab, and makes tensors over it. Runs in reader threads, or in the caller's for the plain
twin.

Knows slabs and tensors, and files through their table. Knows nothing of asyncio, modules or what is read when.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from odewei.errors import OdeweiError, WeightReadError
from odewei.loaders.base import CheckpointFile, WeightsLoader
from odewei.scheduler.file_table import FileTable, cannot_read, open_direct
from odewei.scheduler.host_memory import PAGE, Bytes
from odewei.scheduler.read_plan import UnitReadPlan, size_without_plan
from odewei.scheduler.reads import Cast, CopiedRead, LoaderRead, PlacedRead, Placement, Read, ReadSettings, Wanted

__all__ = [
    "FileTable",
    "Job",
    "PlannedUnit",
    "Resized",
    "UnitReader",
    "cannot_read",
    "copy_cast",
    "open_direct",
    "tensors_over",
]

_CAST_BLOCK = (
    1 << 15
)  # elements; torch copies fewer than this many on one thread, which is what a reader thread may use

Tensors = Mapping[str, torch.Tensor]


class Resized(Exception):
    """The unit needs a slab of ``nbytes`` bytes instead of the one it was given; nothing of it was read for good."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.nbytes = nbytes


class Job(Protocol):
    """A part of reading a unit, for one reader thread."""

    def files(self) -> Sequence[CheckpointFile]:
        """What must be open before ``run``."""

    def run(self, slab: Bytes, files: FileTable) -> int:
        """Fill this part of the slab; the number of bytes read. Raises OdeweiError, or Resized."""


class UnitReader(Protocol):
    """How one unit gets into a slab. ``nbytes`` is the size of the slab it needs, as far as is known."""

    @property
    def nbytes(self) -> int: ...

    def jobs(self) -> Sequence[Job]:
        """The jobs of one read of the unit; they may run at once and in any order."""

    @property
    def placements(self) -> Sequence[Placement]:
        """Where in the slab its tensors are, after all jobs have run; before that as far as is known."""

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        """Tensors over the slab, after all jobs have run. They, and views of them, keep the slab's memory."""


class PlannedUnit:
    """A unit whose weights' places are known: the plan, done. A small unit's plan, which may be larger than the unit,
    is made each time that it is needed, unless this is for one read only (``once``).
    """

    __slots__ = ("_loader", "_plan", "_settings", "_wanted", "nbytes")

    def __init__(
        self, wanted: Sequence[Wanted], settings: ReadSettings, loader: WeightsLoader, *, once: bool = False
    ) -> None:
        self._wanted = wanted
        self._settings = settings
        self._loader = loader
        nbytes = None if once else size_without_plan(wanted)
        self._plan = UnitReadPlan.make(wanted, settings) if nbytes is None else None
        self.nbytes: int = self.plan.nbytes if nbytes is None else nbytes

    @property
    def plan(self) -> UnitReadPlan:
        """How it is read."""
        return self._plan or UnitReadPlan.make(self._wanted, self._settings)

    @property
    def placements(self) -> Sequence[Placement]:
        return self.plan.placements

    def jobs(self) -> Sequence[Job]:
        return [_PlannedJob(reads, self._loader, self._wanted) for reads in self.plan.jobs]

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        return tensors_over(slab, self.plan.placements)


class _PlannedJob:
    def __init__(self, reads: tuple[Read, ...], loader: WeightsLoader, wanted: Sequence[Wanted]) -> None:
        self._reads = reads
        self._loader = loader
        self._wanted = wanted  # for messages

    def files(self) -> Sequence[CheckpointFile]:
        return list({read.file: None for read in self._reads if not isinstance(read, LoaderRead)})

    def run(self, slab: Bytes, files: FileTable) -> int:
        return sum(self._read(read, slab, files) for read in self._reads)

    def _read(self, read: Read, slab: Bytes, files: FileTable) -> int:
        """One read; its errors name the first weight that it was for."""
        try:
            return self._fill(read, slab, files)
        except OdeweiError as error:
            weight = None if error.weight else next(self._weights_in(read), None)
            if weight is None:
                raise
            raise type(error)(
                error.problem, module=error.module, weight=weight, file=error.file, cure=error.cure
            ) from error.__cause__

    def _weights_in(self, read: Read) -> Iterator[str]:
        """The weights of which some bytes are read, by the names that the model has for them."""
        if isinstance(read, LoaderRead):
            return
        for wanted in self._wanted:
            for info in [part.source for part in wanted.info.parts] or [wanted.info]:
                span = info.span
                if span is None or span.file != read.file:
                    continue
                if span.offset < read.offset + read.needed and read.offset < span.offset + span.nbytes:
                    yield wanted.name

    def _fill(self, read: Read, slab: Bytes, files: FileTable) -> int:
        match read:
            case PlacedRead():
                target = slab[read.slab_offset : read.slab_offset + read.nbytes]
                if read.shift:
                    following = files.scratch()[:PAGE]
                    files.read(read.file, [target, following], read.offset, read.needed)
                    _move_down(target, following, read.shift)
                else:
                    files.read(read.file, [target], read.offset, read.needed)
            case CopiedRead():
                scratch = files.scratch()
                files.read(read.file, [scratch[: read.nbytes]], read.offset, read.needed)
                for part in read.parts:
                    source = scratch[part.scratch_offset : part.scratch_offset + part.nbytes]
                    copy_cast(source, slab[part.slab_offset :], part.cast)
            case LoaderRead():
                start = read.slab_offset if read.staging_offset is None else read.staging_offset
                source = slab[start : start + read.nbytes]
                try:
                    self._loader.read_into(read.info, memoryview(source))  # type: ignore[arg-type]
                except OdeweiError:
                    raise
                except Exception as error:
                    raise WeightReadError("the loader failed to read a weight", weight=read.info.name) from error
                if read.cast is not None:
                    copy_cast(source, slab[read.slab_offset :], read.cast)
        return read.needed if not isinstance(read, LoaderRead) else read.nbytes


def _move_down(target: Bytes, following: Bytes, shift: int) -> None:
    """Move ``target`` down by ``shift`` bytes, its end filled from ``following``. Lets other threads run meanwhile."""
    kept = len(target) - shift
    ctypes.memmove(target.ctypes.data, target.ctypes.data + shift, kept)
    target[kept:] = following[:shift]


def copy_cast(source: Bytes, target: Bytes, cast: Cast | None) -> None:
    """Copy bytes to the start of ``target``, converting elements as torch does if ``cast`` says so, on this thread
    only.
    """
    if cast is None:
        target[: len(source)] = source
        return
    step_in, step_out = _CAST_BLOCK // 2 * cast.source.itemsize, _CAST_BLOCK // 2 * cast.target.itemsize
    for index, start in enumerate(range(0, len(source), step_in)):
        block = torch.from_numpy(source[start : start + step_in].copy()).view(cast.source)
        end = index * step_out + block.numel() * cast.target.itemsize
        torch.from_numpy(target[index * step_out : end]).view(cast.target).copy_(block)


def tensors_over(slab: Bytes, placements: Sequence[Placement]) -> dict[str, torch.Tensor]:
    """A tensor for each placement, each with a storage of its own over the slab's memory, which it keeps alive.

    Usable in grad mode whatever mode the caller is in.
    """
    with torch.inference_mode(False), torch.no_grad():
        return dict(_tensors_over(slab, placements))


def _tensors_over(slab: Bytes, placements: Sequence[Placement]) -> Iterator[tuple[str, torch.Tensor]]:
    for place in placements:
        if 0 in place.shape:
            yield place.name, torch.empty(place.shape, dtype=place.dtype, device="cpu")
            continue
        strides = place.stride
        if strides is None:
            count = 1
            for size in place.shape:
                count *= size
        else:
            count = 1 + sum((size - 1) * step for size, step in zip(place.shape, strides, strict=True))
        flat = torch.frombuffer(slab, dtype=place.dtype, count=count, offset=place.offset)
        yield place.name, flat.view(place.shape) if strides is None else flat.as_strided(place.shape, strides)
