"""Cuts a model into units: the weights that come and go together. Pure: reads the module tree, changes nothing.

The blocks of a model are the children of its ``ModuleList``, ``Sequential`` and ``ModuleDict``; each block is a unit
unless it is larger than a fair share of the budget. A block that holds a list of equals (experts, of which few are
used at a time) goes down to them, and what is left of it is one unit. Outside of the blocks, the largest modules
without blocks are units. Weights of a module that has units below it form a unit of their own. A tied weight whose
users lie in different units is a unit that all of them need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from odewei.options import Granularity
from odewei.survey import Weight

__all__ = ["Unit", "partition", "smallest_budget"]

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Unit:
    """``weights`` by name, which the modules ``hooked`` need when they are entered. ``name`` is that of the first."""

    name: str
    weights: tuple[Weight, ...]
    hooked: tuple[str, ...]


def partition(
    model: nn.Module,
    weights: Sequence[Weight],
    nbytes: Mapping[str, int],
    max_unit_bytes: int,
    granularity: Granularity = "auto",
) -> list[Unit]:
    """The units of a model in definition order; every weight is in exactly one.

    ``nbytes`` gives the bytes of a weight by its name. Only ``granularity="auto"`` cuts by size.
    """
    roots = _Cutter(model, weights, nbytes, max_unit_bytes, granularity).roots()
    users: dict[str, list[str]] = {
        weight.name: list(dict.fromkeys(_innermost(use.module, roots) for use in weight.uses)) for weight in weights
    }
    members: dict[str, list[Weight]] = {}
    tied: list[Weight] = []
    for weight in weights:
        if len(users[weight.name]) > 1:
            tied.append(weight)
        else:
            members.setdefault(users[weight.name][0], []).append(weight)
    units = [Unit(root or type(model).__name__, tuple(found), (root,)) for root, found in members.items()]
    for weight in tied:
        hooked = tuple(dict.fromkeys(use.module for use in weight.uses))
        units.append(Unit(weight.name, (weight,), hooked))
    place = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(units, key=lambda unit: place[unit.hooked[0]])


def smallest_budget(units: Sequence[Unit], nbytes: Sequence[int]) -> int:
    """The bytes that must be in memory at one moment: the worst chain of units whose modules lie within each other."""
    hooked: dict[str, int] = {}
    for unit, size in zip(units, nbytes, strict=True):
        for module in unit.hooked:
            hooked[module] = hooked.get(module, 0) + size
    return max((sum(hooked.get(part, 0) for part in _ancestry(module)) for module in hooked), default=0)


def _ancestry(module: str) -> list[str]:
    """The module and all that hold it: ``a.b.c``, ``a.b``, ``a``, and the model itself."""
    parts = module.split(".") if module else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _innermost(module: str, roots: set[str]) -> str:
    return next(name for name in _ancestry(module) if name in roots)


class _Cutter:
    """Chooses the modules that are roots of units: each weight belongs to the innermost root that holds it."""

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        nbytes: Mapping[str, int],
        max_unit_bytes: int,
        granularity: Granularity,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._granularity = granularity
        self._max = max_unit_bytes
        self._own = dict.fromkeys(self._modules, 0)  # bytes of the weights a module owns itself
        self._below = dict.fromkeys(self._modules, 0)  # and those of all below it
        self._owners = {use.module for weight in weights for use in weight.uses}
        for weight in weights:
            size, owner = nbytes[weight.name], weight.uses[0].module
            self._own[owner] += size
            for name in _ancestry(owner):
                if name in self._below:
                    self._below[name] += size

    def roots(self) -> set[str]:
        if self._granularity == "leaf":
            return {"", *self._owners}
        if callable(self._granularity):
            return {"", *self._chosen_by_user(self._granularity)}
        found = {""}
        self._cut("", found, inside_block=False)
        return found

    def _chosen_by_user(self, chooses: Granularity) -> set[str]:
        assert callable(chooses)
        found: set[str] = set()
        for name, module in self._modules.items():
            if not any(parent in found for parent in _ancestry(name)) and chooses(name, module):
                found.add(name)
        rest = {name for name in self._owners if not any(parent in found for parent in _ancestry(name))}
        return found | rest

    def _cut(self, name: str, found: set[str], *, inside_block: bool) -> None:
        """Add the roots at and below a module that is not part of a larger unit."""
        found.add(name)
        module = self._modules[name]
        if inside_block or self._is_plain(module):
            for expert in self._experts(name):
                self._cut(expert, found, inside_block=True)
            rest = self._rest(name, found)
            if rest <= self._max or self._granularity == "block" or not any(True for _ in module.children()):
                return
        for child in self._children(name):
            if child not in found:
                is_block = inside_block or isinstance(module, _CONTAINERS)
                self._cut(child, found, inside_block=is_block)

    def _is_plain(self, module: nn.Module) -> bool:
        """Whether there are no blocks at or below the module."""
        return not any(isinstance(part, _CONTAINERS) and len(part) > 1 for part in module.modules())

    def _experts(self, name: str) -> list[str]:
        """Children of the outermost lists of equals below a block."""
        found: list[str] = []
        for child, module in self._modules.items():
            inside = child.startswith(f"{name}.") if name else bool(child)
            if (
                not inside
                or not isinstance(module, nn.ModuleList | nn.ModuleDict)
                or any(child.startswith(f"{expert}.") for expert in found)
            ):
                continue
            grand = self._children(child)
            kinds = [type(self._modules[one]) for one in grand if self._below[one]]
            if len(kinds) > 1 and len(set(kinds)) == 1:
                found.extend(grand)
        return found

    def _rest(self, name: str, found: set[str]) -> int:
        """Bytes at and below a module that no deeper root has taken."""
        below = [root for root in found if root != name and (root.startswith(f"{name}.") if name else root)]
        outermost = [root for root in below if not any(root.startswith(f"{other}.") for other in below)]
        return self._below[name] - sum(self._below[root] for root in outermost)

    def _children(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        return [prefix + child for child, _ in self._modules[name].named_children() if prefix + child in self._modules]
