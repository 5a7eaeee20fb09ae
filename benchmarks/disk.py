"""What the disk delivers when nothing else is asked of it, and how to make sure that it is asked.

Knows files, the page cache and devices. Knows nothing of models.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

__all__ = ["PlainReader", "device_name", "device_of", "drop_page_cache", "own_bytes"]

_CHUNK = 32 << 20
_READERS = 4
_HUGE = 2 << 20
_DROP = Path("/proc/sys/vm/drop_caches")


class PlainReader:
    """Reads whole files with a few threads, past the page cache where the file system allows it, and nothing else.

    On a virtual machine the bandwidth depends, up to a factor of two, on which physical pages the buffers happen to
    get. So the reader tries several sets of buffers and keeps the fastest: a bar that is not an unlucky one.
    ``direct`` says whether reads go past the page cache; where they do not, it is emptied before each.
    """

    def __init__(self, files: Sequence[Path], tries: int = 4) -> None:
        self._files = list(files)
        self.direct = all(_reads_directly(file) for file in self._files)
        sets = [_huge_buffers() for _ in range(tries)]
        self._buffers = sets[0]
        if tries > 1:
            self._buffers = min(sets, key=lambda buffers: min(self._read(buffers) for _ in range(2)))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self._files)

    def read(self) -> float:
        """Seconds of reading all files once."""
        return self._read(self._buffers)

    def _read(self, buffers: Sequence[memoryview]) -> float:
        if not self.direct:
            for file in self._files:
                drop_files([file])
        flags = os.O_RDONLY | (os.O_DIRECT if self.direct else 0)
        descriptors = {file: os.open(file, flags) for file in self._files}
        try:
            started = time.perf_counter()
            count = _read_all(descriptors, buffers)
            seconds = time.perf_counter() - started
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        if count != self.nbytes:
            raise OSError(f"{count} bytes were read of {self.nbytes}")
        return seconds


def _read_all(descriptors: dict[Path, int], buffers: Sequence[memoryview]) -> int:
    """Read every file, one thread a buffer; the bytes that arrived."""
    jobs = iter([(fd, offset) for fd in descriptors.values() for offset in range(0, os.fstat(fd).st_size, _CHUNK)])
    lock, counts = threading.Lock(), [0] * len(buffers)

    def work(index: int) -> None:
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            counts[index] += os.preadv(job[0], [buffers[index]], job[1])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(buffers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def _huge_buffers() -> list[memoryview]:
    """Buffers on huge pages that have been touched, so that reading is as fast as the machine allows."""
    # Private: Python's default is shared memory, which never gets huge pages.
    memory = mmap.mmap(-1, _READERS * _CHUNK + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % _HUGE
    whole[::4096] = 1
    return [whole[start + index * _CHUNK : start + (index + 1) * _CHUNK].data for index in range(_READERS)]


def _reads_directly(file: Path) -> bool:
    """Whether the file system takes direct reads. tmpfs and some network file systems do not."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        buffer = mmap.mmap(-1, 4096)
        os.preadv(descriptor, [buffer], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def drop_page_cache(files: Sequence[Path]) -> bool:
    """Empty the page cache: all of it, or where that is not allowed that of ``files``. True if it was all of it."""
    try:
        os.sync()
        _DROP.write_text("3")
    except OSError:
        drop_files(files)
        return False
    return True


def drop_files(files: Sequence[Path]) -> None:
    """Empty the page cache of ``files``."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def own_bytes(folder: Path) -> int:
    """Bytes that would be free again without ``folder``: what is linked from elsewhere too costs none."""
    stats = (file.lstat() for file in folder.rglob("*") if file.is_file())
    return sum(stat.st_blocks * 512 for stat in stats if stat.st_nlink == 1)


def device_of(folder: Path, proc: Path = Path("/proc/self"), sys: Path = Path("/sys")) -> str | None:
    """``"major:minor"`` of the whole disk that ``folder`` is on, as limits on disks name it. None if there is none."""
    number = os.stat(folder).st_dev
    for candidate in (number, *_sources(number, proc)):
        entry = sys / "dev" / "block" / f"{os.major(candidate)}:{os.minor(candidate)}"
        if entry.exists():
            entry = entry.resolve()
            whole = entry.parent if (entry / "partition").exists() else entry
            return (whole / "dev").read_text().strip()
    return None


def device_name(device: str | None, sys: Path = Path("/sys")) -> str:
    """The kernel's name of a disk, ``"nvme0n1"`` say."""
    return "unknown" if device is None else (sys / "dev" / "block" / device).resolve().name


def _sources(number: int, proc: Path) -> Iterator[int]:
    """Devices that a file system with a number of its own (btrfs, overlay) is mounted from."""
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == f"{os.major(number)}:{os.minor(number)}":
            source = Path(after.split()[1])
            if source.is_block_device():
                yield source.stat().st_rdev
