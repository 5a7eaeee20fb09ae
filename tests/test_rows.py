"""A table that is only looked up is read by rows; whatever else is done with it is right, too."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import odewei
from odewei import errors
from odewei.looked_up import LookUps
from odewei.placeholder import Placeholder
from odewei.runtime import runtime_of
from odewei.survey import survey
from odewei.tables import cache_shares, find_tables
from tests import models
from tests.interrupts import Alarm, Interrupt, Interrupter

ROWS, COLUMNS = 4096, 96  # 1.5 MiB of float32
TABLE_BYTES = ROWS * COLUMNS * 4
SMALL = "400kB"


class Net(nn.Module):
    """A table and a few layers."""

    def __init__(self, embed: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = embed if embed is not None else nn.Embedding(ROWS, COLUMNS, padding_idx=5)
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, COLUMNS) for _ in range(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.run(self.embed(ids))

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return hidden


class Scaled(nn.Embedding):
    """As some language models have it: derived, and asking its weight for its dtype."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * torch.tensor(9.75).to(self.weight.dtype)


class Own(nn.Module):
    """A module of a user's that looks up in a parameter of its own, beside another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, COLUMNS))
        self.scale = nn.Parameter(torch.randn(COLUMNS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.table, -1) * self.scale


class Indexed(nn.Embedding):
    """Its rows are taken without F.embedding."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids] + (self.weight.T @ self.weight[:, 0]).sum()


class Bagged(nn.Embedding):
    """It sums rows."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(ids, self.weight, mode="sum")


class Bag(nn.EmbeddingBag):
    """The module of torch that sums rows."""


class HeadOf(Net):
    """A head that multiplies with the table without owning it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(super().forward(ids), self.embed.weight)


class Tied(Net):
    """A head that shares the table."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(COLUMNS, ROWS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(ids))


class Shared(Net):
    """Two modules that only look up in one table."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(ROWS, COLUMNS)
        self.other.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.other(ids.flip(0))


BY_ROWS: dict[str, Callable[[], nn.Module]] = {
    "embedding with padding": Net,
    "derived and scaled": lambda: Net(Scaled(ROWS, COLUMNS)),
    "the user's own": lambda: Net(Own()),
    "shared by two": Shared,
}
WHOLE_ON_DEMAND: dict[str, Callable[[], nn.Module]] = {
    "indexed": lambda: Net(Indexed(ROWS, COLUMNS)),
    "bag of the same weight": lambda: Net(Bagged(ROWS, COLUMNS)),
    "head without owning": HeadOf,
}
NOT_TABLES: dict[str, Callable[[], nn.Module]] = {
    "bag": lambda: Net(Bag(ROWS, COLUMNS, mode="sum")),
    "tied head": Tied,
    "renormalised": lambda: Net(nn.Embedding(ROWS, COLUMNS, max_norm=0.5)),
    "small": lambda: Net(nn.Embedding(50, COLUMNS)),
}


def ids_of(seed: int, *shape: int, rows: int = 50) -> torch.Tensor:
    return torch.randint(0, rows, shape or (3, 7), generator=torch.Generator().manual_seed(seed))


