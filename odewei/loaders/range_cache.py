"""A bounded cache of blocks of remote files in a folder, which several processes may share.

Knows folders, keys and bytes; knows nothing of networks. A block is one file, ``<key>/<number>``: magic, length,
number and CRC-32, then the bytes. It appears by a rename, and is checked whenever it is read, so that neither a crash
nor a failing disk gives other bytes: what is damaged is not there. Readers take no lock. Whoever writes or throws out
holds the lock of the folder, whose file has the sum of all sizes, so that it never exceeds the bound. (A reader that
finds a damaged block deletes it without: the sum is too large then, until it is counted again.)

A model is read in a loop, and to throw out what was used longest ago would throw out what comes next, always. So only
what was not used since this cache was made is thrown out, the oldest first; where there is no such block, a new one is
not kept.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["BLOCK_NBYTES", "RangeCache", "stored_nbytes"]

BLOCK_NBYTES = 1 << 20
"""Bytes of a file in a block; the last one has what remains."""

_HEADER = struct.Struct("<8sQQI4x")
_MAGIC = b"odewei\0\1"
_PAGE = 4096
_LOCK, _DOWNLOAD, _PARTIAL = "lock", "download", "partial"
_SKIPPED_WHEN_FULL = 256
_log = logging.getLogger("odewei")


def stored_nbytes(nbytes: int) -> int:
    """What a block of so many bytes takes, in whole pages of the disk."""
    return -(-(nbytes + _HEADER.size) // _PAGE) * _PAGE


class RangeCache:
    """At most ``max_bytes`` of blocks below ``folder``, which is made when it is first written to.

    Methods may be called from any thread. That the folder cannot be used is said once in the log, and then there is
    nothing in it: a cache is never a reason to fail.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._made = threading.Lock()
        self._since: int | None = None  # when this cache was made, by the clock of its disk
        self._skip = 0  # blocks not to try to keep, after it was found full
        self._broken = False

    def load(self, key: str, number: int, parts: Sequence[memoryview]) -> bool:
        """Fill ``parts``, together as long as the block, with it. False if it is not there; they are spoiled then."""
        self._begin()
        path = self._path(key, number)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if _read_block(fd, number, parts):
                os.utime(fd)
                return True
            os.unlink(path)
        except OSError as error:
            self._give_up(error)
        finally:
            os.close(fd)
        return False

    def store(self, key: str, number: int, parts: Sequence[memoryview], *, at_any_cost: bool = False) -> bool:
        """Keep a block if there is room, or can be made. ``at_any_cost``: all but blocks of ``key`` may go for it."""
        self._begin()
        if self._broken or (self._skip > 0 and not at_any_cost):
            self._skip -= 1
            return False
        cost = stored_nbytes(sum(len(part) for part in parts))
        try:
            with self._alone(_LOCK) as lock:
                path = self._path(key, number)
                if path.exists():
                    return True
                total = self._total(lock)
                if total + cost > self.max_bytes:
                    total = self._evict(cost, key if at_any_cost else None)
                fits = total + cost <= self.max_bytes
                # Before the block is there: a crash in between leaves a sum that is too large, never one too small.
                _write_total(lock, total + cost if fits else total)
                if fits:
                    self._write(path, number, parts)
                else:
                    self._skip = _SKIPPED_WHEN_FULL
                return fits
        except OSError as error:
            self._give_up(error)
            return False

    @contextmanager
    def downloading(self) -> Iterator[None]:
        """One whole file is being downloaded at a time, whichever process does it. Raises OSError."""
        self._begin()
        with self._alone(_DOWNLOAD):
            yield

    # -- under the lock ----------------------------------------------------------------------------------------------

    def _total(self, lock: int) -> int:
        """The bytes of all blocks, as the lock's file says, or counted if it says nothing."""
        text = os.pread(lock, 32, 0)
        return int(text) if text.isdigit() else sum(size for _, size, _ in self._blocks())

    def _evict(self, needed: int, key: str | None) -> int:
        """Make room, some more than ``needed``, if there is anything to throw out. Returns the bytes that are left."""
        blocks = sorted(self._blocks())
        total = sum(size for _, size, _ in blocks)
        wanted = min(self.max_bytes - needed, self.max_bytes * 15 // 16)
        for used, size, path in blocks:
            may_go = used < (self._since or 0) if key is None else path.parent.name != key
            if total > wanted and may_go:
                os.unlink(path)
                total -= size
                with suppress(OSError):
                    path.parent.rmdir()  # only an empty one goes
        return total

    def _blocks(self) -> Iterator[tuple[int, int, Path]]:
        """When each block was last used, its bytes and its place."""
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                for block in os.scandir(entry.path):
                    found = block.stat(follow_symlinks=False)
                    yield found.st_mtime_ns, -(-found.st_size // _PAGE) * _PAGE, Path(block.path)

    def _write(self, path: Path, number: int, parts: Sequence[memoryview]) -> None:
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        partial = self.folder / _PARTIAL  # one is enough under the lock; what a crash has left is overwritten
        with open(partial, "wb", buffering=0) as stream:
            head = _HEADER.pack(_MAGIC, sum(map(len, parts)), number, crc)
            for left in (memoryview(head), *parts):
                while left:
                    left = left[stream.write(left) :]
        os.replace(partial, path)

    # -- any thread --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Make the folder, and note the time of its disk, which another machine's clock may be."""
        with self._made:
            if self._since is not None or self._broken:
                return
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with self._alone(_LOCK) as lock:
                    os.utime(lock)
                    self._since = os.fstat(lock).st_mtime_ns
            except OSError as error:
                self._give_up(error)

    @contextmanager
    def _alone(self, name: str) -> Iterator[int]:
        fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # not by closing alone: a forked child may have it open as well
            os.close(fd)

    def _path(self, key: str, number: int) -> Path:
        return self.folder / key / f"{number:x}"

    def _give_up(self, error: OSError) -> None:
        if not self._broken:
            self._broken = True
            _log.warning("the cache of remote files in %s is not used any more: %s", self.folder, error)

    def __reduce__(self) -> tuple[object, ...]:
        return RangeCache, (self.folder, self.max_bytes)

    def __repr__(self) -> str:
        return f"<RangeCache {str(self.folder)!r} of {self.max_bytes} bytes>"


def _read_block(fd: int, number: int, parts: Sequence[memoryview]) -> bool:
    """Whether all of the block came, as it was written."""
    head, nbytes = bytearray(_HEADER.size), sum(map(len, parts))
    buffers, expected = [memoryview(head), *parts], _HEADER.size + nbytes
    if os.fstat(fd).st_size != expected or os.preadv(fd, buffers, 0) != expected:
        return False
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return _HEADER.unpack(head) == (_MAGIC, nbytes, number, crc)


def _write_total(lock: int, total: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(total).encode(), 0)
