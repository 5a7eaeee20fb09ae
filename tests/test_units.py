"""Cutting a model into units: the same cuts as the plain twin makes, at a cost that does not grow with their number."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odewei.options import Granularity
from odewei.survey import Weight, survey, walk
from odewei.units import Unit, partition, smallest_budget

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class PlainTwin:
    """The rules of ``odewei.units`` word for word, by the names of modules, quadratic: what the fast one must equal."""

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        nbytes: Mapping[str, int],
        max_unit_bytes: int,
        granularity: Granularity,
    ) -> None:
        self._model = model
        self._weights = weights
        self._modules = dict(model.named_modules())
        self._granularity = granularity
        self._max = max_unit_bytes
        self._below = dict.fromkeys(self._modules, 0)
        self._owners = {use.module for weight in weights for use in weight.uses}
        for weight in weights:
            for name in _ancestry(weight.uses[0].module):
                self._below[name] += nbytes[weight.name]

    def partition(self) -> list[Unit]:
        roots = self._roots()
        users = {
            weight.name: list(dict.fromkeys(_innermost(use.module, roots) for use in weight.uses))
            for weight in self._weights
        }
        members: dict[str, list[Weight]] = {}
        tied: list[Weight] = []
        for weight in self._weights:
            if len(users[weight.name]) > 1:
                tied.append(weight)
            else:
                members.setdefault(users[weight.name][0], []).append(weight)
        units = [Unit(root or type(self._model).__name__, tuple(found), (root,)) for root, found in members.items()]
        for weight in tied:
            units.append(Unit(weight.name, (weight,), tuple(dict.fromkeys(use.module for use in weight.uses))))
        place = {name: index for index, name in enumerate(self._modules)}
        return sorted(units, key=lambda unit: place[unit.hooked[0]])

    def _roots(self) -> set[str]:
        if self._granularity == "leaf":
            return {"", *self._owners}
        if callable(self._granularity):
            return {"", *self._chosen_by_user(self._granularity)}
        found = {""}
        self._cut("", found, inside_block=False)
        return found

    def _chosen_by_user(self, chooses: Callable[[str, nn.Module], bool]) -> set[str]:
        found: set[str] = set()
        for name, module in self._modules.items():
            if not any(parent in found for parent in _ancestry(name)) and chooses(name, module):
                found.add(name)
        return found | {name for name in self._owners if not any(parent in found for parent in _ancestry(name))}

    def _cut(self, name: str, found: set[str], *, inside_block: bool) -> None:
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
                self._cut(child, found, inside_block=inside_block or isinstance(module, _CONTAINERS))

    def _is_plain(self, module: nn.Module) -> bool:
        return not any(isinstance(part, _CONTAINERS) and len(part) > 1 for part in module.modules())

    def _experts(self, name: str) -> list[str]:
        found: list[str] = []
        for child, module in self._modules.items():
            if (
                not _is_below(child, name)
                or not isinstance(module, nn.ModuleList | nn.ModuleDict)
                or any(_is_below(child, expert) for expert in found)
            ):
                continue
            grand = self._children(child)
            kinds = [type(self._modules[one]) for one in grand if self._below[one]]
            if len(kinds) > 1 and len(set(kinds)) == 1:
                found.extend(grand)
        return found

    def _rest(self, name: str, found: set[str]) -> int:
        below = [root for root in found if _is_below(root, name)]
        outermost = [root for root in below if not any(_is_below(root, other) for other in below)]
        return self._below[name] - sum(self._below[root] for root in outermost)

    def _children(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        return [prefix + child for child, _ in self._modules[name].named_children() if prefix + child in self._modules]


def _ancestry(module: str) -> list[str]:
    parts = module.split(".") if module else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _is_below(module: str, holder: str) -> bool:
    return module.startswith(f"{holder}.") if holder else bool(module)


def _innermost(module: str, roots: set[str]) -> str:
    return next(name for name in _ancestry(module) if name in roots)


class Holder(nn.Module):
    """Any module that is no container."""


class Other(Holder):
    """One of another class."""


_KINDS = (Holder, Other, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ModuleList)


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """A tree of containers and other modules, some of them shared, with weights of few sizes, some of them tied.

    Mostly of equal children, as models are. All is drawn from one seed: hypothesis itself would draw mostly small ones.
    """
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    deepest = draw(st.integers(0, 5))
    made: list[nn.Module] = []
    tensors: list[nn.Parameter] = []

    def module(depth: int, kind: type[nn.Module]) -> nn.Module:
        if made and chance.random() < 0.05:
            return chance.choice(made)
        found: nn.Module = kind()
        if kind in (Holder, Other) or chance.random() < 0.2:
            for index in range(chance.randint(0, 2)):
                found.register_parameter(f"weight{index}", parameter())
        if depth < deepest:
            equal = chance.random() < 0.6
            of_all = chance.choice(_KINDS)
            names = [f"m{index}" for index in range(chance.choice((0, 1, 2, 2, 3, 4)))]
            for name in names:
                of_one = of_all if equal else chance.choice(_KINDS)
                found.add_module(name, None if chance.random() < 0.05 else module(depth + 1, of_one))
            if names and chance.random() < 0.05:
                found.add_module("again", found._modules[names[0]])
        made.append(found)
        return found

    def parameter() -> nn.Parameter:
        if not tensors or chance.random() > 0.1:
            tensors.append(nn.Parameter(torch.empty(chance.choice((0, 1, 4, 16)), device="meta")))
            return tensors[-1]
        return chance.choice(tensors)

    return module(0, chance.choice(_KINDS))


def _choose(name: str, module: nn.Module) -> bool:
    return isinstance(module, Other)


@settings(max_examples=300, deadline=None)
@given(trees(), st.integers(0, 400), st.sampled_from(("auto", "auto", "auto", "block", "leaf", _choose)))
def test_the_units_are_those_of_the_plain_twin(model: nn.Module, most: int, granularity: Granularity) -> None:
    """Names, weights, hooked modules and order of all units are what the rules say word for word."""
    weights = survey(model)
    nbytes = {weight.name: weight.numel * weight.dtype.itemsize for weight in weights}
    units = partition(model, weights, nbytes, most, granularity)
    twin = PlainTwin(model, weights, nbytes, most, granularity).partition()
    assert [(unit.name, unit.weights, unit.hooked) for unit in units] == [
        (unit.name, unit.weights, unit.hooked) for unit in twin
    ]
    held = [weight.name for unit in units for weight in unit.weights]
    assert sorted(held) == sorted(weight.name for weight in weights)


@settings(max_examples=100, deadline=None)
@given(trees())
def test_walking_goes_the_way_of_torch(model: nn.Module) -> None:
    """The modules come under the names and in the order of named_modules(), each with the number of its holder."""
    found = list(walk(model))
    assert [(name, module) for name, module, _ in found] == list(model.named_modules())
    for name, module, parent in found[1:]:
        assert module in found[parent][1]._modules.values()
        assert name.rpartition(".")[0] == found[parent][0]


def test_a_cycle_of_modules_is_cut_like_any_other() -> None:
    """Modules that hold each other end no worse than torch's own walk does."""
    model, inner = Holder(), Holder()
    model.inner, inner.outer = inner, model
    inner.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    weights = survey(model)
    nbytes = {weight.name: weight.numel * weight.dtype.itemsize for weight in weights}
    assert partition(model, weights, nbytes, 1000) == PlainTwin(model, weights, nbytes, 1000, "auto").partition()


