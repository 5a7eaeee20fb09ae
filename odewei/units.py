"""Cuts a model into units: the weights that come and go together. Pure: reads the module tree, changes nothing.

The blocks of a model are the children of its ``ModuleList``, ``Sequential`` and ``ModuleDict``; each block is a unit
unless it is larger than a fair share of the budget. A block that holds a list of equals (experts, of which few are
used at a time) goes down to them, and what is left of it is one unit. Outside of the blocks, the largest modules
without blocks are units. Weights of a module that has units below it form a unit of their own. A tied weight whose
users lie in different units is a unit that all of them need.

Linear in the number of modules, apart from the way from an expert up to its block: models have 100,000 of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from odewei.options import Granularity
from odewei.survey import Modules, Weight

__all__ = ["Unit", "ancestry", "hooked_modules", "partition", "smallest_budget"]

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_NONE: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Unit:
    """``weights``, which the modules ``hooked`` need when they are entered. ``name`` is that of the first."""

    name: str
    weights: tuple[Weight, ...]
    hangs_on: str | tuple[str, ...]  # one module, or any number: of 100,000 units each has one

    def __post_init__(self) -> None:
        if not isinstance(self.hangs_on, str) and len(self.hangs_on) == 1:
            object.__setattr__(self, "hangs_on", self.hangs_on[0])  # so that units that are the same are equal

    @property
    def hooked(self) -> tuple[str, ...]:
        """The names of the modules that it hangs on."""
        return (self.hangs_on,) if isinstance(self.hangs_on, str) else self.hangs_on


def partition(
    model: nn.Module | Modules,
    weights: Sequence[Weight],
    nbytes: Mapping[str, int],
    max_unit_bytes: int,
    granularity: Granularity = "auto",
) -> list[Unit]:
    """The units of a model in definition order; every weight is in exactly one.

    ``nbytes`` gives the bytes of a weight by its name. Only ``granularity="auto"`` cuts by size.
    """
    tree = _Tree(Modules.of(model))
    innermost = tree.innermost(_roots(tree, weights, nbytes, max_unit_bytes, granularity))
    members: dict[int, list[Weight]] = {}
    tied: list[Weight] = []
    for weight in weights:
        root = innermost[tree.place[tree.owner(weight)]]
        if any(innermost[tree.place[use.module]] != root for use in weight.tied):
            tied.append(weight)
        else:
            members.setdefault(root, []).append(weight)
    units = [
        Unit(tree.names[root] or type(tree.modules[0]).__name__, tuple(found), tree.names[root])
        for root, found in members.items()
    ]
    for weight in tied:
        hooked = tuple(dict.fromkeys(use.module for use in weight.uses))
        units.append(Unit(weight.name, (weight,), hooked))
    return sorted(units, key=lambda unit: tree.place[unit.hooked[0]])


def smallest_budget(units: Sequence[Unit], nbytes: Sequence[int]) -> int:
    """The bytes that must be in memory at one moment: the worst chain of units whose modules lie within each other."""
    hooked: dict[str, int] = {}
    for unit, size in zip(units, nbytes, strict=True):
        for module in unit.hooked:
            hooked[module] = hooked.get(module, 0) + size
    return max((sum(hooked.get(part, 0) for part in ancestry(module)) for module in hooked), default=0)


def hooked_modules(units: Sequence[Unit]) -> dict[str, list[int]]:
    """The units that each hooked module takes leases of when it is entered, by the module's name."""
    found: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        for name in unit.hooked:
            found.setdefault(name, []).append(index)
    return found


