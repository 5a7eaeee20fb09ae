"""The fixture ``sim``: a test that asks for it runs on every schedule, and must leave nothing that was found unsaid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.sim import accelerated
from tests.sim.build import find_compiler
from tests.sim.simulator import DEVICE, SCHEDULES, Simulator, load

# Queued work runs in whatever thread waits; the bits must not depend on which.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Other tests would find the simulated device where they expect none."""
    here = Path(__file__).parent
    if any(here not in item.path.parents for item in items):
        raise pytest.UsageError("tests/sim needs a process of its own: pytest tests/sim")


@pytest.fixture(scope="session")
def simulator() -> Simulator:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("the simulated accelerator needs a C++ compiler: g++, or what $CXX names")
    return load(compiler)


@pytest.fixture(params=SCHEDULES, ids=str)
def sim(simulator: Simulator, request: pytest.FixtureRequest) -> Iterator[Simulator]:
    """The simulator at its beginning, on one schedule. What is found and not taken by the test makes it fail."""
    simulator.reset(request.param)
    yield simulator
    torch.accelerator.synchronize()
    findings = simulator.report()
    assert not findings, "\n".join(map(str, findings))


@pytest.fixture
def device(sim: Simulator) -> str:
    """The simulated device, with host memory that tells the detector what the host does."""
    accelerated.use(lambda: accelerated.SimMemory(sim))
    return DEVICE