def _calls(function: Callable[[], object]) -> int:
    """The calls of functions of Python and C that a call takes: a clock that is always right."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


_SHAPES: dict[str, Callable[[int], nn.Module]] = {
    "flat": lambda count: nn.ModuleList(_linear() for _ in range(count)),
    "nested": lambda count: nn.ModuleList(
        nn.Sequential(nn.ModuleList(nn.Sequential(_linear(), nn.ReLU()) for _ in range(count // 8))) for _ in range(8)
    ),
    "experts": lambda count: nn.ModuleList(
        nn.Sequential(nn.ModuleList(_linear() for _ in range(8)), nn.ReLU()) for _ in range(count // 8)
    ),
}


def _linear() -> nn.Linear:
    return nn.Linear(2, 2, device="meta")


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("granularity", ["auto", "leaf"])
def test_the_cost_of_a_module_does_not_grow_with_their_number(shape: str, granularity: Granularity) -> None:
    """However many blocks there are, cutting takes equally many steps for each."""

    def steps(count: int) -> float:
        model = _SHAPES[shape](count)
        weights = survey(model)
        nbytes = {weight.name: weight.numel * weight.dtype.itemsize for weight in weights}
        units: list[Unit] = []

        def cut() -> None:
            units.extend(partition(model, weights, nbytes, 1 << 20, granularity))
            smallest_budget(units, [1] * len(units))

        taken = _calls(cut)
        assert len(units) == count
        return taken / count

    few, many = steps(64), steps(1024)
    assert many <= few * 1.1


def test_the_smallest_budget_is_the_worst_chain() -> None:
    """What must be in memory at once is a unit and those of all modules around it, tied ones at each of their users."""
    hooks = (("",), ("x",), ("x.y.z",), ("x", "u"))
    a, b, c, tied = (Unit(name, (), hooked) for name, hooked in zip("abct", hooks, strict=True))
    assert smallest_budget([a, b, c], [1, 10, 100]) == 111
    assert smallest_budget([a, b, tied], [1, 10, 100]) == 111
    assert smallest_budget([a, tied], [1, 100]) == 101
    assert smallest_budget([], []) == 0
    for order in itertools.permutations([(a, 1), (b, 10), (c, 100), (tied, 1000)]):
        assert smallest_budget([unit for unit, _ in order], [size for _, size in order]) == 1111
