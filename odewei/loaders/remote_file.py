"""A file that is read over the network: one version of it, by ranges, with retries and through a cache if there is one.

A span may be in such a file as in any other. Whoever reads spans asks ``RemoteFile.read`` for the bytes instead of
opening it; nothing here stays open, and nothing here starts a thread.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from odewei.errors import CheckpointError, WeightReadError
from odewei.loaders.base import CheckpointFile
from odewei.loaders.range_cache import BLOCK_NBYTES, RangeCache, stored_nbytes
from odewei.loaders.remote_fsspec import FsspecTransport
from odewei.loaders.remote_http import HttpTransport
from odewei.loaders.remote_path import RemotePath
from odewei.loaders.remote_transport import Found, RangeIgnoredError, Target, Transport
from odewei.loaders.retries import TransientError

__all__ = ["RemoteFile", "RemoteStream", "cut", "list_folder"]

_Value = TypeVar("_Value")
_WHOLE = "the server sends the whole file, whatever part of it is asked for"


@dataclass(frozen=True, slots=True)
class RemoteFile(CheckpointFile):
    """A remote file as it was when it was first looked at. ``identity`` is what the other side says of its version:
    ETag, time of the last change; ``ranges`` whether parts of it could be had.
    """

    path: RemotePath
    identity: tuple[str, ...] = ()
    ranges: bool = True

    @classmethod
    def look(cls, path: RemotePath) -> RemoteFile:
        """The file as it is now. Raises CheckpointError."""
        found = _attempts(path, lambda: _transport(path).look())
        return cls(path, found.size, 0, 0, found.identity, found.ranges)

    def read(self, buffers: Sequence[memoryview], offset: int, needed: int, *, weight: str | None = None) -> None:
        """Fill the buffers in turn, with exactly ``needed`` bytes from ``offset`` on. In a reader thread, which waits.

        Raises WeightReadError, and CheckpointError as its cause: also when the file is not what it was any more.
        """
        try:
            self.fetch(buffers, offset, needed)
        except CheckpointError as error:
            raise WeightReadError(error.problem, weight=weight, file=error.file, cure=error.cure) from error

    def fetch(self, buffers: Sequence[memoryview], offset: int, needed: int) -> None:
        """The same for what is no weight. Raises CheckpointError."""
        if offset + needed > self.size:
            problem = f"the file ends {offset + needed - self.size} bytes too early"
            raise CheckpointError(problem, file=str(self.path), cure="Download the checkpoint's files again")
        wanted = cut([buffer.cast("B") for buffer in buffers], 0, needed)
        cache = self.path.remote.cache
        if not needed:
            return
        if cache is not None and self.identity:
            self._read_cached(cache, wanted, offset, needed)
            return
        try:
            self._read_remote(wanted, offset)
        except RangeIgnoredError as error:
            self._refuse_whole(error, known=cache is None)

    def _refuse_whole(self, cause: Exception, *, known: bool) -> NoReturn:
        """The server has no ranges, and there is no cache, or (not ``known``) no version that a cache could keep."""
        problem, cure = _WHOLE, "give remote=RemoteOptions(cache_bytes=...), with which it is downloaded once"
        if not known:
            problem, cure = f"{_WHOLE}, and nothing that tells its versions apart", "download the file"
        raise CheckpointError(problem, file=str(self.path), cure=f"Use another server, or {cure}") from cause

    def _read_remote(self, buffers: Sequence[memoryview], offset: int) -> None:
        """What came before a connection broke is kept, and the rest asked for. Raises RangeIgnoredError."""
        target = Target(buffers)
        try:
            _attempts(self.path, lambda: _transport(self.path).read(self._found, offset + target.done, target))
        finally:
            target.close()

    def _read_cached(self, cache: RangeCache, wanted: Sequence[memoryview], offset: int, needed: int) -> None:
        """Whole blocks, from the cache or over the network; what is not wanted of the outer ones goes beside."""
        missing = self._load(cache, list(self._blocks(wanted, offset, needed)))
        try:
            for run in _runs(missing):
                first, parts = run[0][0] * BLOCK_NBYTES, [part for _, parts in run for part in parts]
                self._read_remote(parts, first)
                for number, block in run:
                    cache.store(self._key, number, block)
        except RangeIgnoredError:
            self._download(cache, missing)

    def _load(
        self, cache: RangeCache, blocks: Sequence[tuple[int, list[memoryview]]]
    ) -> list[tuple[int, list[memoryview]]]:
        """Those that the cache does not have."""
        return [(number, parts) for number, parts in blocks if not cache.load(self._key, number, parts)]

    def _download(self, cache: RangeCache, missing: Sequence[tuple[int, list[memoryview]]]) -> None:
        """The whole file into the cache, unless another thread or process has just done it, and the blocks from it."""
        count = -(-self.size // BLOCK_NBYTES)
        needed = sum(stored_nbytes(self._length(number)) for number in range(count))
        problem = f"{_WHOLE}, and the cache cannot keep it"
        cure = f"Give the cache {needed} bytes or more, and a folder that can hold them, or download the file"
        if needed > cache.max_bytes:
            raise CheckpointError(problem, file=str(self.path), cure=cure)
        try:
            with cache.downloading():
                if missing := self._load(cache, missing):
                    _attempts(self.path, lambda: self._download_once(cache))
                    missing = self._load(cache, missing)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{problem}: {error}", file=str(self.path), cure=cure) from error
        if missing:
            raise CheckpointError(problem, file=str(self.path), cure=cure)

    def _download_once(self, cache: RangeCache) -> None:
        for number, piece in enumerate(_transport(self.path).whole(self._found, BLOCK_NBYTES)):
            if not cache.store(self._key, number, [memoryview(piece)], at_any_cost=True):
                return

    def _blocks(self, wanted: Sequence[memoryview], offset: int, needed: int) -> Iterator[tuple[int, list[memoryview]]]:
        """The blocks that the wanted bytes are in, each with where its bytes go."""
        end = offset + needed
        for number in range(offset // BLOCK_NBYTES, -(-end // BLOCK_NBYTES)):
            start = number * BLOCK_NBYTES
            stop = start + self._length(number)
            head, tail = max(0, offset - start), max(0, stop - end)
            inner = cut(wanted, start + head - offset, stop - tail - offset)
            beside = (memoryview(bytearray(head)), *inner, memoryview(bytearray(tail)))
            yield number, [part for part in beside if part.nbytes]

    def _length(self, number: int) -> int:
        return min(BLOCK_NBYTES, self.size - number * BLOCK_NBYTES)

    @property
    def _key(self) -> str:
        text = "\n".join((self.path.url, str(self.size), *self.identity))
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    @property
    def _found(self) -> Found:
        return Found(self.size, self.identity, self.ranges)


class RemoteStream(io.RawIOBase):
    """A remote file for whoever reads headers; wrap it in a BufferedReader. Raises CheckpointError where it is read."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the file")
        self._position = base + offset
        return self._position

    def readall(self) -> bytes:
        """What remains, with one request."""
        whole = bytearray(max(0, self._file.size - self._position))
        self.readinto(memoryview(whole))
        return bytes(whole)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._file.size - self._position))
        self._file.fetch([memoryview(buffer)], self._position, count)
        self._position += count
        return count