def ancestry(module: str) -> Iterator[str]:
    """The module and all that hold it: ``a.b.c``, ``a.b``, ``a``, and the model itself."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""


def _roots(
    tree: _Tree, weights: Sequence[Weight], nbytes: Mapping[str, int], max_unit_bytes: int, granularity: Granularity
) -> set[int]:
    """The modules that are roots of units: each weight belongs to the innermost root that holds it."""
    owners = {tree.place[tree.owner(weight)] for weight in weights}
    owners.update(tree.place[use.module] for weight in weights for use in weight.tied)
    if granularity == "leaf":
        return {0, *owners}
    if callable(granularity):
        chosen: set[int] = set()
        inside = [False] * len(tree.names)
        for index, (name, module) in enumerate(zip(tree.names, tree.modules, strict=True)):
            inside[index] = index > 0 and inside[tree.parents[index]]
            if not inside[index] and granularity(name, module):
                chosen.add(index)
                inside[index] = True
        return {0, *chosen, *(owner for owner in owners if not inside[owner])}
    return _Cutter(tree, weights, nbytes, max_unit_bytes, by_size=granularity == "auto").roots()


class _Tree:
    """The modules of a model in definition order, each under its first name, as numbers: 0 is the model itself.

    ``ends[i]`` is the number after the last module below ``i``, so that what is below it is ``range(i + 1, ends[i])``.
    """

    def __init__(self, modules: Modules) -> None:
        self.names, self.modules, self.parents = modules.names, modules.modules, modules.parents
        self.children: list[Sequence[int]] = [_NONE] * len(self.names)
        for index, parent in enumerate(self.parents):
            if parent >= 0:
                if self.children[parent] is _NONE:
                    self.children[parent] = []
                self.children[parent].append(index)  # type: ignore[attr-defined]
        self.place = {name: index for index, name in enumerate(self.names)}
        self.ends = [index + 1 for index in range(len(self.names))]
        for index, parent in reversed(list(enumerate(self.parents))[1:]):
            self.ends[parent] = max(self.ends[parent], self.ends[index])

    @staticmethod
    def owner(weight: Weight) -> str:
        """The module that has a weight first."""
        assert weight.module is not None, "a part of a weight is in no module"
        return weight.module

    def innermost(self, roots: set[int]) -> list[int]:
        """For each module the root at or nearest above it."""
        found: list[int] = []
        for index, parent in enumerate(self.parents):
            found.append(index if index in roots else found[parent])
        return found

    def above(self, index: int) -> Iterator[int]:
        """The modules that hold this one, the nearest first."""
        while index:
            index = self.parents[index]
            yield index

    def holders_of_lists(self) -> set[int]:
        """The modules at or below which there is a container of several, shared modules counted wherever they are."""
        holders: dict[int, list[nn.Module]] = {}
        for module in self.modules:
            for child in module._modules.values():
                if child is not None:
                    holders.setdefault(id(child), []).append(module)
        found: dict[int, nn.Module] = {
            id(module): module for module in self.modules if isinstance(module, _CONTAINERS) and len(module) > 1
        }
        pending = list(found.values())
        while pending:
            for holder in holders.get(id(pending.pop()), ()):
                if id(holder) not in found:
                    found[id(holder)] = holder
                    pending.append(holder)
        return {index for index, module in enumerate(self.modules) if id(module) in found}


class _Cutter:
    """Chooses the roots of units by blocks, and by size below them."""

    def __init__(
        self, tree: _Tree, weights: Sequence[Weight], nbytes: Mapping[str, int], max_unit_bytes: int, *, by_size: bool
    ) -> None:
        self._tree = tree
        self._max = max_unit_bytes
        self._by_size = by_size
        self._below = [0] * len(tree.names)  # bytes of the weights at and below a module
        for weight in weights:
            self._below[tree.place[tree.owner(weight)]] += nbytes[weight.name]
        for index in range(len(tree.names) - 1, 0, -1):
            self._below[tree.parents[index]] += self._below[index]
        self._rest = list(self._below)  # of those, what no deeper root has taken
        self._found: set[int] = set()
        self._cut_already: set[int] = set()
        self._not_plain = tree.holders_of_lists()
        self._next_equals = self._following([self._is_list_of_equals(index) for index in range(len(tree.names))])

    def roots(self) -> set[int]:
        self._cut(0, inside_block=False)
        return self._found

    def _cut(self, index: int, *, inside_block: bool) -> None:
        """Add the roots at and below a module that is not part of a larger unit. A second time changes nothing."""
        if index in self._cut_already:
            return
        self._cut_already.add(index)
        self._add(index)
        module = self._tree.modules[index]
        if inside_block or index not in self._not_plain:
            for expert in self._experts(index):
                self._cut(expert, inside_block=True)
            if self._rest[index] <= self._max or not self._by_size or not any(True for _ in module.children()):
                return
        for child in self._tree.children[index]:
            self._cut(child, inside_block=inside_block or isinstance(module, _CONTAINERS))

    def _add(self, index: int) -> None:
        """A new root takes what is left at and below it from all modules up to the next root."""
        self._found.add(index)
        for holder in self._tree.above(index):
            self._rest[holder] -= self._rest[index]
            if holder in self._found:
                return

    def _experts(self, index: int) -> list[int]:
        """Children of the outermost lists of equals below a block, and of those that are such lists themselves."""
        found: list[int] = []
        place = self._next_equals[index + 1]
        while place < self._tree.ends[index]:
            experts = self._tree.children[place]
            found.extend(experts)
            for expert in experts:
                if self._next_equals[expert] == expert:
                    found.extend(self._tree.children[expert])
            place = self._next_equals[self._tree.ends[place]]
        return found

    def _is_list_of_equals(self, index: int) -> bool:
        if not isinstance(self._tree.modules[index], nn.ModuleList | nn.ModuleDict):
            return False
        kinds = [type(self._tree.modules[child]) for child in self._tree.children[index] if self._below[child]]
        return len(kinds) > 1 and all(one is other for one, other in pairwise(kinds))

    @staticmethod
    def _following(marked: Sequence[bool]) -> list[int]:
        """For each place, and one beyond the last, the next marked place at or after it."""
        found = [len(marked)] * (len(marked) + 1)
        for index in range(len(marked) - 1, -1, -1):
            found[index] = index if marked[index] else found[index + 1]
        return found
