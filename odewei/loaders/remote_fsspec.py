"""Every file system of fsspec but HTTP: object stores, mostly.

Their answers do not say which version of the file they are of. So the bytes are read first, and the file is looked at
again before they are handed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from odewei.errors import CheckpointError
from odewei.loaders.remote_transport import (
    Found,
    RangeIgnoredError,
    Target,
    Transport,
    as_transient,
    changed,
    not_found,
    refused,
)
from odewei.loaders.retries import TransientError

__all__ = ["FsspecTransport"]

_PIECE_NBYTES = 8 << 20  # answers come as a whole, in memory besides the budget
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "md5Hash", "content_md5", "generation", "VersionId", "version_id")
_TIME_KEYS = ("LastModified", "last_modified", "Last-Modified", "mtime", "updated", "modified", "created")
_CONNECTION_WORDS = ("Connection", "Timeout", "IncompleteRead")


class FsspecTransport(Transport):
    """One attempt through a file system's ``info``, ``cat_file`` and ``ls``."""

    def look(self) -> Found:
        info = self._call("info")
        if info.get("type") == "directory":
            problem, cure = "a file was expected here, this is a folder", "Name a file in it, or use open_checkpoint"
            raise CheckpointError(problem, file=str(self.path), cure=cure)
        if not isinstance(info.get("size"), int):
            raise CheckpointError("nothing says how long the file is", file=str(self.path), cure="Download it first")
        identity = tuple(f"{key}: {info[key]}" for key in (*_VERSION_KEYS, *_TIME_KEYS) if info.get(key) is not None)
        return Found(info["size"], identity, True)

    def read(self, expected: Found, offset: int, target: Target) -> None:
        while target.left:
            wanted = min(_PIECE_NBYTES, target.left)
            data = self._call("cat_file", nbytes=wanted, start=offset, end=offset + wanted)
            if len(data) > wanted:
                raise RangeIgnoredError
            target.put(data)
            offset += len(data)
            if len(data) < wanted:
                break
        if self.look() != expected:
            raise changed(self.path)
        if target.left:
            raise TransientError(f"the answer ended {target.left} bytes too early")

    def whole(self, expected: Found, piece_nbytes: int) -> Iterator[bytes]:
        raise CheckpointError(
            f"a part of a file cannot be had from {self.path.protocol}://",
            file=str(self.path),
            cure="Download it first",
        )

    def list(self) -> list[str]:
        try:
            entries = self._call("ls", detail=True)
        except CheckpointError:  # not there, or this user may read and not list
            return []
        return [str(entry["name"]).rpartition("/")[2] for entry in entries if entry.get("type") == "file"]

    def _call(self, method: str, *, nbytes: int = 0, **keywords: Any) -> Any:
        from fsspec.asyn import AsyncFileSystem

        name = self.filesystem._strip_protocol(self.path.url)
        with self._guard():
            if not isinstance(self.filesystem, AsyncFileSystem):
                return getattr(self.filesystem, method)(name, **keywords)
            limit = self.limit_seconds(nbytes)
            return self.sync(getattr(self.filesystem, f"_{method}"), name, timeout=limit, **keywords)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """What a file system raises, as one of ours."""
        try:
            yield
        except FileNotFoundError as error:
            raise not_found(self.path, "there is no such file") from error
        except PermissionError as error:
            raise refused(self.path, str(error)) from error
        except Exception as error:
            if isinstance(error, OSError | EOFError) or _names_a_connection(error):
                raise as_transient(error) from error
            raise refused(self.path, f"{type(error).__name__}: {error}") from error


def _names_a_connection(error: Exception) -> bool:
    """The libraries below a file system have trees of errors of their own."""
    return any(word in kind.__name__ for kind in type(error).__mro__ for word in _CONNECTION_WORDS)
