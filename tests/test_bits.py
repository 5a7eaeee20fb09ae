"""A streamed model computes the same bits as the resident one, and does stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import odewei
from odewei.torch import SafetensorsLoader
from tests import models as zoo


@pytest.mark.parametrize("depth", [0, 1, "auto"])
@pytest.mark.parametrize("name", zoo.CASES)
def test_same_bits_under_a_small_budget(name: str, depth: int | str, tmp_path: Path) -> None:
    """Two passes and one with another input equal the resident model's, within the budget, reading what it lacks."""
    case = zoo.CASES[name]
    model = zoo.resident(case.build)
    path = zoo.save(model, tmp_path / "model.safetensors")
    budget = max(int(0.4 * zoo.weight_bytes(model)), zoo.smallest_budget(case.build, path))
    with zoo.streamed(case.build, SafetensorsLoader(path), prefetch_depth=depth, memory_budget=budget) as streamed:
        for seed in (1, 1, 2):
            read_before = odewei.report(streamed).bytes_read
            expected = zoo.outputs(model, case.inputs(seed))
            assert zoo.same_bits(zoo.outputs(streamed, case.inputs(seed)), expected)
        report = odewei.report(streamed)
        assert report.peak_bytes <= budget < report.weight_bytes
        assert report.overdrafts == 0
        assert report.bytes_read - read_before >= 0.5 * (report.weight_bytes - budget)
        assert report.passes == 3


@pytest.mark.parametrize("granularity", ["auto", "block", "leaf", lambda name, module: name.endswith("mlp")])
@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_same_bits_however_it_is_cut_and_read(granularity: object, io: str, tmp_path: Path) -> None:
    """Neither the granularity nor the way of reading changes a bit."""
    case = zoo.CASES["llama"]
    model = zoo.resident(case.build)
    path = zoo.save(model, tmp_path / "model.safetensors")
    budget = max(zoo.weight_bytes(model) // 2, zoo.smallest_budget(case.build, path, granularity=granularity))
    with zoo.streamed(case.build, path, memory_budget=budget, io=io, granularity=granularity) as streamed:
        for seed in (1, 2):
            expected = zoo.outputs(model, case.inputs(seed))
            assert zoo.same_bits(zoo.outputs(streamed, case.inputs(seed)), expected)


@pytest.mark.parametrize("fraction", [0.3, 0.6, 1.5])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_with_a_cache(name: str, fraction: float, tmp_path: Path) -> None:
    """A decoder and an encoder-decoder generate the resident model's tokens."""
    build = zoo.CASES[name].build
    model = zoo.resident(build)
    path = zoo.save(model, tmp_path / "model.safetensors")
    budget = max(int(fraction * zoo.weight_bytes(model)), zoo.smallest_budget(build, path))
    ids = zoo.CASES[name].inputs(3)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "use_cache": True}
    with zoo.streamed(build, path, memory_budget=budget) as streamed, torch.no_grad():
        expected = model.generate(ids, **options)
        for _ in range(2):
            assert torch.equal(streamed.generate(ids, **options), expected)
        assert odewei.report(streamed).peak_bytes <= budget


def test_everything_fits(tmp_path: Path) -> None:
    """With a budget for everything, each byte is read once."""
    case = zoo.CASES["llama"]
    model = zoo.resident(case.build)
    path = zoo.save(model, tmp_path / "model.safetensors")
    with zoo.streamed(case.build, path, memory_budget="1GiB", io="buffered") as streamed:
        for seed in range(4):
            expected = zoo.outputs(model, case.inputs(seed))
            assert zoo.same_bits(zoo.outputs(streamed, case.inputs(seed)), expected)
        report = odewei.report(streamed)
        assert report.bytes_read == report.weight_bytes
        assert report.stalls <= report.units


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_on_load(dtype: torch.dtype, tmp_path: Path) -> None:
    """With dtype= the bits are those of the resident model converted to it."""
    build = zoo.CASES["llama"].build
    model = zoo.resident(build)
    path = zoo.save(model, tmp_path / "model.safetensors")
    ids = zoo.CASES["llama"].inputs(1)
    for name, parameter in list(model.named_parameters()):
        owner, local = name.rsplit(".", 1)
        setattr(model.get_submodule(owner), local, torch.nn.Parameter(parameter.detach().to(dtype)))
    expected = zoo.outputs(model, ids)
    for depth in (0, "auto"):
        with zoo.streamed(build, path, dtype=dtype, prefetch_depth=depth, memory_budget="200kB") as streamed:
            assert next(streamed.parameters()).dtype is dtype
            assert zoo.same_bits(zoo.outputs(streamed, ids), expected)


def test_every_weight_is_aligned(tmp_path: Path) -> None:
    """Every tensor handed out lies at a multiple of 64 bytes, wherever the file has it."""
    build = zoo.CASES["llama"].build
    path = zoo.save(zoo.resident(build), tmp_path / "model.safetensors")
    seen = []

    def look(module: torch.nn.Module, args: object) -> None:
        seen.extend(value.data_ptr() % 64 for value in module._parameters.values() if value is not None)

    with zoo.streamed(build, path, memory_budget="200kB") as streamed:
        for module in streamed.modules():
            if module._parameters:
                module.register_forward_pre_hook(look)
        zoo.outputs(streamed, zoo.CASES["llama"].inputs(1))
    assert seen
    assert not any(seen)
