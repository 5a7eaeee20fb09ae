"""Puts resident weights into modules and takes them out again (see ``module_binding`` for one module).

Modules are held weakly, so that nothing here keeps a model alive.
"""

from __future__ import annotations

import collections
import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import nn

from odewei.copies import Skeleton
from odewei.errors import ModelError
from odewei.escapes import Escapes
from odewei.looked_up import LookedUp
from odewei.module_binding import ModuleBinding
from odewei.placeholder import Origin, Placeholder
from odewei.scheduler.forks import watch
from odewei.scheduler.rows import RowTable
from odewei.sliced import Sliced, SlicedWeight
from odewei.survey import Modules, Use, Weight
from odewei.uncompiled import uncompiled

__all__ = ["Binder"]


class Binder:
    """All module bindings of a model, and the tensors of its resident units. The scheduler's client.

    ``publish`` and ``retract`` are called by whoever decides, one at a time; everything else by any thread.
    """

    def __init__(
        self,
        modules: Modules,
        units: Sequence[Sequence[Weight]],
        infos: Callable[[Weight], tuple[torch.dtype, tuple[int, ...] | None]],
        tables: Mapping[str, RowTable | SlicedWeight],
        device: torch.device,
    ) -> None:
        """``units[i]`` are the weights of unit i; ``infos`` gives each one's dtype when bound, and its stride;
        ``tables`` are those that are only looked up, or taken expert by expert; ``device`` is where all are when bound.
        """
        self.lock = threading.RLock()  # one at a time binds
        watch(self)
        self.is_suspended = False  # somebody else has the modules' dictionaries for a while
        self._access: Callable[[int, FrameType], None] | None = None
        self._release: Callable[[int], None] | None = None
        self._tables = tables
        self._device = device
        self._units = units
        self._tensors: list[dict[str, nn.Parameter] | None] = [None] * len(units)
        self._escapes = Escapes()
        self._self: weakref.ref[Origin] = weakref.ref(self)
        self._bindings: dict[str, ModuleBinding] = {}
        with torch.inference_mode(False), torch.no_grad():
            for index, unit in enumerate(units):
                for weight in unit:
                    if weight.module is None:
                        continue  # one expert's part of a weight
                    if weight.name in tables:
                        made: Placeholder = self._in_parts(index, weight.name, infos(weight)[0])
                    else:
                        shape, (dtype, stride) = weight.shape, infos(weight)
                        made = Placeholder.make_inside(index, weight.name, shape, dtype, stride, self._self, device)
                    self._replace(modules.named, weight, made)
        kinds: dict[tuple[str, ...], tuple[str, ...]] = {}
        for binding in self._bindings.values():
            binding.settle(kinds)

    def _replace(self, named: Mapping[str, nn.Module], weight: Weight, made: Placeholder) -> None:
        """Put a placeholder in all places of a weight, and let go of the parameter that was there."""
        parameter: nn.Parameter | None = None
        for module, local_name in self._spots(weight):
            binding = self._bindings.get(module)
            if binding is None:
                binding = self._bindings[module] = ModuleBinding(named[module], self)
            parameter = binding.take(local_name, made)
        assert parameter is not None, "a weight without a parameter"
        if sys.getrefcount(parameter) > _REFERENCES_OF_A_VARIABLE and parameter.is_meta:
            _replace_kept_aside(parameter, made)

    @staticmethod
    def _spots(weight: Weight) -> Iterator[tuple[str, str]]:
        """Module and local name of each use of a weight."""
        if weight.module is not None:
            yield weight.module, weight.local_name
            for use in weight.tied:
                yield use.module, use.local_name

    def modules(self) -> Iterator[nn.Module]:
        """Those that have streamed weights, in no order that matters."""
        found = (binding.module() for binding in self._bindings.values())
        return (module for module in found if module is not None)

    def after_fork(self) -> None:
        """In the child: what another thread was binding stays as it is; whatever is bound is right."""
        self.lock = threading.RLock()

    def connect(self, access: Callable[[int, FrameType], None], release: Callable[[int], None]) -> None:
        """``access`` returns when a unit is resident and leased by this thread for the call that runs in a frame;
        ``release`` returns the lease.
        """
        self._access, self._release = access, release

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        self._escapes.bring_back(unit, parameters)
        self._tensors[unit] = parameters

    def bind(self, unit: int) -> None:
        with self.lock:
            parameters = self._tensors[unit]
            if parameters is None:
                return
            for weight in self._units[unit]:
                parameter = parameters[weight.name]
                for binding, local_name in self._places(weight):
                    if binding.dtype_of(local_name) not in (None, parameter.dtype):
                        made = self._placeholder(unit, weight.name, weight.shape, parameter.dtype, None)
                        binding.replace_placeholder(local_name, made)
                    binding.bind(local_name, parameter)

    def retract(self, unit: int) -> None:
        with self.lock:
            for weight in self._units[unit]:
                for binding, local_name in self._places(weight):
                    binding.unbind(local_name)
            tensors, self._tensors[unit] = self._tensors[unit], None
        if tensors is not None:
            self._escapes.note(unit, tensors)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave the modules' dictionaries alone meanwhile, and put the right ones in place at the end."""
        with self.lock:
            self.is_suspended = True
        try:
            yield
        finally:
            with self.lock:
                self.is_suspended = False
                for binding in self._bindings.values():
                    binding.put()

    def was_written(self, unit: int) -> bool:
        """Whether somebody has changed a weight of a resident unit in place."""
        tensors = self._tensors[unit]
        return tensors is not None and any(parameter._version for parameter in tensors.values())

    def changed(self, unit: int, name: str) -> nn.Parameter | None:
        """The parameter of a weight that was written to, loaded if need be; None if it is as in the checkpoint."""
        table, real = self._tables.get(name), self.resident(unit, name)
        in_part = isinstance(table, SlicedWeight) and table.is_written()
        written = real is not None and real._version > 0
        return self.load(unit, name) if written or in_part or self._escapes.is_written(unit, name) else None

    def is_streamed(self, use: Use) -> bool:
        """Whether a module still has the weight there, and not something of the user's."""
        return self._bindings[use.module].has(use.local_name)

    def skeleton(self) -> Skeleton:
        """What stands for the weights in a copy of the model."""
        return Skeleton(self, self._weight, self.changed)

    def _weight(self, unit: int, name: str) -> Weight:
        return next(weight for weight in self._units[unit] if weight.name == name)

    def is_held(self, unit: int) -> bool:
        """Whether somebody has a tensor over the memory of a resident unit: one that was handed out, or a view."""
        tensors = self._tensors[unit] or {}
        storages = [parameter.untyped_storage() for parameter in tensors.values()]
        own = collections.Counter(storage._cdata for storage in storages)
        return any(_references(storage) > count + 1 for storage, count in own.items())  # and this list's

    def hold(self, unit: int) -> dict[str, nn.Parameter]:
        """The parameters of a unit, loaded if need be; the caller's references keep them."""
        return {weight.name: self.load(unit, weight.name) for weight in self._units[unit]}

    def clear(self) -> None:
        """Let go of all units, after the driver has stopped."""
        for unit in range(len(self._units)):
            self.retract(unit)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give every module ordinary parameters, with the ``requires_grad`` they were built with."""
        for weight in itertools.chain.from_iterable(self._units):
            if weight.module is not None:
                parameter = parameters[weight.name]
                parameter.requires_grad_(weight.requires_grad and parameter.is_floating_point())
        for binding in self._bindings.values():
            binding.restore(parameters)

    def _places(self, weight: Weight) -> Iterable[tuple[ModuleBinding, str]]:
        return ((self._bindings[module], local_name) for module, local_name in self._spots(weight))

    def _placeholder(
        self, unit: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None
    ) -> Placeholder:
        return Placeholder.make(unit, name, shape, dtype, stride, self._self, self._device)

    def _in_parts(self, unit: int, name: str, dtype: torch.dtype) -> Placeholder:
        """For a table or a weight of experts, which is whole in ``unit``."""
        table = self._tables[name]
        resident = weakref.WeakMethod(self.resident)

        def loaded() -> nn.Parameter | None:
            method = resident()
            return None if method is None else method(unit, name)

        if isinstance(table, RowTable):
            return LookedUp.of(unit, table, self._self, loaded)
        table.experts.connect(self._self, resident)
        return Sliced.of(unit, table, dtype, self._self, loaded, self._device)

    def resident(self, unit: int, name: str) -> nn.Parameter | None:
        """The real parameter if it is loaded now; the reference keeps it."""
        tensors = self._tensors[unit]
        return None if tensors is None else tensors.get(name)  # a unit that leaves is emptied

    def is_real(self, placeholder: Placeholder, parameter: object) -> bool:
        """Whether this is what was handed out for a weight."""
        unit, name = placeholder.unit, placeholder.weight_name
        real = self.resident(unit, name)
        return parameter is real if real is not None else self._escapes.has(unit, name, parameter)

    @uncompiled
    def load(self, unit: int, name: str) -> nn.Parameter:
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


def _replace_kept_aside(parameter: nn.Parameter, placeholder: Placeholder) -> None:
    """A parameter that the model was built with and that somebody still has (a list, a function) has no values, and
    torch would compute with it all the same: it becomes a placeholder, which loads its own.
    """
    try:
        placeholder.replace(parameter)
    except RuntimeError as error:
        raise ModelError(
            "somebody has a weak reference to a parameter of the model, so that it cannot get its values",
            weight=placeholder.weight_name,
            cure="Have model_fn take parameters aside by name, or by ordinary references",
        ) from error


def _references_of_a_variable() -> int:
    """What getrefcount says of an object that one variable has: it depends on the interpreter."""
    thing = object()
    return sys.getrefcount(thing)


_REFERENCES_OF_A_VARIABLE = _references_of_a_variable()


def _references(storage: int) -> int:
    """How many there are to a storage, in Python (one for all) and in torch."""
    found: int = torch._C._storage_Use_Count(storage)
    return found
