"""Reading when disks and files misbehave: faults at the seam to the system."""

import errno
import gc
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from odewei.errors import MissingWeightError, WeightReadError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo, WeightsLoader
from odewei.scheduler import read_plan
from odewei.scheduler.host_memory import PAGE, Bytes
from odewei.scheduler.reader import FileTable, PlannedUnit, open_direct, tensors_over
from odewei.scheduler.reads import Placement, ReadSettings, Wanted
from tests.files import write_unseen

NBYTES = 3 * PAGE + 1000
Preadv = Callable[[int, Sequence[memoryview], int], int]


class System:
    """Stands before ``os.preadv``. After ``skipped`` calls ``faults`` are raised in turn; then at most ``most`` bytes
    come at a time.
    """

    def __init__(self, preadv: Preadv) -> None:
        self._preadv = preadv
        self.faults: list[int] = []
        self.skipped = 0  # calls before the first fault
        self.most = 1 << 30
        self.calls: list[tuple[int, int]] = []  # file descriptor, offset

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.calls.append((fd, offset))
        self.skipped -= 1
        if self.faults and self.skipped < 0:
            raise OSError(self.faults[0], os.strerror(self.faults.pop(0)))
        room = itertools.accumulate(
            (len(buffer) for buffer in buffers), lambda left, size: left - size, initial=self.most
        )
        return self._preadv(fd, [buffer[: max(0, left)] for buffer, left in zip(buffers, room, strict=False)], offset)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    fake = System(os.preadv)
    monkeypatch.setattr(os, "preadv", fake.preadv)
    return fake


@pytest.fixture
def file(tmp_path: Path) -> CheckpointFile:
    path = tmp_path / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(NBYTES))
    return CheckpointFile.stat(path)


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def files(request: pytest.FixtureRequest) -> Iterator[FileTable]:
    table = FileTable(direct=request.param, scratch_bytes=8 * PAGE)
    yield table
    table.close()


def read_all(files: FileTable, file: CheckpointFile) -> bytes:
    """The whole file through two buffers of whole pages, as a shifted read does."""
    scratch = files.scratch()
    scratch[:] = 0
    files.read(file, [scratch[:PAGE], scratch[PAGE : 5 * PAGE]], 0, file.size)
    return bytes(scratch[: file.size])


def unit_of(file: CheckpointFile, *, direct: bool, nbytes: int = NBYTES) -> PlannedUnit:
    info = WeightInfo("w", torch.uint8, (nbytes,), Span(file, 0, nbytes))
    return PlannedUnit([Wanted("w", info, torch.uint8)], ReadSettings(direct), NoLoader())


def run_all(unit: PlannedUnit, files: FileTable) -> None:
    for job in unit.jobs():
        job.run(np.zeros(unit.nbytes, np.uint8), files)


class NoLoader(WeightsLoader):
    """Delivers nothing; ``error`` is what it raises."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self._error = error

    def weights(self) -> dict[str, WeightInfo]:
        return {}

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        raise self._error or AssertionError("every weight is in a file")


@pytest.mark.parametrize("most", [PAGE, 1000, 1])
def test_short_reads_go_on_where_they_ended(system: System, files: FileTable, file: CheckpointFile, most: int) -> None:
    """However few bytes come at a time, and at whatever odd offset it has to go on, all arrive in order."""
    system.most = most
    assert read_all(files, file) == file.path.read_bytes()
    assert len(system.calls) >= NBYTES // most


@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_passing_disk_error_is_tried_again(
    system: System, files: FileTable, file: CheckpointFile, failures: int, code: int
) -> None:
    """An EIO or EINTR, or two, are survived."""
    system.faults = [code] * failures
    assert read_all(files, file) == file.path.read_bytes()


@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR, errno.EBADMSG, errno.ESTALE])
def test_a_lasting_disk_error_names_the_file(system: System, files: FileTable, file: CheckpointFile, code: int) -> None:
    """Tries are bounded; the error names the file and chains the system's. Later reads are not affected."""
    system.faults = [code] * 3
    with pytest.raises(WeightReadError, match=os.strerror(code)) as caught:
        read_all(files, file)
    assert caught.value.file == str(file.path)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(system.calls) == (3 if code in (errno.EIO, errno.EINTR) else 1)
    system.faults = []
    assert read_all(files, file) == file.path.read_bytes()


