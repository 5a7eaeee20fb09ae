"""odewei.profile of a model on the simulated accelerator: both tiers are in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import odewei
from odewei.profiling.spans import Kind
from odewei.torch import init_on_demand_weights_model
from tests.sim import accelerated
from tests.sim.simulator import Simulator
from tests.sim.test_models import DEPTHS, LAYERS, UNIT, WIDTH, Stack, checkpoint_of


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_the_host_reads_is_in_the_rows_of_the_layers(depth: int | str, tmp_path: Path, sim: Simulator) -> None:
    """A layer's row has the bytes that the host's tier read and the uses of the device's; memory is the device's."""
    accelerated.use(lambda: accelerated.SimMemory(sim))
    file = checkpoint_of(Stack, tmp_path)
    x = torch.randn(5, WIDTH).to("sim")
    model = init_on_demand_weights_model(
        Stack,
        file,
        device="sim",
        memory_budget=3 * UNIT,
        host_budget=3 * UNIT,
        prefetch_depth=depth,
        granularity="leaf",
    )
    try:
        with torch.no_grad(), odewei.profile(model) as timeline:
            model(x)
            model(x)
    finally:
        odewei.close(model)
    assert timeline.summary.passes == 2
    rows = {layer.name: layer for layer in timeline.layers}
    layers = [rows[f"layers.{index}"] for index in range(LAYERS)]
    assert [layer.uses for layer in layers] == [2] * LAYERS
    read = [layer for layer in layers if layer.bytes_read >= WIDTH * WIDTH * 4]
    assert len(read) >= (LAYERS if depth == 0 else 1)  # some may have been read ahead before, and kept
    assert all(layer.bytes_read == 0 for layer in layers if layer not in read)
    assert timeline.summary.budget_bytes == 3 * UNIT >= timeline.summary.peak_bytes > 0
    assert any(span.kind is Kind.READ for span in timeline.spans)
