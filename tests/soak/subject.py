"""What the faults are injected into: a small model of many units, resident and streamed, and how it is called."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.runtime import runtime_of
from odewei.torch import ShardedWeightsLoader, init_on_demand_weights_model
from tests.soak.table import Row, Wrong, judge

__all__ = ["INDEX", "WAYS", "Net", "Subject", "resident", "save_shards", "shrunk", "subject"]

PATIENCE = 60.0
"""Seconds after which a pass hangs."""

INDEX = "model.safetensors.index.json"
SHARDS = 3
ROWS, WIDTH, BLOCKS = 2048, 64, 12

WAYS: tuple[dict[str, object], ...] = (
    {"prefetch_depth": "auto", "io": "direct"},
    {"prefetch_depth": "auto", "io": "buffered"},
    {"prefetch_depth": 0, "io": "direct"},
)
"""How a model is streamed in turn: every fault meets each of them."""


class Block(nn.Module):
    """Residual, so that no value runs away however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        return found


class Net(nn.Module):
    """A table that is looked up, blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 97)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        found: torch.Tensor = self.head(hidden)
        return found


def resident() -> nn.Module:
    """The model in memory, with the same weights each time."""
    torch.manual_seed(0)
    return Net().eval()


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, ROWS, (2, 9), generator=torch.Generator().manual_seed(seed))


def save_shards(model: nn.Module, folder: Path) -> Path:
    """The weights in a few files with an index, whose path is returned."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    names = list(state)
    size = -(-len(names) // SHARDS)
    where = {name: f"shard-{index // size}.safetensors" for index, name in enumerate(names)}
    for shard in dict.fromkeys(where.values()):
        save_file({name: state[name] for name in names if where[name] == shard}, folder / shard)
    index = folder / INDEX
    index.write_text(json.dumps({"weight_map": where}))
    return index


class Subject:
    """A streamed model beside the resident one, and what passes over it have come to."""

    def __init__(self, model: nn.Module, streamed: nn.Module, folder: Path, row: Row) -> None:
        self.model, self.streamed, self.folder, self.row = model, streamed, folder, row
        self._seed = 0

    @property
    def budget(self) -> odewei.MemoryBudget:
        return runtime_of(self.streamed).budget

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.safetensors"))

    def right(self, seed: int) -> bool:
        """One pass in this thread, with the resident model's bits or not."""
        with torch.no_grad():
            found, expected = self.streamed(ids(seed)), self.model(ids(seed))
        return bool(found.dtype == expected.dtype and torch.equal(found.view(torch.int32), expected.view(torch.int32)))

    def passes(self, count: int = 3, thrown_in: type[BaseException] | None = None) -> str:
        """Passes until one does not end right; how it ended. Raises Wrong for wrong numbers and errors not clean."""
        for _ in range(count):
            self._seed += 1
            try:
                is_right = self.right(self._seed)
            except BaseException as error:
                end = judge(error, thrown_in=thrown_in)
                error.__traceback__ = None
                return end
            if not is_right:
                raise Wrong("wrong numbers")
        return "right"

    def inject(
        self,
        make: Callable[[], Callable[[], object] | None],
        *,
        fired: Callable[[], bool] = lambda: True,
        thrown_in: type[BaseException] | None = None,
        count: int = 3,
    ) -> str:
        """Make a fault, pass, take it away (what ``make`` returned does that), and see that the model works again."""
        undo = make()
        try:
            end = within(PATIENCE, lambda: self.passes(count, thrown_in))
        finally:
            if undo is not None:
                undo()
        self.row.note(fired=fired(), end=end)
        self._settle()
        self.recovered()
        return end

    def _settle(self) -> None:
        """Return when no read that began with the fault is under way: it may still fail."""
        account = runtime_of(self.streamed).account
        deadline = time.monotonic() + PATIENCE
        while account.is_reading():
            if time.monotonic() > deadline:
                raise Wrong("a read does not end")
            time.sleep(0.001)

    def recovered(self) -> None:
        """The next passes are right, no lease is taken, and every byte has an owner."""
        if (end := within(PATIENCE, lambda: self.passes(2))) != "right":
            raise Wrong(f"after the cause was gone: {end}")
        ledger = runtime_of(self.streamed).driver.ledger
        if ledger.leases():
            raise Wrong(f"{ledger.leases()} leases are left")
        ledger.check_invariants()
        report = odewei.report(self.streamed)
        if report.overdrafts:
            raise Wrong(f"{report.overdrafts} times over the budget")


def shrunk(one: Subject, meanwhile: Callable[[], object]) -> None:
    """Under as small a budget as works a pass, then ``meanwhile``: nearly nothing is resident afterwards."""
    runtime = runtime_of(one.streamed)
    pool = runtime.driver.ledger.pool
    limit = pool.budget.limit_bytes
    pool.set_limit(runtime.account.least_bytes + runtime.account.pinned_bytes)
    try:
        if one.passes(2) != "right":
            raise Wrong("a smaller budget is no fault")
        meanwhile()
    finally:
        pool.set_limit(limit)


def within(seconds: float, work: Callable[[], str]) -> str:
    """Do ``work`` in this thread; if it takes longer, end the process with the stacks of all threads."""
    import faulthandler

    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        return work()
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def subject(row: Row, folder: Path, **options: object) -> Iterator[Subject]:
    """A model that streams under two fifths of its weights from files of its own in ``folder``; right, and closed
    afterwards without a trace.
    """
    model = resident()
    folder.mkdir(parents=True)
    index = save_shards(model, folder)
    budget = int(0.4 * sum(parameter.nbytes for parameter in model.parameters()))
    before = threading.active_count()
    options = {"memory_budget": budget, **options}
    streamed = init_on_demand_weights_model(Net, ShardedWeightsLoader(str(index), str(folder)), **options).eval()  # type: ignore[arg-type]
    try:
        made = Subject(model, streamed, folder, row)
        made.recovered()
        yield made
    finally:
        shared = runtime_of(streamed).budget
        odewei.close(streamed)
    if threading.active_count() > before:
        raise Wrong("threads are left after closing")
    if shared.used_bytes:
        raise Wrong(f"{shared.used_bytes} bytes of the budget are left after closing")