def test_a_refused_direct_read_falls_back(system: System, file: CheckpointFile) -> None:
    """A file system that opens for direct reads and then refuses them is read through the page cache from then on."""
    files = FileTable(direct=True, scratch_bytes=8 * PAGE)
    system.faults = [errno.EINVAL]
    assert read_all(files, file) == file.path.read_bytes()
    assert read_all(files, file) == file.path.read_bytes()
    assert len({fd for fd, _ in system.calls[1:]}) == 1, "the second descriptor is used once and for all"
    assert system.calls[0][0] != system.calls[1][0]
    files.close()


def test_a_buffered_file_has_nothing_to_fall_back_to(system: System, file: CheckpointFile) -> None:
    """EINVAL of a buffered read is an error, not a reason to try for ever."""
    files = FileTable(direct=False, scratch_bytes=8 * PAGE)
    system.faults = [errno.EINVAL]
    with pytest.raises(WeightReadError):
        read_all(files, file)
    files.close()
    files = FileTable(direct=True, scratch_bytes=8 * PAGE)
    system.faults = [errno.EINVAL] * 2
    with pytest.raises(WeightReadError):
        read_all(files, file)
    files.close()


@pytest.mark.parametrize(("code", "opens"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EACCES, False)])
def test_a_refused_direct_open_falls_back(
    monkeypatch: pytest.MonkeyPatch, file: CheckpointFile, code: int, opens: bool
) -> None:
    """Where direct reads cannot be had the file is opened without; other errors are errors that name the file."""
    real_open = os.open

    def refusing(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    files = FileTable(direct=True, scratch_bytes=8 * PAGE)
    if opens:
        assert read_all(files, file) == file.path.read_bytes()
    else:
        with pytest.raises(WeightReadError, match=os.strerror(code)) as caught:
            read_all(files, file)
        assert caught.value.file == str(file.path)
    files.close()


def test_an_opener_for_direct_reads_asks_for_them(file: CheckpointFile) -> None:
    """Unless refused, the descriptor reads past the page cache."""
    import fcntl

    fd = open_direct(str(file.path), os.O_RDONLY)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    os.close(fd)


def cut(path: Path) -> None:
    os.truncate(path, 5000)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [cut, touch, replace, remove])
def test_a_file_that_is_not_the_same_any_more_is_noticed(
    files: FileTable, file: CheckpointFile, change: Callable[[Path], None]
) -> None:
    """Cut, written, replaced or gone since its header was read: the read raises, and the error names the file."""
    change(file.path)
    with pytest.raises(WeightReadError) as caught:
        read_all(files, file)
    assert caught.value.file == str(file.path)


