"""What this machine delivers: the bytes of some files, read as a model's are, and products with some matrices.

Knows files, threads, matrices. Knows nothing of models. Both are short samples on a machine that has other things to
do: good enough for a plan.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from odewei.loaders.base import CheckpointFile
from odewei.scheduler.budget import Budget
from odewei.scheduler.host_memory import PAGE, Bytes, round_up
from odewei.scheduler.reader import FileTable
from odewei.scheduler.slab import Slab
from odewei.scheduler.slabs import SlabPool

__all__ = ["DiskSample", "product_seconds", "sample_disk"]

_CHUNK = 32 << 20
_ROWS_BYTES = 64 << 20  # of a matrix that is multiplied by
_TRIES = 2


@dataclass(frozen=True, slots=True)
class DiskSample:
    """``nbytes`` were read in ``seconds``; ``direct``: past the page cache."""

    nbytes: int
    seconds: float
    direct: bool

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.nbytes / max(self.seconds, 1e-9)


def sample_disk(
    files: Sequence[CheckpointFile],
    *,
    readers: int = 4,
    direct: bool = True,
    most_bytes: int = 1 << 30,
    most_seconds: float = 4.0,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> DiskSample | None:
    """Read chunks spread over all files with ``readers`` threads, twice; the faster of the two. None: nothing to read.

    Each time about ``most_bytes``, less if ``most_seconds`` are over. ``progress`` is called with the bytes of each
    chunk, in the readers' threads. Where direct reads are refused they are buffered, and the page cache makes the disk
    look faster than it is. Raises WeightReadError.
    """
    chunks = list(_spread(files, most_bytes))
    if not chunks:
        return None
    table = FileTable(direct=direct, scratch_bytes=PAGE)
    pool = SlabPool(Budget(readers * _CHUNK))
    slabs = [slab for _ in range(readers) if (slab := pool.acquire("sample", _CHUNK)) is not None]
    try:
        for slab in slabs:
            slab.view()[::PAGE] = 1  # fresh pages have to be cleared first
        return max((_read(table, chunks, slabs, most_seconds, progress) for _ in range(_TRIES)), key=_bandwidth)
    finally:
        table.close()
        pool.close()


def product_seconds(
    matrices: Iterable[tuple[tuple[int, ...], torch.dtype]], tokens: int
) -> dict[tuple[tuple[int, ...], torch.dtype], float]:
    """Seconds of multiplying ``tokens`` rows by one matrix of each (shape, dtype).

    Of a large matrix, some rows are tried. Left out is what torch does not multiply by on this machine.
    """
    found: dict[tuple[tuple[int, ...], torch.dtype], float] = {}
    for shape, dtype in matrices:
        seconds = _product(shape[0], shape[1], dtype, tokens)
        if seconds is not None:
            found[shape, dtype] = seconds
    return found


def _product(rows: int, columns: int, dtype: torch.dtype, tokens: int) -> float | None:
    tried = max(1, min(rows, _ROWS_BYTES // max(1, columns * dtype.itemsize)))
    try:
        with torch.inference_mode():
            matrix = torch.full((tried, columns), 0.01, dtype=dtype)
            inputs = torch.full((tokens, columns), 0.01, dtype=dtype)
            seconds = []
            for _ in range(4):  # the first one is slower
                start = time.perf_counter()
                functional.linear(inputs, matrix)
                seconds.append(time.perf_counter() - start)
    except (RuntimeError, NotImplementedError):
        return None
    return min(seconds) * rows / tried


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _bandwidth(sample: DiskSample) -> float:
    return sample.bandwidth


def _spread(files: Sequence[CheckpointFile], most_bytes: int) -> Iterator[tuple[CheckpointFile, int, int]]:
    """Chunks (file, offset, bytes) of about so many bytes in all, evenly spaced."""
    chunks = [
        (file, offset, min(_CHUNK, file.size - offset)) for file in files for offset in range(0, file.size, _CHUNK)
    ]
    total = sum(nbytes for *_, nbytes in chunks)
    step = max(1.0, total / max(1, most_bytes))
    return (chunks[int(index * step)] for index in range(max(1, int(len(chunks) / step))) if chunks)


def _read(
    table: FileTable,
    chunks: Sequence[tuple[CheckpointFile, int, int]],
    slabs: Sequence[Slab],
    most_seconds: float,
    progress: Callable[[int], object],
) -> DiskSample:
    """All chunks, a thread a slab."""
    waiting, lock, errors = iter(chunks), threading.Lock(), list[BaseException]()
    for file, *_ in chunks:
        table.opened(file)
    started = time.perf_counter()

    def work(memory: Bytes) -> None:
        try:
            while not errors and time.perf_counter() - started < most_seconds:
                with lock:
                    chunk = next(waiting, None)
                if chunk is None:
                    return
                file, offset, nbytes = chunk
                table.read(file, [memory[: round_up(nbytes, PAGE)]], offset, nbytes)
                counts.append(nbytes)
                progress(nbytes)
        except BaseException as error:
            errors.append(error)

    counts: list[int] = []
    threads = [threading.Thread(target=work, args=(slab.view(),)) for slab in slabs]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: the readers stop before their files close
        errors.append(error)
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
    return DiskSample(sum(counts), time.perf_counter() - started, _is_direct(table.opened(chunks[0][0]).fd))
