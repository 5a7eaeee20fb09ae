"""What a device may do to us: no memory, nothing pinned, no streams, gone. An error or right, never a hang."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import odewei
from odewei import memory_budget
from odewei.errors import BudgetTooSmallError, OptionsError, WeightReadError
from odewei.scheduler.accelerator import Accelerator, Copy, PlainAccelerator
from odewei.torch import init_on_demand_weights_model
from tests.sim import accelerated
from tests.sim.simulator import Simulator
from tests.sim.test_models import LAYERS, UNIT, WIDTH, Stack, checkpoint_of, resident

POSITIONS = 64 * WIDTH * 4  # the largest unit


@pytest.fixture
def stack(tmp_path: Path, sim: Simulator) -> tuple[Path, torch.Tensor, torch.Tensor]:
    file = checkpoint_of(Stack, tmp_path)
    accelerated.use(lambda: accelerated.SimMemory(sim))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).to("sim")
    with torch.no_grad():
        return file, x, resident(Stack, file)(x).cpu()


Case = tuple[Path, torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("depth", [0, "auto"])
def test_out_of_device_memory_the_budget_shrinks(stack: Case, sim: Simulator, depth: int | str) -> None:
    """A budget that the device does not have is made smaller, others leave, and the passes are right."""
    file, x, expected = stack
    with torch.no_grad():
        resident(Stack, file)(x)  # what torch keeps for activations
    sim.set_device_memory(torch.accelerator.memory_allocated() + 4 * POSITIONS)
    model = init_on_demand_weights_model(
        Stack, file, device="sim", memory_budget=LAYERS * POSITIONS, prefetch_depth=depth
    )
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x).cpu(), expected)
    assert odewei.report(model).budget_bytes <= 4 * POSITIONS
    odewei.close(model)


@pytest.mark.parametrize("depth", [0, "auto"])
def test_out_of_device_memory_for_good(stack: Case, sim: Simulator, depth: int | str) -> None:
    """When not even one unit gets its memory, the error has both numbers; with memory, the model works again."""
    file, x, expected = stack
    sim.set_device_memory(torch.accelerator.memory_allocated() + UNIT // 2)
    model = init_on_demand_weights_model(Stack, file, device="sim", memory_budget=2 * POSITIONS, prefetch_depth=depth)
    with torch.no_grad(), pytest.raises(WeightReadError, match=r"no memory for a unit of \d+ bytes.*budget of \d+ b"):
        model(x)
    sim.set_device_memory(1 << 30)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x).cpu(), expected)
    assert odewei.runtime_of(model).driver.ledger.leases() == 0
    odewei.close(model)


def test_pinning_refused(stack: Case, sim: Simulator, caplog: pytest.LogCaptureFixture) -> None:
    """Copies are from pageable memory then, and awaited; that is said once, and in the report."""
    file, x, expected = stack
    memory = accelerated.SimMemory(sim)
    memory.refuse = True
    accelerated.use(lambda: memory)
    with caplog.at_level(logging.WARNING, "odewei"):
        model = init_on_demand_weights_model(Stack, file, device="sim", memory_budget=2 * POSITIONS)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(model(x).cpu(), expected)
    assert len([record for record in caplog.records if "refuses to pin" in record.message]) == 1
    assert "could not be pinned" in str(odewei.report(model))
    odewei.close(model)


@pytest.mark.parametrize("depth", [0, 1, "auto"])
def test_a_device_without_streams(
    stack: Case, sim: Simulator, monkeypatch: pytest.MonkeyPatch, depth: int | str
) -> None:
    """Plain copies in the one order there is: right, bounded, and said in the report."""
    file, x, expected = stack
    monkeypatch.setattr(memory_budget, "accelerator_for", lambda device: PlainAccelerator(sim.device))
    model = init_on_demand_weights_model(Stack, file, device="sim", memory_budget=2 * POSITIONS, prefetch_depth=depth)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x).cpu(), expected)
    assert "no streams" in str(odewei.report(model))
    assert odewei.report(model).peak_bytes <= 2 * POSITIONS
    odewei.close(model)


class Failing(Accelerator):
    """Its copies fail from some moment on, and so does asking for them."""

    failing = False

    def _copy(self, target: torch.Tensor, source: torch.Tensor, pinned: bool) -> None:
        if self.failing:
            raise RuntimeError("device lost")
        super()._copy(target, source, pinned)

    def has_landed(self, copy: Copy) -> bool:
        if self.failing:
            raise RuntimeError("device lost")
        return super().has_landed(copy)

    def wait(self, copy: Copy) -> None:
        if self.failing:
            raise RuntimeError("device lost")
        super().wait(copy)

    def wait_for_copies(self) -> None:
        if self.failing:
            raise RuntimeError("device lost")
        super().wait_for_copies()


def test_a_device_that_is_lost_after_an_interrupt(stack: Case, sim: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mended then does not wait for it: the forward gets its error, and closing ends."""
    file, x, _ = stack
    device = Failing(sim.device, accelerated.SimMemory(sim))
    monkeypatch.setattr(memory_budget, "accelerator_for", lambda _: device)
    model = init_on_demand_weights_model(Stack, file, device="sim", memory_budget=2 * POSITIONS, prefetch_depth=0)

    def interrupted(copy: Copy) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(device, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(x)
    device.failing = True
    with torch.no_grad(), pytest.raises(WeightReadError, match="device lost"):
        model(x)
    odewei.close(model)
    torch.accelerator.synchronize()
    sim.report()  # as below


@pytest.mark.parametrize("depth", [0, 1, "auto"])
def test_a_device_that_is_lost(stack: Case, sim: Simulator, monkeypatch: pytest.MonkeyPatch, depth: int | str) -> None:
    """The forward gets an error that says so, and closing ends; were it there again, the model would work."""
    file, x, expected = stack
    device = Failing(sim.device, accelerated.SimMemory(sim))
    monkeypatch.setattr(memory_budget, "accelerator_for", lambda _: device)
    model = init_on_demand_weights_model(Stack, file, device="sim", memory_budget=2 * POSITIONS, prefetch_depth=depth)
    with torch.no_grad():
        assert torch.equal(model(x).cpu(), expected)
        torch.accelerator.synchronize()  # as the failing device would say that copies are over that are not
        device.failing = True
        with pytest.raises(WeightReadError, match="device lost"):
            model(x)
        device.failing = False
        assert torch.equal(model(x).cpu(), expected)
        device.failing = True
    odewei.close(model)
    torch.accelerator.synchronize()
    sim.report()  # this device is not really lost, and goes on with copies that were given up


def test_budgets_that_cannot_work(stack: Case) -> None:
    """Each budget says what it needs; one object is for one device."""
    file, _, _ = stack
    with pytest.raises(BudgetTooSmallError, match=r"host_budget.*smallest host_budget that works"):
        init_on_demand_weights_model(Stack, file, device="sim", memory_budget=2 * POSITIONS, host_budget=UNIT // 2)
    with pytest.raises(BudgetTooSmallError, match="smallest memory_budget that works"):
        init_on_demand_weights_model(Stack, file, device="sim", memory_budget=UNIT // 2)
    shared = odewei.MemoryBudget(2 * POSITIONS)
    with pytest.raises(OptionsError, match="host_budget"):
        init_on_demand_weights_model(Stack, file, device="sim", memory_budget=shared, host_budget="1MiB")
    model = init_on_demand_weights_model(Stack, file, device="sim", memory_budget=shared)
    with pytest.raises(OptionsError, match="one device"):
        init_on_demand_weights_model(Stack, file, memory_budget=shared)
    with pytest.raises(OptionsError, match="no such device"):
        init_on_demand_weights_model(Stack, file, device="sim:7", memory_budget=2 * POSITIONS)
    odewei.close(model)


def test_an_auto_budget_is_what_the_device_can_spare(stack: Case, sim: Simulator) -> None:
    """Of its free memory, with room for what is computed."""
    file, x, expected = stack
    sim.set_device_memory(torch.accelerator.memory_allocated() + 6 * POSITIONS)
    model = init_on_demand_weights_model(Stack, file, device="sim")
    assert POSITIONS < odewei.report(model).budget_bytes <= 0.8 * 6 * POSITIONS
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x).cpu(), expected)
    odewei.close(model)


def test_a_closed_model_leaves_nothing_pinned(stack: Case, sim: Simulator) -> None:
    """Neither on the host nor on the device."""
    file, x, expected = stack
    pinned, used = sim.counters()["pinned bytes"], torch.accelerator.memory_allocated()
    model = init_on_demand_weights_model(Stack, file, device="sim", memory_budget=2 * POSITIONS)
    with torch.no_grad():
        assert torch.equal(model(x).cpu(), expected)
    assert sim.counters()["pinned bytes"] > pinned
    odewei.close(model)
    del model
    assert sim.counters()["pinned bytes"] == pinned
    assert torch.accelerator.memory_allocated() <= used