def cut(buffers: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """The bytes from ``start`` to ``stop`` of buffers that follow each other. Pure: nothing is copied."""
    parts, at = [], 0
    for buffer in buffers:
        part = buffer[max(0, start - at) : max(0, stop - at)]
        if part.nbytes:
            parts.append(part)
        at += buffer.nbytes
    return parts


def _runs(blocks: Sequence[tuple[int, list[memoryview]]]) -> Iterator[list[tuple[int, list[memoryview]]]]:
    """Neighbours together."""
    run: list[tuple[int, list[memoryview]]] = []
    for block in blocks:
        if run and block[0] != run[-1][0] + 1:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def list_folder(folder: RemotePath) -> list[str]:
    """The names of the files in a remote folder; none where the other side does not say."""
    return _attempts(folder, lambda: _transport(folder).list())


def _transport(path: RemotePath) -> Transport:
    """How ``path`` is reached. Raises CheckpointError where nothing that is installed can."""
    try:
        import fsspec

        # Listings are not kept: a size or an ETag out of one is not that of the file as it is now.
        options = {**path.remote.storage_options, "use_listings_cache": False}
        filesystem = fsspec.filesystem(path.protocol, **options)
    except ImportError as error:
        raise CheckpointError(
            f"what reads {path.protocol}:// is not installed ({error})",
            file=str(path),
            cure="Install it: pip install 'odewei[remote]' (http, https and s3)",
        ) from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"fsspec cannot read {path.protocol}:// ({error})", file=str(path), cure="Check the URL and storage_options"
        ) from error
    return HttpTransport(path, filesystem) if path.is_http else FsspecTransport(path, filesystem)


def _attempts(path: RemotePath, attempt: Callable[[], _Value]) -> _Value:
    """Try as often as the options say. Raises CheckpointError, also for what did not pass."""
    retries = path.remote.options.retries
    try:
        return retries.run(attempt)
    except TransientError as error:
        raise CheckpointError(
            f"the remote file cannot be read: {error.problem} (attempt {retries.attempts} of {retries.attempts})",
            file=str(path),
            cure="Check the network and the server; the next use tries again",
        ) from error
