"""A correct program is silent and right; every broken rule is found, on every schedule."""

from __future__ import annotations

import pytest
import torch

from tests.sim.pipeline import Bug, Pipeline, expected, make_layers
from tests.sim.simulator import SCHEDULES, Simulator

LAYERS = make_layers(8, 24)
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(7))
EXPECTED = expected(LAYERS, X)

# Where each rule is: slots used in turn, or memory from the allocator.
BUGS = [
    (Bug.COPY_NOT_AWAITED, 2),
    (Bug.COPY_NOT_AWAITED, None),
    (Bug.SLOT_OVERWRITTEN, 2),
    (Bug.FREED_IN_USE, None),
    (Bug.WRONG_STREAM, None),
    (Bug.PINNED_REFILLED, 2),
    (Bug.PINNED_REFILLED, None),
    (Bug.PAGEABLE, 2),
    (Bug.RESULT_READ_EARLY, 2),
]


def _run(sim: Simulator, slots: int | None, bug: Bug | None = None) -> torch.Tensor:
    with torch.no_grad():
        pipeline = Pipeline(sim, LAYERS, slots=slots, bug=bug)
        x = X.pin_memory().to(sim.device, non_blocking=True)
        return pipeline.result(pipeline.run(x))


@pytest.mark.parametrize("slots", [1, 2, 3, None])
def test_correct_program_is_silent(sim: Simulator, slots: int | None) -> None:
    """With all rules in place the output is that of the CPU, to the bit, and nothing is found."""
    assert torch.equal(_run(sim, slots), EXPECTED)
    assert sim.report() == []


@pytest.mark.parametrize(("bug", "slots"), BUGS, ids=str)
def test_broken_rule_is_found(sim: Simulator, bug: Bug, slots: int | None) -> None:
    """Without one of the rules something of the right kind is found, also where the output happens to be right."""
    _run(sim, slots, bug)
    torch.accelerator.synchronize()
    kinds = {finding.kind for finding in sim.report()}
    assert ("not pinned" if bug is Bug.PAGEABLE else "race") in kinds


@pytest.mark.parametrize(("bug", "slots"), [pair for pair in BUGS if pair[0] is not Bug.PAGEABLE], ids=str)
def test_schedules_show_broken_rules_in_values(simulator: Simulator, bug: Bug, slots: int | None) -> None:
    """Some schedule makes a broken rule a wrong output: work is late, memory is poisoned, the tests would see it."""
    wrong = 0
    for schedule in SCHEDULES:
        simulator.reset(schedule)
        wrong += not torch.equal(_run(simulator, slots, bug), EXPECTED)
    assert wrong > 0
    torch.accelerator.synchronize()
    simulator.report()


def test_overwritten_source_is_seen_without_the_hook(simulator: Simulator) -> None:
    """A pinned buffer that is refilled under a copy that has yet to run is seen by its hash."""
    simulator.reset(SCHEDULES[1])
    source = torch.ones(64, pin_memory=True)
    on_device = source.to(simulator.device, non_blocking=True)
    source.fill_(2)
    torch.accelerator.synchronize()
    assert [finding.kind for finding in simulator.report()] == ["overwritten"]
    del on_device


class TestOverlap:
    """The virtual clock says exactly what overlaps, on every schedule. A copy takes 30 µs, a layer computes for 20."""

    def _elapsed(self, sim: Simulator, slots: int) -> float:
        with torch.no_grad():
            sim.clock.costs(operator_us=10, bytes_per_us=LAYERS[0].nbytes / 30)
            pipeline = Pipeline(sim, LAYERS, slots=slots)
            x = X.to(sim.device)
            start, end = torch.Event(enable_timing=True), torch.Event(enable_timing=True)
            start.record(pipeline.compute)
            pipeline.run(x)
            end.record(pipeline.compute)
            end.synchronize()
            return start.elapsed_time(end) * 1000

    def test_without_a_second_slot_nothing_overlaps(self, sim: Simulator) -> None:
        """With one slot every copy waits for the computing before it."""
        assert self._elapsed(sim, slots=1) == pytest.approx(len(LAYERS) * (30 + 20))

    def test_with_a_second_slot_computing_is_hidden(self, sim: Simulator) -> None:
        """With two slots the link never rests, and only the last layer's computing is seen."""
        assert self._elapsed(sim, slots=2) == pytest.approx(len(LAYERS) * 30 + 20)
