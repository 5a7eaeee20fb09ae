"""A module's parameters as its forward finds them: the two dictionaries that a module has by turns.

Between passes it has the *idle* one, whose values are the parameters themselves, streamed ones without their bytes.
While a thread is inside a module that a unit hangs on, the modules below it that draw from the unit have a *bound*
one, which hands out real tensors as an ordinary dictionary does, because torch leaves its fast paths when it sees a
subclass. Iterating either yields the parameters, the same objects whatever is resident.

Which of the two is in place decides about speed only. A forward that finds the idle one gets real tensors too, loaded
if need be; and whoever finds the bound one from outside gets one that is right as long as the unit is here.

Nothing here refers to a module but weakly, and nothing that the scheduler's side refers to refers to a parameter: who
has neither module nor parameter any more has let the stream go.
"""

from __future__ import annotations

import collections
import copy
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from odewei.copies import refuse_copy
from odewei.placeholder import Placeholder, same_memory
from odewei.real import Real, constant, in_graph

if TYPE_CHECKING:
    from odewei.binding import Binder

__all__ = ["UNITS", "BoundParameters", "Changes", "IdleParameters", "UnitBinding", "UnitBindings", "idle_of"]


UNITS = "_odewei_units"  # of a module's dictionary: the binding of its unit, or a tuple of several


class Changes:
    """How often something was put into the dictionaries of one unit's modules, or taken out. One for all of them: what
    a hit looks at has to come into the processor's cache again after each layer.
    """

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class IdleParameters(dict[str, Any]):
    """Looking up a streamed name inside a pass loads it and hands out what computes; outside, the parameter itself."""

    __slots__ = ("_displaced", "changes")

    def __init__(self, items: Mapping[str, Any], changes: Changes) -> None:
        super().__init__(items)
        self.changes = changes  # what was made from an earlier state is out of date
        self._displaced: dict[str, Placeholder] | None = None  # what something else was put in the place of

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if type(value) is not Placeholder or value.home.part is not None or not value.home.stream.is_inside():
            return value
        if sys._getframe(2).f_code.co_name == "extra_repr":  # of the module: printing a model must not read it
            return value
        return real_of(value)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  (dict.get would not look it up)

    def __setitem__(self, name: str, value: Any) -> None:
        if type(value) is Real:
            value = self._original(name, value)
        before = dict.get(self, name)
        self._changed(before, value)
        if type(before) is Placeholder and before is not value:
            self._displaced = {**(self._displaced or {}), name: before}
        super().__setitem__(name, value)

    def _changed(self, *values: object) -> None:
        """These come or go."""
        self.changes.count += 1
        for value in values:
            if type(value) is Placeholder:
                value.home.stream.moved(value.home)

    def _original(self, name: str, real: Real) -> Any:
        """What is to be kept of a real tensor: who puts another parameter in the place of one within a forward puts
        that back as it found it, and the parameter is meant.
        """
        displaced = (self._displaced or {}).get(name)
        if displaced is not None:
            resident = displaced.home.stream.resident(displaced.home)
            if resident is not None and same_memory(resident, real):
                return displaced
        from odewei.binding import original_of  # it needs this module

        found = original_of(real)  # asked whether it is true, a parameter would be read
        return real if found is None else found

    def __delitem__(self, name: str) -> None:
        self._changed(dict.get(self, name))
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self._changed(dict.get(self, name))
        return super().pop(name, *default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def clear(self) -> None:
        self._changed(*self.values())
        super().clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self.items()), memo)

    def __reduce__(self) -> Any:
        refuse_copy(self)

    def copy(self) -> dict[str, Any]:
        return dict(self.items())


class BoundParameters(dict[str, Any]):
    """Looking a name up is that of an ordinary dictionary. What is stored in it is stored in ``idle``, too."""

    __slots__ = ("idle",)

    def __init__(self, items: Mapping[str, Any], idle: IdleParameters) -> None:
        super().__init__(items)
        self.idle = idle

    def items(self) -> Any:
        return self.idle.items()

    def values(self) -> Any:
        return self.idle.values()

    def __setitem__(self, name: str, value: Any) -> None:
        self.idle[name] = value
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        del self.idle[name]
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self.idle.pop(name, *default)
        return super().pop(name, *default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def clear(self) -> None:
        self.idle.clear()
        super().clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self.idle.items()), memo)

    def __reduce__(self) -> Any:
        refuse_copy(self)

    def copy(self) -> dict[str, Any]:
        return dict(self.idle.items())


_PLAIN, _IN_GRAPH, _TRACED = "plain", "in graph", "traced"


def _kind_wanted() -> str:
    """What modules are to be given: the real parameters; what leads gradients to the parameters that have no values;
    or constants, which is what weights are to the tracer of torch.jit.

    Autocast keeps its casts of whatever is a leaf and may be trained, a second model, until it ends: it gets no leaves.
    """
    if _is_traced() is not None:
        return _TRACED
    return _IN_GRAPH if _is_grad_enabled() or _is_autocast_enabled() else _PLAIN


