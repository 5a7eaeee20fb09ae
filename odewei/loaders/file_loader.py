"""What the loaders of files share: headers read once, a file opened and checked, a span read the plain way.

Knows files and bytes. A local file is opened for each read and closed after it: nothing stays open between reads, no
file descriptor can be closed under a reading thread, and a file that was replaced is noticed.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch

from odewei.errors import CheckpointError, OptionsError, WeightReadError
from odewei.loaders.base import CheckpointFile, WeightInfo, WeightsLoader
from odewei.loaders.known_weights import KnownWeights, named
from odewei.loaders.names import Rename
from odewei.loaders.remote_file import RemoteFile, RemoteStream
from odewei.loaders.remote_path import AnyPath, RemoteOptions, as_place
from odewei.loaders.sums import Verify, as_verify, check_sum
from odewei.loaders.told import tell_once

__all__ = ["FileLoader", "map_file", "open_again", "open_header", "read_span"]

_EIO_TRIES = 3
_REMOTE_BUFFER_NBYTES = 1 << 18  # what is asked for to read a header


@contextmanager
def open_header(file: CheckpointFile) -> Iterator[BinaryIO]:
    """``file``, open for reading its header. Raises CheckpointError, also when the file changes meanwhile."""
    if isinstance(file, RemoteFile):
        yield io.BufferedReader(RemoteStream(file), _REMOTE_BUFFER_NBYTES)
        return
    try:
        with open(file.path, "rb") as stream, file.steady(stream.fileno()):
            yield stream
    except (OSError, WeightReadError) as error:
        raise CheckpointError(
            f"the header of a checkpoint file cannot be read: {getattr(error, 'problem', error)}",
            file=str(file.path),
            cure="Check that this user may read the file and that nothing writes to it",
        ) from error


@contextmanager
def open_again(file: CheckpointFile, weight: str) -> Iterator[BinaryIO]:
    """``file``, open for reading a weight. Raises WeightReadError, also when the file is not what it was any more."""
    if isinstance(file, RemoteFile):
        try:
            yield io.BufferedReader(RemoteStream(file), _REMOTE_BUFFER_NBYTES)
        except CheckpointError as error:
            raise WeightReadError(error.problem, weight=weight, file=error.file, cure=error.cure) from error
        return
    try:
        with open(file.path, "rb") as stream, file.steady(stream.fileno(), weight=weight):
            yield stream
    except OSError as error:
        raise WeightReadError(
            f"the file can no longer be read ({error.strerror})",
            weight=weight,
            file=str(file.path),
            cure="Put the file back",
        ) from error


def read_span(info: WeightInfo, buffer: memoryview) -> None:
    """Fill ``buffer``, exactly ``info.nbytes`` writable bytes, from ``info.span``. Any thread.

    The file is looked at before and after, so that bytes of a changed file are never handed on.
    Raises WeightReadError.
    """
    assert info.span is not None, f"{info.name} has no span"
    if buffer.nbytes != info.nbytes or info.span.nbytes != info.nbytes:
        raise ValueError(
            f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}, the span {info.span.nbytes}"
        )
    file = info.span.file
    if isinstance(file, RemoteFile):
        file.read([buffer], info.span.offset, info.nbytes, weight=info.name)
        return
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(info, f"the file can no longer be opened ({error.strerror})", "Put the file back") from error
    try:
        with file.steady(fd, weight=info.name):
            if buffer.nbytes:
                _fill(fd, info, buffer.cast("B"))
    finally:
        os.close(fd)


def map_file(file: CheckpointFile) -> mmap.mmap | None:
    """The whole file as memory of its own (private, copy-on-write), or None if its file system does not map files or
    there is no room to: then ``read_span`` is the way to its bytes.

    What is written into the memory stays there; what somebody writes into the file may show through, and touching what
    was cut off from it ends the process. Raises WeightReadError if the file is not what it was. Any thread.
    """
    if isinstance(file, RemoteFile) or not file.size:
        return None
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise WeightReadError(
            f"the file can no longer be opened ({error.strerror})", file=str(file.path), cure="Put the file back"
        ) from error
    try:
        file.check_unchanged(fd)
        return mmap.mmap(fd, file.size, access=mmap.ACCESS_COPY)
    except OSError as error:
        folder = os.path.dirname(file.path)
        tell_once(f"files in {folder!r} cannot be mapped ({error.strerror}): they are read instead")
        return None
    finally:
        os.close(fd)


def _fill(fd: int, info: WeightInfo, buffer: memoryview) -> None:
    assert info.span is not None
    done = failures = 0
    while done < len(buffer):
        try:
            # One call moves at most 2 GiB, and may always move less than asked.
            count = os.preadv(fd, [buffer[done:]], info.span.offset + done)
        except OSError as error:
            failures += 1
            if error.errno == errno.EIO and failures < _EIO_TRIES:
                continue
            cure = "Check the drive or the network file system, then run again"
            raise _failed(info, f"reading the file failed ({error.strerror})", cure) from error
        if count == 0:
            what = f"the file ended {len(buffer) - done} bytes before the end of the weight"
            raise _failed(info, what, "The file is truncated: download it again")
        done += count


def _failed(info: WeightInfo, problem: str, cure: str) -> WeightReadError:
    assert info.span is not None
    return WeightReadError(problem, weight=info.name, file=str(info.span.file.path), cure=cure)


class FileLoader(WeightsLoader):
    """A checkpoint that begins at one file, ``path``. The headers are read when they are first asked for, and once.

    ``path`` may be a URL that fsspec can read; ``storage_options`` are fsspec's (credentials, mostly), ``remote`` says
    how such files are read. Pickles hold both, credentials included.

    Copies and pickles keep the headers that were read, so that they too notice a file that has changed since. A
    ``rename`` that cannot be pickled (a lambda) keeps the loader from it.

    ``verify`` is how far files are trusted. "size", the default: each must be as long as its headers say. "sha256":
    before anything of a file is used, its SHA-256 is compared with the one kept beside it (``odewei.loaders.sums`` says
    where), once a process; a wrong sum is a CorruptCheckpointError, no sum a CheckpointError. All this happens when the
    headers are read, and takes as long as reading the checkpoint once. "none": a file may end too early or too late,
    and a weight that is not all there is a WeightReadError when it is read. Whatever else is checked always is.
    Archives (.npz, torch's files) say themselves where they end, so that "none" changes nothing for them. A remote file
    cannot have "sha256" (OptionsError): that would be to download all of it before the first use.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        prefix: str = "",
        storage_options: Mapping[str, object] | None = None,
        remote: RemoteOptions | None = None,
        verify: Verify = "size",
    ) -> None:
        super().__init__(device=device, dtype=dtype, rename=rename, prefix=prefix)
        self.verify = as_verify(verify)
        self.path = as_place(path, storage_options, remote)
        if self.verify == "sha256" and not isinstance(self.path, Path):
            raise OptionsError(
                "verify='sha256' is for local files: a remote one would have to be read as a whole before it is used",
                file=str(self.path),
                cure="Use verify='size', or download the checkpoint and open the copy",
            )
        self._check_path()
        self._weights: Mapping[str, WeightInfo] | None = None
        self._lock = threading.Lock()

    @property
    def place(self) -> Path | None:
        return self.path if isinstance(self.path, Path) else None  # nothing can be kept beside a remote file

    def _check_path(self) -> None:
        """Raise CheckpointNotFoundError or CheckpointError if ``path`` cannot be one of a checkpoint."""
        CheckpointFile.stat(self.path)

    def _file(self, path: AnyPath) -> CheckpointFile:
        """The file at ``path``, fit to be read as far as ``verify`` can tell. Raises CheckpointError."""
        file = CheckpointFile.stat(path)
        if self.verify == "sha256":
            check_sum(file)
        return file

    @abstractmethod
    def _read_headers(self) -> Mapping[str, WeightInfo]:
        """All weights by the checkpoint's names, ``KnownWeights`` where some of them cannot be read. Called under the
        lock, until it has succeeded once.
        """

    def weights(self) -> Mapping[str, WeightInfo]:
        with self._lock:
            if self._weights is None:
                found = named(self._read_headers(), self._names, str(self.path))
                self._weights = found if isinstance(found, KnownWeights) else MappingProxyType(found)
            return self._weights

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        read_span(info, buffer)

    def __getstate__(self) -> dict[str, object]:
        state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        if isinstance(self._weights, MappingProxyType):  # which cannot be pickled
            state["_weights"] = dict(self._weights)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if isinstance(self._weights, dict):
            self._weights = MappingProxyType(self._weights)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        known = self._weights
        state = "headers not read yet" if known is None else f"{len(known)} weights"
        return f"<{type(self).__name__} {str(self.path)!r}, {state}>"