@pytest.mark.parametrize("change", [cut, touch, replace, remove])
def test_a_file_that_changes_while_it_is_open_is_noticed(
    files: FileTable, file: CheckpointFile, change: Callable[[Path], None]
) -> None:
    """A change under the open descriptor, or of what its path leads to, is noticed by the next read."""
    read_all(files, file)
    change(file.path)
    with pytest.raises(WeightReadError, match=r"original file back"):
        read_all(files, file)


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_file_that_is_put_back_is_found_again(files: FileTable, file: CheckpointFile, opened_before: bool) -> None:
    """Another file at its path is refused, however often; when the original is there again it is read."""
    right = file.path.read_bytes()
    if opened_before:
        assert read_all(files, file) == right
    file.path.rename(file.path.with_name("aside"))
    file.path.write_bytes(bytes(NBYTES))
    for _ in range(2):
        with pytest.raises(WeightReadError):
            read_all(files, file)
    file.path.with_name("aside").rename(file.path)
    assert read_all(files, file) == right


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("times", [1, 9])
def test_what_is_changed_and_put_back_during_a_read(
    files: FileTable, file: CheckpointFile, times: int, opened_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that were there for a moment are not handed on, though the file is the same before and after: it is read
    again, and where that happens again and again it is an error.
    """
    right = file.path.read_bytes()
    if opened_before:
        assert read_all(files, file) == right
    preadv, left = os.preadv, [times]

    def rewritten(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not left[0]:
            return preadv(fd, buffers, offset)
        left[0] -= 1
        write_unseen(file.path, bytes(NBYTES))
        found = preadv(fd, buffers, offset)
        write_unseen(file.path, right)
        return found

    monkeypatch.setattr(os, "preadv", rewritten)
    if times == 1:
        assert read_all(files, file) == right
        return
    with pytest.raises(WeightReadError, match=r"put back while it was being read.*weights\.bin"):
        read_all(files, file)
    left[0] = 0
    assert read_all(files, file) == right


@pytest.mark.usefixtures("no_new_files")
def test_after_an_error_no_file_is_left_open(system: System, files: FileTable, file: CheckpointFile) -> None:
    """After a failure the descriptor is closed with the error, and the next read opens the file again."""
    before = set(os.listdir("/proc/self/fd"))
    system.faults = [errno.ESTALE]
    with pytest.raises(WeightReadError, match="again"):
        read_all(files, file)
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert read_all(files, file) == file.path.read_bytes()
    files.close()


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EBADF, errno.ESPIPE])
def test_a_descriptor_that_was_lost_is_opened_again(
    system: System, files: FileTable, file: CheckpointFile, code: int
) -> None:
    """One from an earlier read that fails now is given up, and the read succeeds with a fresh one."""
    assert read_all(files, file) == file.path.read_bytes()
    system.faults = [code]
    assert read_all(files, file) == file.path.read_bytes()
    fd = files.opened(file).fd
    os.close(fd)
    stranger = os.open(os.devnull, os.O_RDONLY)  # may have got its number
    assert read_all(files, file) == file.path.read_bytes()
    if stranger != fd:
        os.close(stranger)


def test_a_file_given_up_is_not_closed_under_a_reader(files: FileTable, file: CheckpointFile) -> None:
    """Whoever has the descriptor goes on with it; the next one gets another."""
    mine = files.opened(file)
    files.give_up(file, mine)
    assert os.fstat(mine.fd).st_ino == file.inode
    fresh = files.opened(file)
    assert fresh.fd != mine.fd
    files.give_up(file, mine)  # another thread meets the same trouble later
    assert files.opened(file) is fresh


def test_a_number_that_was_another_files_meanwhile(
    files: FileTable, file: CheckpointFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody closes a descriptor; its number is another file's while it is read from, and the right one's when that
    is looked at: what was read is not handed on.
    """
    (tmp_path / "other").write_bytes(bytes(NBYTES))
    other = CheckpointFile.stat(tmp_path / "other")
    tables = [FileTable(direct=False, scratch_bytes=PAGE) for _ in range(2)]
    fd = files.opened(file).fd
    os.close(fd)
    assert tables[0].opened(other).fd == fd, "the lowest number that is free"
    real, hits = os.preadv, list[int]()

    def preadv(number: int, buffers: list[memoryview], offset: int) -> int:
        count = real(number, buffers, offset)
        if not hits:
            hits.append(number)
            tables[0].close()
            assert tables[1].opened(file).fd == fd
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_all(files, file) == file.path.read_bytes()
    assert hits == [fd]
    for table in tables:
        table.close()


@pytest.mark.parametrize("seen", ["before its number is used again", "afterwards", "never"])
def test_what_somebody_has_closed_is_not_closed_again(files: FileTable, file: CheckpointFile, seen: str) -> None:
    """Its number may be another file's by then, the same file opened by somebody else included."""
    mine = files.opened(file)
    fd = mine.fd
    os.close(fd)
    if seen == "before its number is used again":
        files.give_up(file, mine)
    stranger = os.open(file.path if seen == "before its number is used again" else os.devnull, os.O_RDONLY)
    assert stranger == fd, "the lowest number that is free"
    if seen == "afterwards":
        files.give_up(file, mine)
    else:
        files.close()
    del mine
    os.fstat(stranger)
    os.close(stranger)


@pytest.mark.parametrize(
    ("code", "cure"), [(errno.EMFILE, "ulimit -n"), (errno.ENOMEM, "ulimit -v"), (errno.ESTALE, "mount")]
)
def test_the_cure_is_that_of_the_cause(system: System, file: CheckpointFile, code: int, cure: str) -> None:
    """Too many files, too little memory and a lost network file ask for different things; the weight is named."""
    files = FileTable(direct=False, scratch_bytes=PAGE)
    unit = unit_of(file, direct=False)
    system.faults = [code]
    with pytest.raises(WeightReadError, match=cure) as caught:
        unit.jobs()[0].run(np.zeros(unit.nbytes, np.uint8), files)
    assert (caught.value.weight, caught.value.file) == ("w", str(file.path))
    assert isinstance(caught.value.__cause__, OSError)
    files.close()


def test_the_weight_whose_bytes_fail_is_named(system: System, file: CheckpointFile, tmp_path: Path) -> None:
    """Of a unit of several weights, the error names the one that the failing read was for."""
    (tmp_path / "other").write_bytes(bytes(NBYTES))
    both = {"a": file, "b": CheckpointFile.stat(tmp_path / "other")}
    infos = [WeightInfo(name, torch.uint8, (NBYTES,), Span(one, 0, NBYTES)) for name, one in both.items()]
    unit = PlannedUnit([Wanted(i.name, i, torch.uint8) for i in infos], ReadSettings(False), NoLoader())
    named = {}
    for skipped in range(len(both)):
        files = FileTable(direct=False, scratch_bytes=PAGE)
        system.skipped, system.faults = skipped, [errno.EBADMSG]
        with pytest.raises(WeightReadError) as caught:
            run_all(unit, files)
        named[caught.value.weight] = caught.value.file
        files.close()
    assert named == {name: str(one.path) for name, one in both.items()}


def test_a_header_that_promises_too_much_is_noticed(files: FileTable, file: CheckpointFile) -> None:
    """A read that ends with the file before everything has come says how much is missing."""
    with pytest.raises(WeightReadError, match="7 bytes too early"):
        files.read(file, [files.scratch()], 0, NBYTES + 7)


def test_a_table_opens_each_file_once_and_again_after_close(files: FileTable, file: CheckpointFile) -> None:
    """A descriptor is kept and shared; after close it is opened anew."""
    assert not files.is_open(file)
    fd = files.opened(file).fd
    assert files.is_open(file)
    assert files.opened(file).fd == fd
    files.close()
    files.close()
    assert not files.is_open(file)
    assert read_all(files, file) == file.path.read_bytes()


@given(most=st.integers(1, 3 * PAGE), offset=st.integers(0, 300), direct=st.booleans())
@example(most=PAGE, offset=40, direct=True)  # what comes at a time ends where a chunk does
@settings(deadline=None, max_examples=30)
def test_shifted_reads_survive_short_ones(
    tmp_path_factory: pytest.TempPathFactory, most: int, offset: int, direct: bool
) -> None:
    """A unit whose bytes are moved after reading is right whatever the system returns at a time."""
    path = tmp_path_factory.mktemp("short") / "weights.bin"
    path.write_bytes(np.random.default_rng(offset).bytes(offset + NBYTES))
    file = CheckpointFile.stat(path)
    info = WeightInfo("w", torch.uint8, (NBYTES,), Span(file, offset, NBYTES))
    files = FileTable(direct=direct, scratch_bytes=8192)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_plan, "_IN_PLACE_FROM", 1)
        unit = PlannedUnit([Wanted("w", info, torch.uint8)], ReadSettings(direct, 8192, 8192), NoLoader())
        system = System(os.preadv)
        system.most = most
        patch.setattr(os, "preadv", system.preadv)
        slab = np.frombuffer(bytearray(unit.nbytes), np.uint8)
        for job in unit.jobs():
            job.run(slab, files)
    files.close()
    assert bytes(unit.tensors(slab)["w"].numpy()) == path.read_bytes()[offset:]


