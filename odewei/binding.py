"""Puts a unit's tensors into modules and takes them out again, by swapping a module's parameter dictionary.

A streamed module has two: *bound*, an ordinary one with the real parameters, and *unbound*, whose lookup of one name
loads the weight like any other access, while iterating it yields placeholders and loads nothing. Attribute access
always hands out a real tensor, because torch leaves its fast paths when it sees a subclass. The bound one is in place
when all units that the module draws from are resident.

The driver's thread swaps; forward threads only look. Whatever they find is right: the real tensor, kept alive by their
reference, or a load. Modules are held weakly, so that nothing here keeps a model alive.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from odewei.looked_up import LookedUp
from odewei.placeholder import Origin, Placeholder
from odewei.scheduler.rows import RowTable
from odewei.sliced import Sliced, SlicedWeight
from odewei.survey import Weight, walk

__all__ = ["Binder", "ModuleBinding"]

Loader = Callable[[int, str], nn.Parameter]
Parameters = dict[str, nn.Parameter | None]


class _Streamed(dict[str, Any]):
    """Either dictionary of a module. What the user stores in it becomes the user's own, in both."""

    __slots__ = ("_binding",)

    def __init__(self, items: Mapping[str, Any], binding: ModuleBinding) -> None:
        super().__init__(items)
        self._binding = binding

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._binding.adopt(name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._binding.disown(name)

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self:
            return super().pop(name, *default)
        value = self[name]
        del self[name]
        return value

    def __reduce__(self) -> Any:
        return (dict, (dict(self),))

    def copy(self) -> dict[str, Any]:
        return dict(self)


class BoundParameters(_Streamed):
    """All parameters are real."""


class UnboundParameters(_Streamed):
    """Looking a streamed name up loads it; iterating yields placeholders."""

    def __getitem__(self, name: str) -> Any:
        return self._binding.look_up(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  (dict.get would not look it up)


class ModuleBinding:
    """One module that has streamed weights: ``names`` are its parameters that are bound when their units are resident,
    ``tables`` those that are only looked up, which never are: their placeholders serve all.
    """

    __slots__ = ("_flat_names", "_load", "_module", "_names", "_real", "_tables", "_unbound", "suspended")

    def __init__(self, module: nn.Module, names: tuple[str, ...], tables: tuple[str, ...], load: Loader) -> None:
        self._module = weakref.ref(module)
        self._names = names
        self._tables = tables
        self._load = load
        self._real: dict[str, nn.Parameter] | None = None  # those that are here
        self._flat_names = _flat_names(module)
        self.suspended = False  # somebody else has the module's dictionary for a while
        self._unbound = UnboundParameters(module._parameters, self)

    def install(self, placeholders: Mapping[str, Placeholder]) -> None:
        """Take the module's parameters over, with placeholders by local name; nothing is bound yet."""
        dict.update(self._unbound, placeholders)
        self.put()

    def bind(self, local_name: str, parameter: nn.Parameter) -> None:
        """One weight is here."""
        if local_name in self._names:
            if self._real is None:
                self._real = {}
            self._real[local_name] = parameter
            if len(self._real) == len(self._names):
                self.put()

    def unbind(self, local_name: str) -> None:
        """One weight leaves."""
        if self._real is not None and self._real.pop(local_name, None) is not None:
            if not self._real:
                self._real = None
            self.put()

    def replace_placeholder(self, local_name: str, placeholder: Placeholder) -> None:
        """The weight turned out to have another dtype."""
        if local_name in self._names:
            dict.__setitem__(self._unbound, local_name, placeholder)

    def dtype_of(self, local_name: str) -> torch.dtype | None:
        """What the placeholder says; None if the user has stored something else."""
        found = dict.get(self._unbound, local_name) if local_name in self._names else None
        return None if found is None else found.dtype

    def look_up(self, local_name: str, kept: Any) -> Any:
        """The real parameter, loaded if need be; ``kept`` for what is not streamed. Any thread."""
        if local_name not in self._names:
            return kept
        here = self._real
        real = None if here is None else here.get(local_name)
        return self._load(kept.unit, kept.weight_name) if real is None else real

    def adopt(self, local_name: str, value: Any) -> None:
        """The user has stored a parameter: from now on it is the module's own and not streamed."""
        self._forget(local_name)
        dict.__setitem__(self._unbound, local_name, value)

    def disown(self, local_name: str) -> None:
        """The user has deleted a parameter."""
        self._forget(local_name)
        dict.pop(self._unbound, local_name, None)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the module an ordinary dictionary with these parameters, by the weights' names, for good."""
        module = self._module()
        if module is not None:
            streamed = {*self._names, *self._tables}
            items = {
                local: parameters[kept.weight_name] if local in streamed else kept
                for local, kept in dict.items(self._unbound)
            }
            module.__dict__["_parameters"] = items
            self._follow(module, items)
        self._names = self._tables = ()
        self._real = None

    def put(self) -> None:
        """Make the module use the dictionary that fits what is here now."""
        module = self._module()
        if module is None or self.suspended:
            return
        parameters: _Streamed = self._unbound
        real = self._real or {}
        if len(real) == len(self._names):
            items = {name: real.get(name, kept) for name, kept in dict.items(self._unbound)}
            parameters = BoundParameters(items, self)
        module.__dict__["_parameters"] = parameters
        self._follow(module, parameters)

    def _forget(self, local_name: str) -> None:
        self._names = tuple(name for name in self._names if name != local_name)
        self._tables = tuple(name for name in self._tables if name != local_name)
        if self._real is not None:
            self._real.pop(local_name, None)

    def _follow(self, module: nn.Module, parameters: Mapping[str, Any]) -> None:
        """Recurrent modules keep a second list of their weights."""
        if self._flat_names:
            items = dict(parameters.items())  # placeholders stay placeholders: nothing is looked up
            flat = [items.get(name) for name in self._flat_names]
            module.__dict__["_flat_weights"] = flat


class Binder:
    """All module bindings of a model, and the tensors of its resident units. The scheduler's client.

    ``publish`` and ``retract`` are called by the driver only; everything else by any thread.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Sequence[Weight]],
        infos: Callable[[Weight], tuple[torch.dtype, tuple[int, ...] | None]],
        tables: Mapping[str, RowTable | SlicedWeight],
    ) -> None:
        """``units[i]`` are the weights of unit i; ``infos`` gives each one's dtype when bound, and its stride;
        ``tables`` are those that are only looked up, or taken expert by expert.
        """
        self._lock = threading.Lock()  # one at a time binds
        self._access: Callable[[int, FrameType], None] | None = None
        self._release: Callable[[int], None] | None = None
        self._tables = tables
        self._units = units
        self._tensors: list[dict[str, nn.Parameter] | None] = [None] * len(units)
        self._self: weakref.ref[Origin] = weakref.ref(self)
        placeholders: dict[str, dict[str, Placeholder]] = {}  # by module and local name
        for index, unit in enumerate(units):
            for weight in unit:
                if not weight.uses:
                    continue  # one expert's part of a weight
                if weight.name in tables:
                    made: Placeholder = self._in_parts(index, weight.name, infos(weight)[0])
                else:
                    made = self._placeholder(index, weight.name, weight.shape, *infos(weight))
                for use in weight.uses:
                    placeholders.setdefault(use.module, {})[use.local_name] = made
        self._bindings = dict(self._take_over(model, placeholders))

    def _take_over(
        self, model: nn.Module, placeholders: Mapping[str, Mapping[str, Placeholder]]
    ) -> Iterator[tuple[str, ModuleBinding]]:
        """Replace the parameters of the modules, by name, with placeholders."""
        load = self._load
        kinds: dict[tuple[str, ...], tuple[str, ...]] = {}  # thousands of modules have the same names
        for name, module, _ in walk(model):
            found = placeholders.get(name)
            if found is not None:
                names = tuple(local for local, made in found.items() if not isinstance(made, LookedUp | Sliced))
                tables = tuple(local for local, made in found.items() if isinstance(made, LookedUp | Sliced))
                names = kinds.setdefault(names, names)
                binding = ModuleBinding(module, names, tables, load)
                binding.install(found)
                yield name, binding

    def connect(self, access: Callable[[int, FrameType], None], release: Callable[[int], None]) -> None:
        """``access`` returns when a unit is resident and leased by this thread for the call that runs in a frame;
        ``release`` returns the lease.
        """
        self._access, self._release = access, release

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        with self._lock:
            self._tensors[unit] = parameters
            for weight in self._units[unit]:
                parameter = parameters[weight.name]
                for binding, local_name in self._places(weight):
                    if binding.dtype_of(local_name) not in (None, parameter.dtype):
                        made = self._placeholder(unit, weight.name, weight.shape, parameter.dtype, None)
                        binding.replace_placeholder(local_name, made)
                    binding.bind(local_name, parameter)

    def retract(self, unit: int) -> None:
        with self._lock:
            for weight in self._units[unit]:
                for binding, local_name in self._places(weight):
                    binding.unbind(local_name)
            self._tensors[unit] = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave the modules' dictionaries alone meanwhile, and put the right ones in place at the end."""
        with self._lock:
            for binding in self._bindings.values():
                binding.suspended = True
        try:
            yield
        finally:
            with self._lock:
                for binding in self._bindings.values():
                    binding.suspended = False
                    binding.put()

    def was_written(self, unit: int) -> bool:
        """Whether somebody has changed a weight of a resident unit in place."""
        tensors = self._tensors[unit]
        return tensors is not None and any(parameter._version for parameter in tensors.values())

    def is_held(self, unit: int) -> bool:
        """Whether somebody has a tensor over the memory of a resident unit: one that was handed out, or a view."""
        tensors = self._tensors[unit] or {}
        return any(_references(parameter) > _OWN_REFERENCES for parameter in tensors.values())

    def hold(self, unit: int) -> dict[str, nn.Parameter]:
        """The parameters of a unit, loaded if need be; the caller's references keep them."""
        return {weight.name: self._load(unit, weight.name) for weight in self._units[unit]}

    def clear(self) -> None:
        """Let go of all units, after the driver has stopped."""
        for unit in range(len(self._units)):
            self.retract(unit)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give every module ordinary parameters, with the ``requires_grad`` they were built with."""
        for weight in itertools.chain.from_iterable(self._units):
            if weight.uses:
                parameter = parameters[weight.name]
                parameter.requires_grad_(weight.requires_grad and parameter.is_floating_point())
        for binding in self._bindings.values():
            binding.restore(parameters)

    def _places(self, weight: Weight) -> Iterable[tuple[ModuleBinding, str]]:
        return ((self._bindings[use.module], use.local_name) for use in weight.uses)

    def _placeholder(
        self, unit: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None
    ) -> Placeholder:
        return Placeholder.make(unit, name, shape, dtype, stride, self._self)

    def _in_parts(self, unit: int, name: str, dtype: torch.dtype) -> Placeholder:
        """For a table or a weight of experts, which is whole in ``unit``."""
        table = self._tables[name]
        resident = weakref.WeakMethod(self._resident)

        def loaded() -> nn.Parameter | None:
            method = resident()
            return None if method is None else method(unit, name)

        if isinstance(table, RowTable):
            return LookedUp.of(unit, table, self._self, loaded)
        table.experts.connect(self._self, resident)
        return Sliced.of(unit, table, dtype, self._self, loaded)

    def _resident(self, unit: int, name: str) -> nn.Parameter | None:
        """The real parameter if it is loaded now; the reference keeps it."""
        tensors = self._tensors[unit]
        return None if tensors is None else tensors[name]

    def _load(self, unit: int, name: str) -> nn.Parameter:
        """An access outside of the hooks: wait for the unit, hand out the real parameter; the reference keeps it."""
        parameter, release = self.lease(unit, name, sys._getframe())
        release()
        return parameter

    def lease(self, unit: int, name: str, frame: FrameType) -> tuple[nn.Parameter, Callable[[], None]]:
        """The real parameter, loaded if need be, and what returns its lease; that ends with ``frame`` at the latest."""
        assert self._access is not None, "an access before the model was ready"
        assert self._release is not None
        table = self._tables.get(name)
        if isinstance(table, RowTable):
            table.keep_none()
        self._access(unit, frame)
        tensors = self._tensors[unit]
        assert tensors is not None, "a leased unit has no tensors"
        if isinstance(table, SlicedWeight):
            table.catch_up(tensors[name])
        return tensors[name], functools.partial(self._release, unit)


_OWN_REFERENCES = 2  # of a storage: the parameter's, and that of whoever asks


def _references(tensor: torch.Tensor) -> int:
    """How many there are to the storage of a tensor, in Python and in torch."""
    found: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return found


def _flat_names(module: nn.Module) -> list[str] | None:
    return list(module._flat_weights_names) if isinstance(module, nn.RNNBase) else None
