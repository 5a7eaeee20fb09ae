"""Models of very many small units: what a unit costs, and that units which share things do not share too much."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.scheduler.read_plan import UnitReadPlan
from odewei.torch import init_on_demand_weights_model

ROOT = Path(__file__).parents[1]
UNITS = 2000
MOST_BYTES = 2850  # at 2,000 units, 2.75 kB; parameters that are kept as objects take 0.5 kB of it


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


def blocks(count: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(count)))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[int], str]:
    def write(count: int) -> str:
        path = tmp_path / f"{count}.safetensors"
        save_file({name: torch.ones(value.shape) for name, value in blocks(count).state_dict().items()}, path)
        return str(path)

    return write


def traced(build: Callable[[], nn.Module]) -> int:
    """Bytes that Python objects of a model take."""
    gc.collect()
    tracemalloc.start()
    try:
        model = build()
        gc.collect()
        found = tracemalloc.get_traced_memory()[0]
        del model  # not before
        return found
    finally:
        tracemalloc.stop()


def bytes_a_unit(small: str, large: str) -> float:
    """Of checkpoints of 10 and of ``UNITS`` units: what odewei keeps of a unit beyond a build on the meta device."""

    def meta() -> nn.Module:
        with torch.device("meta"):
            return blocks(UNITS)

    traced(lambda: init_on_demand_weights_model(lambda: blocks(10), small, prefetch_depth=0))  # imports
    streamed = traced(lambda: init_on_demand_weights_model(lambda: blocks(UNITS), large, prefetch_depth=0))
    return (streamed - traced(meta)) / UNITS


def test_a_unit_takes_two_kilobytes_beyond_the_model_without_weights(checkpoint: Callable[[int], str]) -> None:
    """Of two modules and two weights. In a fresh process: Python lays objects out by what it saw of their class."""
    call = f"bytes_a_unit({checkpoint(10)!r}, {checkpoint(UNITS)!r})"
    code = f"from tests.test_many_units import bytes_a_unit; print({call})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert float(done.stdout) < MOST_BYTES


def test_a_hook_of_the_user_is_its_modules_own(checkpoint: Callable[[int], str]) -> None:
    """A hook that is always called is called for its module only, and its removal leaves those of odewei in place."""
    model = init_on_demand_weights_model(lambda: blocks(4), checkpoint(4), prefetch_depth=0)
    called: list[nn.Module] = []
    handle = model[1].register_forward_hook(lambda module, args, output: called.append(module), always_call=True)
    with torch.no_grad():
        model(torch.ones(1, 8))
        handle.remove()
        model(torch.ones(1, 8))
    assert called == [model[1]]
    assert odewei.report(model).accesses == 8
    assert odewei.runtime_of(model).driver.ledger.leases() == 0
    odewei.close(model)


def test_an_exception_in_one_of_many_returns_its_lease(checkpoint: Callable[[int], str]) -> None:
    """Hooks that share the dictionary of those always called are called when a forward raises."""
    model = init_on_demand_weights_model(lambda: blocks(4), checkpoint(4), prefetch_depth=0)
    with pytest.raises(RuntimeError, match="shapes"), torch.no_grad():
        model[2](torch.ones(1, 7))
    assert odewei.runtime_of(model).driver.ledger.leases() == 0
    odewei.close(model)


def test_materialized_modules_share_nothing(checkpoint: Callable[[int], str]) -> None:
    """Without odewei every module has its own dictionaries of hooks again, and nothing of odewei's."""
    model = init_on_demand_weights_model(lambda: blocks(4), checkpoint(4), prefetch_depth=0)
    odewei.materialize(model)
    assert len({id(block._forward_hooks_always_called) for block in model}) == 4
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model)
    assert not any("odewei" in name for block in model for name in vars(block))


def test_a_small_unit_is_planned_once_a_read(checkpoint: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan is kept from the read to the tensors over it, and not longer."""
    made = 0
    make = UnitReadPlan.make

    def counted(*args: object) -> UnitReadPlan:
        nonlocal made
        made += 1
        return make(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(UnitReadPlan, "make", counted)
    model = init_on_demand_weights_model(lambda: blocks(4), checkpoint(4), prefetch_depth=0)
    assert made == 0
    with torch.no_grad():
        model(torch.ones(1, 8))
    assert made == 4
    odewei.close(model)
