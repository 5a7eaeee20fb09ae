"""Plans for reading units, made and done: against plain slices of the file."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from odewei.loaders import Concat, GatheringLoader, Recipe, Stack, view_as_weight
from odewei.loaders.base import CheckpointFile, Span, WeightInfo, WeightsLoader
from odewei.loaders.file_loader import read_span
from odewei.loaders.tensors import contiguous_stride
from odewei.scheduler import gather_plan
from odewei.scheduler import read_plan as module
from odewei.scheduler.budget import Budget
from odewei.scheduler.host_memory import PAGE
from odewei.scheduler.read_plan import UnitReadPlan
from odewei.scheduler.reader import FileTable, PlannedUnit
from odewei.scheduler.reads import CopiedRead, LoaderRead, PlacedRead, ReadSettings, Wanted
from odewei.scheduler.slab import ALIGNMENT
from odewei.scheduler.slabs import SlabPool
from tests.recipes import made_by_torch, recipes

CHUNK = SCRATCH = 8192
DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.bool]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (3, 0, 2), (1,), (5, 7)]),
    st.integers(1, 9000).map(lambda size: (size,)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
)


@dataclass(frozen=True)
class Stored:
    """A weight of a random file: ``gap`` bytes lie before it, in file ``where``, if in any."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    gap: int
    where: str  # "a", "b": a file; "loader": only the loader has it; "same": where the weight before it is
    target: torch.dtype | None  # what floats are cast to
    gaps_within: bool  # strides that leave gaps

    @property
    def stride(self) -> tuple[int, ...] | None:
        return (self.shape[1] + 3, 1) if self.gaps_within and len(self.shape) == 2 else None

    @property
    def wanted(self) -> torch.dtype:
        return self.target if self.target is not None and self.dtype.is_floating_point else self.dtype


GAPS = st.one_of(st.just(0), st.integers(0, 200), st.integers(4000, 9000), st.sampled_from([64, 4096]))
STORED = st.builds(
    Stored,
    st.sampled_from(DTYPES),
    SHAPES,
    GAPS,
    st.sampled_from(["a", "a", "a", "b", "loader", "same"]),
    st.one_of(st.none(), st.none(), st.sampled_from(FLOATS)),
    st.booleans(),
)


class Case:
    """Random files with these weights in them, their loader, and the unit of all of them."""

    def __init__(self, folder: Path, stored: list[Stored], seed: int) -> None:
        self.noise = random.Random(seed)
        self.bytes: dict[str, bytearray] = {"a": bytearray(), "b": bytearray()}
        self.stored = stored
        self.of_loader: dict[str, bytes] = {}
        places = [self._put(index, weight) for index, weight in enumerate(stored)]
        self.files: dict[str, CheckpointFile] = {}
        for name, content in self.bytes.items():
            (folder / name).write_bytes(content)
            self.files[name] = CheckpointFile.stat(folder / name)
        self.wanted = [Wanted(info.name, info, weight.wanted) for info, weight in self._infos(places)]

    def _put(self, index: int, weight: Stored) -> tuple[str, int] | None:
        nbytes = self._info(index, weight, None).nbytes
        if weight.where == "loader":
            self.of_loader[f"w{index}"] = self._random(nbytes, weight.dtype)
            return None
        content = self.bytes["b" if weight.where == "b" else "a"]
        if weight.where == "same" and len(content) >= nbytes:
            start = len(content) - nbytes
        else:
            content += self.noise.randbytes(weight.gap)
            start = len(content)
            content += self._random(nbytes, weight.dtype)
        return ("b" if weight.where == "b" else "a"), start

    def _random(self, nbytes: int, dtype: torch.dtype) -> bytes:
        if dtype == torch.bool:
            return bytes(self.noise.choices((0, 1), k=nbytes))
        return self.noise.randbytes(nbytes)

    def _info(self, index: int, weight: Stored, span: Span | None) -> WeightInfo:
        return WeightInfo(f"w{index}", weight.dtype, weight.shape, span, weight.stride)

    def _infos(self, places: list[tuple[str, int] | None]) -> Iterator[tuple[WeightInfo, Stored]]:
        for index, (weight, place) in enumerate(zip(self.stored, places, strict=True)):
            span = None
            if place is not None:
                span = Span(self.files[place[0]], place[1], self._info(index, weight, None).nbytes)
            yield self._info(index, weight, span), weight

    def expected(self, wanted: Wanted) -> torch.Tensor:
        """The weight by the plain way: a slice of the file, cast by torch."""
        info = wanted.info
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=wanted.dtype)
        if info.span is None:
            raw = self.of_loader[info.name]
        else:
            raw = info.span.file.path.read_bytes()[info.span.offset : info.span.offset + info.span.nbytes]
        flat = torch.frombuffer(bytearray(raw), dtype=info.dtype)
        tensor = flat.view(info.shape) if info.stride is None else flat.as_strided(info.shape, info.stride)
        return tensor.to(wanted.dtype)


