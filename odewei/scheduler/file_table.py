"""The open files of one runtime, and how bytes are read from them when disks and files misbehave.

Knows files and descriptors. Knows nothing of weights or units. Direct reads need offset, length and address aligned,
end short at the end of the file, and are refused by some file systems: those files are read through the page cache
instead.

A file that is not what it was when its header was read is noticed before its bytes are used: the descriptor is looked
at after each read, and so is the path, where another file may have taken its place. What was changed and put back while
it was read is read again. After any failure the descriptor is given up, so that the next read opens whatever is there
then: what was put back is found again.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import numpy as np

from odewei.errors import WeightReadError
from odewei.loaders.base import CheckpointFile
from odewei.loaders.file_identity import has_unsteady_inode
from odewei.loaders.remote_file import RemoteFile
from odewei.loaders.told import tell_once
from odewei.scheduler.forks import watch
from odewei.scheduler.host_memory import Bytes

__all__ = ["FileTable", "OpenFile", "cannot_read", "open_direct"]

_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_RETRIES = 2
_PASSING = (errno.EIO, errno.EINTR)  # errors that a second try may not meet

_TOO_MANY = "Too many files are open: close some, or raise the limit (ulimit -n); the next use tries again"
_NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EFAULT, errno.EPERM, errno.ENOSYS)
"""What a system says that does not read directly: at once, or of an address, a length or an offset."""
_CURES = {
    errno.ENOENT: "Put the original file back, or build the model again from the new one",
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
    errno.ENOMEM: "Use a smaller memory_budget, or raise the limit on memory (ulimit -v); the next use tries again",
    errno.ESTALE: "The network file system has lost the file: mount it again or put the file back; the next use opens "
    "it again",
}
_CURE = "Check that the file is there and its disk is healthy; the next use tries again"


def open_direct(path: str, flags: int) -> int:
    """Open for direct reads, falling back to buffered ones where direct ones are refused."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        return os.open(path, flags)


def cannot_read(file: CheckpointFile, error: OSError) -> WeightReadError:
    """What to raise when the system refuses to open or read a file."""
    return WeightReadError(
        f"the file cannot be read: {error.strerror or error}",
        file=str(file.path),
        cure=_CURES.get(error.errno or 0, _CURE),
    )


class OpenFile:
    """A descriptor that closes when nobody has it any more, the frames of an error that somebody keeps included: under
    a thread that reads from it, its number must not become that of another file.

    Somebody else may close it all the same. Then the number is not closed again, for it may be another file's; and what
    was read from it may be another file's bytes, even if the number is that of the right file again when it is looked
    at. Whoever opens a file here and gets the number of one that is still in use takes note of that.
    """

    __slots__ = ("__weakref__", "_inode", "_is_lost", "fd")
    _by_number: ClassVar[dict[int, weakref.ref[OpenFile]]] = {}

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._is_lost = False
        before = self._by_number.get(fd)
        if before is not None and (other := before()) is not None:
            other._is_lost = True
        self._by_number[fd] = weakref.ref(self)
        self._inode: tuple[int, int] | None = None  # not known
        with contextlib.suppress(OSError):
            self._inode = _inode_of(fd)

    @property
    def is_taken(self) -> bool:
        """Whether it is known to be lost, because the number was given to another, say. Asks no system."""
        return self._is_lost

    def is_lost(self) -> bool:
        """Whether somebody has closed it, as far as that can be seen: then, or when this was asked before."""
        if not self._is_lost:
            try:
                self._is_lost = self._inode not in (None, _inode_of(self.fd))
            except OSError as error:
                self._is_lost = error.errno == errno.EBADF
        return self._is_lost

    def __del__(self) -> None:
        if not self.is_lost():
            with contextlib.suppress(OSError):
                os.close(self.fd)


def _inode_of(fd: int) -> tuple[int, int]:
    """Device and number of an open file; 0 where the number moves by itself. Raises OSError."""
    found = os.fstat(fd)
    return found.st_dev, 0 if has_unsteady_inode(lambda: os.fstat(fd)) else found.st_ino


