"""Checkpoints whose names, or whose pieces, are not the model's: streamed with the resident model's bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.errors import WeightMismatchError
from odewei.torch import Concat, GatheringLoader, NumpyLoader, SafetensorsLoader, Stack, open_checkpoint
from tests import models as zoo

EXPERTS = 4


def by_expert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mixtral's state as it was published: three matrices an expert, under other names."""
    found = {}
    for name, tensor in state.items():
        block, _, what = name.partition(".mlp.")
        if what == "experts.gate_up_proj":
            for expert, fused in enumerate(tensor):
                w1, w3 = fused.chunk(2)
                found[f"{block}.block_sparse_moe.experts.{expert}.w1.weight"] = w1
                found[f"{block}.block_sparse_moe.experts.{expert}.w3.weight"] = w3
        elif what == "experts.down_proj":
            for expert, down in enumerate(tensor):
                found[f"{block}.block_sparse_moe.experts.{expert}.w2.weight"] = down
        else:
            found[name.replace(".mlp.gate", ".block_sparse_moe.gate")] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def fused(path: Path | str, layers: int, experts: int = EXPERTS) -> GatheringLoader:
    """The same state as the model has it."""
    recipes: dict[str, Stack | Concat] = {}
    for layer in range(layers):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        recipes[f"{new}.gate_up_proj"] = Stack(
            Concat([f"{old}.{e}.w1.weight", f"{old}.{e}.w3.weight"]) for e in range(experts)
        )
        recipes[f"{new}.down_proj"] = Stack(f"{old}.{e}.w2.weight" for e in range(experts))
    return GatheringLoader(
        SafetensorsLoader(path, rename=lambda name: name.replace(".block_sparse_moe.gate", ".mlp.gate")), recipes
    )


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("depth", [0, "auto"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_experts_of_their_own_become_one_weight(
    dtype: torch.dtype | None, depth: int | str, io: str, tmp_path: Path
) -> None:
    """A model with fused experts runs from a checkpoint that has each alone, within the budget, reading each byte."""
    model = zoo.resident(zoo.mixtral)
    path = tmp_path / "model.safetensors"
    save_file(by_expert(model.state_dict()), path)
    for parameter in model.parameters():  # and not the buffers, as model.to() would
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    budget = int(0.6 * zoo.weight_bytes(model))
    options = {"memory_budget": budget, "prefetch_depth": depth, "io": io, "dtype": dtype}
    with zoo.streamed(zoo.mixtral, fused(path, 3), **options) as streamed:
        for seed in (1, 1, 2):
            inputs = zoo.CASES["mixtral"].inputs(seed)
            assert zoo.same_bits(zoo.outputs(streamed, inputs), zoo.outputs(model, inputs))
        report = odewei.report(streamed)
        assert report.peak_bytes <= budget < report.weight_bytes
        assert report.overdrafts == 0
        assert report.bytes_read >= 3 * (report.weight_bytes - budget)


@pytest.mark.parametrize("depth", [0, "auto"])
def test_only_routed_experts_are_read_from_weights_of_their_own(depth: int | str, tmp_path: Path) -> None:
    """Where the model takes experts one by one, those that a token is routed to are gathered, and no others."""

    def build() -> nn.Module:
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=16, num_experts_per_tok=2, vocab_size=99, experts_implementation="eager",
        )  # fmt: skip
        return MixtralForCausalLM(config)

    model = zoo.resident(build)
    path = tmp_path / "model.safetensors"
    save_file(by_expert(model.state_dict()), path)
    expert_bytes = sum(one.nbytes for name, one in model.named_parameters() if ".experts." in name)
    token = {"input_ids": torch.tensor([[5]])}
    options = {"memory_budget": "1GiB", "prefetch_depth": depth, "io": "buffered"}
    with zoo.streamed(build, fused(path, 2, 16), **options) as streamed:
        for _ in range(2):
            assert zoo.same_bits(zoo.outputs(streamed, token), zoo.outputs(model, token))
        expected = zoo.weight_bytes(model) - expert_bytes + expert_bytes * 2 // 16
        assert odewei.report(streamed).bytes_read == expected
    with zoo.streamed(build, fused(path, 2, 16), memory_budget="500kB", prefetch_depth=depth) as streamed:
        for seed in range(3):
            inputs = zoo.CASES["mixtral"].inputs(seed)
            assert zoo.same_bits(zoo.outputs(streamed, inputs), zoo.outputs(model, inputs))


def test_a_recipe_of_another_shape_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """What a recipe makes has to fit the model; the error names the weight and the file of its sources."""
    model = zoo.resident(zoo.mixtral)
    path = tmp_path / "model.safetensors"
    save_file(by_expert(model.state_dict()), path)
    loader = fused(path, 3)
    name = "model.layers.1.mlp.experts.down_proj"
    loader.recipes[name] = Concat(loader.recipes[name].sources)
    with pytest.raises(WeightMismatchError, match=r"\(128, 48\), the model \(4, 32, 48\)") as caught:
        zoo.init_on_demand_weights_model(zoo.mixtral, loader)
    assert (caught.value.weight, caught.value.file) == (name, str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_part_of_a_checkpoint_is_a_model(save: object, tmp_path: Path) -> None:
    """With a prefix the encoder of a larger checkpoint is a checkpoint; here one of NumPy, deflated or not."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    model = zoo.resident(build)
    state = {f"encoder.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    save(tmp_path / "model.npz", **state, **{"decoder.weight": np.zeros(3)})  # type: ignore[operator]
    inputs = {"input": torch.randn(5, 64, generator=torch.Generator().manual_seed(0))}
    loader = open_checkpoint(tmp_path, prefix="encoder.")
    assert isinstance(loader, NumpyLoader)
    with zoo.streamed(build, loader, memory_budget=40_000) as streamed:
        for _ in range(3):
            assert zoo.same_bits(zoo.outputs(streamed, inputs), zoo.outputs(model, inputs))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_quantised_weights_are_those_of_the_package(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """A streamed GGUF file has the bits of a model that holds what the package dequantises, cast as asked."""
    gguf = pytest.importorskip("gguf")

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))

    model = zoo.resident(build)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mlp")
    for name, parameter in model.named_parameters():
        kind = gguf.GGMLQuantizationType.Q8_0 if parameter.dim() == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quantize(parameter.detach().numpy(), kind)
        writer.add_tensor(f"blk.{name}", stored, raw_dtype=kind)
        parameter.data = torch.from_numpy(gguf.dequantize(stored, kind)).to(dtype or torch.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    inputs = {"input": torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(dtype or torch.float32)}
    loader = open_checkpoint(tmp_path, prefix="blk.", dtype=dtype)
    with zoo.streamed(build, loader, memory_budget=700_000) as streamed:
        for _ in range(3):
            assert zoo.same_bits(zoo.outputs(streamed, inputs), zoo.outputs(model, inputs))
        assert odewei.report(streamed).overdrafts == 0


def test_arrays_in_fortran_order_give_the_bits_of_the_resident_model(tmp_path: Path) -> None:
    """A weight that NumPy saved column by column is bound with its strides, as the resident model has it."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 96))

    arrays = {name: np.asfortranarray(t.numpy()) for name, t in zoo.resident(build).state_dict().items()}
    np.savez(tmp_path / "model.npz", **arrays)
    model = build().eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
    inputs = {"input": torch.randn(7, 96, generator=torch.Generator().manual_seed(0))}
    with zoo.streamed(build, tmp_path, memory_budget=70_000, granularity="leaf") as streamed:
        assert streamed[0].weight.stride() == (1, 80)
        for _ in range(3):
            assert zoo.same_bits(zoo.outputs(streamed, inputs), zoo.outputs(model, inputs))
