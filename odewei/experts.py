"""Which weights hold the experts of a layer, and how they are cut. Pure: reads modules, changes nothing.

A fused expert weight has one expert in each place of its first dimension (``gate_up_proj[E, ...]``, its biases
``[E, n]``), so an expert's part is one stretch of the file, or gathered from weights of its own: a *piece*. The pieces
of one expert, of all such weights of its module, come and go together.

That a weight is one is a guess: the code of its module takes single places of it, ``self.weight[i]``. It decides only
how the weight is read ahead; a wrong guess costs time, because the weight itself (``sliced``) is right whatever is done
with it. Where the module can also run in ways that take the weight whole (transformers' implementations of experts),
its configuration is asked, and where it does so the weight is read as any other.

Experts that are modules in a list are units anyway. That they are experts decides only that they are not read ahead
before they have been used regularly.
"""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType

import torch
from torch import nn

from odewei.loaders.base import WeightInfo
from odewei.loaders.gathering import cut_places, lies_in_places
from odewei.scheduler.host_memory import PAGE
from odewei.scheduler.slab import ALIGNMENT
from odewei.survey import Kind, Modules, Weight
from odewei.units import Unit, ancestry

__all__ = ["ExpertPlan", "find_experts", "largest_expert_bytes", "listed_experts", "piece_name", "slack_bytes"]

_ONE_BY_ONE = (None, "eager", "odewei")  # implementations that take experts one by one; None stands for "eager"
_ROUTING = frozenset({"argmax", "argsort", "bincount", "index_add_", "nonzero", "one_hot", "topk", "unique", "where"})


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """The experts of one module: ``count`` of them, each with a piece of every one of ``weights``."""

    module: str
    count: int
    weights: tuple[Weight, ...]

    def units(self) -> list[Unit]:
        """One for each expert. They hang on no module: a piece is read when somebody takes it."""
        return [
            Unit(f"{self.module}[{place}]", tuple(_piece(weight, place) for weight in self.weights), ())
            for place in range(self.count)
        ]

    def infos(self, infos: Mapping[str, WeightInfo]) -> dict[str, WeightInfo]:
        """Where each piece is, by its name."""
        found = {}
        for weight in self.weights:
            for place, info in enumerate(cut_places(infos[weight.name])):
                found[piece_name(weight.name, place)] = info
        return found

    def one_at_a_time(self) -> Unit:
        """What must be in memory of them at one moment, for the smallest budget: one, while the module runs."""
        return Unit(self.module, (), (self.module,))


def find_experts(
    model: nn.Module | Modules,
    weights: Sequence[Weight],
    infos: Mapping[str, WeightInfo],
    bound: Callable[[WeightInfo], torch.dtype],
) -> list[ExpertPlan]:
    """The modules whose experts can be read one by one, in definition order. ``bound`` gives the dtype that one is
    handed out in.
    """
    if not any(len(weight.shape) > 2 for weight in weights):
        return []
    by_module: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.module is None or weight.tied or len(weight.shape) < 2:
            continue
        if weight.name in infos and _lies_in_pieces(infos[weight.name], bound):
            by_module.setdefault(weight.module, []).append(weight)
    modules = Modules.of(model).named if by_module else {}
    found = []
    for name, candidates in by_module.items():
        plan = _plan(name, modules[name], candidates, infos)
        if plan is not None:
            found.append(plan)
    return found


def listed_experts(model: nn.Module | Modules, units: Sequence[Unit]) -> list[bool]:
    """For each unit whether it is of an expert in a list: that list has modules of one class, lies in a block, and a
    method of the module that holds it names both it and a function that chooses by values.
    """
    modules = Modules.of(model).named
    of_list: dict[str, bool] = {}  # by the module that holds others, which all get the same answer
    of_kind: dict[tuple[type[nn.Module], str], bool] = {}

    def holds_experts(container: str) -> bool:
        owner, _, local_name = container.rpartition(".")
        experts = modules.get(container)
        if not isinstance(experts, nn.ModuleList | nn.ModuleDict) or not local_name:
            return False
        if len({type(expert) for expert in experts.children()}) != 1:
            return False  # the parts of a block: one for attention, one that comes after it
        if not any(isinstance(modules.get(above), nn.ModuleList | nn.Sequential) for above in ancestry(owner)):
            return False
        key = (type(modules[owner]), local_name)
        if key not in of_kind:
            of_kind[key] = any(
                local_name in code.co_names and not _ROUTING.isdisjoint(code.co_names) for code in _codes(key[0])
            )
        return of_kind[key]

    def is_in_one(name: str) -> bool:
        """Whether the module is an expert, or lies in one. No recursion: a function that holds itself would hold the
        modules until the collector comes by.
        """
        found, asked = False, []
        while name and not found:
            name = name.rpartition(".")[0]
            known = of_list.get(name)
            if known is not None:
                found = known
                break
            asked.append(name)
            found = holds_experts(name)
        of_list.update(dict.fromkeys(asked, found))
        return found

    return [all(map(is_in_one, unit.hooked)) for unit in units]


