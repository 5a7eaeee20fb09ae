"""A forecast and what happens: they agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.demo.synthetic import LlamaShape, model_fn, write_llama_checkpoint
from odewei.errors import BudgetTooSmallError, CheckpointError
from odewei.forecast import Outline, is_tied
from odewei.loaders.state_dict import StateDictLoader
from tests import models

SHAPE = LlamaShape(256, 1024, 24, heads=4, kv_heads=2, vocab=4000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 MiB in several files."""
    folder = tmp_path_factory.mktemp("forecast") / "checkpoint"
    write_llama_checkpoint(folder, SHAPE, shard_bytes=16 << 20)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes on one thread: on a busy machine several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("percent", [30, 70])
def test_bytes_are_those_of_a_real_run(checkpoint: Path, percent: int) -> None:
    """Given how fast the disk and the products were, what a pass will read is what a real run reports, within
    a few percent of the weights; the units are the same.
    """
    budget = SHAPE.nbytes() * percent // 100
    source = odewei.open_checkpoint(checkpoint)
    with models.streamed(model_fn(SHAPE), source, memory_budget=budget, io="direct") as model, torch.no_grad():
        for _ in range(5):
            model(input_ids=torch.arange(8)[None], use_cache=False)
        before = odewei.report(model)
        for _ in range(6):
            model(input_ids=torch.arange(8)[None], use_cache=False)
        report = odewei.report(model)
    outline = Outline(odewei.open_checkpoint(checkpoint), budget)
    matrices = outline.matrices()
    product = (report.compute_seconds - before.compute_seconds) / 6 / sum(matrices.values())
    bandwidth = report.bandwidth
    forecast = outline.forecast(bandwidth=bandwidth, tokens=8, products=dict.fromkeys(matrices, product))
    assert forecast.read_bytes == pytest.approx((report.bytes_read - before.bytes_read) / 6, abs=0.05 * SHAPE.nbytes())
    assert forecast.units + 1 == report.units  # the table of tokens is a unit of its own, used only when it is wanted
    assert forecast.weight_bytes == report.weight_bytes
    assert forecast.budget_bytes == report.budget_bytes


def test_the_smallest_budget_is_that_of_the_model(checkpoint: Path) -> None:
    """A budget that the model would refuse is refused with the same number."""
    with pytest.raises(BudgetTooSmallError) as planned:
        Outline(odewei.open_checkpoint(checkpoint), 100_000)
    with pytest.raises(BudgetTooSmallError) as real:
        odewei.init_on_demand_weights_model(
            model_fn(SHAPE), odewei.open_checkpoint(checkpoint), memory_budget=100_000, io="direct"
        )
    assert planned.value.cure == real.value.cure


def test_a_budget_for_everything_reads_nothing(checkpoint: Path) -> None:
    """Under "auto" on a machine with room, only the first pass reads, and computing is all that there is."""
    outline = Outline(odewei.open_checkpoint(checkpoint))
    matrices = outline.matrices()
    assert sum(matrices.values()) == 24 * 7 + 1
    forecast = outline.forecast(bandwidth=1e9, products=dict.fromkeys(matrices, 0.001))
    assert forecast.read_bytes == 0
    assert not forecast.disk_bound
    assert forecast.seconds == pytest.approx(0.169)
    assert forecast.floor_seconds == pytest.approx(0.169)
    assert forecast.first_seconds > forecast.seconds
    assert all(group.stay == group.count for group in forecast.groups)


def test_slow_disks_and_slow_products_bound_a_pass(checkpoint: Path) -> None:
    """The slower of reading and computing is what a pass takes, about; what stays and what is read are all units."""
    outline = Outline(odewei.open_checkpoint(checkpoint), SHAPE.nbytes() // 3)
    slow = outline.forecast(bandwidth=1e6)
    fast = outline.forecast(bandwidth=1e12, products=dict.fromkeys(outline.matrices(), 0.01))
    assert slow.disk_bound
    assert slow.seconds == pytest.approx(slow.floor_seconds, rel=0.02)
    assert not fast.disk_bound
    assert fast.seconds == pytest.approx(1.69, rel=0.02)
    for group in slow.groups:
        assert 0 <= group.stay <= group.count
        assert group.stay_bytes <= group.nbytes
    assert sum(group.nbytes - group.stay_bytes for group in slow.groups) == pytest.approx(slow.read_bytes, rel=0.1)


def test_any_checkpoint_can_be_planned(tmp_path: Path) -> None:
    """Names without structure, integers, scalars, empty tensors and buffers: a forecast; nothing at all: an error."""
    weights = {"a": torch.zeros(300, 300), "b.c": torch.zeros((), dtype=torch.int64), "d.0": torch.zeros(0, 3)}
    weights["bn.running_mean"] = torch.zeros(1000)
    save_file(weights, tmp_path / "w.safetensors")
    forecast = Outline(odewei.open_checkpoint(tmp_path / "w.safetensors"), "1MiB").forecast(bandwidth=1e9)
    assert forecast.weight_bytes == 300 * 300 * 4 + 8
    with pytest.raises(CheckpointError, match="no weights"):
        Outline(StateDictLoader({}), "1MiB")


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"architectures": ["AForConditionalGeneration"], "text_config": {"tie_word_embeddings": False}}, False),
        ({"architectures": ["BertModel"]}, False),
        ({}, False),
        ([], False),
        ("{", False),
    ],
)
def test_what_a_configuration_says_of_the_head(tmp_path: Path, config: object, tied: bool) -> None:
    """Only the configuration of a model with a head can say that it is tied; nonsense says nothing."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert not is_tied(odewei.open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert is_tied(odewei.open_checkpoint(tmp_path)) is tied


@pytest.mark.parametrize("build", [models.gpt2, models.t5, models.mixtral, models.ConvNet, models.Recurrent])
def test_the_units_of_other_kinds_of_models_fit_too(build: Callable[[], nn.Module]) -> None:
    """Whatever the model, a pass reads no more than its weights, and the smallest budget is enough for it."""
    state = build().state_dict()
    everything = sum(value.nbytes for value in state.values())
    forecast = Outline(StateDictLoader(state), everything).forecast(bandwidth=1e9)
    assert 0 <= forecast.read_bytes <= everything
    assert 0 < forecast.least_bytes <= forecast.budget_bytes
