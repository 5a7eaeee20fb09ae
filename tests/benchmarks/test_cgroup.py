"""Control groups, on folders that look like the kernel's: what is found, what is written, what is swept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cgroup import Controller, Group, GroupError, Limits, find_controllers, remove_stale

_MEMORY_V1 = "memory.limit_in_bytes"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let every folder made from now on have the files that a kernel puts into a new group, and be removable."""

    def offer(*names: str) -> None:
        make, remove = Path.mkdir, Path.rmdir

        def mkdir(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            make(self, mode, parents, exist_ok)
            for name in ("cgroup.procs", *names):
                (self / name).write_text("")

        def rmdir(self: Path) -> None:
            for file in self.iterdir():
                file.unlink()
            remove(self)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)

    return offer


def _proc(tmp_path: Path, groups: str, *mounts: str) -> Path:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))
    return proc


def _base(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ({"cgroup.procs": ""} | {name.replace("_", "."): text for name, text in files.items()}).items():
        (folder / name).write_text(text)
    return folder


def test_v1_controller_is_found_below_its_own_group(tmp_path: Path, kernel: Callable[..., None]) -> None:
    """Each v1 controller has its own hierarchy, the disk's under the name blkio; the process's own group is nearest."""
    memory, disk = _base(tmp_path / "memory" / "job"), _base(tmp_path / "blkio")
    mounts = [
        f"30 1 0:30 / {tmp_path}/memory rw - cgroup cgroup rw,memory",
        f"31 1 0:31 / {tmp_path}/blkio rw - cgroup cgroup rw,blkio",
    ]
    proc = _proc(tmp_path, "4:memory:/job\n3:blkio:/\n", *mounts)
    kernel(_MEMORY_V1, "blkio.throttle.read_bps_device")
    found = find_controllers("memory", "io", proc=proc)
    assert found == (Controller("memory", 1, memory), Controller("io", 1, disk))
    assert [file.name for file in memory.iterdir()] == ["cgroup.procs"], "the trial group is gone"


def test_mount_of_a_part_of_the_hierarchy_is_understood(tmp_path: Path, kernel: Callable[..., None]) -> None:
    """In a container whose mount shows the hierarchy from its own group on, that group is the mount itself."""
    base = _base(tmp_path / "memory")
    proc = _proc(tmp_path, "4:memory:/box/1\n", f"30 1 0:30 /box/1 {base} rw - cgroup cgroup rw,memory")
    kernel(_MEMORY_V1)
    assert find_controllers("memory", proc=proc) == (Controller("memory", 1, base),)


def test_v2_goes_up_to_a_group_that_hands_the_controller_down(tmp_path: Path, kernel: Callable[..., None]) -> None:
    """A v2 group that does not have the controller is passed over for the ancestor that hands it down."""
    root = _base(tmp_path / "unified", cgroup_controllers="memory io", cgroup_subtree_control="memory")
    (root / "cgroup.subtree_control").write_text("memory")
    (root / "cgroup.controllers").write_text("memory io")
    _base(root / "job")
    proc = _proc(tmp_path, "0::/job\n", f"30 1 0:30 / {root} rw - cgroup2 cgroup2 rw")
    kernel("memory.max")
    assert find_controllers("memory", proc=proc) == (Controller("memory", 2, root),)


def test_missing_controller_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Where v2 is mounted without the controller, the reason is in the message."""
    root = _base(tmp_path / "unified")
    proc = _proc(tmp_path, "0::/\n", f"30 1 0:30 / {root} rw - cgroup2 cgroup2 rw")
    with pytest.raises(GroupError, match="without the controller memory"):
        find_controllers("memory", proc=proc)


def test_v1_group_limits_memory_swap_and_disk(tmp_path: Path, kernel: Callable[..., None]) -> None:
    """A group has the limit, no swap beyond it and the disk's rate while it is open, and is gone afterwards."""
    memory, disk = _base(tmp_path / "memory"), _base(tmp_path / "blkio")
    kernel(_MEMORY_V1, "memory.memsw.limit_in_bytes", "blkio.throttle.read_bps_device")
    limits = Limits(Controller("memory", 1, memory), Controller("io", 1, disk), "254:0", 1000)
    with limits.group("one", 5000) as group:
        assert [file.parent.parent for file in group.enter] == [memory, disk]
        inside, throttle = (file.parent for file in group.enter)
        assert (inside / _MEMORY_V1).read_text() == "5000"
        assert (inside / "memory.memsw.limit_in_bytes").read_text() == "5000"
        assert (throttle / "blkio.throttle.read_bps_device").read_text() == "254:0 1000"
    assert not inside.exists()
    assert not throttle.exists()


def test_v2_group_is_one_folder_for_both_limits(tmp_path: Path, kernel: Callable[..., None]) -> None:
    """A process can be in one v2 group only, so both limits are written there."""
    base = _base(tmp_path / "unified")
    kernel("memory.max", "memory.swap.max", "io.max")
    limits = Limits(Controller("memory", 2, base), Controller("io", 2, base), "254:0", 1000)
    with limits.group("one", 5000) as group:
        (enter,) = group.enter
        texts = [(enter.parent / name).read_text() for name in ("memory.max", "memory.swap.max", "io.max")]
    assert texts == ["5000", "0", "254:0 rbps=1000"]


def test_group_without_a_limit_only_measures(tmp_path: Path, kernel: Callable[..., None]) -> None:
    """With no limit nothing is written, and the kernel's count of the most memory is still read."""
    base = _base(tmp_path / "memory")
    kernel(_MEMORY_V1, "memory.max_usage_in_bytes")
    with Limits(Controller("memory", 1, base)).group("free", None) as group:
        assert group.memory is not None
        assert (group.memory / _MEMORY_V1).read_text() == ""
        (group.memory / "memory.max_usage_in_bytes").write_text("77\n")
        assert group.peak_bytes() == 77


@pytest.mark.parametrize(("stat", "nbytes"), [("cache 9\nrss 1\ntotal_rss 5\n", 5), ("anon 6\nfile 9\n", 6)])
def test_anonymous_bytes_are_read_in_both_versions(tmp_path: Path, stat: str, nbytes: int) -> None:
    """v1 counts children in ``total_rss``, v2 calls it ``anon``; the page cache is in neither."""
    (tmp_path / "memory.stat").write_text(stat)
    assert Group((), tmp_path).anonymous_bytes() == nbytes


def test_stale_groups_are_removed_and_no_others(tmp_path: Path, kernel: Callable[..., None]) -> None:
    """Only an empty group of ours goes whose maker is gone."""
    base, proc = _base(tmp_path / "memory"), tmp_path / "proc"
    (proc / "11").mkdir(parents=True)
    kernel()
    for name in ("odewei-bench-10-1-mmap", "odewei-bench-11-1-mmap", "odewei-bench-12-1-mmap", "other-10-1"):
        (base / name).mkdir()
    (base / "odewei-bench-12-1-mmap" / "cgroup.procs").write_text("99\n")
    controllers = (Controller("memory", 1, base), Controller("io", 1, base))
    assert remove_stale(*controllers, proc=proc) == ["odewei-bench-10-1-mmap"]
    left = sorted(path.name for path in base.iterdir() if path.is_dir())
    assert left == ["odewei-bench-11-1-mmap", "odewei-bench-12-1-mmap", "other-10-1"]
