"""Streamed models on an accelerator: the bits of the resident model. The simulated one looks for races as well.

``tests/gpu`` runs the same on a real one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.torch import init_on_demand_weights_model

DEPTHS = (0, 1, "auto")
WIDTH, LAYERS = 48, 6
UNIT = WIDTH * WIDTH * 4 + 256  # bytes of one layer of Stack, its bias included


class Stack(nn.Module):
    """Layers of one size. ``positions`` returns a view of its own weight, which is used after its module has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions(len(x))
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.scale
        return x


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, count: int) -> torch.Tensor:
        return self.weight[:count]


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=None,
            bos_token_id=0,
            pad_token_id=0,
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=None,
        )
    )


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=6,
            num_experts_per_tok=2,
            eos_token_id=None,
            bos_token_id=0,
            experts_implementation="eager",
        )
    )


IDS = torch.arange(12).view(2, 6) * 7 % 96
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor]]] = {
    "llama": (_llama, {"input_ids": IDS}),
    "t5": (_t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}),
    "mixtral": (_mixtral, {"input_ids": IDS}),
}


def checkpoint_of(make: Callable[[], nn.Module], path: Path, seed: int = 0) -> Path:
    """A file with random weights for the model."""
    torch.manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    file = path / f"{seed}.safetensors"
    save_file(state, file)
    return file


def resident(make: Callable[[], nn.Module], file: Path, device: str = "sim") -> nn.Module:
    """The same with all weights in memory, on the device."""
    from safetensors.torch import load_file

    model = make().eval()
    model.load_state_dict(load_file(file), strict=False)
    return model.to(device)


