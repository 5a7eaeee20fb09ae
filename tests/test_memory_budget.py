"""Several models under one budget: one history, one limit, and each can go by itself."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import BudgetTooSmallError, ClosedError, OptionsError
from odewei.runtime import runtime_of
from odewei.torch import init_on_demand_weights_model
from tests import models

WIDTH, KIB = 32, 1 << 10
LAYER = WIDTH * WIDTH * 4  # bytes; a page each


class Stack(nn.Module):
    """Plain layers, one after another; with ``skips`` as in a U-Net: each of the second half sees one of the first."""

    def __init__(self, count: int, *, skips: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for index, layer in enumerate(self.layers):
            if self.skips and index >= len(self.layers) / 2:
                x = x + kept.pop()
            x = layer(x).tanh()
            if self.skips and index < len(self.layers) / 2:
                kept.append(x)
        return x


def encoder() -> nn.Module:
    return Stack(8)


def unet() -> nn.Module:
    return Stack(20, skips=True)


def decoder() -> nn.Module:
    return Stack(6)


PARTS = {"encoder": encoder, "unet": unet, "decoder": decoder}
STEPS = 10


def run_pipeline(parts: dict[str, nn.Module], x: torch.Tensor) -> torch.Tensor:
    """An encoder once, a U-Net in a loop, a decoder once."""
    with torch.no_grad():
        x = hidden = parts["encoder"](x)
        for _ in range(STEPS):
            x = x + 0.1 * parts["unet"](hidden + x)
        return parts["decoder"](x)


@pytest.fixture
def resident() -> dict[str, nn.Module]:
    return {name: models.resident(build, seed) for seed, (name, build) in enumerate(PARTS.items())}


@pytest.fixture
def paths(tmp_path: Path, resident: dict[str, nn.Module]) -> dict[str, str]:
    return {name: str(models.save(model, tmp_path / f"{name}.safetensors")) for name, model in resident.items()}


@pytest.fixture
def budget() -> odewei.MemoryBudget:
    return odewei.MemoryBudget(16 * LAYER)


@pytest.fixture
def parts(paths: dict[str, str], budget: odewei.MemoryBudget) -> Iterator[dict[str, nn.Module]]:
    made = {
        name: init_on_demand_weights_model(build, paths[name], memory_budget=budget, prefetch_depth=1).eval()
        for name, build in PARTS.items()
    }
    yield made
    for model in made.values():
        odewei.close(model)


def test_a_pipeline_is_right_and_bounded(
    resident: dict[str, nn.Module], parts: dict[str, nn.Module], budget: odewei.MemoryBudget
) -> None:
    """Three models under one budget give the resident pipeline's bits, and together stay within it."""
    for seed in range(3):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(run_pipeline(parts, x), run_pipeline(resident, x))
    assert budget.peak_bytes <= budget.limit_bytes == 16 * LAYER
    runtime_of(parts["unet"]).driver.ledger.check_invariants()
    assert "3 models" in repr(budget)


def test_memory_goes_to_the_model_that_needs_it_next(parts: dict[str, nn.Module]) -> None:
    """While the U-Net loops, nearly all of the budget is its own; each model reports its own bytes."""
    x = torch.ones(1, WIDTH)
    run_pipeline(parts, x)
    before = {name: odewei.report(model) for name, model in parts.items()}
    run_pipeline(parts, x)
    after = {name: odewei.report(model) for name, model in parts.items()}
    read = {name: (after[name].bytes_read - before[name].bytes_read) / LAYER for name in PARTS}
    assert after["unet"].passes - before["unet"].passes == STEPS
    assert read["encoder"] <= 8 + 1  # one may be read ahead and driven out again
    assert read["decoder"] <= 6 + 1
    # 20 layers under a budget of 16, of which one is in use and one on its way: 4 to 6 misses a step
    assert 4 * (STEPS - 1) <= read["unet"] <= 6.5 * STEPS + 10


def test_the_models_share_threads(parts: dict[str, nn.Module]) -> None:
    """One scheduler's thread serves all three."""
    run_pipeline(parts, torch.ones(1, WIDTH))
    schedulers = [thread for thread in threading.enumerate() if thread.name.startswith("odewei-scheduler")]
    assert len(schedulers) == 1
    assert len({id(runtime_of(model).driver) for model in parts.values()}) == 1


@pytest.mark.usefixtures("no_new_files")
def test_models_come_and_go(
    resident: dict[str, nn.Module], parts: dict[str, nn.Module], paths: dict[str, str], budget: odewei.MemoryBudget
) -> None:
    """Closing one model disturbs no other and gives its memory to them; the last one ends the threads."""
    x = torch.ones(1, WIDTH)
    run_pipeline(parts, x)
    odewei.close(parts["unet"])
    with pytest.raises(ClosedError):
        parts["unet"](x)
    ledger = runtime_of(parts["encoder"]).driver.ledger
    ledger.check_invariants()
    assert len(ledger.units) == 14
    with torch.no_grad():
        for name in ("encoder", "decoder", "encoder", "decoder"):
            assert torch.equal(parts[name](x), resident[name](x))
        before = odewei.report(parts["encoder"]).bytes_read
        assert torch.equal(parts["encoder"](x), resident["encoder"](x))
    assert odewei.report(parts["encoder"]).bytes_read == before, "14 layers fit into a budget of 16"
    parts["unet"] = init_on_demand_weights_model(unet, paths["unet"], memory_budget=budget).eval()
    assert torch.equal(run_pipeline(parts, x), run_pipeline(resident, x))
    for model in parts.values():
        odewei.close(model)
    assert budget.used_bytes == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("odewei-")]