class CaseLoader(WeightsLoader):
    """Delivers the weights of a case that are in no file."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._case = case

    def weights(self) -> dict[str, WeightInfo]:
        return {}

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        buffer[:] = self._case.of_loader[info.name]


def execute(case: Case, plan: UnitReadPlan, *, direct: bool, order: random.Random) -> dict[str, torch.Tensor]:
    """Run the jobs of the case's plan in random order into memory that held something else before."""
    return execute_with(case.wanted, CaseLoader(case), plan, direct=direct, order=order)


def execute_with(
    wanted: list[Wanted], loader: WeightsLoader, plan: UnitReadPlan, *, direct: bool, order: random.Random
) -> dict[str, torch.Tensor]:
    files = FileTable(direct=direct, scratch_bytes=SCRATCH)
    files.scratch()[:] = 0xAA
    pool = SlabPool(Budget(plan.nbytes))
    slab = pool.acquire("unit", plan.nbytes)
    assert slab is not None
    view = pool.lend(slab)
    view[:] = 0x55
    reader = PlannedUnit(wanted, ReadSettings(direct, CHUNK, SCRATCH), loader)
    assert reader.nbytes == plan.nbytes
    assert reader.plan == plan
    jobs = list(reader.jobs())
    order.shuffle(jobs)
    for job in jobs:
        job.run(view, files)
    files.close()
    return reader.tensors(view)


def check_reads(plan: UnitReadPlan, *, direct: bool) -> None:
    """Every read stays within its slab and scratch; direct ones have whole pages on both sides."""
    for read in (read for job in plan.jobs for read in job):
        if isinstance(read, PlacedRead):
            assert 0 <= read.slab_offset <= read.slab_offset + read.nbytes <= plan.nbytes
            assert 0 < read.needed <= read.nbytes + (PAGE if read.shift else 0)
            assert read.offset + read.needed <= read.file.size
            assert read.nbytes <= CHUNK
            assert not direct or (read.offset % PAGE, read.nbytes % PAGE, read.slab_offset % PAGE) == (0, 0, 0)
        elif isinstance(read, CopiedRead):
            assert read.needed <= read.nbytes <= SCRATCH
            assert read.offset + read.needed <= read.file.size
            assert not direct or (read.offset % PAGE, read.nbytes % PAGE) == (0, 0)
            assert all(part.scratch_offset + part.nbytes <= read.needed for part in read.parts)
        else:
            start = read.slab_offset if read.staging_offset is None else read.staging_offset
            assert start + read.nbytes <= plan.nbytes


def check_placements(plan: UnitReadPlan, wanted: list[Wanted]) -> None:
    """Tensors are aligned, in the slab, and apart from each other."""
    sizes = {weight.name: weight.nbytes for weight in wanted}
    assert [place.name for place in plan.placements] == [weight.name for weight in wanted]
    end = 0
    for place in sorted((place for place in plan.placements if sizes[place.name]), key=lambda place: place.offset):
        assert place.offset % ALIGNMENT == 0
        assert place.offset >= end, "two tensors share bytes"
        end = place.offset + sizes[place.name]
    assert end <= plan.nbytes


