"""Real limits for a process: memory (its page cache included) and the disk's bandwidth, by control groups v1 or v2.

Knows the kernel's files and nothing of what runs in a group. Sources: the kernel's ``admin-guide/cgroup-v1/memory``,
``cgroup-v1/blkio-controller`` and ``admin-guide/cgroup-v2``.

A group is a folder. It is made where this process may make one: below its own group, or below the nearest ancestor that
allows it, so that limits from outside keep holding. Whoever opens a group has to end its processes before closing it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

__all__ = ["Controller", "Group", "GroupError", "Limits", "find_controllers", "remove_stale"]

_PREFIX = "odewei-bench-"
_CLOSE_SECONDS = 5.0


class GroupError(Exception):
    """No such limit can be set here; the message says why."""


@dataclass(frozen=True, slots=True)
class Controller:
    """Where groups with one kind of limit can be made, and which hierarchy they belong to."""

    name: str
    version: int
    base: Path


@dataclass(frozen=True, slots=True)
class Group:
    """An open group: ``enter`` are the files that a process writes its id (or 0) into to be limited."""

    enter: tuple[Path, ...]
    memory: Path | None

    def peak_bytes(self) -> int | None:
        """The most memory that was ever charged to the group, page cache included."""
        return _number(self.memory, "memory.peak", "memory.max_usage_in_bytes")

    def anonymous_bytes(self) -> int | None:
        """Memory charged now that is not page cache."""
        if self.memory is None:
            return None
        lines = (line.split() for line in _read(self.memory / "memory.stat").splitlines())
        stat = {parts[0]: int(parts[1]) for parts in lines if len(parts) == 2}
        return stat.get("total_rss", stat.get("anon"))


@dataclass(frozen=True, slots=True)
class Limits:
    """What can be limited here, and the limit of the disk that holds for every group of a run.

    ``device`` is ``"major:minor"``. A controller that is None limits nothing.
    """

    memory: Controller | None = None
    io: Controller | None = None
    device: str = ""
    bytes_per_second: int | None = None

    @contextmanager
    def group(self, label: str, limit_bytes: int | None) -> Iterator[Group]:
        """A group for one process and its children; removed afterwards. With ``limit_bytes`` None it only measures."""
        with ExitStack() as stack:
            folders: dict[Path, None] = {}
            measured = None
            if self.memory is not None:
                measured = _make(stack, self.memory, label)
                folders[measured] = None
                if limit_bytes is not None:
                    _limit_memory(self.memory, measured, limit_bytes)
            if self.io is not None and self.bytes_per_second is not None:
                folder = _make(stack, self.io, label)
                folders[folder] = None
                _limit_reads(self.io, folder, self.device, self.bytes_per_second)
            yield Group(tuple(folder / "cgroup.procs" for folder in folders), measured)


def find_controllers(*names: str, proc: Path = Path("/proc/self")) -> tuple[Controller, ...]:
    """Where limits on all of ``names`` (``"memory"``, ``"io"``) can be set. Raises GroupError where they cannot.

    A process is in one group of each hierarchy, so controllers of one hierarchy share their base.
    """
    reasons: list[str] = []
    candidates = [list(_candidates(name, proc, reasons)) for name in names]
    for chosen in product(*candidates):
        if len({controller.base for controller in chosen if controller.version == 2}) <= 1:
            return chosen
    raise GroupError(reasons[0] if reasons else f"the kernel offers no control groups for {' and '.join(names)} here")


def remove_stale(*controllers: Controller, proc: Path = Path("/proc")) -> list[str]:
    """Remove the groups that a killed run has left below the bases of ``controllers``; their names.

    Only groups of this benchmark are looked at, and of those only such as nobody is in and whose maker, which its name
    tells, is gone. A run that goes on beside this one keeps its groups.
    """
    removed = []
    for base in dict.fromkeys(controller.base for controller in controllers):
        for folder in sorted(base.glob(f"{_PREFIX}*-*")):
            maker = folder.name.removeprefix(_PREFIX).split("-")[0]
            if not maker.isdigit() or (proc / maker).exists() or _read(folder / "cgroup.procs").strip():
                continue
            with contextlib.suppress(OSError):  # somebody else was faster, or has just entered it
                folder.rmdir()
                removed.append(folder.name)
    return removed


def _candidates(name: str, proc: Path, reasons: list[str]) -> Iterator[Controller]:
    for version, mount, own in _hierarchies(name, proc):
        for base in _bases(mount, own):
            problem = _why_not(name, version, base)
            if problem is None:
                yield Controller(name, version, base)
            else:
                reasons.append(problem)


def _hierarchies(name: str, proc: Path) -> list[tuple[int, Path, str]]:
    """Version, mount point and own group of every hierarchy that may have the controller."""
    v1_name = "blkio" if name == "io" else name
    own = {}
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    found = []
    for line in _read(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup" and v1_name in options.split(",") and v1_name in own:
            found.append((1, Path(point), _below(own[v1_name], root)))
        elif kind == "cgroup2" and "" in own:
            found.append((2, Path(point), _below(own[""], root)))
    return found


def _below(path: str, root: str) -> str:
    """A group's path as seen from a mount that shows the hierarchy from ``root`` on."""
    return path.removeprefix(root.rstrip("/")) or "/"


