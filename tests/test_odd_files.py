"""File systems that number, date, read and map files in odd ways: there is a second way, and never another file."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import odewei
from odewei.errors import WeightReadError
from odewei.loaders import file_identity, open_checkpoint, told
from odewei.loaders.base import CheckpointFile
from odewei.loaders.file_loader import map_file, read_span
from odewei.scheduler.file_table import FileTable
from odewei.scheduler.host_memory import PAGE
from odewei.torch import init_on_demand_weights_model

Change = Callable[[os.stat_result], dict[str, int]]
NBYTES = 3 * PAGE + 1000


def model_fn() -> nn.Module:
    return nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(model_fn().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told once is told in each test."""
    monkeypatch.setattr(told, "_told", set())


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old however young they are."""
    monkeypatch.setattr(file_identity, "_SETTLED_NS", (-(10**12), -(10**12)))


def changed(found: os.stat_result, **values: int) -> os.stat_result:
    """The same with other numbers; times in nanoseconds."""
    numbers = list(found)
    numbers[1] = values.get("inode", found.st_ino)
    names = ("st_atime", "st_mtime", "st_ctime", "st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks")
    rest = {name: getattr(found, name) for name in (*names, "st_rdev")}
    for name in ("mtime", "ctime"):
        if name in values:
            rest |= {f"st_{name}_ns": values[name], f"st_{name}": values[name] / 1e9}
    return os.stat_result(numbers, rest)


def answer_with(monkeypatch: pytest.MonkeyPatch, change: Change, *, calls: Sequence[str] = ("stat", "fstat")) -> None:
    """Have the system's answers changed, of regular files only."""
    for name in calls:
        monkeypatch.setattr(os, name, functools.partial(_answer, change, getattr(os, name)))


def _answer(change: Change, real: Callable[..., os.stat_result], *given: object, **options: object) -> os.stat_result:
    found = real(*given, **options)
    return changed(found, **change(found)) if found.st_mode & 0o100000 else found


def streamed_equals_resident(folder: Path, depth: int | str) -> bool:
    """Two passes of a streamed model, which reads again, beside the ordinary one."""
    resident = model_fn()
    resident.load_state_dict(load_file(folder / "model.safetensors"))
    streamed = init_on_demand_weights_model(model_fn, folder, memory_budget=16_000, prefetch_depth=depth)
    x = torch.ones(2, 40)
    with torch.no_grad():
        same = all(torch.equal(streamed(x), resident(x)) for _ in range(2))
    odewei.close(streamed)
    return same


LOOKS = itertools.count(10**6)
ODD: dict[str, tuple[Change, Sequence[str]]] = {
    "another number at every look": (lambda found: {"inode": next(LOOKS)}, ("stat", "fstat")),
    "another number at every look at a path": (lambda found: {"inode": next(LOOKS)}, ("stat",)),
    "another number at every look at a descriptor": (lambda found: {"inode": next(LOOKS)}, ("fstat",)),
    "no number of a descriptor": (lambda found: {"inode": 0}, ("fstat",)),
    "other numbers of descriptors than of paths": (lambda found: {"inode": found.st_ino + 7}, ("fstat",)),
    "no numbers": (lambda found: {"inode": 0}, ("stat", "fstat")),
    "another time of the last change at every look": (
        lambda found: {"ctime": found.st_ctime_ns + next(LOOKS)},
        ("stat", "fstat"),
    ),
    "both": (
        lambda found: {"inode": next(LOOKS), "ctime": found.st_ctime_ns + next(LOOKS)},
        ("stat", "fstat"),
    ),
}