def on_device(inputs: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.fixture
def stack(tmp_path: Path, device: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A checkpoint of Stack, an input on the device, and what the resident model makes of it."""
    file = checkpoint_of(Stack, tmp_path)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        return file, x, resident(Stack, file, device)(x).cpu()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("budget", [1, 2, 3, LAYERS + 2])
def test_every_budget_and_depth_has_the_bits_of_the_resident_model(
    stack: tuple[Path, torch.Tensor, torch.Tensor], budget: int, depth: Any, device: str
) -> None:
    """From one unit at a time to everything, passes back to back, without a wait of the host for its results."""
    file, x, expected = stack
    model = init_on_demand_weights_model(
        Stack, file, device=device, memory_budget=budget * (64 * WIDTH * 4), prefetch_depth=depth
    )
    with torch.no_grad():
        outputs = [model(x) for _ in range(4)]
    assert all(torch.equal(output.cpu(), expected) for output in outputs)
    report = odewei.report(model)
    assert report.overdrafts == 0
    assert report.peak_bytes <= report.budget_bytes
    odewei.close(model)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_transformers(tmp_path: Path, device: str, name: str, depth: Any) -> None:
    """A decoder, an encoder-decoder and a mixture of experts, a third of the weights at a time."""
    make, inputs = TRANSFORMERS[name]
    file = checkpoint_of(make, tmp_path)
    whole = resident(make, file, device)
    inputs = on_device(inputs, device)
    with torch.no_grad():
        expected = whole(**inputs).logits.cpu()
        budget = sum(parameter.nbytes for parameter in whole.parameters()) // 3
        model = init_on_demand_weights_model(make, file, device=device, memory_budget=budget, prefetch_depth=depth)
        model.eval()
        for _ in range(3):
            assert torch.equal(model(**inputs).logits.cpu(), expected)
    odewei.close(model)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_generate(tmp_path: Path, device: str, name: str) -> None:
    """A loop of passes with a cache gives the same tokens."""
    make, inputs = TRANSFORMERS[name]
    file = checkpoint_of(make, tmp_path)
    whole = resident(make, file, device)
    ids = inputs["input_ids"].to(device)
    how = {"max_new_tokens": 4, "do_sample": False}
    expected = whole.generate(ids, **how).cpu()  # type: ignore[operator]
    budget = sum(parameter.nbytes for parameter in whole.parameters()) // 2
    model = init_on_demand_weights_model(make, file, device=device, memory_budget=budget).eval()
    assert torch.equal(model.generate(ids, **how).cpu(), expected)  # type: ignore[operator]
    odewei.close(model)


@pytest.mark.parametrize("depth", [1, "auto"])
def test_two_threads(stack: tuple[Path, torch.Tensor, torch.Tensor], device: str, depth: Any) -> None:
    """Two threads in one model, one of them on a stream of its own."""
    file, x, expected = stack
    model = init_on_demand_weights_model(
        Stack, file, device=device, memory_budget=3 * (64 * WIDTH * 4), prefetch_depth=depth
    )
    other = torch.Stream(device=device)
    other.wait_stream(torch.accelerator.current_stream())
    found: list[torch.Tensor] = []

    def passes(stream: torch.Stream | None) -> None:
        with torch.no_grad():
            if stream is None:
                outputs = [model(x) for _ in range(3)]
            else:
                with stream:
                    outputs = [model(x) for _ in range(3)]
                stream.synchronize()
        found.extend(output.cpu() for output in outputs)

    threads = [threading.Thread(target=passes, args=(stream,)) for stream in (None, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(output, expected) for output in found)
    odewei.close(model)


def test_views_that_escape_keep_their_values(stack: tuple[Path, torch.Tensor, torch.Tensor], device: str) -> None:
    """What somebody holds of a unit stays what it is when the unit has left, and is used safely before it goes."""
    file, x, expected = stack
    model = init_on_demand_weights_model(Stack, file, device=device, memory_budget=2 * (64 * WIDTH * 4))
    positions: Any = model.positions
    with torch.no_grad():
        view = positions(9)
        kept = positions.weight
        for _ in range(3):
            assert torch.equal(model(x).cpu(), expected)
            late = view * 1.0 + kept[:9]
        weight = late.cpu() / 2
        del view, kept, late
        for _ in range(2):
            assert torch.equal(model(x).cpu(), expected)
        assert torch.equal(weight, positions.weight[:9].cpu())
    odewei.close(model)


def test_weights_used_outside_of_their_module(stack: tuple[Path, torch.Tensor, torch.Tensor], device: str) -> None:
    """A weight taken from its module, or from parameters(), in the middle of other layers: right, whatever it costs."""
    file, x, _ = stack
    whole = resident(Stack, file, device)
    model = init_on_demand_weights_model(Stack, file, device=device, memory_budget=2 * (64 * WIDTH * 4))

    def odd(stack: Any) -> torch.Tensor:
        y = x
        for layer in stack.layers:
            y = torch.tanh(layer(y)) @ stack.layers[0].weight + stack.positions.weight[: len(y)]
        for parameter in stack.parameters():
            y = y + parameter.sum()
        return y.cpu()

    with torch.no_grad():
        expected = odd(whole)
        for _ in range(3):
            assert torch.equal(odd(model), expected)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert all(buffer.device.type == device for buffer in model.buffers())
    odewei.close(model)


def test_an_exception_in_mid_forward_leaves_everything_in_order(
    stack: tuple[Path, torch.Tensor, torch.Tensor], device: str
) -> None:
    """The next pass is right, and no lease is left."""
    file, x, expected = stack
    model = init_on_demand_weights_model(Stack, file, device=device, memory_budget=2 * (64 * WIDTH * 4))
    layers: Any = model.layers

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("in the middle")

    with torch.no_grad():
        for number in (0, 3, LAYERS - 1):
            handle = layers[number].register_forward_pre_hook(fail)
            with pytest.raises(ValueError, match="in the middle"):
                model(x)
            handle.remove()
            assert odewei.runtime_of(model).driver.ledger.leases() == 0
            assert torch.equal(model(x).cpu(), expected)
    odewei.close(model)


def test_several_models_under_one_budget(tmp_path: Path, device: str) -> None:
    """Two models by turns share the device's budget and the host's."""
    files = [checkpoint_of(Stack, tmp_path, seed) for seed in (1, 2)]
    x = torch.ones(3, WIDTH).to(device)
    budget = odewei.MemoryBudget(4 * (64 * WIDTH * 4), host_budget="1MiB")
    models = [init_on_demand_weights_model(Stack, file, device=device, memory_budget=budget) for file in files]
    with torch.no_grad():
        expected = [resident(Stack, file, device)(x).cpu() for file in files]
        for _ in range(3):
            for model, right in zip(models, expected, strict=True):
                assert torch.equal(model(x).cpu(), right)
    assert budget.peak_bytes <= budget.limit_bytes
    odewei.close(models[0])
    with torch.no_grad():
        assert torch.equal(models[1](x).cpu(), expected[1])
    odewei.close(models[1])


def test_sources_of_every_kind(stack: tuple[Path, torch.Tensor, torch.Tensor], device: str) -> None:
    """A function, and weights in host memory, take the same way."""
    from safetensors.torch import load_file

    file, x, expected = stack
    state = load_file(file)

    def load(module: str, names: Any) -> dict[str, torch.Tensor]:
        return {name: state[name] for name in names}

    for source in (state, load):
        model = init_on_demand_weights_model(Stack, source, device=device, memory_budget=2 * (64 * WIDTH * 4))
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(model(x).cpu(), expected)
        odewei.close(model)


def test_cast_on_load(stack: tuple[Path, torch.Tensor, torch.Tensor], device: str) -> None:
    """Weights are cast on their way, by the reader."""
    file, x, _ = stack
    whole = resident(Stack, file, device).to(torch.bfloat16)
    build = partial(init_on_demand_weights_model, Stack, file, device=device, memory_budget=2 * (64 * WIDTH * 4))
    model = build(dtype=torch.bfloat16)
    x = x.to(torch.bfloat16)
    with torch.no_grad():
        model.scale = model.scale.to(torch.bfloat16)  # type: ignore[operator, union-attr]
        assert torch.equal(model(x).cpu(), whole(x).cpu())
    odewei.close(model)


def test_materialize(stack: tuple[Path, torch.Tensor, torch.Tensor], device: str) -> None:
    """A materialized model is an ordinary one on the device."""
    file, x, expected = stack
    model = init_on_demand_weights_model(Stack, file, device=device, memory_budget=2 * (64 * WIDTH * 4))
    with torch.no_grad():
        model(x)
        odewei.materialize(model)
        assert torch.equal(model(x).cpu(), expected)
    assert type(model.layers[0].weight) is nn.Parameter  # type: ignore[index, union-attr]
    assert model.layers[0].weight.device.type == device  # type: ignore[index, union-attr]


def test_tracing_and_copies_and_state(
    stack: tuple[Path, torch.Tensor, torch.Tensor], device: str, tmp_path: Path
) -> None:
    """What can be done with a streamed model on the CPU can be done here: trace it, copy it, take its state."""
    file, x, expected = stack
    model = init_on_demand_weights_model(Stack, file, device=device, memory_budget=3 * (64 * WIDTH * 4))
    order = odewei.trace(model, x)
    odewei.save_trace(model, tmp_path / "order.json")
    assert "layers.2" in order.units
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(x).cpu(), expected)
        assert torch.equal(model(x).cpu(), expected)
        model.layers[2].weight.add_(1)  # type: ignore[index, union-attr, operator]
        changed = model(x).cpu()
        for _ in range(2):
            assert torch.equal(model(x).cpu(), changed)
        assert not torch.equal(changed, expected)
        assert torch.equal(twin(x).cpu(), expected)
    state = model.state_dict()
    assert torch.equal(state["layers.1.weight"].cpu(), resident(Stack, file, "cpu").layers[1].weight)  # type: ignore[index, union-attr]
    model.to(device)  # where it is
    with pytest.raises(odewei.OdeweiError, match="cannot be converted"):
        model.to("cpu")
    odewei.close(model)
    odewei.close(twin)