def same_bytes(found: torch.Tensor, expected: torch.Tensor, *, cast: bool) -> bool:
    """Byte for byte. After a cast a NaN is as good as another: torch's own depend on where in the tensor they are."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if cast:
        if not torch.equal(found.isnan(), expected.isnan()):
            return False
        found, expected = (tensor.masked_fill(tensor.isnan(), 1) for tensor in (found, expected))
    found, expected = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected))
    return torch.equal(found, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for random files. One thread of torch: many small tensors on busy cores are no work for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("read_plan")
    torch.set_num_threads(threads)


def plain(count: int, *, where: str = "a", gap: int = 0) -> Stored:
    return Stored(torch.uint8, (count,), gap, where, None, False)


@given(
    stored=st.lists(STORED, max_size=8),
    direct=st.booleans(),
    in_place_from=st.sampled_from([1, 2000, 1 << 20]),
    seed=st.integers(0, 99),
)
@example(stored=[plain(20000, gap=24), plain(20000)], direct=True, in_place_from=1, seed=0)  # in chunks, shifted
@example(stored=[plain(8192 + 10, gap=4096 + 32)], direct=True, in_place_from=1, seed=0)  # ends within the shift
@example(stored=[plain(20000), plain(20000, where="same")], direct=True, in_place_from=1, seed=0)
@settings(deadline=None, max_examples=200)
def test_what_is_read_is_what_is_stored(
    folder: Path, stored: list[Stored], direct: bool, in_place_from: int, seed: int
) -> None:
    """Byte for byte and whatever the layout, dtype, order of jobs and way of reading; casts are those of torch."""
    case = Case(folder, stored, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_IN_PLACE_FROM", in_place_from)
        plan = UnitReadPlan.make(case.wanted, ReadSettings(direct, CHUNK, SCRATCH))
        tensors = execute(case, plan, direct=direct, order=random.Random(seed))
    check_placements(plan, case.wanted)
    check_reads(plan, direct=direct)
    for wanted in case.wanted:
        found, expected = tensors[wanted.name], case.expected(wanted)
        assert same_bytes(found, expected, cast=wanted.casts), wanted
        assert found.numel() == 0 or found.data_ptr() % ALIGNMENT == 0
        assert wanted.info.stride is None or 0 in found.shape or found.stride() == wanted.info.stride


@given(
    kind=st.sampled_from(
        [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.half)]
    ),
    count=st.integers(16000, 40000),
    direct=st.booleans(),
)
@settings(deadline=None, max_examples=10)
def test_long_casts_are_those_of_torch(
    folder: Path, kind: tuple[torch.dtype, torch.dtype], count: int, direct: bool
) -> None:
    """Cutting a cast into blocks and scratches changes no bit of it."""
    case = Case(folder, [Stored(kind[0], (count,), 3, "a", kind[1], False)], count)
    plan = UnitReadPlan.make(case.wanted, ReadSettings(direct, CHUNK, SCRATCH))
    found = execute(case, plan, direct=direct, order=random.Random(0))["w0"]
    assert same_bytes(found, case.expected(case.wanted[0]), cast=True)


def reads_of(plan: UnitReadPlan) -> list[PlacedRead | CopiedRead | LoaderRead]:
    return [read for job in plan.jobs for read in job]


def test_large_stretches_are_read_in_place(folder: Path) -> None:
    """A megabyte of neighbours is read in large chunks to where it stays; what is small goes through the scratch."""
    case = Case(folder, [plain(1 << 20, gap=8), plain(1 << 20), plain(100, where="b")], 0)
    plan = UnitReadPlan.make(case.wanted, ReadSettings(True, 1 << 20, 1 << 16))
    kinds = [(type(read), getattr(read, "shift", None)) for read in reads_of(plan)]
    assert kinds == [(PlacedRead, 8), (PlacedRead, 8), (PlacedRead, 8), (CopiedRead, None)]
    assert plan.nbytes <= (2 << 20) + 3 * PAGE


def test_neighbours_are_one_read(folder: Path) -> None:
    """Small weights side by side come with one read, and over small gaps too; a large gap starts another."""
    case = Case(folder, [plain(100), plain(100), plain(100, gap=PAGE), plain(100, gap=PAGE + 1)], 0)
    plan = UnitReadPlan.make(case.wanted, ReadSettings(True, 1 << 20, 1 << 20))
    assert [len(read.parts) for read in reads_of(plan) if isinstance(read, CopiedRead)] == [3, 1]


def test_casts_of_a_loader_share_their_staging_in_one_job(folder: Path) -> None:
    """Weights that pass through one staging place are read in order, by one reader."""
    weights = [Stored(torch.float32, (5000,), 0, "loader", torch.float16, False)] * 3
    case = Case(folder, weights, 0)
    plan = UnitReadPlan.make(case.wanted, ReadSettings(True, CHUNK, SCRATCH))
    staged = [job for job in plan.jobs if any(getattr(read, "staging_offset", None) is not None for read in job)]
    assert len(staged) == 1


def test_a_unit_without_weights_has_an_empty_plan() -> None:
    """Nothing to read, no room needed."""
    plan = UnitReadPlan.make([], ReadSettings(True))
    assert (plan.nbytes, plan.placements, plan.jobs) == (0, (), ())


class Dealt(WeightsLoader):
    """Weights that lie in a file one after another in random order, ``gap`` bytes apart; the last are in no file. Those
    of ``turned`` lie there with strides of their own.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, torch.Tensor],
        gap: int,
        seed: int,
        without_file: int = 0,
        turned: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        noise = random.Random(seed)
        self.tensors = {name: tensor.mT if name in turned else tensor for name, tensor in tensors.items()}
        names = sorted(tensors)
        noise.shuffle(names)
        content = bytearray(noise.randbytes(gap))
        starts: dict[str, int] = {}
        for name in names[: len(names) - without_file]:
            starts[name] = len(content)
            content += self.raw(name) + noise.randbytes(gap)
        (folder / "dealt").write_bytes(content)
        file = CheckpointFile.stat(folder / "dealt")
        self.infos = {
            name: WeightInfo(
                name,
                tensor.dtype,
                tuple(tensor.shape),
                Span(file, starts[name], tensor.nbytes) if name in starts else None,
                tuple(reversed(contiguous_stride(tensor.shape[::-1]))) if name in turned else None,
            )
            for name, tensor in tensors.items()
        }

    def raw(self, name: str) -> bytes:
        return self.tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()

    def weights(self) -> dict[str, WeightInfo]:
        return self.infos

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        if info.span is None:
            buffer[:] = self.raw(info.name)
        else:
            read_span(info, buffer)