@pytest.mark.parametrize("depth", [0, "auto"])
@pytest.mark.parametrize("case", sorted(ODD))
def test_numbers_that_move_are_no_changes(
    case: str, depth: int | str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model streams from a file system whose numbers or times move by themselves; that is said once at most."""
    change, calls = ODD[case]
    answer_with(monkeypatch, change, calls=calls)
    with caplog.at_level(logging.INFO, "odewei"):
        assert streamed_equals_resident(folder, depth)
    assert len([record for record in caplog.records if "the file system of" in record.message]) <= 1


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "change",
    [
        lambda found: {"inode": found.st_ino + 7},
        lambda found: {name: time // 10**9 * 10**9 for name, time in _times(found)},
        lambda found: {name: time // 100 * 100 for name, time in _times(found)},
        lambda found: {"inode": 5} | {name: time // 10**6 * 10**6 for name, time in _times(found)},
    ],
    ids=["number", "seconds", "100 ns", "both"],
)
def test_numbers_given_anew_and_times_rounded_are_no_changes(
    change: Change, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a file system forgets, or rounds when it writes it to its disk, after the header was read, is told once."""
    loader = open_checkpoint(folder)
    loader.weights()
    answer_with(monkeypatch, change)
    with caplog.at_level(logging.WARNING, "odewei"):
        found = loader("", list(loader.weights()))
    expected = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(caplog.records) == 1


def _times(found: os.stat_result) -> tuple[tuple[str, int], ...]:
    return ("mtime", found.st_mtime_ns), ("ctime", found.st_ctime_ns)


@pytest.mark.usefixtures("settled")
def test_another_file_of_the_same_size_and_time_is_another(folder: Path) -> None:
    """Where numbers stay, one that differs is another file, though somebody gave it the old one's time."""
    path = folder / "model.safetensors"
    loader = open_checkpoint(folder)
    loader.weights()
    before = path.stat()
    other = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(other, folder / "new")
    os.replace(folder / "new", path)
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(WeightReadError, match=r"changed|replaced"):
        loader("", ["0.weight"])


def test_a_young_file_is_not_told_by_its_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was changed just now may change again within a tick of the clock: another number is another file."""
    monkeypatch.setattr(file_identity, "_SETTLED_NS", (10**15, 10**15))
    loader = open_checkpoint(folder)
    loader.weights()
    answer_with(monkeypatch, lambda found: {"inode": found.st_ino + 7})
    with pytest.raises(WeightReadError, match="changed"):
        loader("", ["0.weight"])


# -- direct reads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> CheckpointFile:
    path = tmp_path / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(NBYTES))
    return CheckpointFile.stat(path)


@pytest.fixture
def files() -> Iterator[FileTable]:
    table = FileTable(direct=True, scratch_bytes=8 * PAGE)
    yield table
    table.close()


def read_all(files: FileTable, file: CheckpointFile) -> bytes:
    scratch = files.scratch()
    scratch[:] = 0
    files.read(file, [scratch[:PAGE], scratch[PAGE : 5 * PAGE]], 0, file.size)
    return bytes(scratch[: file.size])


def is_direct(fd: int) -> bool:
    fcntl = pytest.importorskip("fcntl")
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    "code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EFAULT, errno.EPERM, errno.ENOSYS, 0]
)
def test_direct_reads_that_are_refused_are_done_through_the_page_cache(
    code: int,
    after: int,
    files: FileTable,
    file: CheckpointFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error that means "not directly", or no bytes where there are some, at once or midway: buffered, said once."""
    real, done = os.preadv, [0]

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not is_direct(fd):
            return real(fd, buffers, offset)
        done[0] += 1
        if done[0] <= after:
            return real(fd, [buffers[0][:PAGE]], offset)
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    monkeypatch.setattr(os, "preadv", preadv)
    with caplog.at_level(logging.INFO, "odewei"):
        for _ in range(3):
            assert read_all(files, file) == file.path.read_bytes()
    assert done[0] == after + 1
    assert len([record for record in caplog.records if "does not read directly" in record.message]) == 1


def test_a_file_that_gives_no_bytes_at_all_is_an_error(
    files: FileTable, file: CheckpointFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the second way gives none either, that is said, and nothing is tried for ever."""
    calls: list[int] = []
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: calls.append(fd) or 0)
    with pytest.raises(WeightReadError, match="too early"):
        read_all(files, file)
    assert len(calls) <= 4


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS])
def test_direct_opens_that_are_refused_are_plain_ones(
    code: int, files: FileTable, file: CheckpointFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that opens for ordinary reads only is read in the ordinary way."""
    real = os.open

    def refusing(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    assert read_all(files, file) == file.path.read_bytes()


# -- maps ------------------------------------------------------------------------------------------------------------


def test_a_mapped_file_is_private(file: CheckpointFile) -> None:
    """What is written into the map is in the map only."""
    before = file.path.read_bytes()
    found = map_file(file)
    assert found is not None
    assert found[:] == before
    found[:4] = b"mine"
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EACCES, errno.ENOMEM, errno.EPERM, errno.ENOSYS])
def test_a_file_that_cannot_be_mapped_is_none_and_reads(
    code: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller is told to read instead, and can; the log has it once."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(mmap, "mmap", refuse)
    info = open_checkpoint(folder).weights()["0.bias"]
    assert info.span is not None
    with caplog.at_level(logging.INFO, "odewei"):
        assert [map_file(info.span.file) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    buffer = bytearray(info.nbytes)
    read_span(info, memoryview(buffer))
    assert bytes(buffer) == load_file(folder / "model.safetensors")["0.bias"].numpy().tobytes()


def test_what_is_not_there_cannot_be_mapped(file: CheckpointFile, tmp_path: Path) -> None:
    """A file that is gone or changed is an error; an empty one has nothing to map."""
    (tmp_path / "empty").touch()
    assert map_file(CheckpointFile.stat(tmp_path / "empty")) is None
    os.truncate(file.path, 10)
    with pytest.raises(WeightReadError, match="10 now"):
        map_file(file)
    file.path.unlink()
    with pytest.raises(WeightReadError, match="no longer be opened"):
        map_file(file)


# -- files that are replaced while a model streams -------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def table(request: pytest.FixtureRequest) -> Iterator[FileTable]:
    made = FileTable(direct=request.param, scratch_bytes=8 * PAGE)
    yield made
    made.close()


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(bytes(NBYTES))
    path.with_name("new").replace(path)


def remove_and_write(path: Path) -> None:
    path.unlink()
    path.write_bytes(bytes(17))


@pytest.mark.parametrize("change", [replace, remove_and_write, Path.unlink])
def test_a_file_that_is_held_goes_on_being_read(
    table: FileTable, file: CheckpointFile, change: Callable[[Path], None]
) -> None:
    """What was there when it was held is read, whatever is at its path; after ``close`` the path counts again."""
    right = file.path.read_bytes()
    table.hold([file])
    change(file.path)
    for _ in range(2):
        assert read_all(table, file) == right
    table.close()
    with pytest.raises(WeightReadError):
        read_all(table, file)


def test_a_held_file_falls_back_to_itself(
    table: FileTable, file: CheckpointFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a direct read is refused after the file was replaced, the old one is read in the other way."""
    right, real = file.path.read_bytes(), os.preadv
    table.hold([file])
    replace(file.path)

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_all(table, file) == right


def test_a_held_file_that_is_written_into_is_noticed(table: FileTable, file: CheckpointFile) -> None:
    """Holding keeps a file from being replaced, not from being overwritten: that is an error, and never other bytes."""
    table.hold([file])
    with open(file.path, "r+b") as stream:
        stream.write(b"other")
        os.utime(stream.fileno(), ns=(1, 1))
    with pytest.raises(WeightReadError, match="changed while the model was using it"):
        read_all(table, file)


def test_what_is_not_as_it_was_cannot_be_held(table: FileTable, file: CheckpointFile) -> None:
    """A file that is another by then is an error at once."""
    replace(file.path)
    with pytest.raises(WeightReadError):
        table.hold([file])


@pytest.mark.parametrize("how", ["replaced", "written into"])
def test_the_cure_of_a_changed_file_works(how: str, folder: Path) -> None:
    """The error says that the model can be built again from what is there now; then it can."""
    path = folder / "model.safetensors"
    streamed = init_on_demand_weights_model(model_fn, folder, memory_budget=16_000)
    x = torch.ones(2, 40)
    with torch.no_grad():
        streamed(x)
        new = {name: tensor * 2 for name, tensor in load_file(path).items()}
        if how == "replaced":
            save_file(new, folder / "new")
            os.replace(folder / "new", path)
        else:
            content = path.read_bytes()
            path.write_bytes(content[: -len(content) // 2] + bytes(len(content) - len(content) // 2 - 1))
            save_file(new, path)
        with pytest.raises(WeightReadError, match=r"build the model again from the new one.*another folder"):
            streamed(x)
        resident = model_fn()
        resident.load_state_dict(new)
        again = init_on_demand_weights_model(model_fn, folder, memory_budget=16_000)
        assert torch.equal(again(x), resident(x))
    for model in (streamed, again):
        with contextlib.suppress(WeightReadError):
            odewei.close(model)
