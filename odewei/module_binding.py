"""One module's streamed parameters: the two dictionaries that it has by turns, and which of them is in place.

*Bound* has the real parameters; *unbound* loads a weight when its name is looked up, like any other access. Attribute
access always hands out a real tensor, because torch leaves its fast paths when it sees a subclass. The bound one is in
place when all units that the module draws from are resident. Iterating either yields placeholders and loads nothing:
the same objects whatever is resident, so that a tied weight is one to whoever counts while units come and go.

The driver's thread swaps; forward threads only look. Whatever they find is right: the real tensor, kept alive by their
reference, or a load. The module is held weakly.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from odewei.copies import Skeleton, refuse_copy
from odewei.in_parts import InParts
from odewei.placeholder import Placeholder

if TYPE_CHECKING:
    from odewei.binding import Binder

__all__ = ["ModuleBinding"]


class _Streamed(dict[str, Any]):
    """Either dictionary of a module. What the user stores in it becomes the user's own, in both."""

    __slots__ = ("_binding",)

    def __init__(self, items: Mapping[str, Any], binding: ModuleBinding) -> None:
        super().__init__(items)
        self._binding = binding

    def __setitem__(self, name: str, value: Any) -> None:
        self._binding.adopt(name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._binding.disown(name)

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self:
            return super().pop(name, *default)
        value = self[name]
        del self[name]
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return self._binding.copied(memo)

    def __reduce__(self) -> Any:
        refuse_copy()

    def copy(self) -> dict[str, Any]:
        return dict(self)


class BoundParameters(_Streamed):
    """Looking a name up is that of an ordinary dictionary, and finds real parameters only."""

    __slots__ = ()

    def items(self) -> Any:
        return self._binding.placeholders().items()

    def values(self) -> Any:
        return self._binding.placeholders().values()

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        dict.__setitem__(self, name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        dict.__delitem__(self, name)


class UnboundParameters(_Streamed):
    """Looking a streamed name up loads it; iterating yields placeholders."""

    def __getitem__(self, name: str) -> Any:
        kept = super().__getitem__(name)
        if sys._getframe(2).f_code.co_name == "extra_repr":  # of the module: printing a model must not read it
            return kept
        return self._binding.look_up(name, kept)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  (dict.get would not look it up)


class ModuleBinding:
    """One module that has streamed weights: ``names`` are its parameters that are bound when their units are resident,
    ``tables`` those that are only looked up, which never are: their placeholders serve all.
    """

    __slots__ = (
        "_binder",
        "_names",
        "_real",
        "_replaced",
        "_tables",
        "_unbound",
        "module",
    )

    def __init__(self, module: nn.Module, binder: Binder) -> None:
        """Take the module's dictionary over. Nothing of it is streamed yet."""
        self.module = weakref.ref(module)
        self._names: tuple[str, ...] = ()
        self._tables: tuple[str, ...] = ()
        self._binder = binder
        self._replaced: dict[str, Placeholder] | None = None  # what the user has put something else in the place of
        self._real: dict[str, nn.Parameter] | None = None  # those that are here
        self._unbound = module.__dict__["_parameters"] = UnboundParameters(module._parameters, self)

    def take(self, local_name: str, placeholder: Placeholder) -> nn.Parameter:
        """Stream a parameter from now on; returns what the module had. ``settle`` has to follow the last of them."""
        had: nn.Parameter = dict.__getitem__(self._unbound, local_name)
        dict.__setitem__(self._unbound, local_name, placeholder)
        module = self.module()
        if isinstance(module, nn.RNNBase):
            _follow(module, self._unbound)  # it would keep what was there
        return had

    def settle(self, kinds: dict[tuple[str, ...], tuple[str, ...]]) -> None:
        """All that is streamed has been taken. ``kinds``: thousands of modules have the same names."""
        taken = [item for item in dict.items(self._unbound) if isinstance(item[1], Placeholder)]
        names = tuple(name for name, found in taken if not isinstance(found, InParts))
        tables = tuple(name for name, found in taken if isinstance(found, InParts))
        self._names, self._tables = kinds.setdefault(names, names), kinds.setdefault(tables, tables)
        self.put()

    def placeholders(self) -> UnboundParameters:
        """All that the module has, as it is when no unit is here."""
        return self._unbound

    def bind(self, local_name: str, parameter: nn.Parameter) -> None:
        """One weight is here."""
        if local_name in self._names:
            if self._real is None:
                self._real = {}
            self._real[local_name] = parameter
            if len(self._real) == len(self._names):
                self.put()

    def unbind(self, local_name: str) -> None:
        """One weight leaves. After an interrupt in the middle of this it may leave twice."""
        if local_name in self._names:
            if self._real is not None and self._real.pop(local_name, None) is not None and not self._real:
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

    def has(self, local_name: str) -> bool:
        """Whether this parameter is streamed, and not the user's own."""
        return local_name in self._names or local_name in self._tables

    def look_up(self, local_name: str, kept: Any) -> Any:
        """The real parameter, loaded if need be; ``kept`` for what is not streamed. Any thread."""
        if local_name not in self._names:
            return kept
        here = self._real
        real = None if here is None else here.get(local_name)
        return self._binder.load(kept.unit, kept.weight_name) if real is None else real

    def adopt(self, local_name: str, value: Any) -> None:
        """The user has stored a parameter: from now on it is the module's own and not streamed.

        Unless it is what was there before: whoever puts another in its place for a while (``functional_call``) puts
        that back.
        """
        with self._binder.lock:
            self._forget(local_name)
            dict.__setitem__(self._unbound, local_name, value)
            before = (self._replaced or {}).get(local_name)
            if before is not None and (value is before or self._binder.is_real(before, value)):
                dict.__setitem__(self._unbound, local_name, before)
                self._take_back(local_name, before)

    def disown(self, local_name: str) -> None:
        """The user has deleted a parameter."""
        with self._binder.lock:
            self._forget(local_name)
            dict.pop(self._unbound, local_name, None)

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the module an ordinary dictionary with these parameters, by the weights' names, for good."""
        module = self.module()
        if module is not None:
            streamed = {*self._names, *self._tables}
            items = {
                local: parameters[kept.weight_name] if local in streamed else kept
                for local, kept in dict.items(self._unbound)
            }
            module.__dict__["_parameters"] = items
            _follow(module, items)
        self._names = self._tables = ()
        self._real = self._replaced = None

    def copied(self, memo: dict[int, Any]) -> dict[str, Any]:
        """The module's parameters in a copy of the model."""
        Skeleton.of(memo)
        return copy.deepcopy(dict(dict.items(self._unbound)), memo)

    def put(self) -> None:
        """Make the module use the dictionary that fits what is here now."""
        module = self.module()
        if module is None or self._binder.is_suspended:
            return
        parameters: _Streamed = self._unbound
        real = self._real or {}
        if len(real) == len(self._names):
            items = {name: real.get(name, kept) for name, kept in dict.items(self._unbound)}
            parameters = BoundParameters(items, self)
        module.__dict__["_parameters"] = parameters
        _follow(module, parameters)

    def _take_back(self, local_name: str, placeholder: Placeholder) -> None:
        """It is streamed again."""
        del self._replaced[local_name]  # type: ignore[union-attr, unused-ignore]
        if isinstance(placeholder, InParts):
            self._tables += (local_name,)
        else:
            self._names += (local_name,)
            real = self._binder.resident(placeholder.unit, placeholder.weight_name)
            if real is not None:
                self._real = (self._real or {}) | {local_name: real}
        self.put()

    def _forget(self, local_name: str) -> None:
        if local_name in self._names or local_name in self._tables:
            self._replaced = (self._replaced or {}) | {local_name: dict.__getitem__(self._unbound, local_name)}
        self._names = tuple(name for name in self._names if name != local_name)
        self._tables = tuple(name for name in self._tables if name != local_name)
        if self._real is not None:
            self._real.pop(local_name, None)


def _follow(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Recurrent modules keep a second list of their weights."""
    if isinstance(module, nn.RNNBase):
        items = dict(dict.items(parameters))  # placeholders stay placeholders: nothing is looked up
        module.__dict__["_flat_weights"] = [items.get(name) for name in module._flat_weights_names]
