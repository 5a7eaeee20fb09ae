"""Passes: in every mode, backward, training, in parts, from two threads."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.func import functional_call
from torch.nn.utils import parametrize

from .action import Arguments, Draw, action
from .side import Inapplicable, Side, mode, tensors_of
from .subjects import Stack

MODES = ("no_grad", "no_grad", "inference", "grad")
CAUSAL = ("llama", "mixtral", "t5")


def _forward(draw: Draw) -> Arguments:
    return {"how": draw.one(MODES), "seed": draw.seed()}


def _seed(draw: Draw) -> Arguments:
    return {"seed": draw.seed()}


def _gradients(side: Side) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in side.model.named_parameters()}


@action(_forward, often=5)
def forward(side: Side, how: str, seed: int) -> object:
    with mode(how):
        return list(tensors_of(side.call(seed)))


@action(_seed, often=3)
def backward(side: Side, seed: int) -> object:
    loss = side.loss(seed)
    loss.backward()
    return loss, _gradients(side)


@action(lambda draw: {"seed": draw.seed(), "names": draw.rng.sample(range(40), 3)})
def autograd_grad(side: Side, seed: int, names: list[int]) -> object:
    """Gradients of some parameters without ``.grad``."""
    parameters = list(side.model.parameters())
    wanted = [parameters[number % len(parameters)] for number in names]
    return torch.autograd.grad(side.loss(seed), wanted, allow_unused=True)


def _optimizer(side: Side, kind: str) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=0.01)


def _train(side: Side, optimizer: torch.optim.Optimizer, seed: int, clip: float | None) -> object:
    loss = side.loss(seed)  # first: a model that refuses is to be as before
    optimizer.zero_grad()
    loss.backward()
    norm = None if clip is None else nn.utils.clip_grad_norm_(side.model.parameters(), clip)
    optimizer.step()
    return loss, norm


@action(
    lambda draw: {
        "optimizer": draw.one(("sgd", "adamw")),
        "seed": draw.seed(),
        "clip": draw.one((None, 0.1)),
    },
    often=2.5,
    holds=True,
)
def train_step(side: Side, optimizer: str, seed: int, clip: float | None) -> object:
    """A step over what is trainable now; the optimizer is kept."""
    made = _optimizer(side, optimizer)
    loss = _train(side, made, seed, clip)
    side.kept["optimizer"] = made
    return loss


@action(lambda draw: {"key": draw.kept("optimizer"), **_seed(draw)}, often=6, holds=True)
def train_on(side: Side, key: str, seed: int) -> object:
    """Another step with the optimizer that was kept; its state is keyed by parameters."""
    optimizer = side.keep(key)
    return _train(side, optimizer, seed, None), len(optimizer.state)


@action(lambda draw: {"to_none": draw.one((True, False))})
def zero_grad(side: Side, to_none: bool) -> object:
    side.model.zero_grad(set_to_none=to_none)
    return _gradients(side)


@action(lambda draw: {"norm": draw.one((0.01, 1.0))})
def clip_grad_norm(side: Side, norm: float) -> object:
    return nn.utils.clip_grad_norm_(side.model.parameters(), norm)


@action(lambda draw: {"on": draw.one((True, False))}, often=1.5)
def training_mode(side: Side, on: bool) -> object:
    side.model.train(on)
    return side.model.training


@action(lambda draw: {"name": draw.module(nn.Dropout, nn.BatchNorm2d), "on": draw.one((True, False))})
def training_mode_of_part(side: Side, name: str, on: bool) -> object:
    side.module(name).train(on)


@action(lambda draw: {"on": draw.one((True, False))})
def checkpointing(side: Side, on: bool) -> object:
    """Blocks are run again in the backward pass."""
    if hasattr(side.model, "gradient_checkpointing_enable"):
        side.model.train()
        side.model.gradient_checkpointing_enable() if on else side.model.gradient_checkpointing_disable()
        return None
    stack = next((one for one in side.model.modules() if isinstance(one, Stack)), None)
    if stack is None:
        raise Inapplicable("no blocks")
    stack.checkpointed = on
    return None


@action(_seed, often=0.5, only=lambda side: side.plan.subject in CAUSAL and hasattr(side.model, "generate"))
def generate(side: Side, seed: int) -> object:
    if not hasattr(side.model, "generate"):
        raise Inapplicable("no generate")
    ids = side.inputs(seed)["input_ids"]
    return side.model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=seed % 2 == 0)


@action(_seed, holds=True)
def two_threads(side: Side, seed: int) -> object:
    """Two passes at the same time, without gradients."""
    found: dict[int, object] = {}
    rng = torch.get_rng_state()

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                found[number] = list(tensors_of(side.call(seed + number)))
        except Exception as error:
            found[number] = error

    changing = nn.Dropout | nn.BatchNorm2d | parametrize.ParametrizationList  # a spectral norm goes on with each pass
    if any(one.training for one in side.model.modules() if isinstance(one, changing)):
        raise Inapplicable("the order of two threads would decide")
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_rng_state(rng)
    if error := next((one for one in found.values() if isinstance(one, Exception)), None):
        raise error
    return found[0], found[1]


@action(
    lambda draw: {"name": draw.module(nn.Linear, nn.LayerNorm, nn.Embedding), "how": draw.one(MODES), **_seed(draw)}
)
def call_a_part(side: Side, name: str, how: str, seed: int) -> object:
    """One layer by itself."""
    return _call_part(side.module(name), how, seed)


def _call_part(part: Any, how: str, seed: int) -> object:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(part, nn.Embedding):
        given = torch.randint(0, part.num_embeddings, (2, 3), generator=generator)
    else:
        width = part.in_features if isinstance(part, nn.Linear) else part.normalized_shape[0]
        given = torch.randn(2, 3, width, generator=generator)
        given = given[:, -1:].to(part.weight.dtype)  # not contiguous
    with mode(how):
        return part(given)


@action(lambda draw: {"name": draw.parameter(), **_seed(draw)})
def call_with_other_weights(side: Side, name: str, seed: int) -> object:
    """``functional_call`` with one weight in place of the model's."""
    other = side.parameter(name).detach() * 0.5
    with torch.no_grad():
        return list(tensors_of(functional_call(side.model, {name: other}, (), side.inputs(seed))))