def test_a_budget_can_be_used_again(
    resident: dict[str, nn.Module], paths: dict[str, str], budget: odewei.MemoryBudget
) -> None:
    """After its last model was dropped, the next one gets new threads."""
    x = torch.ones(1, WIDTH)
    for _ in range(5):
        model = init_on_demand_weights_model(encoder, paths["encoder"], memory_budget=budget).eval()
        with torch.no_grad():
            assert torch.equal(model(x), resident["encoder"](x))
        del model
        gc.collect()
    assert budget.used_bytes == 0


def test_a_model_may_go_while_another_thread_computes(
    resident: dict[str, nn.Module], paths: dict[str, str], budget: odewei.MemoryBudget
) -> None:
    """Models built and closed in one thread never disturb the passes of another."""
    steady = init_on_demand_weights_model(unet, paths["unet"], memory_budget=budget).eval()
    x = torch.ones(1, WIDTH)
    wrong: list[object] = []
    stop = threading.Event()

    def compute() -> None:
        try:
            with torch.no_grad():
                expected = resident["unet"](x)
                while not stop.is_set():
                    if not torch.equal(steady(x), expected):
                        wrong.append("bits")
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    for index in range(30):
        guest = init_on_demand_weights_model(encoder, paths["encoder"], memory_budget=budget).eval()
        if index % 2:
            with torch.no_grad():
                assert torch.equal(guest(x), resident["encoder"](x))
        odewei.close(guest)
    stop.set()
    thread.join()
    assert wrong == []
    runtime_of(steady).driver.ledger.check_invariants()
    odewei.close(steady)


def test_depth_zero_among_others(
    resident: dict[str, nn.Module], paths: dict[str, str], budget: odewei.MemoryBudget
) -> None:
    """A model that must not be read ahead can share the budget of one that is."""
    ahead = init_on_demand_weights_model(encoder, paths["encoder"], memory_budget=budget).eval()
    never = init_on_demand_weights_model(unet, paths["unet"], memory_budget=budget, prefetch_depth=0).eval()
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(never(ahead(x)), resident["unet"](resident["encoder"](x)))
    report = odewei.report(never)
    assert report.stalls == report.accesses - report.hits > 0
    odewei.close(ahead)
    odewei.close(never)


class WithTable(nn.Module):
    """A table of 2 MiB that is only looked up, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16384, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table(ids))


class Wide(nn.Module):
    """One layer of 169 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(208, 208, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_what_others_keep_for_good_is_no_room(tmp_path: Path) -> None:
    """The rows of one model's table are not promised to the next one; when that model goes, they are room again."""
    budget = odewei.MemoryBudget(64 * LAYER)
    table = str(models.save(models.resident(WithTable), tmp_path / "table.safetensors"))
    wide = str(models.save(models.resident(Wide), tmp_path / "wide.safetensors"))
    first = init_on_demand_weights_model(WithTable, table, memory_budget=budget)
    assert 0 < budget.pinned_bytes < 32 * LAYER
    with pytest.raises(BudgetTooSmallError):
        init_on_demand_weights_model(Wide, wide, memory_budget=budget)
    odewei.close(first)
    odewei.close(init_on_demand_weights_model(Wide, wide, memory_budget=budget))
    assert budget.used_bytes == 0


def test_a_model_that_fails_to_join_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error half way through building gives back what was reserved, and the others never see its units."""
    budget = odewei.MemoryBudget(64 * LAYER)
    table = str(models.save(models.resident(WithTable), tmp_path / "table.safetensors"))
    steady = init_on_demand_weights_model(WithTable, table, memory_budget=budget).eval()
    pinned, units = budget.pinned_bytes, len(runtime_of(steady).driver.ledger.units)
    for name in ("_bind", "_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(f"odewei.runtime.Runtime.{name}", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                init_on_demand_weights_model(WithTable, table, memory_budget=budget)
        assert (budget.pinned_bytes, len(runtime_of(steady).driver.ledger.units)) == (pinned, units)
    with torch.no_grad():
        steady(torch.arange(3))
    odewei.close(steady)
    assert budget.used_bytes == 0


def test_what_cannot_work_is_refused(paths: dict[str, str]) -> None:
    """Nonsense sizes, and a model whose largest step the shared budget cannot hold; the others go on."""
    for nonsense in ("much", -1, 0, True, 1.5):
        with pytest.raises(OptionsError):
            odewei.MemoryBudget(nonsense)
    with pytest.raises(OptionsError):
        odewei.MemoryBudget("1GB", num_readers=0)
    budget = odewei.MemoryBudget(LAYER - 1)
    with pytest.raises(BudgetTooSmallError, match=str(LAYER)):
        init_on_demand_weights_model(encoder, paths["encoder"], memory_budget=budget)
    assert budget.used_bytes == 0