class FileTable:
    """The open files of one runtime, and a scratch buffer for each reader thread. Methods may be called from any
    thread.
    """

    def __init__(self, *, direct: bool, scratch_bytes: int) -> None:
        self._is_direct = direct
        self._scratch_bytes = scratch_bytes
        self._open: dict[CheckpointFile, OpenFile] = {}
        self._buffered: dict[CheckpointFile, OpenFile] = {}  # those that refused a direct read
        self._held: set[CheckpointFile] = set()
        self._copies: dict[CheckpointFile, OpenFile] = {}
        self._lost: set[CheckpointFile] = set()  # of those that have a copy: they are not what they were
        self._lock = threading.Lock()
        self._local = threading.local()
        watch(self)

    def after_fork(self) -> None:
        """In the child: descriptors can be shared, the lock cannot."""
        self._lock = threading.Lock()

    def is_open(self, file: CheckpointFile) -> bool:
        """Whether it can be read as it is: a remote file is never open."""
        return file in self._open or isinstance(file, RemoteFile)

    def opened(self, file: CheckpointFile) -> OpenFile:
        """The open file, opened now if need be. Raises OSError."""
        if file in self._lost:
            return self._copies[file]
        found = self._buffered.get(file) or self._open.get(file)
        return found or self._keep(
            self._open, file, (open_direct if self._is_direct else os.open)(str(file.path), _FLAGS)
        )

    def hold(self, files: Iterable[CheckpointFile]) -> None:
        """Go on reading these files as they are, whatever comes to be at their paths: they are opened now, and stay so
        until ``close``, after which they are looked for at their paths again.

        For who is about to write where the model streams from: a file that is replaced or removed lives on for whom has
        it open. One that is written into is lost all the same, and noticed. Raises WeightReadError for one that cannot
        be opened, or is not what it was.
        """
        for file in files:
            if not isinstance(file, RemoteFile):
                self.use(file, lambda opened, file=file: file.check_unchanged(opened.fd))  # type: ignore[misc]
                self._held.add(file)

    def hold_copy(self, file: CheckpointFile, fd: int) -> None:
        """``fd`` is an open copy of a file, which is read instead when the file is not what it was any more."""
        with self._lock:
            if file in self._copies:
                os.close(fd)
            else:
                self._copies[file] = OpenFile(fd)

    def copy_of(self, file: CheckpointFile) -> OpenFile | None:
        """The copy of a file, if there is one."""
        return self._copies.get(file)

    def check(self, file: CheckpointFile, opened: OpenFile) -> None:
        """Raise WeightReadError if an open file is not what it was, or, unless it is held, is not at its path."""
        if self._copies.get(file) is opened:
            return  # nobody else has it
        file.check_unchanged(opened.fd, at_path=file not in self._held)

    def give_up(self, file: CheckpointFile, opened: OpenFile) -> None:
        """Something is wrong with an open file: the next use opens what is there then, unless another thread has."""
        opened.is_lost()  # as long as that can be seen
        with self._lock:
            for table in (self._open, self._buffered):
                if table.get(file) is opened:
                    del table[file]  # closes later: the caller has it

    def use(self, file: CheckpointFile, work: Callable[[OpenFile], object]) -> None:
        """Have ``work`` read from the open file. Raises WeightReadError for its OSError.

        If that fails with a descriptor from before, it is done once more with a fresh one: somebody may have closed the
        old one, a network's file system may have lost it, or the file may have been put back. It is also done once more
        if something was done to the file meanwhile.
        """
        for is_last in (False, True):
            is_fresh = file not in self._open and file not in self._buffered
            opened = None
            try:
                opened = self.opened(file)
                since = file.last_change(opened.fd)
                work(opened)
                if opened.is_taken:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                if not file.was_touched(opened.fd, since):
                    return
                if is_last:
                    raise file.touched()
            except OSError as error:
                if opened is not None:
                    self.give_up(file, opened)
                if is_last or is_fresh or error.errno in _PASSING:
                    raise cannot_read(file, error) from error
            except WeightReadError:
                if opened is not None:
                    self.give_up(file, opened)
                if file in self._copies and file not in self._lost:
                    self._lost.add(file)
                    tell_once(f"the file {str(file.path)!r} was saved over: a copy of what it was is read from now on")
                    self.use(file, work)
                    return
                if is_last or is_fresh:
                    raise

    def read(self, file: CheckpointFile, buffers: Sequence[Bytes], offset: int, needed: int) -> None:
        """Fill the buffers in turn from ``offset`` on, with at least ``needed`` bytes. Raises WeightReadError."""
        if isinstance(file, RemoteFile):
            file.read([buffer.data for buffer in buffers], offset, needed)
            return

        def fill(opened: OpenFile) -> None:
            found = self._read_fully(opened, file, [buffer.data for buffer in buffers], offset, needed)
            if found < needed:
                raise WeightReadError(
                    f"the file ends {needed - found} bytes too early",
                    file=str(file.path),
                    cure="It was cut short while the model was using it: put the whole file back",
                )

        self.use(file, fill)

    def scratch(self) -> Bytes:
        """This thread's scratch buffer; it begins at a page."""
        scratch: Bytes | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = np.frombuffer(mmap.mmap(-1, self._scratch_bytes), np.uint8)
        return scratch

    def close(self) -> None:
        """Close all files, those that are being read from when that ends. They are opened again when they are used
        again.
        """
        with self._lock:
            found = self._open.copy(), self._buffered.copy()
            self._held.clear()
            self._open.clear()
            self._buffered.clear()
        del found

    def _read_fully(
        self, opened: OpenFile, file: CheckpointFile, buffers: list[memoryview], offset: int, needed: int
    ) -> int:
        """As many bytes as there are, at least ``needed``, all of them from the file whose header was read."""
        found = failures = 0
        while found < needed:
            try:
                count = os.preadv(opened.fd, buffers, offset + found)
            except OSError as error:
                if error.errno in _NOT_DIRECT and self._is_direct and file not in self._buffered:
                    # refused here, or a short read has left an odd offset
                    opened = self._fall_back(file, opened, os.strerror(error.errno))
                elif error.errno in _PASSING and failures < _RETRIES:
                    failures += 1
                else:
                    raise
                continue
            if count == 0:
                if self._is_direct and file not in self._buffered and offset + found < file.size:
                    opened = self._fall_back(file, opened, "no bytes came")  # where there should be some
                    continue
                break
            found += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]
        self.check(file, opened)
        return found

    def _fall_back(self, file: CheckpointFile, opened: OpenFile, why: str) -> OpenFile:
        """Read this file through the page cache from now on; a direct descriptor stays open for those reading from it.

        What was read from that is looked at first.
        """
        self.check(file, opened)
        folder = os.path.dirname(file.path)
        tell_once(f"the file system of {folder!r} does not read directly ({why}): its page cache is used")
        path = f"/proc/self/fd/{opened.fd}" if file in self._held else file.path  # another one may be at its path
        return self._keep(self._buffered, file, os.open(path, _FLAGS))

    def _keep(self, table: dict[CheckpointFile, OpenFile], file: CheckpointFile, fd: int) -> OpenFile:
        """What the table has for the file from now on: another thread may have been first."""
        mine = OpenFile(fd)
        with self._lock:
            return table.setdefault(file, mine)

    def __repr__(self) -> str:
        return f"<FileTable of {len(self._open)} open files, {'direct' if self._is_direct else 'buffered'}>"
