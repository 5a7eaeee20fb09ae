"""Disks without room: what odewei writes is written whole, or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import odewei
from odewei.align import align
from odewei.errors import OdeweiError
from tests.soak.subject import INDEX, ids, subject
from tests.soak.table import Row, Skipped, Wrong, fault, judge


def _is_written_whole_or_not(row: Row, folder: Path, write: Callable[[], object], full_disk: bool) -> None:
    """A write on a full disk is a clean error and leaves no file that was not there before."""
    before = {path: path.stat().st_size for path in folder.rglob("*")}
    try:
        write()
        end = "right"
    except OdeweiError as error:
        end = judge(error)
    row.note(fired=full_disk and end != "right", end=end)
    left = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    new = [path.name for path in left if before.get(path) != left[path]]
    if end != "right" and new:
        raise Wrong(f"{new} were left half written")


@contextmanager
def _tiny_disk() -> Iterator[Path]:
    """A file system of 64 KiB that is real."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
        )
        if made.returncode:
            raise Skipped("this user may not mount a small file system")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@fault("the disk is full: align", "disks")
def aligning(row: Row, full: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model") as one:
        with _tiny_disk() as disk:
            _is_written_whole_or_not(row, disk, lambda: align(one.folder / INDEX, disk / "copy"), True)
        one.recovered()


@fault("the disk is full: save_trace", "disks")
def saving(row: Row, full: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model") as one, _tiny_disk() as disk:
        odewei.trace(one.streamed, ids(0))
        (disk / "other").write_bytes(bytes(1 << 16))
        _is_written_whole_or_not(row, disk, lambda: odewei.save_trace(one.streamed, disk / "order.json"), True)
        (disk / "other").unlink()
        odewei.save_trace(one.streamed, disk / "order.json")
        one.recovered()


@fault("RLIMIT_FSIZE: align and save_trace", "disks")
def limited(row: Row, full: bool) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model") as one:
        odewei.trace(one.streamed, ids(0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            for size, write in (
                (20_000, lambda: align(one.folder / INDEX, Path(scratch) / "copy")),
                (50, lambda: odewei.save_trace(one.streamed)),
            ):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
                _is_written_whole_or_not(row, Path(scratch), write, True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        one.recovered()


@fault("ENOSPC and EIO from fsync: save_trace", "disks")
def syncing(row: Row, full: bool) -> None:
    real = os.fsync
    with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model") as one:
        odewei.trace(one.streamed, ids(0))
        for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT):

            def failing(fd: int, code: int = code) -> None:
                raise OSError(code, os.strerror(code))

            os.fsync = failing
            try:
                _is_written_whole_or_not(row, one.folder, lambda: odewei.save_trace(one.streamed), True)
            finally:
                os.fsync = real
        one.recovered()