def piece_name(weight: str, place: int) -> str:
    """What one expert's part of a weight is called: as it is written in Python."""
    return f"{weight}[{place}]"


def _piece(weight: Weight, place: int) -> Weight:
    """One expert's part, which no module has by itself."""
    return Weight(piece_name(weight.name, place), Kind(weight.shape[1:], weight.dtype, False), None, "")


def slack_bytes(plans: Sequence[ExpertPlan]) -> int:
    """What all pieces take at most beyond their bytes: each expert lies in a slab of its own."""
    return sum(plan.count * len(plan.weights) for plan in plans) * 3 * PAGE


def largest_expert_bytes(plans: Sequence[ExpertPlan], sizes: Mapping[str, int]) -> int:
    """What the largest expert takes, given the bytes of weights by their names."""
    return max((sum(sizes[weight.name] for weight in plan.weights) // plan.count for plan in plans), default=0)


def _plan(
    name: str, module: nn.Module, candidates: Sequence[Weight], infos: Mapping[str, WeightInfo]
) -> ExpertPlan | None:
    """The weights that hold one expert in each place: those with three dimensions, and their biases with two."""
    if not any(len(weight.shape) > 2 for weight in candidates) or not _takes_one_by_one(module):
        return None
    taken = _taken_by_place(type(module))
    taken_weights = [weight for weight in candidates if weight.local_name in taken]
    counts = {weight.shape[0] for weight in taken_weights if len(weight.shape) >= 3}
    if len(counts) != 1:
        return None
    (count,) = counts
    plan = ExpertPlan(name, count, tuple(weight for weight in taken_weights if weight.shape[0] == count))
    return plan if count > 1 and _expert_bytes(plan, infos) >= PAGE else None  # less cannot be read by itself


def _lies_in_pieces(info: WeightInfo, bound: Callable[[WeightInfo], torch.dtype]) -> bool:
    """Whether each place can be read by itself, and lies as well aligned as it is in the whole weight.

    The last bits depend on that: in a whole weight whose pieces are no multiples of 64 bytes, few of them are aligned.
    """
    if len(info.shape) < 2 or not lies_in_places(info):
        return False
    return math.prod(info.shape[1:]) * bound(info).itemsize % ALIGNMENT == 0


def _expert_bytes(plan: ExpertPlan, infos: Mapping[str, WeightInfo]) -> int:
    return sum(infos[weight.name].nbytes for weight in plan.weights) // plan.count


def _takes_one_by_one(module: nn.Module) -> bool:
    """Whether the module's code runs, rather than an implementation that takes the weights whole.

    transformers' decorator puts a function that chooses by the configuration in the place of ``forward``.
    """
    chooses = hasattr(type(module).forward, "__wrapped__")
    config = getattr(module, "config", None)
    return not chooses or getattr(config, "_experts_implementation", None) in _ONE_BY_ONE


def _taken_by_place(kind: type[nn.Module]) -> set[str]:
    """The attributes of which the methods of a class take single places, ``self.name[variable]``."""
    return {name for code in _codes(kind) for name in _subscripted(code)}


def _codes(kind: type[nn.Module]) -> Iterator[CodeType]:
    """The code of a class's methods, as they were written: without their decorators."""
    for base in kind.__mro__:
        for value in vars(base).values() if base is not nn.Module else ():
            method = inspect.unwrap(value) if inspect.isfunction(value) else None
            if inspect.isfunction(method):
                yield method.__code__


def _subscripted(code: CodeType) -> Iterator[str]:
    """Attributes that are subscripted with one local variable."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    for attribute, index, subscript in zip(steps, steps[1:], steps[2:], strict=False):
        if (
            attribute.opname == "LOAD_ATTR"
            and index.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
            and (subscript.opname == "BINARY_SUBSCR" or subscript.argrepr == "[]")
        ):
            yield attribute.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _subscripted(constant)
