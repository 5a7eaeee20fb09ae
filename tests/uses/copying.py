"""Copies: of the model, of a layer, shallow, and by pickling."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch

from .action import action
from .side import Side, mode, tensors_of


@action(lambda draw: {"seed": draw.seed(), "go_on_with": draw.one(("original", "copy"))}, often=2)
def deep_copy(side: Side, seed: int, go_on_with: str) -> object:
    """A copy computes the same; one of the two is changed and does not change the other."""
    made = copy.deepcopy(side.model)
    with torch.no_grad():
        found = list(tensors_of(made(**side.inputs(seed))))
    flags = [parameter.requires_grad for parameter in made.parameters()]
    if go_on_with == "copy":
        side.model, made = made, side.model
    side.kept["the other"] = made
    return found, flags


@action(
    lambda draw: {"key": draw.kept("the other"), "seed": draw.seed(), "how": draw.one(("no_grad", "grad"))}, often=6
)
def call_the_other(side: Side, key: str, seed: int, how: str) -> object:
    """The one of original and copy that was put aside."""
    with mode(how):
        return list(tensors_of(side.keep(key)(**side.inputs(seed))))


@action(lambda draw: {"name": draw.module()}, often=1.5)
def deep_copy_a_part(side: Side, name: str) -> object:
    """A copy of a part is an ordinary module with the part's values."""
    made = copy.deepcopy(side.module(name))
    side.kept["copied part"] = made
    return _state(made)


def _state(module: Any) -> Any:
    return {name: (value, value.requires_grad) for name, value in module.state_dict(keep_vars=True).items()}


@action(lambda draw: {"seed": draw.seed(), "scale": draw.one((None, 0.5))}, holds=True)
def shallow_copy(side: Side, seed: int, scale: float | None) -> object:
    """``copy.copy`` shares all parameters with the original."""
    made = copy.copy(side.model)
    if scale is not None:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(scale)
    with torch.no_grad():
        return list(tensors_of(made(**side.inputs(seed))))


@action(lambda draw: {"name": draw.parameter(), "via": draw.via(), "deep": draw.one((True, False))})
def copy_a_parameter(side: Side, name: str, via: str, deep: bool) -> object:
    parameter = side.parameter(name, via)
    made = copy.deepcopy(parameter) if deep else copy.copy(parameter)
    return made, made.requires_grad, made is parameter


@action(lambda draw: {"by": draw.one(("pickle", "torch.save")), "go_on": draw.one((True, False))}, holds=True)
def pickle_the_model(side: Side, by: str, go_on: bool) -> object:
    if by == "pickle":
        made = pickle.loads(pickle.dumps(side.model))
    else:
        file = io.BytesIO()
        torch.save(side.model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    found = _state(made)
    if go_on:
        side.model = made
    return found


@action(holds=True)
def deep_copy_state(side: Side) -> object:
    """What people keep of the best epoch."""
    side.kept["state"] = copy.deepcopy(side.model.state_dict())
