"""A signal's handler that raises, anywhere in the library on a device: right afterwards, and nothing is left."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import WeightReadError
from odewei.torch import init_on_demand_weights_model
from tests.interrupts import Alarm, Interrupt, Interrupter, Lost, kept_for_nobody
from tests.sim.test_models import WIDTH, Stack, checkpoint_of, resident

STEP = 131
"""Between two places that are tried, of some thousand; each schedule begins at another one."""


@pytest.mark.parametrize("kind", [Interrupt, Alarm])
@pytest.mark.parametrize("depth", [0, "auto"])
def test_an_interrupt_anywhere_in_a_pass(
    depth: int | str, kind: type[BaseException], tmp_path: Path, device: str, request: pytest.FixtureRequest
) -> None:
    """No lease, no memory and no wrong number stays, whether or not what is raised is an error."""
    file = checkpoint_of(Stack, tmp_path)
    x = torch.ones(3, WIDTH).to(device)
    budget = 3 * (64 * WIDTH * 4)
    model = init_on_demand_weights_model(Stack, file, device=device, memory_budget=budget, prefetch_depth=depth)
    watched = Interrupter()
    with torch.no_grad(), Lost():
        expected = resident(Stack, file, device)(x).cpu()
        model(x)
        with watched.watching():
            model(x)
        fired = 0
        for at in range(zlib.crc32(request.node.name.encode()) % STEP, watched.seen, STEP):
            interrupter = Interrupter(at, kind)
            try:
                with interrupter.watching():
                    model(x)
            except (kind, WeightReadError) as error:
                error.__traceback__ = None  # it holds the frames of the pass
                fired += 1
            assert torch.equal(model(x).cpu(), expected), interrupter.where
            _check_books(model, interrupter.where, is_quiet=depth == 0)
    assert fired > 5
    odewei.close(model)


def _check_books(model: nn.Module, where: str, *, is_quiet: bool) -> None:
    """Of both tiers. ``is_quiet``: nothing is under way."""
    runtime = odewei.runtime_of(model)
    assert runtime.host is not None
    for ledger in (runtime.driver.ledger, runtime.host.ledger):
        ledger.check_invariants()
        assert ledger.leases() == 0 or not is_quiet, where
    assert kept_for_nobody(model) == [] or not is_quiet, where
    assert odewei.report(model).overdrafts == 0, where
