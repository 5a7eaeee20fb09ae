"""Files that fail or change while they are in use: an error that says so, never wrong bytes (traps 17 and 34)."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from odewei.errors import CheckpointError, CheckpointNotFoundError, WeightReadError
from odewei.loaders import CheckpointFile, SafetensorsLoader, WeightInfo
from odewei.loaders.file_loader import open_header
from odewei.loaders.json_pairs import no_duplicates
from tests.files import write_unseen

from .conformance import bits, random_tensor, read_bytes

EXPECTED = random_tensor(torch.float32, (1000,))


@pytest.fixture
def loader(tmp_path: Path) -> SafetensorsLoader:
    """A loader of one weight whose header has been read."""
    save_file({"w": EXPECTED}, tmp_path / "model.safetensors")
    loader = SafetensorsLoader(tmp_path / "model.safetensors")
    loader.weights()
    return loader


def info_of(loader: SafetensorsLoader) -> WeightInfo:
    return loader.weights()["w"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def replace(path: Path) -> None:
    save_file({"w": torch.zeros(1000)}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def grow(path: Path) -> None:
    with open(path, "ab") as stream:
        stream.write(b"more")


def overwrite(path: Path) -> None:
    before = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # the clock of a file system may be coarse


@pytest.mark.parametrize("change", [truncate, replace, grow, overwrite])
def test_a_changed_file_is_noticed(loader: SafetensorsLoader, change: Callable[[Path], None]) -> None:
    """After any change of the file a read fails, naming weight, file, change and cure."""
    change(loader.path)
    with pytest.raises(WeightReadError, match=r"was changed while.*original") as caught:
        read_bytes(loader, info_of(loader))
    assert (caught.value.weight, caught.value.file) == ("w", str(loader.path))


@pytest.mark.parametrize("change", [truncate, replace, grow, overwrite])
def test_copies_of_a_loader_notice_a_changed_file_too(
    loader: SafetensorsLoader, change: Callable[[Path], None]
) -> None:
    """A copy made before the change remembers the file as it was."""
    import copy

    twin = copy.deepcopy(loader)
    change(loader.path)
    with pytest.raises(WeightReadError, match="was changed"):
        read_bytes(twin, info_of(twin))


def test_a_deleted_file_is_an_error_and_put_back_it_is_none(loader: SafetensorsLoader) -> None:
    """A file that is gone is a WeightReadError; when the same file is back, reading goes on."""
    away = loader.path.with_suffix(".away")
    os.rename(loader.path, away)
    with pytest.raises(WeightReadError, match=r"can no longer be opened.*'w'") as caught:
        read_bytes(loader, info_of(loader))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    os.rename(away, loader.path)
    assert read_bytes(loader, info_of(loader)) == bits(EXPECTED)


def test_a_change_during_the_read_is_noticed(loader: SafetensorsLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read while the file was being overwritten are not handed on."""
    preadv = os.preadv

    def overwritten(fd: int, buffers: list[memoryview], offset: int) -> int:
        overwrite(loader.path)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", overwritten)
    with pytest.raises(WeightReadError, match="was changed"):
        read_bytes(loader, info_of(loader))


def test_a_change_that_is_taken_back_during_the_read_is_noticed(
    loader: SafetensorsLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are bytes handed on that were there for a moment, though the file looks as before."""
    preadv = os.preadv

    def overwritten(fd: int, buffers: list[memoryview], offset: int) -> int:
        content = loader.path.read_bytes()
        write_unseen(loader.path, bytes(len(content)))
        found = preadv(fd, buffers, offset)
        write_unseen(loader.path, content)
        return found

    monkeypatch.setattr(os, "preadv", overwritten)
    with pytest.raises(WeightReadError, match="put back while it was being read"):
        read_bytes(loader, info_of(loader))
    monkeypatch.undo()
    assert read_bytes(loader, info_of(loader)) == bits(EXPECTED)


def test_a_file_that_ends_early_is_an_error(loader: SafetensorsLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of nothing is the end of the file: an error with the missing bytes, no endless loop."""
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 0)
    with pytest.raises(WeightReadError, match=r"4000 bytes before the end.*'w'.*download it again"):
        read_bytes(loader, info_of(loader))


def test_reads_in_pieces_are_put_together(loader: SafetensorsLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that gives less than asked is asked again, from where it stopped."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:333]], offset))
    assert read_bytes(loader, info_of(loader)) == bits(EXPECTED)


@pytest.mark.parametrize(("failures", "code"), [(1, errno.EIO), (2, errno.EIO), (3, errno.EIO), (1, errno.EACCES)])
def test_input_output_errors_are_retried_a_few_times(
    loader: SafetensorsLoader, monkeypatch: pytest.MonkeyPatch, failures: int, code: int
) -> None:
    """Up to two EIO are survived, the third is an error with its cause; other errors are not retried."""
    preadv, calls = os.preadv, 0

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise OSError(code, os.strerror(code))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    if code == errno.EIO and failures < 3:
        assert read_bytes(loader, info_of(loader)) == bits(EXPECTED)
        return
    with pytest.raises(WeightReadError, match=os.strerror(code)) as caught:
        read_bytes(loader, info_of(loader))
    assert isinstance(caught.value.__cause__, OSError)
    assert calls == failures


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Nothing, a folder, a path through a file, a pipe, a name with a zero: refused without opening anything."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    for name in ("nothing", "file/below", "dangling"):
        with pytest.raises(CheckpointNotFoundError, match="does not exist"):
            CheckpointFile.stat(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointFile.stat(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"folder.*open_checkpoint"):
        CheckpointFile.stat(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be looked at"):
        CheckpointFile.stat(tmp_path / "a\0b")


def test_a_header_of_a_changing_file_is_refused(tmp_path: Path) -> None:
    """A file that is still being written when its header is read is a CheckpointError with its cause."""
    (tmp_path / "f").write_bytes(b"x")
    file = CheckpointFile.stat(tmp_path / "f")

    def read_while_it_grows() -> None:
        with open_header(file):
            grow(file.path)

    with pytest.raises(CheckpointError, match="nothing writes to it") as caught:
        read_while_it_grows()
    assert isinstance(caught.value.__cause__, WeightReadError)


def test_a_name_twice_is_an_error() -> None:
    """The JSON hook keeps distinct names and refuses a second one."""
    assert no_duplicates([("a", 1), ("b", 1)]) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="'a' occurs twice"):
        no_duplicates([("a", 1), ("b", 1), ("a", 1)])