def preadv_log(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read from now on."""
    log: list[int] = []
    real = os.preadv

    def noting(fd: int, buffers: list[memoryview], *rest: int) -> int:
        log.append(sum(len(buffer) for buffer in buffers))
        return real(fd, buffers, *rest)

    monkeypatch.setattr(os, "preadv", noting)
    return log


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = models.resident(Net)
    return model, models.save(model, tmp_path_factory.mktemp("net") / "model.safetensors")


@pytest.fixture(params=[0, "auto"], ids=["plain", "prefetch"])
def pair(request: pytest.FixtureRequest, net: tuple[nn.Module, Path]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The resident and the streamed twin, under a budget that the table does not fit into."""
    model, path = net
    with models.streamed(Net, path, memory_budget=SMALL, prefetch_depth=request.param) as streamed:
        yield model, streamed


@pytest.fixture
def plain(net: tuple[nn.Module, Path]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The same, without prefetch."""
    model, path = net
    with models.streamed(Net, path, memory_budget=SMALL, prefetch_depth=0) as streamed:
        yield model, streamed


def whole_loads(streamed: nn.Module) -> int:
    """How often the table's unit was entered."""
    runtime = runtime_of(streamed)
    table = [unit.name for unit in runtime.units].index("embed.weight")
    log = runtime.account.counters.accesses
    return log if table is None else sum(unit.state.name == "RESIDENT" for unit in [runtime.account.units[table]])


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, "auto"])
def test_a_table_far_above_the_budget(depth: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ids of a table of 64 MiB under a budget of 2 MiB cost five rows, a second time nothing."""

    def build() -> nn.Module:
        return nn.Embedding(16384, 1024)

    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    ids = torch.tensor([[3, 16383, 0], [77, 3, 9000]])
    with models.streamed(build, path, memory_budget="2MiB", prefetch_depth=depth) as streamed:
        log = preadv_log(monkeypatch)
        assert torch.equal(streamed(ids), model(ids))
        assert sum(log) == odewei.report(streamed).bytes_read == 5 * 4096
        assert torch.equal(streamed(ids), model(ids))
        report = odewei.report(streamed)
        assert sum(log) == report.bytes_read == 5 * 4096
        assert (report.rows_looked_up, report.rows_read) == (12, 5)
        assert 0 < report.row_cache_bytes == report.peak_bytes <= 2 << 20
        assert report.overdrafts == 0
        assert "12 looked up in tables, 5 read" in str(report)


@pytest.mark.parametrize("depth", [0, "auto"])
@pytest.mark.parametrize("name", BY_ROWS)
def test_same_bits_by_rows(name: str, depth: int | str, tmp_path: Path) -> None:
    """Whichever module looks up, the bits are the resident model's, and the table is never read as a whole."""
    build = BY_ROWS[name]
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    with models.streamed(build, path, memory_budget=SMALL, prefetch_depth=depth) as streamed:
        assert len(runtime_of(streamed).tables) == 1
        for seed in (1, 1, 2, 3):
            inputs = {"ids": ids_of(seed, 3, 7, rows=ROWS)}
            assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
        report = odewei.report(streamed)
        table = runtime_of(streamed).account.units[-1]
        assert (table.name in runtime_of(streamed).tables, table.state.name) == (True, "ABSENT")
        assert report.peak_bytes <= report.budget_bytes < TABLE_BYTES
        assert report.overdrafts == 0
        assert 0 < report.rows_read <= report.rows_looked_up


@pytest.mark.parametrize("depth", [0, "auto"])
@pytest.mark.parametrize("name", [*WHOLE_ON_DEMAND, *NOT_TABLES])
def test_same_bits_where_rows_do_not_do(name: str, depth: int | str, tmp_path: Path) -> None:
    """Uses that need the whole table get it, when they ask (a wrong guess) or as any other weight (no table at all)."""
    build = {**WHOLE_ON_DEMAND, **NOT_TABLES}[name]
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    with models.streamed(build, path, memory_budget="2500kB", prefetch_depth=depth) as streamed:
        assert len(runtime_of(streamed).tables) == (name in WHOLE_ON_DEMAND)
        for seed in (1, 1, 2):
            inputs = {"ids": ids_of(seed)}
            assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
        assert odewei.report(streamed).overdrafts == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_are_cast_like_the_table(net: tuple[nn.Module, Path], dtype: torch.dtype) -> None:
    """With dtype= the rows are those of the resident table converted to it."""
    model, path = net
    ids = ids_of(1)
    with models.streamed(Net, path, memory_budget="800kB", dtype=dtype) as streamed:
        for _ in range(2):
            assert models.same_bits([streamed.embed(ids)], [model.embed(ids).to(dtype)])
        assert streamed.embed.weight.dtype is dtype
        assert models.same_bits([streamed.embed.weight + 0], [model.embed.weight.to(dtype) + 0])


def test_a_budget_for_everything_keeps_every_row(net: tuple[nn.Module, Path]) -> None:
    """With room for all weights, a row is read once however many are looked up between."""
    model, path = net
    everything = torch.arange(ROWS)
    with models.streamed(Net, path, memory_budget="1GiB") as streamed:
        for ids in (everything[:100], everything, everything.flip(0), everything[:100]):
            assert torch.equal(streamed.embed(ids), model.embed(ids))
        report = odewei.report(streamed)
        assert report.rows_read == ROWS
        assert report.peak_bytes <= report.weight_bytes + (1 << 20)


def test_the_smallest_budget_has_no_room_for_the_table(net: tuple[nn.Module, Path]) -> None:
    """What must be in memory at once are the layers; with no byte more, rows are right and none is kept."""
    model, path = net
    smallest = models.smallest_budget(Net, path)
    assert smallest < 50_000
    with models.streamed(Net, path, memory_budget=smallest) as streamed:
        assert torch.equal(streamed(ids_of(1)), model(ids_of(1)))
        assert odewei.report(streamed).row_cache_bytes == 0
        assert odewei.report(streamed).overdrafts == 0


def test_an_absent_table_keeps_nobody_busy(net: tuple[nn.Module, Path]) -> None:
    """When all that is read ahead is there, the scheduler has nothing to do, although the table never is."""
    with models.streamed(Net, net[1], memory_budget="1GiB") as streamed:
        streamed(ids_of(1))
        ledger = runtime_of(streamed).driver.ledger
        assert not ledger.needs_driver()
        assert streamed.embed.weight.sum()
        assert not ledger.needs_driver()


def test_looking_up_imports_no_compiler(net: tuple[nn.Module, Path]) -> None:
    """A first look-up does not wait for torch's compiler to be imported, which takes most of a second."""
    code = (
        "import sys, torch; from tests import models, test_rows\n"
        "with models.streamed(test_rows.Net, sys.argv[1], memory_budget='400kB') as model:\n"
        "    model(test_rows.ids_of(1))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(net[1])], check=True, timeout=60, env=environment)


# -- the same answers as torch's -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        ids_of(1).int(),
        torch.tensor(7),
        torch.tensor([], dtype=torch.int64),
        torch.empty(0, 3, dtype=torch.int32),
        ids_of(2, 4, 6)[:, ::2],
        ids_of(2, 4, 6).T,
        ids_of(3, 2, 3, 4),
        torch.arange(300),
        torch.tensor([5, 5, 5]),
        torch.tensor([3]).expand(4, 2),
        ids_of(1).to(torch.float32),
        ids_of(1).to(torch.int16),
        ids_of(1) > 3,
        torch.tensor([0, -1]),
        torch.tensor([ROWS]),
        torch.tensor([1 << 40]),
        nn.Parameter(ids_of(1), requires_grad=False),
        ids_of(1).to_sparse(),
        None,
        "ids",
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [None, 0, ROWS - 1, -1, ROWS, -ROWS - 1])
def test_every_kind_of_ids(ids: object, padding: int | None, plain: tuple[nn.Module, nn.Module]) -> None:
    """Whatever the ids: the resident table's answer, or its error."""
    model, streamed = plain

    def answer(weight: torch.Tensor) -> object:
        try:
            return F.embedding(ids, weight, padding_idx=padding)
        except Exception as error:
            return type(error), str(error)

    got, expected = answer(streamed.embed.weight), answer(model.embed.weight)
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert (got.device, got.stride(), got.requires_grad) == (
            expected.device,
            expected.stride(),
            expected.requires_grad,
        )
        assert got.is_meta or models.same_bits([got], [expected])
    else:
        assert got == expected
        if isinstance(ids, torch.Tensor) and ids.layout is torch.strided:
            assert odewei.report(streamed).bytes_read == 0, "an error needs no table"


def test_every_way_to_call(plain: tuple[nn.Module, nn.Module]) -> None:
    """By position or by name, with all options, with torch.embedding: rows only."""
    model, streamed = plain
    ids = ids_of(4)
    for call in (
        lambda weight: F.embedding(ids, weight, 3, None, 2.0, True, True),
        lambda weight: F.embedding(input=ids, weight=weight, padding_idx=-2, scale_grad_by_freq=True, sparse=True),
        lambda weight: torch.embedding(weight, ids),
        lambda weight: torch.embedding(weight=weight, indices=ids, padding_idx=99999, sparse=True),
    ):
        assert models.same_bits([call(streamed.embed.weight)], [call(model.embed.weight.detach())])
    assert odewei.report(streamed).bytes_read == ids.unique().numel() * COLUMNS * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_every_mode(mode: Callable[[], object], pair: tuple[nn.Module, nn.Module]) -> None:
    """Results are tensors of the mode they are made in, as a frozen resident model's are; gradients flow past them."""
    model, streamed = pair
    frozen = copy.deepcopy(model).requires_grad_(False)
    streamed.requires_grad_(False)
    for _ in range(2):
        with mode():  # type: ignore[attr-defined]
            got, expected = streamed.embed(ids_of(1)), frozen.embed(ids_of(1))
        assert models.same_bits([got], [expected])
        assert type(got) is torch.Tensor
        assert (got.is_inference(), got.requires_grad) == (expected.is_inference(), expected.requires_grad)
    bias = torch.randn(COLUMNS).requires_grad_()
    gradients = [
        torch.autograd.grad((one.embed(ids_of(2)) * bias).square().sum(), bias)[0] for one in (streamed, frozen)
    ]
    assert models.same_bits(gradients[:1], gradients[1:])


def test_what_is_not_a_look_up_has_the_residents_bits(plain: tuple[nn.Module, nn.Module]) -> None:
    """Functions, methods and operators on the table run as on the resident parameter, to the last bit."""
    model, streamed = plain
    x = torch.randn(3, COLUMNS)
    for use in (
        lambda weight: F.linear(x[:1], weight),
        lambda weight: F.linear(input=x, weight=weight),
        lambda weight: x @ weight.T,
        lambda weight: weight.sum()[None],
        lambda weight: torch.cat([x, weight])[:7],
        lambda weight: weight[3:9, 2],
        lambda weight: F.embedding_bag(ids_of(1), weight),
        lambda weight: torch.ops.aten.embedding(weight, ids_of(1)),
        lambda weight: torch.ops.aten.mm.default(x, weight.t()),
        lambda weight: weight.detach() * 2,
        lambda weight: torch.from_numpy(weight.detach().numpy()),
        lambda weight: torch.tensor(weight.tolist()[4]),
        lambda weight: next(iter(weight)),
        lambda weight: pickle.loads(pickle.dumps(weight)),
        lambda weight: copy.deepcopy(weight),
        lambda weight: weight.data.clone(),
        lambda weight: torch.func.vmap(lambda ids: F.embedding(ids, weight))(ids_of(1)),
        lambda weight: F.embedding(ids_of(5), torch.zeros(60, 2)) + F.linear(x, weight).sum(),
    ):
        assert models.same_bits([use(streamed.embed.weight)], [use(model.embed.weight)])


def test_describing_loads_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    """Code that asks the table what it is hears what the resident one says, and no byte is read."""
    model, streamed = pair
    for name in ("attribute", "iteration"):
        got = streamed.embed.weight if name == "attribute" else dict(streamed.named_parameters())["embed.weight"]
        expected = model.embed.weight
        assert isinstance(got, nn.Parameter)
        assert isinstance(got, Placeholder)
        assert isinstance(got.home.part, LookUps)
        for ask in (
            lambda weight: (
                weight.shape,
                weight.dtype,
                weight.device,
                weight.layout,
                weight.ndim,
                weight.requires_grad,
            ),
            lambda weight: (weight.size(), weight.size(1), weight.dim(), weight.numel(), weight.stride(), len(weight)),
            lambda weight: (weight.is_contiguous(), weight.is_floating_point(), weight.is_meta, weight.is_cuda),
            lambda weight: (weight.nbytes, weight.itemsize, weight.element_size(), weight.storage_offset()),
            lambda weight: (weight.grad, weight.grad_fn, weight.is_leaf, weight.is_sparse, weight.get_device()),
            lambda weight: (torch.is_floating_point(weight), torch.is_complex(weight), torch.numel(weight)),
        ):
            assert ask(got) == ask(expected)
        for one in (got, expected):
            one.requires_grad_(not one.requires_grad)
            one.requires_grad = not one.requires_grad
            one.grad = None
        assert got.requires_grad == expected.requires_grad
        assert "embed.weight" in repr(got)
        assert hash(got) == id(got)
    assert odewei.report(streamed).rows_looked_up == 0
    account = runtime_of(streamed).account
    assert (account.counters.accesses, account.units[-1].state.name) == (0, "ABSENT")


class Watching(TorchDispatchMode):
    """Writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    """Lets everything pass."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_those_who_watch_operations_see_the_residents(plain: tuple[nn.Module, nn.Module]) -> None:
    """A dispatch mode sees the look-up that it would see; a function mode changes nothing."""
    model, streamed = plain
    seen = []
    for one in (streamed, model):
        with Watching() as watching, torch.no_grad():
            assert torch.equal(one.embed(ids_of(1)), model.embed.weight[ids_of(1)])
        seen.append([name for name in watching.seen if "embedding" in name])
    assert seen[0] == seen[1] == ["aten.embedding.default"]
    read = odewei.report(streamed).rows_read
    with Passing(), torch.device("meta"):
        assert torch.equal(streamed.embed(torch.tensor([1, 2], device="cpu")), model.embed.weight[1:3])
    assert odewei.report(streamed).rows_read >= read


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_tracing_does_not_bake_rows_in(plain: tuple[nn.Module, nn.Module]) -> None:
    """A look-up that is traced is one: the trace is right for other ids."""
    model, streamed = plain
    weight = streamed.embed.weight
    traced = torch.jit.trace(lambda ids: F.embedding(ids, weight), (ids_of(1),), check_trace=False)
    assert torch.equal(traced(ids_of(2)), model.embed.weight[ids_of(2)])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling(backend: str, plain: tuple[nn.Module, nn.Module]) -> None:
    """torch.compile of a module that looks up gives the right rows for other ids, too, and reads no table."""
    model, streamed = plain
    compiled = torch.compile(streamed.embed, backend=backend)
    with torch.no_grad():
        for seed in (1, 2, 3):
            ids = ids_of(seed, 2, seed + 3, rows=ROWS)
            assert torch.equal(compiled(ids), model.embed(ids))
    torch._dynamo.reset()
    assert odewei.report(streamed).bytes_read < TABLE_BYTES // 10


def test_a_dry_run(net: tuple[nn.Module, Path]) -> None:
    """trace() reads no row, and the tables are not among what it expects."""
    model, path = net
    with models.streamed(Net, path, memory_budget=SMALL, prefetch_depth=0) as streamed:
        found = odewei.trace(streamed, ids_of(1))
        assert odewei.report(streamed).bytes_read == 0
        assert list(found.units) == [unit.name for unit in runtime_of(streamed).units if unit.name != "embed.weight"]
        assert torch.equal(streamed(ids_of(1)), model(ids_of(1)))


# -- writing, replacing, the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "renormalised"])
def test_what_is_written_into_a_table_stays(how: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """After the table is changed in place, look-ups see the change and never the file again."""
    model, streamed = copy.deepcopy(pair[0]), pair[1]
    before = streamed.embed(ids_of(1))
    for one in (model, streamed):
        with torch.no_grad():
            if how == "in place":
                one.embed.weight.mul_(2)
            elif how == "load_state_dict":
                one.embed.load_state_dict({"weight": pair[0].embed.weight.detach() + 1})
            else:
                F.embedding(ids_of(1), one.embed.weight, max_norm=0.1)
    for seed in range(4):
        with torch.no_grad():
            assert models.same_bits([streamed(ids_of(seed))], [model(ids_of(seed))])
    assert not torch.equal(streamed.embed(ids_of(1)), before)


def test_a_table_replaced_by_the_user_is_the_users(pair: tuple[nn.Module, nn.Module]) -> None:
    """Assigning another parameter, or deleting it, takes the table out; the old weight still looks up."""
    model, streamed = pair
    old = streamed.embed.weight
    new = nn.Parameter(torch.randn(ROWS, COLUMNS))
    streamed.embed.weight = new
    assert streamed.embed.weight is new
    assert torch.equal(streamed.embed(ids_of(1)), new[ids_of(1)])
    assert torch.equal(F.embedding(ids_of(1), old), model.embed.weight[ids_of(1)])
    streamed.embed.weight = old
    assert torch.equal(streamed.embed(ids_of(2)), model.embed(ids_of(2)))
    del streamed.embed.weight
    with pytest.raises(AttributeError):
        streamed.embed(ids_of(1))


def test_tying_afterwards(pair: tuple[nn.Module, nn.Module]) -> None:
    """A head that is given the table later computes the resident's bits."""
    model, streamed = pair
    heads = []
    for one in (streamed, model):
        head = nn.Linear(COLUMNS, ROWS, bias=False)
        head.weight = one.embed.weight
        heads.append(head)
    x = torch.randn(2, COLUMNS)
    with torch.no_grad():
        assert models.same_bits([heads[0](x)], [heads[1](x)])


def test_state_dict_and_load(pair: tuple[nn.Module, nn.Module]) -> None:
    """Both give the whole table."""
    model, streamed = pair
    assert torch.equal(streamed.state_dict()["embed.weight"], model.embed.weight)
    real = runtime_of(streamed).binder.load(len(runtime_of(streamed).units) - 1, "embed.weight")
    assert isinstance(real, nn.Parameter)
    assert torch.equal(real, model.embed.weight)


def test_materialize(pair: tuple[nn.Module, nn.Module]) -> None:
    """The table is an ordinary parameter afterwards, and the memory for its rows is gone."""
    model, streamed = pair
    streamed(ids_of(1))
    table = runtime_of(streamed).tables["embed.weight"]
    odewei.materialize(streamed)
    assert type(streamed.embed.weight) is nn.Parameter
    assert streamed.embed.weight.requires_grad
    assert torch.equal(streamed(ids_of(1)), model(ids_of(1)))
    assert table._pool.budget.used_bytes == 0


def test_after_close(pair: tuple[nn.Module, nn.Module]) -> None:
    """Looking up in a closed model says so, and names the weight, also through a weight that was kept."""
    _, streamed = pair
    weight = streamed.embed.weight
    streamed.embed(ids_of(1))
    odewei.close(streamed)
    for look_up in (lambda: streamed.embed(ids_of(1)), lambda: F.embedding(ids_of(1), weight)):
        with pytest.raises(errors.ClosedError, match=r"embed\.weight"):
            look_up()
    with pytest.raises(errors.ClosedError):
        weight.sum()


@pytest.mark.usefixtures("no_new_files")
@pytest.mark.parametrize("depth", [0, "auto"])
def test_dropping_the_model_closes_the_table(depth: int | str, net: tuple[nn.Module, Path]) -> None:
    """No file and no memory stays, as soon as nobody keeps a weight either; until then that is one as ever."""
    model = odewei.init_on_demand_weights_model(Net, str(net[1]), memory_budget=SMALL, prefetch_depth=depth)
    model(ids_of(1))
    budget, weight = runtime_of(model).budget, model.embed.weight
    expected = model.embed(ids_of(1)).detach()
    del model
    gc.collect()
    assert torch.equal(F.embedding(ids_of(1), weight), expected)
    del weight
    assert budget.pool.room_bytes() == budget.limit_bytes


# -- faults and threads ----------------------------------------------------------------------------------------------


def test_a_file_changed_under_the_model(pair: tuple[nn.Module, nn.Module], net: tuple[nn.Module, Path]) -> None:
    """The error names module, weight and file; with the file as it was the model is right again."""
    model, streamed = pair
    path = net[1]
    stat = path.stat()
    streamed.embed(ids_of(1))
    os.utime(path, ns=(1, 1))
    try:
        with pytest.raises(errors.WeightReadError, match="changed") as caught:
            streamed.embed(torch.arange(3000, 3100))
    finally:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (caught.value.module, caught.value.weight, caught.value.file) == ("embed", "embed.weight", str(path))
    assert torch.equal(streamed(torch.arange(3000, 3100)), model(torch.arange(3000, 3100)))


def test_threads_look_up_at_once(pair: tuple[nn.Module, nn.Module]) -> None:
    """Four passes at once over rows that drive each other out are right."""
    model, streamed = pair
    right: list[bool] = []

    def work(seed: int) -> None:
        for step in range(25):
            ids = ids_of(100 * seed + step, 1, 200, rows=ROWS)
            with torch.no_grad():
                right.append(torch.equal(streamed(ids), model(ids)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 100


_FORK = """
import os, sys, torch
from tests import models, test_rows
ids = test_rows.ids_of(1)
with models.streamed(test_rows.Net, sys.argv[1], memory_budget="400kB") as model:
    first = model.embed(ids)
    child = os.fork()
    if not child:
        again, others = model.embed(ids), model.embed(ids + 900)
        os._exit(7 if torch.equal(again, first) and torch.equal(others[0], model.embed(ids[0] + 900)) else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert torch.equal(model.embed(ids), first)
"""


def test_a_forked_child_looks_up(net: tuple[nn.Module, Path]) -> None:
    """Rows need no thread that a fork would leave behind."""
    command = [sys.executable, "-W", "ignore", "-c", _FORK, str(net[1])]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=60, env=environment)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # finalizers drop an interrupt
@pytest.mark.parametrize("kind", [Interrupt, Alarm])
def test_an_interrupt_anywhere_in_a_look_up(kind: type[BaseException], net: tuple[nn.Module, Path]) -> None:
    """Rows that were being put into their places when it came are never taken for others."""
    model, path = net
    with models.streamed(Net, str(path), memory_budget=SMALL, prefetch_depth=0) as streamed, torch.no_grad():
        fired = at = 0
        while True:
            ids, others = ids_of(at, 1, 40, rows=ROWS), ids_of(at + 10_000, 1, 40, rows=ROWS)
            interrupter = Interrupter(at, kind)
            try:
                with interrupter.watching():
                    streamed.embed(ids)
                if not interrupter.fired:
                    break
            except kind:
                fired += 1
            for again in (others, ids):
                assert torch.equal(streamed.embed(again), model.embed(again)), interrupter.where
            at += 1
        assert fired > 30


# -- guessing and sharing --------------------------------------------------------------------------------------------


def test_what_is_taken_for_a_table(tmp_path: Path) -> None:
    """Large, two-dimensional, contiguous in a file, and looked up by all who have it; not what a function delivers."""
    builds = {**BY_ROWS, **WHOLE_ON_DEMAND, **NOT_TABLES}
    for name, build in builds.items():
        model = build()
        path = models.save(model, tmp_path / "model.safetensors")
        loader = odewei.open_checkpoint(path)
        found = find_tables(model, survey(model), loader.weights())
        assert bool(found) == (name not in NOT_TABLES), name
        assert find_tables(model, survey(model), {}) == []
        assert find_tables(model, survey(model), odewei.torch.StateDictLoader(model.state_dict()).weights()) == []


@given(
    tables=st.dictionaries(st.text(max_size=3), st.integers(1, 1 << 34), max_size=4),
    units=st.integers(0, 1 << 34),
    smallest=st.integers(0, 1 << 34),
    more=st.integers(0, 1 << 36),
)
def test_shares_leave_room_for_the_units(tables: dict[str, int], units: int, smallest: int, more: int) -> None:
    """No table gets more than its size, and all together leave what the units need at least, and half of the rest."""
    smallest = min(smallest, units)
    budget, everything = smallest + more, units + sum(tables.values())
    shares = cache_shares(tables, budget, smallest, everything)
    assert shares.keys() == tables.keys()
    assert all(0 <= shares[name] <= tables[name] for name in tables)
    if budget >= everything:
        assert shares == tables
    else:
        assert sum(shares.values()) <= more / 2
