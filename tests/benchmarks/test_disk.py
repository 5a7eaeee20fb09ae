"""The plain read, and which disk a folder is on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import disk
from benchmarks.disk import PlainReader, device_name, device_of, own_bytes


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_CHUNK", 1 << 16)
    monkeypatch.setattr(disk, "_HUGE", 1 << 16)


@pytest.mark.usefixtures("small_chunks")
def test_plain_read_reads_every_byte_of_every_file(tmp_path: Path) -> None:
    """Files of many chunks, of less than one and of an odd length are all counted."""
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, nbytes in zip(files, (5 << 16, 100, (1 << 16) + 7), strict=True):
        file.write_bytes(b"x" * nbytes)
    reader = PlainReader(files, tries=1)
    assert reader.nbytes == (6 << 16) + 107
    assert reader.read() > 0


@pytest.mark.usefixtures("small_chunks")
def test_file_cut_during_the_read_is_no_bandwidth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that got less than the files have raises, for its time would be too good."""
    file = tmp_path / "a"
    file.write_bytes(b"x" * (2 << 16))
    reader = PlainReader([file], tries=1)
    monkeypatch.setattr(os, "preadv", lambda *_: 1)
    with pytest.raises(OSError, match="2 bytes were read of 131072"):
        reader.read()


def _sys(tmp_path: Path, folder: Path, *, partition: bool) -> Path:
    number = os.stat(folder).st_dev
    whole = tmp_path / "sys" / "devices" / "sda"
    entry = whole / "sda1" if partition else whole
    entry.mkdir(parents=True)
    (whole / "dev").write_text("8:0\n")
    if partition:
        (entry / "partition").write_text("1\n")
    block = tmp_path / "sys" / "dev" / "block"
    block.mkdir(parents=True)
    (block / f"{os.major(number)}:{os.minor(number)}").symlink_to(entry)
    (block / "8:0").symlink_to(whole)
    return tmp_path / "sys"


@pytest.mark.parametrize("partition", [True, False])
def test_limits_name_the_whole_disk(tmp_path: Path, partition: bool) -> None:
    """Of a partition it is the disk below it that a throttle has to name."""
    sys = _sys(tmp_path, tmp_path, partition=partition)
    assert device_of(tmp_path, sys=sys) == "8:0"
    assert device_name("8:0", sys=sys) == "sda"


def test_folder_on_no_disk_has_no_device(tmp_path: Path) -> None:
    """A file system without a block device, tmpfs say, gives None and no exception."""
    (tmp_path / "mountinfo").write_text("")
    assert device_of(tmp_path, proc=tmp_path, sys=tmp_path) is None
    assert device_name(None) == "unknown"


def test_links_cost_no_disk(tmp_path: Path) -> None:
    """A hard link to a file elsewhere is not counted, a file of one's own is."""
    inside = tmp_path / "scratch" / "splitted_model"
    inside.mkdir(parents=True)
    (tmp_path / "weights").write_bytes(b"x" * 100_000)
    os.link(tmp_path / "weights", inside / "linked")
    assert own_bytes(tmp_path / "scratch") == 0
    (inside / "copied").write_bytes(b"x" * 100_000)
    assert own_bytes(tmp_path / "scratch") >= 100_000
