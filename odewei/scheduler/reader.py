"""Reads one unit into its slab, and makes tensors over it. Runs in reader threads, or in the caller's for the plain
twin.

Knows files, slabs, tensors. Knows nothing of asyncio, modules or what is read when. Direct reads need offset, length
and address aligned, end short at the end of the file, and are refused by some file systems: those files are read
through the page cache instead.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from odewei.errors import OdeweiError, WeightReadError
from odewei.loaders.base import CheckpointFile, WeightsLoader
from odewei.loaders.remote_file import RemoteFile
from odewei.scheduler.read_plan import (
    Cast,
    CopiedRead,
    LoaderRead,
    PlacedRead,
    Placement,
    Read,
    ReadSettings,
    UnitReadPlan,
    Wanted,
    size_without_plan,
)
from odewei.scheduler.slabs import PAGE, Bytes

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

_EIO_RETRIES = 2
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


def open_direct(path: str, flags: int) -> int:
    """An ``opener`` for direct reads, falling back to buffered ones where direct ones are refused."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return os.open(path, flags)


class FileTable:
    """The open files of one runtime, and a scratch buffer for each reader thread. Methods may be called from any
    thread.

    ``opener`` is that of the built-in ``open``. Whoever opens files in another way (aiofiles) puts them in with
    ``keep``.
    """

    def __init__(self, *, direct: bool, scratch_bytes: int) -> None:
        self.opener: Callable[[str, int], int] | None = open_direct if direct else None
        self._scratch_bytes = scratch_bytes
        self._open: dict[CheckpointFile, io.FileIO] = {}
        self._buffered: dict[CheckpointFile, io.FileIO] = {}  # those that refused a direct read
        self._lock = threading.Lock()
        self._local = threading.local()

    def is_open(self, file: CheckpointFile) -> bool:
        """Whether it can be read as it is: a remote file is never open."""
        return file in self._open or isinstance(file, RemoteFile)

    def keep(self, file: CheckpointFile, opened: io.FileIO) -> None:
        """Take over an open file; if another thread was first, close this one."""
        with self._lock:
            if self._open.setdefault(file, opened) is not opened:
                opened.close()

    def fd(self, file: CheckpointFile) -> int:
        """The descriptor of a file, opened now if need be."""
        if file in self._buffered:
            return self._buffered[file].fileno()
        if file not in self._open:
            self.keep(file, open(file.path, "rb", buffering=0, opener=self.opener))  # noqa: SIM115
        return self._open[file].fileno()

    def read(self, file: CheckpointFile, buffers: Sequence[Bytes], offset: int, needed: int) -> None:
        """Fill the buffers in turn from ``offset`` on, with at least ``needed`` bytes. Raises WeightReadError."""
        if isinstance(file, RemoteFile):
            file.read([buffer.data for buffer in buffers], offset, needed)
            return
        try:
            found = self._read_fully(file, [buffer.data for buffer in buffers], offset, needed)
            file.check_unchanged(self.fd(file))
        except OSError as error:
            raise cannot_read(file, error) from error
        if found < needed:
            raise WeightReadError(
                f"the file ends {needed - found} bytes too early",
                file=str(file.path),
                cure="It was cut short while the model was using it: put the whole file back",
            )

    def scratch(self) -> Bytes:
        """This thread's scratch buffer; it begins at a page."""
        scratch: Bytes | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = np.frombuffer(mmap.mmap(-1, self._scratch_bytes), np.uint8)
        return scratch

    def close(self) -> None:
        """Close all files. They are opened again when they are used again."""
        with self._lock:
            for table in (self._open, self._buffered):
                while table:
                    table.popitem()[1].close()

    def _read_fully(self, file: CheckpointFile, buffers: list[memoryview], offset: int, needed: int) -> int:
        found = failures = 0
        while found < needed:
            try:
                count = os.preadv(self.fd(file), buffers, offset + found)
            except OSError as error:
                if error.errno == errno.EINVAL and self.opener is not None and file not in self._buffered:
                    self._fall_back(file)  # refused here, or a short read has left an odd offset
                elif error.errno == errno.EIO and failures < _EIO_RETRIES:
                    failures += 1
                else:
                    raise
                continue
            if count == 0:
                break
            found += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]
        return found

    def _fall_back(self, file: CheckpointFile) -> None:
        """Read this file through the page cache from now on; a direct descriptor stays open for those reading from
        it.
        """
        with self._lock:
            if file not in self._buffered:
                self._buffered[file] = open(file.path, "rb", buffering=0)  # noqa: SIM115

    def __repr__(self) -> str:
        return f"<FileTable of {len(self._open)} open files, {'direct' if self.opener else 'buffered'}>"


def cannot_read(file: CheckpointFile, error: OSError) -> WeightReadError:
    """What to raise when the system refuses to open or read a file."""
    return WeightReadError(
        f"the file cannot be read: {error.strerror or error}",
        file=str(file.path),
        cure="Check that the file is there and its disk is healthy; the next use tries again",
    )


class PlannedUnit:
    """A unit whose weights' places are known: the plan, done. A small unit's plan, which may be larger than the unit,
    is made each time that it is needed.
    """

    __slots__ = ("_loader", "_plan", "_settings", "_wanted", "nbytes")

    def __init__(self, wanted: Sequence[Wanted], settings: ReadSettings, loader: WeightsLoader) -> None:
        self._wanted = wanted
        self._settings = settings
        self._loader = loader
        nbytes = size_without_plan(wanted)
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
        return [_PlannedJob(reads, self._loader) for reads in self.plan.jobs]

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        return tensors_over(slab, self.plan.placements)


class _PlannedJob:
    def __init__(self, reads: tuple[Read, ...], loader: WeightsLoader) -> None:
        self._reads = reads
        self._loader = loader

    def files(self) -> Sequence[CheckpointFile]:
        return list({read.file: None for read in self._reads if not isinstance(read, LoaderRead)})

    def run(self, slab: Bytes, files: FileTable) -> int:
        return sum(self._read(read, slab, files) for read in self._reads)

    def _read(self, read: Read, slab: Bytes, files: FileTable) -> int:
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
