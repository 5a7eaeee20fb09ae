"""Enter and leave: a module that units hang on takes their leases before its forward and returns them after.

The hooks sit on the module at the root of a unit, not on every module that owns a weight: weights used without that
module's forward load on access anyway (see ``binding``). They are always called, so that an
exception returns the leases; what a ``KeyboardInterrupt`` leaves behind is returned later, because each lease knows
its frame.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from odewei.binding import WeightStream
from odewei.convoy import pass_begins, pass_ends
from odewei.copies import Inert, leave_out, refuse_copy
from odewei.module_binding import UNITS, UnitBinding, UnitBindings
from odewei.scheduler.drivers import Driver
from odewei.scheduler.records import Account
from odewei.sliced import Experts
from odewei.uncompiled import uncompiled

__all__ = ["Hooks", "unhook"]


_PASS = "_odewei_pass"  # of that of the whole model


class _Pair(Protocol):
    def before(self, module: nn.Module, args: Any) -> None: ...

    def after(self, module: nn.Module, args: Any, output: Any) -> None: ...


class _UnitHooks:
    """The unit of a module is entered and left. One for all modules of a model: each has its unit in its dictionary.

    A module that has none does nothing: somebody has copied the hooks of another one to it.
    """

    __slots__ = ("_driver", "_stream")
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, driver: Driver, stream: WeightStream) -> None:
        self._driver, self._stream = driver, stream

    @uncompiled
    def before(self, module: nn.Module, args: Any) -> None:
        unit = module.__dict__.get(UNITS)
        if unit is None or not (unit.needed or unit.is_needed()):
            return
        self._driver.enter(unit.id, sys._getframe(1))  # the module's call, which ends with its forward
        unit.enter()
        if torch.is_grad_enabled():
            unit.saves = True
            self._stream.saved.begin(unit)

    @uncompiled
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        unit = module.__dict__.get(UNITS)
        if unit is None or not (unit.needed or unit.is_needed()):
            return
        if unit.saves:
            self._stream.saved.end(unit)
        unit.leave()
        self._driver.leave(unit.id)


class _SeveralHooks:
    """Several units of a module are entered in order and left in reverse. One for all modules of a model."""

    __slots__ = ("_driver", "_stream")
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, driver: Driver, stream: WeightStream) -> None:
        self._driver, self._stream = driver, stream

    @uncompiled
    def before(self, module: nn.Module, args: Any) -> None:
        frame, units = sys._getframe(1), _needed(module)
        for entered, unit in enumerate(units):
            try:
                self._driver.enter(unit.id, frame)
            except BaseException:
                for earlier in units[:entered]:
                    self._driver.leave(earlier.id)
                raise
        for unit in units:
            unit.begin()  # so that a module with weights of all of them finds all of them entered
        for unit in units:
            unit.bind()
        if units and torch.is_grad_enabled():
            self._stream.saved.begin(units[0])

    @uncompiled
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        units = _needed(module)
        if units:
            self._stream.saved.end(units[0])
        for unit in reversed(units):
            unit.leave()
            self._driver.leave(unit.id)


def _needed(module: nn.Module) -> list[UnitBinding]:
    return [unit for unit in module.__dict__.get(UNITS) or () if unit.is_needed()]


class _PassHooks:
    """Tell the scheduler when a thread is inside the model."""

    __slots__ = ("_account", "_driver", "_stream")
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, driver: Driver, stream: WeightStream, account: Account) -> None:
        self._driver, self._stream, self._account = driver, stream, account

    @uncompiled
    def before(self, module: nn.Module, args: Any) -> None:
        if _PASS not in module.__dict__:
            return
        pass_begins(self._account.counters.bytes_read)
        if self._driver.enter_pass(self._account, sys._getframe(1)):
            self._stream.saved.clear()
        if torch.is_grad_enabled():
            self._stream.saved.begin(self)

    @uncompiled
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if _PASS not in module.__dict__:
            return
        self._stream.saved.end(self)
        self._driver.leave_pass(self._account)
        pass_ends()


class _ExpertHooks:
    """While a thread is inside, it holds the expert that it took last."""

    __slots__ = ("_experts",)
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, experts: Experts) -> None:
        self._experts: Experts | None = experts

    @uncompiled
    def before(self, module: nn.Module, args: Any) -> None:
        if self._experts is not None:
            self._experts.enter(sys._getframe(1))

    @uncompiled
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._experts is not None:
            self._experts.leave()


class _Everybodys(OrderedDict[int, bool]):
    """Which hooks of a module are always called: one dictionary for all modules without hooks of others."""


class _Own(OrderedDict[int, bool]):
    """That of one module, which had everybody's ``before``: the handles of hooks that somebody has put on the module
    since refer to that one weakly, and cannot be copied any more when it is gone.
    """

    before: OrderedDict[int, bool]


class Hooks:
    """Puts the hooks of one model on its modules, of which there may be 100,000.

    This does what ``register_forward_pre_hook(prepend=True)`` and ``register_forward_hook(always_call=True)`` do, but
    with one key for all modules, without handles, and with one dictionary for all modules that says which hooks are
    always called: torch only asks whether a key is in it, and no two hooks have the same.
    """

    def __init__(self, driver: Driver, stream: WeightStream) -> None:
        self._driver, self._stream = driver, stream
        self._keys: dict[type[_Pair], int] = {kind: _new_key() for kind in _ALL}
        self._always = _Everybodys.fromkeys(self._keys.values(), True)
        one, several = _UnitHooks(driver, stream), _SeveralHooks(driver, stream)
        self._one, self._several = (one.before, one.after), (several.before, several.after)

    def unit(self, module: nn.Module, units: Sequence[UnitBinding]) -> None:
        """Have ``module`` lease ``units`` while its forward runs."""
        if module._forward_pre_hooks:
            _take_out(module, Inert)  # a part that was copied from a streamed model has kept them
        if len(units) == 1:
            module.__dict__[UNITS] = units[0]
            self._put(module, self._keys[_UnitHooks], *self._one)
        else:
            module.__dict__[UNITS] = UnitBindings(units)
            self._put(module, self._keys[_SeveralHooks], *self._several)

    def experts(self, module: nn.Module, experts: Experts) -> None:
        """Have ``module`` lease one of its experts at a time while its forward runs."""
        pair = _ExpertHooks(experts)
        self._put(module, self._keys[_ExpertHooks], pair.before, pair.after)

    def whole_pass(self, model: nn.Module, account: Account) -> None:
        """Have the scheduler know when a thread is inside the model. To be called after all ``unit``."""
        pair = _PassHooks(self._driver, self._stream, account)
        model.__dict__[_PASS] = True
        self._put(model, self._keys[_PassHooks], pair.before, pair.after)

    def _put(self, module: nn.Module, key: int, before: Callable[..., None], after: Callable[..., None]) -> None:
        first, own = module._forward_pre_hooks, module._forward_hooks_always_called
        assert isinstance(first, OrderedDict), "torch keeps hooks in order"
        first[key] = before
        if len(first) > 1:
            first.move_to_end(key, last=False)
        if not own and not module._forward_hooks and len(first) == 1:
            module.__dict__["_forward_hooks_always_called"] = self._always
        elif own is not self._always:
            own[key] = True
        module._forward_hooks[key] = after


def _new_key() -> int:
    """One that no hook has, nor will have."""
    key = RemovableHandle.next_id
    RemovableHandle.next_id += 1
    return key


def unhook(module: nn.Module) -> None:
    """Take the hooks out. They are found by what they are."""
    module.__dict__.pop(UNITS, None)
    module.__dict__.pop(_PASS, None)
    _take_out(module, _ALL)


def _take_out(module: nn.Module, kinds: type | tuple[type, ...]) -> None:
    """Take the hooks of these kinds out."""
    always = module._forward_hooks_always_called
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), kinds):
                del hooks[key]
                if type(always) is not _Everybodys:
                    always.pop(key, None)
    if type(always) is _Everybodys:
        own = _Own((key, True) for key in module._forward_hooks if key in always)
        if module._forward_hooks or module._forward_pre_hooks:
            own.before = always
        module.__dict__["_forward_hooks_always_called"] = own


_ALL = (_UnitHooks, _SeveralHooks, _ExpertHooks, _PassHooks, Inert)
