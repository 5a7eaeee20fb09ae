"""Enter and leave: a module that units hang on takes their leases before its forward and returns them after.

The hooks sit on the module at the root of a unit, not on every module that owns a weight: weights used without that
module's forward load on access anyway (see ``binding``). They are registered with ``always_call=True``, so that an
exception returns the leases; what a ``KeyboardInterrupt`` leaves behind is returned later, because each lease knows
its frame.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from odewei.convoy import pass_begins, pass_ends
from odewei.copies import leave_out, refuse_copy
from odewei.scheduler.drivers import Driver
from odewei.scheduler.records import Account
from odewei.sliced import Experts
from odewei.uncompiled import uncompiled

__all__ = ["hook_experts", "hook_pass", "hook_unit", "unhook"]


class _Pair(Protocol):
    def before(self, module: nn.Module, args: Any) -> None: ...

    def after(self, module: nn.Module, args: Any, output: Any) -> None: ...


class _UnitHooks:
    """``units`` are entered in order and left in reverse."""

    __slots__ = ("_driver", "_units")
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, units: Sequence[int], driver: Driver) -> None:
        self._units = tuple(units)
        self._driver = driver

    @uncompiled
    def before(self, module: nn.Module, args: Any) -> None:
        frame = sys._getframe(1)  # the call of the module, which ends with its forward
        for entered, unit in enumerate(self._units):
            try:
                self._driver.enter(unit, frame)
            except BaseException:
                for earlier in self._units[:entered]:
                    self._driver.leave(earlier)
                raise

    @uncompiled
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        for unit in reversed(self._units):
            self._driver.leave(unit)


class _PassHooks:
    """Tell the scheduler when a thread is inside the model."""

    __slots__ = ("_account", "_driver")
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, driver: Driver, account: Account) -> None:
        self._driver = driver
        self._account = account

    @uncompiled
    def before(self, module: nn.Module, args: Any) -> None:
        pass_begins(self._account.counters.bytes_read)
        self._driver.enter_pass(self._account, sys._getframe(1))

    @uncompiled
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._driver.leave_pass(self._account)
        pass_ends()


class _ExpertHooks:
    """While a thread is inside, it holds the expert that it took last."""

    __slots__ = ("_experts",)
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, experts: Experts) -> None:
        self._experts = experts

    @uncompiled
    def before(self, module: nn.Module, args: Any) -> None:
        self._experts.enter(sys._getframe(1))

    @uncompiled
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._experts.leave()


def hook_unit(module: nn.Module, units: Sequence[int], driver: Driver) -> None:
    """Have ``module`` lease ``units`` while its forward runs."""
    _register(module, _UnitHooks(units, driver))


def hook_experts(module: nn.Module, experts: Experts) -> None:
    """Have ``module`` lease one of its experts at a time while its forward runs."""
    _register(module, _ExpertHooks(experts))


def hook_pass(model: nn.Module, driver: Driver, account: Account) -> None:
    """Have the scheduler know when a thread is inside the model. To be called after all ``hook_unit``."""
    _register(model, _PassHooks(driver, account))


def unhook(module: nn.Module) -> None:
    """Take the hooks out. They are found by what they are: the handles of 100,000 modules would take memory."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _UnitHooks | _ExpertHooks | _PassHooks):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _register(module: nn.Module, pair: _Pair) -> None:
    module.register_forward_pre_hook(pair.before, prepend=True)
    module.register_forward_hook(pair.after, always_call=True)
