"""Grad modes, gradients through frozen weights, adapters and autocast are as in the resident model."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import odewei
from tests import models as zoo
from tests.traps import DEPTHS, WIDTH, Blocks, assert_streams, rows, twins

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("order", list(itertools.permutations(MODES))[::5], ids="-".join)
def test_modes_follow_each_other(order: tuple[str, ...], depth: int | str, tmp_path: Path) -> None:
    """Weights that were loaded in one mode can be used in any other, with the same bits and the same kind of result."""
    with twins(Blocks, tmp_path, depth) as (model, streamed):
        for name in (*order, *order):
            with MODES[name]():
                hidden = rows(1).requires_grad_(name == "grad")
                expected, found = model(hidden), streamed(hidden)
                weight = streamed.blocks[3].up.weight
            assert torch.equal(found, expected)
            assert (found.requires_grad, found.is_inference()) == (expected.requires_grad, expected.is_inference())
            assert not weight.is_inference()
            if name == "grad":
                grads = [torch.autograd.grad(one.square().sum(), hidden)[0] for one in (expected, found)]
                assert torch.equal(*grads)
            del weight, expected, found
        assert odewei.report(streamed).bytes_read > odewei.report(streamed).weight_bytes


class Adapter(nn.Module):
    """A low-rank adapter around a streamed layer."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=draw))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=draw))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + hidden @ self.down.T @ self.up.T


class Checkpointed(nn.Module):
    """Runs blocks so that their activations, and with them their weights, are not kept for the backward pass."""

    def __init__(self, blocks: nn.ModuleList, reentrant: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.reentrant = reentrant

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
        return hidden


def _adapted(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for seed, block in enumerate(model.blocks):
        block.up, block.down = Adapter(block.up, seed), Adapter(block.down, 100 + seed)
    return model


def _gradients(model: nn.Module, seed: int) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the adapters."""
    hidden = rows(seed).requires_grad_()
    output = model(hidden)
    output.square().sum().backward()
    adapters = [one for one in model.parameters() if one.requires_grad]
    found = [output.detach(), hidden.grad, *(one.grad for one in adapters)]
    for one in adapters:
        one.grad = None
    return found


@pytest.mark.parametrize("depth", DEPTHS)
def test_gradients_through_frozen_weights(depth: int | str, tmp_path: Path) -> None:
    """Gradients of inputs and of adapters added after streaming are the resident ones, though weights leave."""
    with twins(Blocks, tmp_path, depth) as (model, streamed):
        _adapted(model), _adapted(streamed)
        assert sum(one.requires_grad for one in streamed.parameters()) == 4 * len(model.blocks)
        for seed in range(3):
            assert zoo.same_bits(_gradients(streamed, seed), _gradients(model, seed))
        report = odewei.report(streamed)
        assert report.bytes_read > report.weight_bytes
        assert report.overdrafts == 0, "what autograd keeps of weights are references"
        assert report.weight_bytes == 8 * 4 * (4 * WIDTH * WIDTH + 3 * WIDTH), "adapters are none of odewei's weights"


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_checkpointed_blocks_stay_within_the_budget(depth: int | str, reentrant: bool, tmp_path: Path) -> None:
    """With checkpointed blocks, gradients are right and weights never take more than the budget."""
    with twins(Blocks, tmp_path, depth) as (model, streamed):
        one, other = (Checkpointed(_adapted(net).blocks, reentrant) for net in (model, streamed))
        for seed in range(3):
            assert zoo.same_bits(_gradients(other, seed), _gradients(one, seed))
        assert_streams(streamed)


class _Casts(TorchDispatchMode):
    """Weak references to what casts of ``dtype`` give."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.shapes: list[tuple[int, ...]] = []
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype is self.dtype:
            self.shapes.append(tuple(result.shape))
            self.made.append(weakref.ref(result))
        return result


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_autocast(grad: bool, depth: int | str, tmp_path: Path) -> None:
    """Under autocast, passes have the resident bits, within the budget."""
    with twins(Blocks, tmp_path, depth) as (model, streamed), torch.set_grad_enabled(grad):
        for one in (True, False):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=one):
                for seed in (1, 2, 1):
                    expected = model(rows(seed))
                    assert expected.dtype is torch.float32
                    assert torch.equal(streamed(rows(seed)), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(streamed(rows(3)), model(rows(3)))
        assert torch.equal(streamed(rows(3)), model(rows(3)))
        assert_streams(streamed)


def test_autocast_keeps_no_casts(tmp_path: Path) -> None:
    """Casts of streamed weights die with their use: kept until the end of autocast they would be a second model."""
    with (
        twins(Blocks, tmp_path) as (model, streamed),
        torch.autocast("cpu", torch.bfloat16),
        _Casts(torch.bfloat16) as seen,
        torch.no_grad(),
    ):
        streamed(rows(1))
        assert seen.shapes.count((2 * WIDTH, WIDTH)) == len(model.blocks)
        assert not any(made() is not None for made in seen.made)


@pytest.fixture
def llamas(tmp_path: Path) -> Iterator[tuple[nn.Module, nn.Module]]:
    with twins(zoo.CASES["llama"].build, tmp_path) as pair:
        yield pair


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's affair
def test_peft_lora(llamas: tuple[nn.Module, nn.Module]) -> None:
    """LoRA of peft added after streaming gives the resident outputs and gradients; base weights stream."""
    peft = pytest.importorskip("peft")
    results = []
    for one in llamas:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"], init_lora_weights=False)
        adapted = peft.get_peft_model(one, config)
        found = []
        for seed in (1, 2):
            with torch.no_grad():
                found += list(zoo._tensors(adapted(**zoo.CASES["llama"].inputs(seed)).logits))
            adapted(**zoo.CASES["llama"].inputs(seed)).logits.square().mean().backward()
        trained = {name: one.grad for name, one in adapted.named_parameters() if one.requires_grad}
        assert len(trained) == 2 * (2 * 6 + 1)
        with adapted.disable_adapter(), torch.no_grad():
            found.append(adapted(**zoo.CASES["llama"].inputs(3)).logits)
        results.append([*found, *trained.values()])
    assert zoo.same_bits(*results)
    report = odewei.report(llamas[1])
    assert report.bytes_read > report.weight_bytes
    assert report.weight_bytes == sum(one.nbytes for name, one in llamas[0].named_parameters() if "lora" not in name)


@pytest.mark.parametrize(
    "change", [lambda one: one.train(), lambda one: one.eval(), lambda one: one.requires_grad_(False)]
)
def test_what_changes_no_weight_is_let_pass(change: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Modes of modules, and freezing what is frozen, load nothing and change no result."""
    with twins(Blocks, tmp_path, 0) as (model, streamed):
        assert change(streamed) is streamed
        assert odewei.report(streamed).accesses == 0
        assert torch.equal(streamed(rows(1)), model(rows(1)))
