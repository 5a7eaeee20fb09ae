"""Which weights a model has: every distinct parameter, by identity, with all the places that use it.

Pure: reads the module tree, changes nothing. A tensor used under several names (tied) is one weight; its first name in
definition order is its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from odewei.errors import ModelError

__all__ = ["Use", "Weight", "survey", "walk"]


@dataclass(frozen=True, slots=True)
class Use:
    """The weight is ``module._parameters[local_name]`` of the module called ``module``."""

    module: str
    local_name: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.local_name}" if self.module else self.local_name


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One parameter of the model, as it was built; the checkpoint may have it in another dtype.

    ``uses`` has at least one entry; ``name`` is the first's. The parameter itself is not kept.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    uses: tuple[Use, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(use.name for use in self.uses[1:])


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """What ``model.named_modules()`` yields, in its order, each with the number of the module that holds it (-1: none).

    Without a generator for each level above a module, which are what ``named_modules`` spends its time on.
    """
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module, int]] = [("", model, -1)]
    number = 0
    while pending:
        name, module, _ = found = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield found
        prefix = f"{name}." if name else ""
        for local_name, child in reversed(module._modules.items()):
            if child is not None and id(child) not in seen:
                pending.append((prefix + local_name, child, number))
        number += 1


def survey(model: nn.Module, *, of_copy: bool = False) -> Sequence[Weight]:
    """The distinct parameters of a model in definition order. A module that appears twice counts under its first name.

    Of a copy of a streamed model only those without values: the others are the user's own.

    Raises ModelError for a parameter that is more than its bytes (a quantised one) or has no shape yet (a lazy one).
    """
    found: dict[int, tuple[nn.Parameter, list[Use]]] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # thousands of weights have the same
    for prefix, module, _ in walk(model):
        for local_name, parameter in module._parameters.items():
            if parameter is not None and (parameter.is_meta or not of_copy):
                _check_plain(parameter, prefix, local_name)
                found.setdefault(id(parameter), (parameter, []))[1].append(Use(prefix, local_name))
    weights = []
    for parameter, uses in found.values():
        shape = tuple(parameter.shape)
        name = sys.intern(uses[0].name)  # the checkpoint has it too
        shape = shapes.setdefault(shape, shape)
        weights.append(Weight(name, shape, parameter.dtype, parameter.requires_grad, tuple(uses)))
    return weights


def _check_plain(parameter: nn.Parameter, module: str, local_name: str) -> None:
    if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
        raise ModelError(
            f"a parameter of class {type(parameter).__name__} cannot be streamed: its bytes alone do not make it",
            module=module or None,
            weight=local_name,
            cure="Have model_fn build the module with ordinary parameters (a lazy module: run it once before)",
        )
