"""Which weights a model has: every distinct parameter, by identity, with all the places that use it.

Pure: reads the module tree, changes nothing. A tensor used under several names (tied) is one weight; its first name in
definition order is its own.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from odewei.errors import ModelError

__all__ = ["Kind", "Modules", "Use", "Weight", "is_plain", "streamed_roots", "survey", "walk"]

streamed_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models that stream. As a part of another model they go on by themselves: who walks that leaves them alone."""


@dataclass(frozen=True, slots=True)
class Use:
    """The weight is ``module._parameters[local_name]`` of the module called ``module``."""

    module: str
    local_name: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.local_name}" if self.module else self.local_name


@dataclass(frozen=True, slots=True)
class Kind:
    """What thousands of weights have in common."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One parameter of the model, as it was built; the checkpoint may have it in another dtype.

    ``name`` is that of its first use, ``module._parameters[local_name]`` of the module called ``module``, and ``tied``
    are the others. ``module`` None: no module has it, it is a part of another weight. The parameter itself is not kept.
    """

    name: str
    kind: Kind
    module: str | None
    local_name: str
    tied: tuple[Use, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kind.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.kind.dtype

    @property
    def requires_grad(self) -> bool:
        return self.kind.requires_grad

    @property
    def uses(self) -> tuple[Use, ...]:
        """All places that have it; made when asked for, because there may be 100,000 weights."""
        return () if self.module is None else (Use(self.module, self.local_name), *self.tied)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(use.name for use in self.tied)


class Modules:
    """What ``walk`` yields of a model, walked once for all who need it. Holds the modules: keep it no longer."""

    __slots__ = ("_named", "modules", "names", "parents")

    def __init__(self, model: nn.Module) -> None:
        walked = list(walk(model))
        self.names = [name for name, _, _ in walked]
        self.modules = [module for _, module, _ in walked]
        self.parents = [parent for _, _, parent in walked]
        self._named: dict[str, nn.Module] | None = None

    @classmethod
    def of(cls, model: nn.Module | Modules) -> Modules:
        """``model``, walked if it is not yet."""
        return model if isinstance(model, Modules) else cls(model)

    @property
    def model(self) -> nn.Module:
        return self.modules[0]

    @property
    def named(self) -> dict[str, nn.Module]:
        """The modules by their names."""
        if self._named is None:
            self._named = dict(zip(self.names, self.modules, strict=True))
        return self._named

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules, in order."""
        return zip(self.names, self.modules, strict=True)

    def __repr__(self) -> str:
        return f"<Modules: {len(self.names)} of a {type(self.model).__name__}>"


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """What ``model.named_modules()`` yields, in its order, each with the number of the module that holds it (-1: none).

    Without a generator for each level above a module, which are what ``named_modules`` spends its time on. Streamed
    models that are parts of it are left out.
    """
    seen = {id(root) for root in streamed_roots if root is not model}
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


def survey(model: nn.Module | Modules, *, known: Mapping[int, Weight] | None = None) -> Sequence[Weight]:
    """The distinct parameters of a model in definition order. A module that appears twice counts under its first name.

    Of a copy of a streamed model only those that are ``known``, by their numbers (``id``), which keep their names: the
    others are the user's own.

    Raises ModelError for a parameter that is more than its bytes (a quantised one) or has no shape yet (a lazy one).
    """
    found: dict[int, tuple[nn.Parameter, str, str]] = {}
    model = Modules.of(model)
    if model.model in streamed_roots:
        raise ModelError(
            f"model_fn returned a {type(model.model).__name__} that streams already",
            cure="Have model_fn build the model, or call odewei.materialize on it before",
        )
    tied: dict[int, list[Use]] = {}
    for prefix, module in model.items():
        if type(module._parameters) is not dict:  # a part of a streamed model, which goes on by itself
            continue
        for local_name, parameter in module._parameters.items():
            if parameter is None or (known is not None and id(parameter) not in known):
                continue
            _check_plain(parameter, prefix, local_name)
            key = id(parameter)
            if key in found:
                tied.setdefault(key, []).append(Use(prefix, local_name))
            else:
                found[key] = parameter, prefix, local_name
    kinds: dict[tuple[torch.Size, torch.dtype, bool], Kind] = {}
    weights = []
    for key, (parameter, prefix, local_name) in found.items():
        looks = parameter.shape, parameter.dtype, parameter.requires_grad
        kind = kinds.get(looks)
        if kind is None:
            kind = kinds[looks] = Kind(tuple(parameter.shape), *looks[1:])
        full_name = f"{prefix}.{local_name}" if prefix else local_name
        name = sys.intern(full_name) if known is None else known[key].name  # the checkpoint has it too
        weights.append(Weight(name, kind, prefix, local_name, tuple(tied.get(key, ()))))
    return weights


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether shape, dtype, strides and bytes are all there is to it."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)


def _check_plain(parameter: nn.Parameter, module: str, local_name: str) -> None:
    if type(parameter) is not nn.Parameter or not is_plain(parameter):
        kind = type(parameter).__name__
        if type(parameter) is nn.Parameter:
            kind += f" ({parameter.layout}, {parameter.dtype})"
        raise ModelError(
            f"a parameter of class {kind} cannot be streamed: its bytes alone do not make it",
            module=module or None,
            weight=local_name,
            cure="Have model_fn build the module with ordinary parameters (a lazy module: run it once before)",
        )