@action(lambda draw: {"name": draw.module(nn.Linear), **_seed(draw)})
def functional_gradients(side: Side, name: str, seed: int) -> object:
    """``torch.func.grad`` of one layer, for each of its inputs (``vmap``)."""
    layer = side.module(name)
    parameters = {key: parameter.detach() for key, parameter in layer.named_parameters()}
    given = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(seed))

    def loss(weights: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, weights, (one,)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, given)


@action(lambda draw: {"how": draw.one(("no_grad", "grad")), **_seed(draw)}, often=0.5)
def autocast(side: Side, how: str, seed: int) -> object:
    with torch.autocast("cpu", dtype=torch.bfloat16), mode(how):
        return list(tensors_of(side.call(seed)))


@action(lambda draw: {"name": draw.module(nn.Linear, nn.LayerNorm), "kind": draw.one(("forward", "pre", "backward"))})
def hook_a_module(side: Side, name: str, kind: str) -> object:
    """A hook that changes what goes through."""
    if any(isinstance(one, OptimizedModule) or one._compiled_call_impl is not None for one in side.model.modules()):
        raise Inapplicable("what is compiled may or may not see hooks that come later (skip_nnmodule_hook_guards)")
    module, key = side.module(name), f"hook of {name} {kind}"
    if kind == "forward":
        side.kept[key] = module.register_forward_hook(lambda module, given, made: made * 1.5)
    elif kind == "pre":
        side.kept[key] = module.register_forward_pre_hook(lambda module, given: (given[0] * 0.5,))
    else:
        side.kept[key] = module.register_full_backward_hook(lambda module, back, ahead: (back[0] * 2,))
    return None


@action(lambda draw: {"name": draw.parameter(), "via": draw.via(), "late": draw.one((True, False))}, often=1.5)
def hook_a_weight(side: Side, name: str, via: str, late: bool) -> object:
    """A hook that changes the gradient, before or after it is there."""
    parameter, key = side.parameter(name, via), f"hook of {name} {late}"
    if late:
        side.kept[key] = parameter.register_post_accumulate_grad_hook(_halve)
    else:
        side.kept[key] = parameter.register_hook(lambda gradient: gradient * 2)
    return None


def _halve(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


@action(lambda draw: {"key": draw.kept("hook ")})
def unhook(side: Side, key: str) -> object:
    side.keep(key).remove()
    del side.kept[key]


@action(lambda draw: {"name": draw.module(nn.Linear), "scale": draw.one((0.5, 2.0))}, often=0.5)
def copy_hooks(side: Side, name: str, scale: float) -> object:
    """A library puts another module in the place of one, and takes the hooks along."""
    parent, last = side.parent(name)
    old = side.module(name)
    made = _Scaled(old.weight.detach() * scale)
    made._forward_pre_hooks.update(old._forward_pre_hooks)
    made._forward_hooks.update(old._forward_hooks)
    setattr(parent, last, made)


class _Scaled(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(given, self.weight)