def _bases(mount: Path, own: str) -> Iterator[Path]:
    """The process's own group and its ancestors, nearest first."""
    here = mount / own.lstrip("/")
    yield here
    while here != mount and mount in here.parents:
        here = here.parent
        yield here


def _why_not(name: str, version: int, base: Path) -> str | None:
    """None where a group with this limit can be made below ``base``."""
    if not base.is_dir():
        return f"the control group of {name} is not visible"
    if version == 2 and name not in _read(base / "cgroup.controllers").split():
        return f"control groups v2 are there, but without the controller {name}"
    if version == 2 and name not in _read(base / "cgroup.subtree_control").split():
        # Only where no process lives in the group itself, or in the root.
        with contextlib.suppress(OSError):
            (base / "cgroup.subtree_control").write_text(f"+{name}")
        if name not in _read(base / "cgroup.subtree_control").split():
            return f"the controller {name} is not handed down to groups that this user may make"
    trial = base / f"{_PREFIX}{os.getpid()}-trial"
    try:
        trial.mkdir()
    except OSError as error:
        return f"no control group of {name} can be made ({error.strerror})"
    try:
        file = _LIMIT_FILES[name, version]
        if not os.access(trial / file, os.W_OK):
            return f"{file} cannot be written"
        if not os.access(base / "cgroup.procs", os.W_OK):
            return "processes cannot be moved between control groups"
    finally:
        trial.rmdir()
    return None


_LIMIT_FILES = {
    ("memory", 1): "memory.limit_in_bytes",
    ("memory", 2): "memory.max",
    ("io", 1): "blkio.throttle.read_bps_device",
    ("io", 2): "io.max",
}


def _make(stack: ExitStack, controller: Controller, label: str) -> Path:
    """The group's folder, the same for controllers of one hierarchy; removed when ``stack`` closes."""
    folder = controller.base / f"{_PREFIX}{os.getpid()}-{label}"
    if not folder.exists():
        folder.mkdir()
        stack.callback(_remove, folder)
    return folder


def _remove(folder: Path) -> None:
    """Remove a group. The kernel refuses for a moment after the last process in it has ended."""
    deadline = time.monotonic() + _CLOSE_SECONDS
    while True:
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _limit_memory(controller: Controller, folder: Path, nbytes: int) -> None:
    (folder / _LIMIT_FILES["memory", controller.version]).write_text(str(nbytes))
    # Without swap: a process that is swapped out to a disk is not limited, it is slow in another way.
    _write_if_there(folder / "memory.memsw.limit_in_bytes", str(nbytes))
    _write_if_there(folder / "memory.swap.max", "0")


def _limit_reads(controller: Controller, folder: Path, device: str, bytes_per_second: int) -> None:
    file = folder / _LIMIT_FILES["io", controller.version]
    line = f"{device} {bytes_per_second}" if controller.version == 1 else f"{device} rbps={bytes_per_second}"
    try:
        file.write_text(line)
    except OSError as error:
        raise GroupError(f"the disk {device} cannot be throttled ({error.strerror})") from error


def _write_if_there(file: Path, text: str) -> None:
    if file.exists():
        file.write_text(text)


def _number(folder: Path | None, *names: str) -> int | None:
    texts: Sequence[str] = [] if folder is None else [_read(folder / name).strip() for name in names]
    return next((int(text) for text in texts if text.isdigit()), None)


def _read(file: Path) -> str:
    """The file's text; empty where there is none, as kernels differ in what they offer."""
    try:
        return file.read_text()
    except OSError:
        return ""
