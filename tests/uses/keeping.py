"""What is kept of a model and used later: parameters, state dicts, parts; with the model or without it."""

from __future__ import annotations

import gc

import torch
from torch import nn

from .action import action
from .passes import MODES, _call_part
from .side import Inapplicable, Side, tensors_of


@action(holds=True)
def keep_parameters(side: Side) -> object:
    side.kept["parameters"] = dict(side.model.named_parameters())


@action(lambda draw: {"key": draw.kept("parameters")}, often=6, holds=True)
def read_kept_parameters(side: Side, key: str) -> object:
    """What was kept has values, and is what the model has where nothing was replaced."""
    now = dict(side.model.named_parameters())
    kept = side.keep(key)
    return {name: (value, value.requires_grad, value is now.get(name), value.grad) for name, value in kept.items()}


@action(lambda draw: {"key": draw.kept("parameters"), "number": draw.seed()}, often=6, holds=True)
def write_kept_parameter(side: Side, key: str, number: int) -> object:
    """A change of what was kept is one of the model's weight."""
    kept = side.keep(key)
    name = sorted(kept)[number % len(kept)]
    with torch.no_grad():
        kept[name].add_(0.125)
    kept[name].requires_grad_(number % 2 == 0)
    return name


@action(holds=True)
def keep_state(side: Side) -> object:
    """Tensors of a state dict are the model's memory: what is written later is seen in them."""
    side.kept["state"] = side.model.state_dict()


@action(lambda draw: {"key": draw.kept("state"), "assign": draw.one((True, False))}, often=6, holds=True)
def load_kept_state(side: Side, key: str, assign: bool) -> object:
    return str(side.model.load_state_dict(side.keep(key), strict=False, assign=assign))


@action(lambda draw: {"key": draw.kept("state")}, often=6, holds=True)
def read_kept_state(side: Side, key: str) -> object:
    return dict(side.keep(key))


@action(lambda draw: {"name": draw.module(nn.Linear, nn.LayerNorm, nn.Embedding)}, often=1.5, holds=True)
def keep_a_part(side: Side, name: str) -> object:
    side.kept[f"part {name}"] = side.module(name)


@action(lambda draw: {"key": draw.kept("part "), "how": draw.one(MODES), "seed": draw.seed()}, often=6, holds=True)
def call_kept_part(side: Side, key: str, how: str, seed: int) -> object:
    part = side.keep(key)
    if not isinstance(part, nn.Linear | nn.LayerNorm | nn.Embedding):
        raise Inapplicable("another kind")
    return _call_part(part, how, seed)


@action(
    lambda draw: {
        "name": draw.module(nn.Linear, nn.LayerNorm, nn.Embedding),
        "what": draw.one(("part", "parameters", "blocks", "state", "encoder")),
        "seed": draw.seed(),
    },
    often=0.5,
    holds=True,
    ends=True,
)
def drop_the_model(side: Side, name: str, what: str, seed: int) -> object:
    """What is kept of the model lives on without it."""
    part, parameters = side.module(name), dict(side.model.named_parameters())
    state, children = side.model.state_dict(), dict(side.model.named_children())
    encoder = getattr(side.model, "get_encoder", nn.Module)()
    inputs = side.inputs(seed)
    side.kept.clear()
    side.is_over = True
    side.model = nn.Module()
    if what != "part":
        del part
    if what != "parameters":
        del parameters
    if what != "blocks":
        del children
    if what != "encoder" or not isinstance(inputs.get("input_ids"), torch.Tensor):
        encoder = nn.Module()
    if what != "state":
        del state
    gc.collect()
    if what == "part":
        return _call_part(part, "no_grad", seed)
    if what == "parameters":
        return {key: (value.detach().clone(), value.requires_grad) for key, value in parameters.items()}
    if what == "state":
        return dict(state)
    if what == "encoder":
        if not list(encoder.parameters()):
            raise Inapplicable("no encoder")
        with torch.no_grad():
            return list(tensors_of(encoder(inputs["input_ids"])))
    return {key: dict(child.state_dict()) for key, child in children.items()}