_is_traced, _is_autocast_enabled = torch._C._get_tracing_state, torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled


def real_of(placeholder: Placeholder) -> torch.Tensor:
    """What computes, for a forward that takes a weight outside of the module that its unit hangs on."""
    real = placeholder.home.stream.resident(placeholder.home)
    if real is None:
        real = placeholder.fetch()
    kind = _kind_wanted()
    if kind is _TRACED:
        return constant(real)
    if placeholder.requires_grad and kind is _IN_GRAPH:
        return in_graph([placeholder], [real])[0]
    return real if placeholder.is_owner else real.detach().requires_grad_(placeholder.requires_grad)


def idle_of(parameters: Any) -> Any:
    """A module's parameters as they are between passes."""
    return parameters.idle if type(parameters) is BoundParameters else parameters


_Holder = dict[str, Any] | weakref.ref[nn.Module]
"""What leads to a module's dictionary: the dictionary itself, or the module."""


class _Bound(NamedTuple):
    """What a unit's modules have while a thread is inside, made when ``seen`` changes had been made."""

    modules: list[tuple[_Holder, IdleParameters, BoundParameters]]
    seen: list[tuple[Changes, int]]


class UnitBinding:
    """What entering one unit binds. The module that the unit hangs on has it in its dictionary, and keeps it alive.

    ``id`` is the scheduler's number of the unit, ``unit`` the model's. Forward threads enter and leave; the driver's
    clears. Every state that this may be in is right, so there is no lock.
    """

    __slots__ = (
        "__weakref__",
        "_binder",
        "_bound",
        "_inside",
        "_kind",
        "_modules",
        "_recurrent",
        "_trains",
        "id",
        "needed",
        "saves",
        "unit",
    )

    def __init__(self, unit: int, modules: tuple[weakref.ref[nn.Module], ...], binder: Binder) -> None:
        """``modules`` are those that have weights of the unit."""
        self.id = -1
        self.unit = unit
        self._binder = binder
        self._modules = modules
        self._bound: _Bound | None = None
        self._kind = _PLAIN  # of what is bound
        self._recurrent = any(isinstance(module(), nn.RNNBase) for module in modules)
        self.needed: bool | None = None  # as is_needed; None: not looked at
        self.saves = False  # a thread has computed with gradients inside
        self._trains = False  # some of what is bound leads gradients to parameters
        self._inside = 0

    def is_needed(self) -> bool:
        """Whether any of its modules still has a weight of the unit: the user may have put others in all places."""
        if self.needed is None:
            self.needed = any(True for _ in self._binder.parameters(self.unit))
        return self.needed

    def look_again(self) -> None:
        """Something of the unit has come or gone."""
        self.needed = None

    def enter(self) -> None:
        """This thread is inside, and the unit is resident and leased."""
        self._inside += 1
        self.bind()

    def begin(self) -> None:
        """The first half of ``enter``."""
        self._inside += 1

    def bind(self) -> None:
        """The second half of ``enter``."""
        bound, kind = self._bound, _kind_wanted()
        if bound is None or (not (kind is self._kind is _PLAIN) and not self._serves(kind)):
            bound = self._make(kind)
        modules, seen = bound
        for changes, count in seen:
            if changes.count != count:  # somebody has put other parameters there since
                inside = self._inside
                self.clear()
                self._inside = inside
                modules, _ = self._make(kind)
                break
        for holder, idle, parameters in modules:  # the only work of a hit that grows with the modules of a unit
            own = holder if type(holder) is dict else _dictionary(holder)
            if own["_parameters"] is idle:
                own["_parameters"] = parameters
        if self._recurrent:
            self._follow()

    def _serves(self, kind: str) -> bool:
        """Whether what is bound will do.

        With gradients each call has a way to the parameters of its own: contributions of several calls to one are added
        one after another then, as in an ordinary model, and not in groups that depend on when the unit came and went.
        """
        if kind is _IN_GRAPH:
            return self._kind is _IN_GRAPH and not self._trains
        return self._kind is kind or (kind is _PLAIN and self._kind is _IN_GRAPH)

    def leave(self) -> None:
        """This thread leaves."""
        self._inside -= 1
        if self._inside <= 0:
            self._inside = 0
            if self._bound is not None:
                self._put_idle(self._bound)
            if self._recurrent:
                self._follow()

    def clear(self) -> None:
        """Let go of all real tensors: nobody is inside."""
        bound, self._bound, self._inside = self._bound, None, 0
        if bound is not None:
            self._put_idle(bound)
            if self._recurrent:
                self._follow()

    def owns(self, real: object) -> Placeholder | None:
        """The parameter that a real tensor was bound for."""
        for _, idle, parameters in () if self._bound is None else self._bound.modules:
            for name, value in idle.items():
                if type(value) is Placeholder and dict.get(parameters, name) is real:
                    return value
        return None

    @staticmethod
    def _put_idle(bound: _Bound) -> None:
        for holder, idle, parameters in bound.modules:
            own = holder if type(holder) is dict else _dictionary(holder)
            there = own["_parameters"]
            if there is parameters or (there is not idle and idle_of(there) is idle):
                own["_parameters"] = idle

    def _follow(self) -> None:
        """Have recurrent modules have the second list of what their dictionaries have."""
        for reference in self._modules:
            module = reference()
            if isinstance(module, nn.RNNBase):
                follow(module, module.__dict__["_parameters"])

    def _make(self, kind: str) -> _Bound:
        """Dictionaries with what is resident now. A module that lacks something stays idle."""
        found: list[tuple[_Holder, IdleParameters, dict[str, Any]]] = []
        seen: dict[int, tuple[Changes, int]] = {}
        reals: dict[int, torch.Tensor] = {}
        trained: list[Placeholder] = []
        for reference in self._modules:
            module = reference()
            idle = None if module is None else idle_of(module.__dict__["_parameters"])
            if module is None or type(idle) is not IdleParameters:
                continue
            seen.setdefault(id(idle.changes), (idle.changes, idle.changes.count))  # before what they may change
            items = dict(idle.items())
            streamed = [value for value in items.values() if type(value) is Placeholder and value.home.part is None]
            for value in streamed:
                real = reals.get(id(value))
                if real is None:
                    real = self._real(value)
                if real is not None:
                    reals[id(value)] = constant(real) if kind is _TRACED else real
                    if kind is _IN_GRAPH and value.requires_grad:
                        trained.append(value)
            if all(id(value) in reals for value in streamed):
                found.append((_holder(module, reference), idle, items))
        bound = [BoundParameters(_with(reals, items), idle) for _, idle, items in found]
        if trained:
            _lead_gradients(trained, reals, bound)
        self._kind, self._trains = kind, bool(trained)
        modules = [(holder, idle, parameters) for (holder, idle, _), parameters in zip(found, bound, strict=True)]
        self._bound = _Bound(modules, list(seen.values()))
        return self._bound

    def _real(self, placeholder: Placeholder) -> torch.Tensor | None:
        """Its real tensor, if a lease keeps it: that of this unit, or of another one that is entered, too."""
        home = placeholder.home
        if not placeholder.is_owner or home.stream is not self._binder.stream():
            return None
        if home.unit != self.unit and not self._binder.is_entered(home.unit):
            return None
        return self._binder.resident(home)

    @property
    def is_entered(self) -> bool:
        """Whether some thread is inside."""
        return self._inside > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied module has a binding of its own, or none

    def __reduce__(self) -> Any:
        refuse_copy(self)

    def __repr__(self) -> str:
        return f"<UnitBinding of unit {self.unit}: {len(self._modules)} modules, {self._inside} inside>"


