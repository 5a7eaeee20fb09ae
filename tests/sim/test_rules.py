"""Each rule of order of the accelerator is taken out, and the detector finds it: what nothing finds is not tested."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch

import odewei
from odewei import memory_budget
from odewei.scheduler.accelerator import Accelerator, Copy
from odewei.scheduler.host_memory import HostMemory
from odewei.torch import init_on_demand_weights_model
from tests.sim.accelerated import SimMemory
from tests.sim.simulator import Schedule, Simulator
from tests.sim.test_models import UNIT, WIDTH, Stack, checkpoint_of


class Whole(Accelerator):
    """With every rule."""


class Blind(Accelerator):
    """The host never asks whether copies are over: what the host knows is ordered, and it is all up to the streams."""

    def has_landed(self, copy: Copy) -> bool:
        return False


class ComputesBeforeTheCopy(Blind):
    """What computes does not wait for the copy."""

    def let_use(self, copy: Copy) -> None:
        pass


class NewStreamsComputeBeforeTheCopy(Blind):
    """A stream that comes later does not wait for what the others have waited for."""

    def note_stream(self) -> None:
        stream = torch.accelerator.current_stream(self.device)
        self._computing = {**self._computing, stream.stream_id: stream}


class ReusesWhatComputes(Blind):
    """Memory is used again while it may be computed with."""

    def wait_for_computing(self) -> None:
        pass


class RefillsUnderTheCopy(Accelerator):
    """Pinned memory is filled again before the copy from it has landed."""

    def has_landed(self, copy: Copy) -> bool:
        return True

    def wait(self, copy: Copy) -> None:
        pass


class CopiesFromPageable(Accelerator):
    """A copy is asked not to block, from memory that is not pinned."""

    def __init__(self, device: torch.device, memory: HostMemory) -> None:
        super().__init__(device, HostMemory())

    def _copy(self, target: torch.Tensor, source: torch.Tensor, pinned: bool) -> None:
        target.copy_(source, non_blocking=True)


class AllocatesWhereItComputes(Blind):
    """Memory is allocated on the stream that computes, and filled on the copy stream."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


RULES: dict[type[Accelerator], str] = {
    ComputesBeforeTheCopy: "race",
    NewStreamsComputeBeforeTheCopy: "race",
    ReusesWhatComputes: "race",
    RefillsUnderTheCopy: "race",
    CopiesFromPageable: "not pinned",
    AllocatesWhereItComputes: "race",
}


def _run(sim: Simulator, kind: type[Accelerator], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes on two streams, of a model that is larger than the device's budget, which is larger than the host's."""
    monkeypatch.setattr(memory_budget, "accelerator_for", lambda device: kind(sim.device, SimMemory(sim)))
    fits = kind is NewStreamsComputeBeforeTheCopy  # nothing that would have streams wait for other reasons
    model = init_on_demand_weights_model(
        Stack,
        file,
        device="sim",
        memory_budget=16 * UNIT if fits else 4 * UNIT,
        host_budget=3 * UNIT + 8192 if kind in (Whole, RefillsUnderTheCopy) else "1MiB",
        prefetch_depth=2,
    )
    x = torch.ones(2, WIDTH).to("sim")
    other = torch.Stream(device="sim")
    other.wait_stream(torch.accelerator.current_stream())

    def two_passes() -> None:
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            for _ in range(2):
                model(x)

    def on_another_stream() -> None:
        with other:
            two_passes()

    two_passes()
    thread = threading.Thread(target=on_another_stream)
    thread.start()
    thread.join()
    odewei.close(model)
    torch.accelerator.synchronize()


# Where the host happens to learn that a copy is over, all streams count as ordered after it: on "lazy" it does not.
# The threads that read run as they come, so one run may happen to wait in the right places without the rule.
TRIES = 20
CASES = [(kind, schedule) for kind in (Whole, *RULES) for schedule in (Schedule("lazy"), Schedule("random", 3))]
CASES.remove((NewStreamsComputeBeforeTheCopy, Schedule("random", 3)))


@pytest.mark.parametrize(
    ("kind", "schedule"), CASES, ids=lambda case: case.__name__ if isinstance(case, type) else str(case)
)
def test_a_rule_that_is_taken_out_is_found(
    simulator: Simulator,
    schedule: Schedule,
    kind: type[Accelerator],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The detector names the mistake, and says nothing when all rules are there."""
    file = checkpoint_of(Stack, tmp_path)

    def kinds_of_findings() -> set[str]:
        simulator.reset(schedule)
        _run(simulator, kind, file, monkeypatch)
        return {finding.kind for finding in simulator.report()}

    if kind in RULES:
        assert any(RULES[kind] in kinds_of_findings() for _ in range(TRIES))
    else:
        assert not kinds_of_findings()
