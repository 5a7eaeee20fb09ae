"""Puts a unit's tensors into modules and takes them out again, by swapping a module's parameter dictionary.

A streamed module has two: *bound*, an ordinary one with the real parameters, and *unbound*, whose lookup of one name
loads the weight like any other access, while iterating it yields placeholders and loads nothing. Attribute access
always hands out a real tensor, because torch leaves its fast paths when it sees a subclass. The bound one is in place
when all units that the module draws from are resident.

The driver's thread swaps; forward threads only look. Whatever they find is right: the real tensor, kept alive by their
reference, or a load. Modules are held weakly, so that nothing here keeps a model alive.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from odewei.looked_up import LookedUp
from odewei.placeholder import Fetch, Placeholder
from odewei.scheduler.rows import RowTable
from odewei.survey import Weight

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
    """One module that has streamed weights. ``sources`` maps its parameter names to (unit, weight name), ``tables``
    those of tables that are only looked up, which are never bound: their placeholders serve all.
    """

    def __init__(
        self,
        module: nn.Module,
        sources: Mapping[str, tuple[int, str]],
        tables: Mapping[str, str],
        load: Loader,
    ) -> None:
        self._module = weakref.ref(module)
        self._sources = dict(sources)
        self._tables = dict(tables)
        self._load = load
        self._real: dict[str, nn.Parameter] = {}
        self._flat_names = _flat_names(module)
        self.suspended = False  # somebody else has the module's dictionary for a while
        self._unbound = UnboundParameters(module._parameters, self)

    def install(self, placeholders: Mapping[str, Placeholder]) -> None:
        """Take the module's parameters over; nothing is bound yet."""
        for local_name, name in self._names().items():
            dict.__setitem__(self._unbound, local_name, placeholders[name])
        self.put()

    def bind(self, local_name: str, parameter: nn.Parameter) -> None:
        """One weight is here."""
        if local_name in self._sources:
            self._real[local_name] = parameter
            if len(self._real) == len(self._sources):
                self.put()

    def unbind(self, local_name: str) -> None:
        """One weight leaves."""
        if self._real.pop(local_name, None) is not None:
            self.put()

    def replace_placeholder(self, local_name: str, placeholder: Placeholder) -> None:
        """The weight turned out to have another dtype."""
        if local_name in self._sources:
            dict.__setitem__(self._unbound, local_name, placeholder)

    def look_up(self, local_name: str, kept: Any) -> Any:
        """The real parameter, loaded if need be; ``kept`` for what is not streamed. Any thread."""
        source = self._sources.get(local_name)
        if source is None:
            return kept
        real = self._real.get(local_name)
        return self._load(*source) if real is None else real

    def adopt(self, local_name: str, value: Any) -> None:
        """The user has stored a parameter: from now on it is the module's own and not streamed."""
        self._sources.pop(local_name, None)
        self._tables.pop(local_name, None)
        self._real.pop(local_name, None)
        dict.__setitem__(self._unbound, local_name, value)

    def disown(self, local_name: str) -> None:
        """The user has deleted a parameter."""
        self._sources.pop(local_name, None)
        self._tables.pop(local_name, None)
        self._real.pop(local_name, None)
        dict.pop(self._unbound, local_name, None)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the module an ordinary dictionary with these parameters, for good."""
        module = self._module()
        if module is not None:
            names = self._names()
            items = {
                local: parameters[names[local]] if local in names else kept for local, kept in dict.items(self._unbound)
            }
            module.__dict__["_parameters"] = items
            self._follow(module, items)
        self._real.clear()
        self._sources.clear()
        self._tables.clear()

    def put(self) -> None:
        """Make the module use the dictionary that fits what is here now."""
        module = self._module()
        if module is None or self.suspended:
            return
        parameters: _Streamed = self._unbound
        if len(self._real) == len(self._sources):
            items = {name: self._real.get(name, kept) for name, kept in dict.items(self._unbound)}
            parameters = BoundParameters(items, self)
        module.__dict__["_parameters"] = parameters
        self._follow(module, parameters)

    def _names(self) -> dict[str, str]:
        """Local names of all that is streamed, and the weights' names."""
        return {local: name for local, (_, name) in self._sources.items()} | self._tables

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
        infos: Mapping[str, tuple[torch.dtype, Any]],
        tables: Mapping[str, RowTable],
    ) -> None:
        """``units[i]`` are the weights of unit i; ``infos`` gives each one's dtype when bound, and its stride;
        ``tables`` are those that are only looked up.
        """
        self._lock = threading.Lock()  # one at a time binds
        self._access: Callable[[int], None] | None = None
        self._release: Callable[[int], None] | None = None
        self._tables = tables
        self._units = [{weight.name: weight.uses for weight in unit} for unit in units]
        self._tensors: list[dict[str, nn.Parameter] | None] = [None] * len(units)
        self._requires_grad = {weight.name: weight.parameter.requires_grad for unit in units for weight in unit}
        self._placeholders: dict[str, Placeholder] = {}
        sources: dict[str, dict[str, tuple[int, str]]] = {}
        looked_up: dict[str, dict[str, str]] = {}
        for index, unit in enumerate(units):
            for weight in unit:
                dtype, stride = infos[weight.name]
                if weight.name in tables:
                    self._placeholders[weight.name] = self._looked_up(index, tables[weight.name])
                else:
                    self._placeholders[weight.name] = self._placeholder(index, weight.name, weight.shape, dtype, stride)
                for use in weight.uses:
                    sources.setdefault(use.module, {})
                    if weight.name in tables:
                        looked_up.setdefault(use.module, {})[use.local_name] = weight.name
                    else:
                        sources[use.module][use.local_name] = (index, weight.name)
        modules = dict(model.named_modules())
        self._bindings = {
            name: ModuleBinding(modules[name], found, looked_up.get(name, {}), self._load)
            for name, found in sources.items()
        }
        for binding in self._bindings.values():
            binding.install(self._placeholders)

    def connect(self, access: Callable[[int], None], release: Callable[[int], None]) -> None:
        """``access`` returns when a unit is resident and leased by this thread; ``release`` returns the lease."""
        self._access, self._release = access, release

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        with self._lock:
            self._tensors[unit] = parameters
            for name, parameter in parameters.items():
                for binding, local_name in self._places(unit, name):
                    if parameter.dtype != self._placeholders[name].dtype:
                        made = self._placeholder(unit, name, tuple(parameter.shape), parameter.dtype, None)
                        binding.replace_placeholder(local_name, made)
                    binding.bind(local_name, parameter)

    def retract(self, unit: int) -> None:
        with self._lock:
            for name in self._units[unit]:
                for binding, local_name in self._places(unit, name):
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

    def hold(self, unit: int) -> dict[str, nn.Parameter]:
        """The parameters of a unit, loaded if need be; the caller's references keep them."""
        return {name: self._load(unit, name) for name in self._units[unit]}

    def clear(self) -> None:
        """Let go of all units, after the driver has stopped."""
        for unit in range(len(self._units)):
            self.retract(unit)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give every module ordinary parameters, with the ``requires_grad`` they were built with."""
        for name, parameter in parameters.items():
            parameter.requires_grad_(self._requires_grad[name] and parameter.is_floating_point())
        for binding in self._bindings.values():
            binding.restore(parameters)

    def _places(self, unit: int, name: str) -> Iterable[tuple[ModuleBinding, str]]:
        return ((self._bindings[use.module], use.local_name) for use in self._units[unit][name])

    def _placeholder(
        self, unit: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, stride: Any
    ) -> Placeholder:
        return Placeholder.make(name, shape, dtype, stride, self._fetcher(unit, name))

    def _looked_up(self, unit: int, table: RowTable) -> LookedUp:
        name = table.place.weight
        resident = weakref.WeakMethod(self._resident)

        def loaded() -> nn.Parameter | None:
            method = resident()
            return None if method is None else method(unit, name)

        return LookedUp.of(table, self._fetcher(unit, name), loaded)

    def _fetcher(self, unit: int, name: str) -> Fetch:
        load = weakref.WeakMethod(self._load)

        def fetch() -> torch.Tensor:
            method = load()
            if method is None:
                raise ReferenceError(f"the model of weight {name!r} is gone")
            return method(unit, name)

        return fetch

    def _resident(self, unit: int, name: str) -> nn.Parameter | None:
        """The real parameter if it is loaded now; the reference keeps it."""
        tensors = self._tensors[unit]
        return None if tensors is None else tensors[name]

    def _load(self, unit: int, name: str) -> nn.Parameter:
        """An access outside of the hooks: wait for the unit, hand out the real parameter; the reference keeps it."""
        assert self._access is not None, "an access before the model was ready"
        assert self._release is not None
        if name in self._tables:
            self._tables[name].keep_none()
        self._access(unit)
        try:
            tensors = self._tensors[unit]
            assert tensors is not None, "a leased unit has no tensors"
            return tensors[name]
        finally:
            self._release(unit)


def _flat_names(module: nn.Module) -> list[str] | None:
    return list(module._flat_weights_names) if isinstance(module, nn.RNNBase) else None
