"""Files that change under a running model, for real."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.soak.subject import WAYS, Subject, subject
from tests.soak.table import Row, Wrong, fault

Undo = Callable[[], object]


def _with_each_way(row: Row, full: bool, make: Callable[[Path], Undo], *, must_be: str = "clean") -> None:
    """Do something to each shard in turn, in each way of streaming; every one must be noticed."""
    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            for _ in range(5 if full else 1):
                for shard in one.shards:
                    end = one.inject(lambda shard=shard: make(shard))  # type: ignore[misc]
                    if not end.startswith(must_be):
                        raise Wrong(f"{shard.name} under {way} went unnoticed: {end}")


def _restore(path: Path) -> Callable[[bytes], None]:
    """Writes into the very file, with the time that it had."""
    stat = path.stat()

    def write(content: bytes) -> None:
        with open(path, "r+b") as file:
            file.truncate(len(content))
            file.write(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return write


@fault("a shard is cut short", "files")
def cut(row: Row, full: bool) -> None:
    def make(shard: Path) -> Undo:
        content, restore = shard.read_bytes(), _restore(shard)
        os.truncate(shard, len(content) // 2)
        return lambda: restore(content)

    _with_each_way(row, full, make)


@fault("a shard is rewritten in place", "files")
def rewrite(row: Row, full: bool) -> None:
    def make(shard: Path) -> Undo:
        content, restore = shard.read_bytes(), _restore(shard)
        with open(shard, "r+b") as file:
            file.seek(len(content) // 2)
            file.write(bytes(len(content) - len(content) // 2))
        return lambda: restore(content)

    _with_each_way(row, full, make)


@fault("a shard is replaced by rename", "files")
def replace(row: Row, full: bool) -> None:
    def make(shard: Path) -> Undo:
        aside, other = shard.with_suffix(".aside"), shard.with_suffix(".other")
        other.write_bytes(shard.read_bytes()[:-8] + bytes(8))
        shard.rename(aside)
        other.rename(shard)
        return lambda: aside.replace(shard)

    _with_each_way(row, full, make)


@fault("a shard is deleted", "files")
def delete(row: Row, full: bool) -> None:
    def make(shard: Path) -> Undo:
        kept = shard.with_suffix(".kept")
        os.link(shard, kept)  # only a name for the same file: it can be put back
        shard.unlink()
        return lambda: kept.rename(shard)

    _with_each_way(row, full, make)


@fault("the folder is moved away", "files")
def move(row: Row, full: bool) -> None:
    def make(shard: Path) -> Undo:
        folder = shard.parent
        moved = folder.with_name("moved")
        folder.rename(moved)
        return lambda: moved.rename(folder)

    _with_each_way(row, full, make)


@fault("every descriptor is closed by somebody", "files")
def close_all(row: Row, full: bool) -> None:
    """What daemons do; the files are opened again."""
    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            for _ in range(10 if full else 1):
                closed: list[str] = []
                one.inject(lambda one=one, closed=closed: _close(one, closed), fired=lambda c=closed: bool(c))  # type: ignore[misc]


def _close(one: Subject, closed: list[str]) -> None:
    for number in os.listdir("/proc/self/fd"):
        try:
            where = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if where.startswith(str(one.folder)):
            os.close(int(number))
            closed.append(where)