@given(
    case=recipes(times=3000),
    kind=st.sampled_from([(torch.uint8, torch.uint8), (torch.float32, torch.float32), (torch.float16, torch.float32)]),
    gap=st.sampled_from([0, 0, 1, 64, 5000]),
    direct=st.booleans(),
    long=st.sampled_from([1, 3000, 1 << 20]),
    most_runs=st.sampled_from([2, 1024]),
    without_file=st.sampled_from([0, 0, 0, 1]),
    turns=st.booleans(),
    seed=st.integers(0, 99),
)
@example(  # long stretches, each with another distance between its places in the file and in the slab
    case=(Stack([Concat(["w0", "w1"]), Concat(["w2", "w3"])]), {f"w{i}": (30_000 + i % 2,) for i in range(4)}),
    kind=(torch.uint8, torch.uint8), gap=1, direct=True, long=1, most_runs=1024, without_file=0, turns=False, seed=3,
)  # fmt: skip
@example(  # sources with strides of their own
    case=(Stack(["w0", "w1"]), {"w0": (30, 20), "w1": (30, 20)}),
    kind=(torch.uint8, torch.uint8), gap=0, direct=True, long=1, most_runs=1024, without_file=0, turns=True, seed=0,
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_what_is_gathered_is_what_the_loader_gathers(
    folder: Path,
    case: tuple[Recipe, dict[str, tuple[int, ...]]],
    kind: tuple[torch.dtype, torch.dtype],
    gap: int,
    direct: bool,
    long: int,
    most_runs: int,
    without_file: int,
    turns: bool,
    seed: int,
) -> None:
    """Planned reads into the right places, the plain twin, and torch's stack and cat all give the same bytes."""
    recipe, shapes = case
    noise = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 200, shape, generator=noise, dtype=torch.uint8).to(kind[0])
        for name, shape in {**shapes, "plain": (5000,)}.items()
    }
    turned = frozenset(name for name, shape in shapes.items() if turns and len(shape) == 2 and 0 not in shape)
    dealt = Dealt(folder, tensors, gap, seed, without_file, turned)
    loader = GatheringLoader(dealt, {"made": recipe})
    infos = loader.weights()
    wanted = [Wanted(name, infos[name], kind[1]) for name in ("made", "plain")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_IN_PLACE_FROM", long)
        patch.setattr(module, "_PLACED_FROM", long)
        patch.setattr(gather_plan, "_MOST_RUNS", most_runs)
        plan = UnitReadPlan.make(wanted, ReadSettings(direct, CHUNK, SCRATCH))
        found = execute_with(wanted, loader, plan, direct=direct, order=random.Random(seed))
    check_placements(plan, wanted)
    check_reads(plan, direct=direct)
    raw = torch.empty(infos["made"].nbytes, dtype=torch.uint8)
    loader.read_into(infos["made"], raw.numpy().data)
    twin = view_as_weight(raw, infos["made"]).to(kind[1])
    assert same_bytes(found["made"], twin, cast=False)
    assert same_bytes(found["made"], made_by_torch(recipe, tensors).to(kind[1]), cast=False)
    assert same_bytes(found["plain"], tensors["plain"].to(kind[1]), cast=False)


def test_experts_are_read_to_where_they_stay(folder: Path) -> None:
    """Large sources of a stacked weight are read in place whatever their offsets, and only their ends are copied; small
    ones that lie side by side come with one read.
    """
    tensors = {f"w{i}": torch.zeros(3 << 19, dtype=torch.uint8) for i in range(4)}
    tensors |= {f"s{i}": torch.zeros(100, dtype=torch.uint8) for i in range(4)}
    made = {"large": Stack(f"w{i}" for i in range(4)), "small": Stack(f"s{i}" for i in range(4))}
    loader = GatheringLoader(Dealt(folder, tensors, 7, 0), made)
    infos = loader.weights()
    wanted = [Wanted(name, infos[name], torch.uint8) for name in made]
    for direct in (True, False):
        plan = UnitReadPlan.make(wanted, ReadSettings(direct, 1 << 20, 1 << 20))
        reads = reads_of(plan)
        placed = [read for read in reads if isinstance(read, PlacedRead)]
        assert not any(isinstance(read, LoaderRead) for read in reads)
        assert sum(read.nbytes for read in placed) > 0.99 * 4 * (3 << 19)
        assert len(placed) == 8
        assert all(read.needed == read.nbytes + read.shift for read in placed)
        assert any(read.shift >= ALIGNMENT for read in placed) == direct
        copied = [read for read in reads if isinstance(read, CopiedRead)]
        assert len(copied) <= 6
        assert sum(read.nbytes for read in copied) <= 6 * 3 * PAGE
        assert plan.nbytes <= sum(info.nbytes for info in infos.values()) + 2 * PAGE


@given(offset=st.integers(0, 10_000), nbytes=st.integers(0, 30_000), place=st.integers(0, 10_000))
def test_a_stretch_is_cut_into_whole_pages_and_its_ends(folder: Path, offset: int, nbytes: int, place: int) -> None:
    """Head, middle and tail are the stretch; the middle is whole pages of the slab, the ends are less than one each."""
    (folder / "pages").write_bytes(b"x")
    file = CheckpointFile.stat(folder / "pages")
    pieces = gather_plan.cut_at_pages(Span(file, offset, nbytes), place)
    assert sum(span.nbytes for span, _ in pieces) == nbytes
    expected = (offset, place)
    for span, at in pieces:
        assert (span.offset, at) == expected
        expected = (span.offset + span.nbytes, at + span.nbytes)
    head, middle, tail = pieces
    assert max(head[0].nbytes, tail[0].nbytes) < PAGE
    assert middle[0].nbytes % PAGE == 0
    assert not middle[0].nbytes or middle[1] % PAGE == 0
