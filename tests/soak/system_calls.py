"""Faults at the seam to the system: what reads, opens and allocates fails, is short or is slow."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from odewei.scheduler.host_memory import HostMemory
from tests.soak.subject import WAYS, Subject, shrunk, subject
from tests.soak.table import Row, Wrong, fault

Preadv = Callable[[int, Sequence[memoryview], int], int]


class Seam:
    """Stands in the place of a function of a module; ``hits`` counts the calls that did not go through as they were."""

    def __init__(self, module: object, name: str, make: Callable[[Callable[..., object], Seam], Callable[..., object]]):
        self._module, self._name, self._real = module, name, getattr(module, name)
        self._made = make(self._real, self)
        self.hits = 0

    def __enter__(self) -> Seam:
        setattr(self._module, self._name, self._made)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._module, self._name, self._real)


@contextlib.contextmanager
def _subjects(row: Row, ways: Sequence[dict[str, object]] = WAYS) -> Iterator[Iterator[Subject]]:
    def each() -> Iterator[Subject]:
        for way in ways:
            with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
                yield one

    yield each()


def _at_seam(
    row: Row,
    full: bool,
    module: object,
    name: str,
    make: Callable[[Callable[..., object], Seam], Callable[..., object]],
    *,
    must_be: str = "",
    before: Callable[[Subject], object] = lambda one: None,
) -> None:
    """Put something in the place of a function while a subject passes, in each way of streaming."""
    with _subjects(row) as each:
        for one in each:
            for _ in range(10 if full else 1):
                before(one)
                seam = Seam(module, name, make)

                def begin(seam: Seam = seam) -> Callable[[], object]:
                    seam.__enter__()
                    return seam.__exit__

                end = one.inject(begin, fired=lambda seam=seam: seam.hits > 0)  # type: ignore[misc]
                if must_be and seam.hits and not end.startswith(must_be):
                    raise Wrong(f"{end} instead of {must_be}")


def _failing(code: int, every: int = 1) -> Callable[[Callable[..., object], Seam], Callable[..., object]]:
    """Each ``every``-th call fails with an error of the system."""

    def make(real: Callable[..., object], seam: Seam) -> Callable[..., object]:
        calls = 0
        lock = threading.Lock()

        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            with lock:
                calls += 1
                now = calls % every == 0
            if now:
                seam.hits += 1
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    return make


def _lasting(code: int) -> Callable[[Row, bool], None]:
    return lambda row, full: _at_seam(row, full, os, "preadv", _failing(code), must_be="clean")


def _passing(code: int) -> Callable[[Row, bool], None]:
    return lambda row, full: _at_seam(row, full, os, "preadv", _failing(code, 2), must_be="right")


for _code in (errno.EIO, errno.EINTR, errno.ESTALE, errno.EBADMSG, errno.ETIMEDOUT, errno.ENOMEM):
    fault(f"every read fails with {errno.errorcode[_code]}", "reads")(_lasting(_code))
for _code in (errno.EIO, errno.EINTR):
    fault(f"every second read fails with {errno.errorcode[_code]}", "reads")(_passing(_code))


@fault("reads are short, down to odd bytes", "reads")
def short(row: Row, full: bool) -> None:
    def make(real: Callable[..., object], seam: Seam) -> Callable[..., object]:
        def call(fd: int, buffers: Sequence[memoryview], offset: int) -> object:
            seam.hits += 1
            return real(fd, [buffers[0][: max(1, min(len(buffers[0]) - 1, 3001))]], offset)

        return call

    _at_seam(row, full, os, "preadv", make, must_be="right")


@fault("a read ends at nothing", "reads")
def nothing(row: Row, full: bool) -> None:
    def make(real: Callable[..., object], seam: Seam) -> Callable[..., object]:
        def call(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            seam.hits += 1
            return 0

        return call

    _at_seam(row, full, os, "preadv", make, must_be="clean")


@fault("the disk is slow, each read differently", "reads")
def slow(row: Row, full: bool) -> None:
    def make(real: Callable[..., object], seam: Seam) -> Callable[..., object]:
        def call(fd: int, buffers: Sequence[memoryview], offset: int) -> object:
            seam.hits += 1
            time.sleep(0.001 * (seam.hits % 7))
            return real(fd, buffers, offset)

        return call

    _at_seam(row, full, os, "preadv", make, must_be="right")


@fault("direct reads are refused from now on", "reads")
def refused(row: Row, full: bool) -> None:
    """Of a direct descriptor only: those files are read through the page cache instead."""
    import fcntl

    def make(real: Callable[..., object], seam: Seam) -> Callable[..., object]:
        def call(fd: int, buffers: Sequence[memoryview], offset: int) -> object:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                seam.hits += 1
                raise OSError(errno.EINVAL, "direct")
            return real(fd, buffers, offset)

        return call

    with _subjects(row, [way for way in WAYS if way["io"] == "direct"]) as each:
        for one in each:
            seam = Seam(os, "preadv", make)

            def begin(seam: Seam = seam) -> Callable[[], object]:
                seam.__enter__()
                return seam.__exit__

            if one.inject(begin, fired=lambda seam=seam: seam.hits > 0) != "right":  # type: ignore[misc]
                raise Wrong("no way round was found")


def _forget_files(one: Subject) -> None:
    """The next read has to open its file."""
    from odewei.runtime import runtime_of

    runtime_of(one.streamed).account.files.close()


def _opens(code: int) -> Callable[[Row, bool], None]:
    def make(real: Callable[..., object], seam: Seam) -> Callable[..., object]:
        failing = _failing(code)(real, seam)

        def call(path: object, *args: object, **kwargs: object) -> object:
            return (failing if str(path).endswith(".safetensors") else real)(path, *args, **kwargs)

        return call

    return lambda row, full: _at_seam(row, full, os, "open", make, must_be="clean", before=_forget_files)


for _code in (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOENT, errno.ESTALE):
    fault(f"opening fails with {errno.errorcode[_code]}", "files")(_opens(_code))


@fault("a file's state cannot be asked for", "files")
def unknown(row: Row, full: bool) -> None:
    _at_seam(row, full, os, "fstat", _failing(errno.ESTALE), must_be="clean")


@fault("the system gives no memory for a slab", "memory")
def no_memory(row: Row, full: bool) -> None:
    """Everything that is resident goes first, so that slabs have to be made."""

    def empty(one: Subject) -> None:
        shrunk(one, lambda: None)

    with _subjects(row) as each:
        for one in each:
            for code in (errno.ENOMEM, errno.EAGAIN):
                for every in (1, 2):
                    empty(one)
                    seam = Seam(HostMemory, "allocate", _failing(code, every))

                    def begin(seam: Seam = seam) -> Callable[[], object]:
                        seam.__enter__()
                        return seam.__exit__

                    one.inject(begin, fired=lambda seam=seam: seam.hits > 0)  # type: ignore[misc]
