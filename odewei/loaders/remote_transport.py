"""One attempt at looking at a remote file, or at reading a stretch of it: the seam between files and networks.

Nothing is retried or cached here. fsspec has the connections, the credentials, and a thread of its own for the network,
in which coroutines run; the reader thread waits for them. A TransientError may pass; a CheckpointError will not.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from odewei.errors import CheckpointError, CheckpointNotFoundError
from odewei.loaders.remote_path import RemotePath
from odewei.loaders.retries import TransientError

__all__ = ["Found", "RangeIgnoredError", "Target", "Transport", "as_transient", "changed", "not_found", "refused"]

_Value = TypeVar("_Value")
_SLOWEST_NBYTES = 1 << 16  # a second


@dataclass(frozen=True, slots=True)
class Found:
    """A file as the other side describes it. ``identity`` is of its version, empty if nothing but the size tells."""

    size: int
    identity: tuple[str, ...]
    ranges: bool  # whether a part of it can be had


class RangeIgnoredError(Exception):
    """The server sends the whole file whatever is asked for."""


class Target:
    """Where the bytes of one read go: ``buffers``, filled in turn. After ``close`` nothing is written any more, even
    if a thread of the network is still at work: whoever gave the buffers may have them for something else by then.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._all = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
        self._buffers = list(self._all)
        self._lock = threading.Lock()
        self.left = sum(map(len, self._buffers))
        self.done = 0

    def put(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises TransientError for more than there is room for, and after ``close``."""
        with self._lock:
            if len(data) > self.left:
                raise TransientError("more bytes came than were asked for")
            rest = memoryview(data)
            while rest:
                head = self._buffers[0]
                count = min(len(head), len(rest))
                head[:count] = rest[:count]
                rest = rest[count:]
                if count == len(head):
                    del self._buffers[0]
                else:
                    self._buffers[0] = head[count:]
            self.left -= len(data)
            self.done += len(data)

    def rewind(self) -> None:
        """Begin anew."""
        with self._lock:
            self._buffers = list(self._all)
            self.left, self.done = self.left + self.done if self._all else 0, 0

    def close(self) -> None:
        with self._lock:
            self._all, self._buffers, self.left = [], [], 0


class Transport(ABC):
    """How one remote file is reached. Methods may be called from any thread but fsspec's own."""

    def __init__(self, path: RemotePath, filesystem: Any) -> None:
        self.path = path
        self.filesystem = filesystem
        self.timeout_seconds = path.remote.options.timeout_seconds

    @abstractmethod
    def look(self) -> Found:
        """The file as it is now."""

    @abstractmethod
    def read(self, expected: Found, offset: int, target: Target) -> None:
        """Put the bytes from ``offset`` on into the target, as many as it has room for; ``target.done`` tells how many
        came if that fails. Raises RangeIgnoredError.
        """

    @abstractmethod
    def whole(self, expected: Found, piece_nbytes: int) -> Iterator[bytes]:
        """The whole file, in pieces of so many bytes; the last has what remains."""

    @abstractmethod
    def list(self) -> list[str]:
        """The names of the files in this folder, as far as the other side says; none where it does not."""

    def limit_seconds(self, nbytes: int) -> float:
        """How long an answer of so many bytes may take."""
        return self.timeout_seconds + nbytes / _SLOWEST_NBYTES

    def sync(self, function: Callable[..., Awaitable[_Value]], *args: object, **keywords: Any) -> _Value:
        """Run a coroutine in fsspec's thread, and wait for it."""
        from fsspec.asyn import sync

        result: _Value = sync(self.filesystem.loop, function, *args, **keywords)
        return result


def changed(path: RemotePath) -> CheckpointError:
    """What to raise when the file is not what it was."""
    return CheckpointError(
        "the remote file was changed while it was in use",
        file=str(path),
        cure="Put the original file back, or build the loader and the model again from the new one",
    )


def not_found(path: RemotePath, problem: str) -> CheckpointNotFoundError:
    """What to raise for a file that is not there."""
    return CheckpointNotFoundError(
        f"a file of the checkpoint does not exist: {problem}", file=str(path), cure="Check the address"
    )


def refused(path: RemotePath, problem: str) -> CheckpointError:
    """What to raise where this user gets no answer."""
    return CheckpointError(
        f"the file may not be read: {problem}",
        file=str(path),
        cure="Check the address, and give credentials: storage_options=, or fsspec's own configuration",
    )


def as_transient(error: BaseException) -> TransientError:
    """A failure of the network."""
    return TransientError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
