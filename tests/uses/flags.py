"""Freezing and unfreezing: of all, by names, of a module, of one parameter."""

from __future__ import annotations

from .action import Draw, action
from .side import Side

PATTERNS = ("norm", "weight", "bias", "0", "1", "head", "q_proj", "embed")


def _flag(draw: Draw) -> bool:
    return draw.one((True, False))


@action(lambda draw: {"flag": _flag(draw)}, often=1.5)
def flag_all(side: Side, flag: bool) -> object:
    return side.model.requires_grad_(flag) is side.model


@action(lambda draw: {"flag": _flag(draw), "pattern": draw.one(PATTERNS)}, often=1.5)
def flag_by_name(side: Side, flag: bool, pattern: str) -> object:
    touched = []
    for name, parameter in side.model.named_parameters():
        if pattern in name:
            touched.append(name)
            if flag:
                parameter.requires_grad_()
            else:
                parameter.requires_grad = False
    return touched


@action(lambda draw: {"flag": _flag(draw), "name": draw.module()})
def flag_a_module(side: Side, flag: bool, name: str) -> object:
    side.module(name).requires_grad_(flag)


@action(lambda draw: {"flag": _flag(draw), "name": draw.parameter(), "via": draw.via(), "set": _flag(draw)}, often=1.5)
def flag_a_parameter(side: Side, flag: bool, name: str, via: str, set: bool) -> object:
    parameter = side.parameter(name, via)
    if set:
        parameter.requires_grad = flag
    else:
        parameter.requires_grad_(flag)
    return parameter.requires_grad, side.parameter(name).requires_grad
