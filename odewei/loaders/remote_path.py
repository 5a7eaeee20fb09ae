"""Names of remote files, and what a user may say about reading them.

Knows URLs as text. Nothing here opens a connection but ``RemotePath.stat``, which looks at the file.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from odewei.errors import OptionsError
from odewei.loaders.range_cache import RangeCache
from odewei.loaders.retries import Retries

if TYPE_CHECKING:
    from odewei.loaders.remote_file import RemoteFile

__all__ = ["AnyPath", "Remote", "RemoteOptions", "RemotePath", "as_place", "is_url"]

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_DEFAULT_CACHE_BYTES = 16 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """How remote files are read.

    There is no local cache unless ``cache_dir`` or ``cache_bytes`` is given: a checkpoint can be larger than the disk,
    and nobody who streams one has asked for a copy. ``cache_dir`` defaults to ``odewei/remote`` in the user's cache
    folder, ``cache_bytes`` to 16 GiB; several processes may share a folder.

    A dropped connection, a timeout, and the answers 408, 425, 429, 500, 502, 503 and 504 are tried again, ``attempts``
    times in all, after waits that double from ``first_wait_seconds`` to ``longest_wait_seconds``. ``timeout_seconds``
    is how long a server may be silent; a whole read may take that and a second for each 64 KiB. ``sleep`` is for tests.
    """

    cache_dir: str | os.PathLike[str] | None = None
    cache_bytes: int | None = None
    attempts: int = 5
    timeout_seconds: float = 30.0
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        _check(
            self.cache_bytes is None or (type(self.cache_bytes) is int and self.cache_bytes > 0), "cache_bytes", self
        )
        _check(type(self.attempts) is int and self.attempts > 0, "attempts", self)
        for name in ("timeout_seconds", "first_wait_seconds", "longest_wait_seconds"):
            value = getattr(self, name)
            _check(isinstance(value, int | float) and value > 0, name, self)

    @property
    def retries(self) -> Retries:
        return Retries(self.attempts, self.first_wait_seconds, self.longest_wait_seconds, self.sleep)

    def make_cache(self) -> RangeCache | None:
        """The cache that is asked for; nothing is made on the disk yet."""
        if self.cache_dir is None and self.cache_bytes is None:
            return None
        folder = _default_folder() if self.cache_dir is None else Path(self.cache_dir)
        return RangeCache(folder, self.cache_bytes or _DEFAULT_CACHE_BYTES)


def _check(holds: bool, keyword: str, options: RemoteOptions) -> None:
    if not holds:
        raise OptionsError(f"{keyword}={getattr(options, keyword)!r} cannot work", cure="Give a positive number")


def _default_folder() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "odewei" / "remote"


@dataclass(eq=False)
class Remote:
    """What the files of one loader share: options for fsspec, ours, the cache, and each file as it was first seen, so
    that all that a loader reads of a file is of one version of it.
    """

    storage_options: dict[str, object]
    options: RemoteOptions
    cache: RangeCache | None
    files: dict[str, RemoteFile] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "files": {}}

    def __repr__(self) -> str:
        return f"<Remote, {len(self.files)} files seen, cache {self.cache!r}>"  # no options: they hold credentials


class RemotePath:
    """A remote file or folder. Its text, which is in messages, has neither password nor query: they can be secrets.

    It has what loaders use of a ``Path``, and is none: whatever would open it as a local file raises OptionsError.
    """

    __slots__ = ("_head", "_path", "_tail", "_text", "remote", "url")

    def __init__(self, url: str, remote: Remote) -> None:
        self.remote = remote
        scheme, _, rest = url.partition("://")
        scheme = scheme.lower()
        if scheme in ("http", "https"):
            parts = urlsplit(url)
            self._head = f"{scheme}://{parts.netloc}"
            self._path, self._tail = parts.path, f"?{parts.query}" if parts.query else ""
        else:
            self._head, self._path, self._tail = f"{scheme}://", rest, ""
        self.url = f"{self._head}{self._path}{self._tail}"
        self._text = re.sub(r"//[^/@]*@", "//", self._head) + self._path + ("?…" if self._tail else "")

    @property
    def protocol(self) -> str:
        return self._head.partition("://")[0]

    @property
    def is_http(self) -> bool:
        return self.protocol in ("http", "https")

    @property
    def name(self) -> str:
        last = self._path.rstrip("/").rpartition("/")[2]
        return unquote(last) if self.is_http else last

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        return self._with_path(self._path.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        """The file ``name``, a text that is no part of a URL, below this folder. A query goes with the folder: it is
        often a key to all of it.
        """
        return self._with_path(f"{self._path.rstrip('/')}/{quote(name) if self.is_http else name}")

    def _with_path(self, path: str) -> RemotePath:
        return RemotePath(f"{self._head}{path}{self._tail}", self.remote)

    def stat(self) -> RemoteFile:
        """The file as it was when this loader first looked at it. Raises CheckpointError."""
        from odewei.loaders.remote_file import RemoteFile

        found = self.remote.files.get(self.url)
        return found or self.remote.files.setdefault(self.url, RemoteFile.look(self))

    def __fspath__(self) -> str:
        raise OptionsError(
            "a remote file was to be opened as a local one", file=str(self), cure="Download it, and name the local file"
        )

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)


AnyPath = Path | RemotePath


def is_url(path: object) -> bool:
    """Whether it is a text that begins with a scheme. One letter is a drive of Windows."""
    return isinstance(path, str) and _URL.match(path) is not None


def as_place(
    path: str | os.PathLike[str],
    storage_options: Mapping[str, object] | None = None,
    remote: RemoteOptions | None = None,
) -> AnyPath:
    """What ``path`` names: a local path, also for ``file://``, or a remote one, for which the options are.

    Raises OptionsError for a URL that cannot be one, also for one that a ``Path`` has spoiled.
    """
    if isinstance(path, RemotePath):
        return path
    if not isinstance(path, str) or not (("::" in path and "://" in path) or _URL.match(path)):
        return _local(Path(path))
    if path[:7].lower() == "file://":
        return Path(unquote(urlsplit(path).path))
    if "::" in path or any(character <= " " for character in path):
        raise OptionsError(
            f"{str(path)[:200]!r} is no URL of a file", cure="Give one URL, without '::' and with %20 for a space"
        )
    options = RemoteOptions() if remote is None else remote
    return RemotePath(path, Remote(dict(storage_options or {}), options, options.make_cache()))


def _local(path: Path) -> Path:
    if path.parts and re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]+:", path.parts[0]) and not os.path.exists(path.parts[0]):
        raise OptionsError(f"{str(path)!r} was a URL until it became a Path", cure="Give the URL as text")
    return path