@pytest.mark.parametrize("error", [MissingWeightError("gone", weight="w"), ValueError("odd")])
def test_the_error_of_a_loader_is_told(error: Exception) -> None:
    """Errors of the library pass as they are; others are chained to one that names the weight."""
    info = WeightInfo("w", torch.uint8, (5,), None)
    unit = PlannedUnit([Wanted("w", info, torch.uint8)], ReadSettings(False), NoLoader(error))
    (job,) = unit.jobs()
    assert list(job.files()) == []
    with pytest.raises((MissingWeightError, WeightReadError)) as caught:
        job.run(np.zeros(unit.nbytes, np.uint8), FileTable(direct=False, scratch_bytes=PAGE))
    assert caught.value is error or caught.value.__cause__ is error
    assert caught.value.weight == "w"


def test_jobs_say_which_files_they_need(file: CheckpointFile) -> None:
    """Whoever runs a job can open its files before; it returns the bytes it has read."""
    (job,) = unit_of(file, direct=False).jobs()
    assert list(job.files()) == [file]
    files = FileTable(direct=False, scratch_bytes=PAGE)
    assert job.run(np.zeros(unit_of(file, direct=False).nbytes, np.uint8), files) == NBYTES
    files.close()


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_can_be_trained_through_whatever_the_mode(inference: bool) -> None:
    """Tensors made in inference mode are ordinary ones; each has a storage of its own over the slab."""
    slab: Bytes = np.zeros(256, np.uint8)
    places = [Placement(name, offset, torch.float32, (4,), None) for name, offset in (("a", 0), ("b", 64))]
    with torch.inference_mode(inference):
        tensors = tensors_over(slab, places)
    assert not any(tensor.is_inference() for tensor in tensors.values())
    assert tensors["a"].untyped_storage().data_ptr() != tensors["b"].untyped_storage().data_ptr()
    slab[64:80] = np.ones(4, np.float32).view(np.uint8)
    assert tensors["b"].tolist() == [1, 1, 1, 1]
    assert (torch.nn.Parameter(tensors["b"]) * 2).requires_grad