def _holder(module: nn.Module, reference: weakref.ref[nn.Module]) -> _Holder:
    """The dictionary where that keeps nothing alive which its owner would not: that of a module without modules below
    it and without a unit. Looking it up through the module costs a pass with everything resident 0.6 %, by what has to
    come into the processor's cache again after each layer.
    """
    return reference if module._modules or UNITS in module.__dict__ else module.__dict__


def _dictionary(holder: _Holder) -> dict[str, Any]:
    module = holder() if isinstance(holder, weakref.ref) else None
    return _NONE if module is None else module.__dict__


_NONE: dict[str, Any] = {"_parameters": None}  # of a module that is gone: never written to


def _with(reals: Mapping[int, torch.Tensor], items: Mapping[str, Any]) -> dict[str, Any]:
    """What a module has, with real tensors by the numbers of the parameters that they stand for."""
    return {name: reals.get(id(value), value) for name, value in items.items()}


def _lead_gradients(
    trained: Sequence[Placeholder], reals: Mapping[int, torch.Tensor], bound: Iterable[BoundParameters]
) -> None:
    """Put what leads gradients to ``trained`` (as often as modules have one) in the places of their real tensors.

    One way for all weights of the unit; but each module that shares a weight with another gets one of its own: their
    contributions are added in the order in which they come up, among those of other calls, and not as one sum.
    """
    uses = collections.Counter(map(id, trained))
    once = [value for value in trained if uses[id(value)] == 1]
    made = dict(zip(map(id, once), in_graph(once, [reals[id(value)] for value in once]), strict=True)) if once else {}
    for parameters in bound:
        for name, value in parameters.idle.items():
            if id(value) in uses:
                way = made[id(value)] if id(value) in made else in_graph([value], [reals[id(value)]])[0]
                dict.__setitem__(parameters, name, way)


def follow(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Recurrent modules keep a second list of their weights."""
    if isinstance(module, nn.RNNBase):
        flat = [dict.get(parameters, name) for name in module._flat_weights_names]
        module.__dict__["_flat_weights"] = flat


class UnitBindings(tuple[UnitBinding, ...]):
    """Those of a module that several units hang on."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None
