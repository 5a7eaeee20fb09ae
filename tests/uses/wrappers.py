"""What libraries put around or into a model: adapters, pruning, parametrizations, compilers, wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, parametrize, prune

from .action import Arguments, Draw, action
from .layers import Around
from .side import Inapplicable, Side, tensors_of


def _peft(side: Side) -> Any:
    from peft import PeftModel

    if not isinstance(side.model, PeftModel):
        raise Inapplicable("no adapters")
    return side.model


def _has_adapters(side: Side) -> bool:
    return hasattr(side.model, "peft_config") and hasattr(side.model, "merge_and_unload")


def _targets(draw: Draw) -> list[str]:
    found = draw.side.model.named_modules()
    names = sorted({name.rpartition(".")[2] for name, one in found if type(one) is nn.Linear and name.count(".")})
    return [draw.one(name for name in names if not name.isdecimal() and name != "out_proj")]


def _lora(draw: Draw) -> Arguments:
    trained = draw.rng.random() < 0.2 and hasattr(draw.side.model, "lm_head")
    return {"targets": _targets(draw), "kept_whole": ["lm_head"] if trained else None, "seed": draw.seed()}


@action(_lora, often=1.5, only=lambda side: not _has_adapters(side))
def add_lora(side: Side, targets: list[str], kept_whole: list[str] | None, seed: int) -> object:
    from peft import LoraConfig, get_peft_model

    if _has_adapters(side):
        raise Inapplicable("adapters are there")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, lora_dropout=0.0, modules_to_save=kept_whole
    )
    side.model = get_peft_model(side.model, config)


@action(often=8, holds=True, only=_has_adapters)
def merge_and_unload(side: Side) -> object:
    side.model = _peft(side).merge_and_unload()


@action(often=4, only=_has_adapters)
def unload(side: Side) -> object:
    side.model = _peft(side).unload()


@action(lambda draw: {"merge": draw.one((True, False))}, often=8, holds=True, only=_has_adapters)
def merge_adapter(side: Side, merge: bool) -> object:
    model = _peft(side)
    model.merge_adapter() if merge else model.unmerge_adapter()


@action(lambda draw: {"seed": draw.seed()}, often=8, only=_has_adapters)
def without_adapter(side: Side, seed: int) -> object:
    with _peft(side).disable_adapter(), torch.no_grad():
        return list(tensors_of(side.call(seed)))


def _owner(side: Side, name: str) -> Any:
    module = side.module(name)
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise Inapplicable("no weight")
    return module


@action(lambda draw: {"name": draw.module(nn.Linear, nn.Conv2d), "amount": draw.one((0.3, 0.5))}, often=1.5, holds=True)
def prune_weights(side: Side, name: str, amount: float) -> object:
    return prune.l1_unstructured(_owner(side, name), "weight", amount).weight


@action(lambda draw: {"name": draw.one(_pruned(draw.side.model))}, often=8, holds=True)
def make_pruning_permanent(side: Side, name: str) -> object:
    return prune.remove(_owner(side, name), "weight").weight


def _pruned(model: nn.Module) -> list[str]:
    return [
        name
        for name, one in model.named_modules()
        if "weight_orig" in one._parameters and "weight_mask" in one._buffers
    ]


class _Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


PARAMETRIZATIONS: dict[str, Any] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "own": lambda module: parametrize.register_parametrization(module, "weight", _Halved()),
    "old weight_norm": nn.utils.weight_norm,
}


@action(
    lambda draw: {"name": draw.module(nn.Linear, nn.Conv2d), "kind": draw.one(PARAMETRIZATIONS)}, often=1.5, holds=True
)
def add_parametrization(side: Side, name: str, kind: str) -> object:
    module = _owner(side, name)
    if kind == "old weight_norm" and isinstance(module, NonDynamicallyQuantizableLinear):
        # It computes before the forward of its module, which attention never calls: gradients go back through the old
        # graph then, and for a parameter that got other .data since, torch computes with that if nothing hooks it.
        raise Inapplicable("the norm would be computed once only")
    PARAMETRIZATIONS[kind](module)


@action(
    lambda draw: {"name": draw.one(_parametrized(draw.side.model)), "leave": draw.one((True, False))},
    often=3,
    holds=True,
)
def remove_parametrization(side: Side, name: str, leave: bool) -> object:
    module = _owner(side, name)
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=leave)
    else:
        nn.utils.remove_weight_norm(module)
    return module.weight


def _parametrized(model: nn.Module) -> list[str]:
    found = model.named_modules()
    return [name for name, one in found if parametrize.is_parametrized(one) or "weight_g" in one._parameters]


@action()
def wrap_the_model(side: Side) -> object:
    """The model within a module of the user's."""
    side.model = Around(side.model)


@action(often=2, only=lambda side: isinstance(side.model, Around))
def unwrap_the_model(side: Side) -> object:
    if not isinstance(side.model, Around):
        raise Inapplicable("not wrapped")
    side.model = side.model.inner


@action(lambda draw: {"name": draw.module(nn.Linear, nn.LayerNorm), "seed": draw.seed()}, often=0.06)
def compile_a_layer(side: Side, name: str, seed: int) -> object:
    side.module(name).compile(backend="eager")
    with torch.no_grad():
        return list(tensors_of(side.call(seed)))


@action(lambda draw: {"seed": draw.seed()}, often=0.03, holds=True)
def compile_the_model(side: Side, seed: int) -> object:
    side.model = torch.compile(side.model, backend="eager")
    with torch.no_grad():
        return list(tensors_of(side.call(seed)))


@action(lambda draw: {"name": draw.one(_convolutions(draw.side.model))}, often=2, holds=True)
def fuse_batch_norm(side: Side, name: str) -> object:
    """A convolution and the normalisation behind it become one, which torch does with a deep copy."""
    block = side.module(name)
    if not isinstance(block, nn.Sequential) or type(block[0]) is not nn.Conv2d or type(block[1]) is not nn.BatchNorm2d:
        raise Inapplicable("no such pair")
    block.eval()
    block[0] = nn.utils.fusion.fuse_conv_bn_eval(block[0], block[1])
    block[1] = nn.Identity()
    return block[0].weight


def _convolutions(model: nn.Module) -> list[str]:
    pairs = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Sequential) and len(one) > 1]
    return [name for name, one in pairs if type(one[0]) is nn.Conv2d and type(one[1]) is nn.BatchNorm2d]


@action(lambda draw: {"seed": draw.seed()}, often=0.7, holds=True)
def average(side: Side, seed: int) -> object:
    """An averaged model beside the model, as in training."""
    averaged = torch.optim.swa_utils.AveragedModel(side.model)
    averaged.update_parameters(side.model)
    with torch.no_grad():
        for parameter in side.model.parameters():
            parameter.mul_(0.5)
    averaged.update_parameters(side.model)
    with torch.no_grad():
        return list(tensors_of(averaged(**side.inputs(seed)))), [one.detach().clone() for one in averaged.parameters()]
