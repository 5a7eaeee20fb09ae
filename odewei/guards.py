"""Refuses, with the cure, what would silently load a whole streamed model: converting and moving it.

``module.to()``, ``.half()``, ``.cuda()`` and their like all go through ``nn.Module._apply``; one that would change
nothing is let pass. Knows modules and dtypes only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import nn

from odewei.copies import leave_out, refuse_copy
from odewei.errors import ModelError

__all__ = ["guard", "unguard"]


def guard(modules: Iterable[nn.Module], dtypes: Collection[torch.dtype], device: torch.device) -> None:
    """Have ``_apply`` of these modules accept only functions that leave tensors of these dtypes, which are on
    ``device``, as they are.
    """
    samples = [torch.empty(1, dtype=dtype, device=device) for dtype in dtypes]
    for module in modules:
        module.__dict__["_apply"] = _Apply(module, samples)


class _Apply:
    """What stands in for a module's ``_apply``."""

    __slots__ = ("_module", "_samples")
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, module: nn.Module, samples: Sequence[torch.Tensor]) -> None:
        self._module = weakref.ref(module)  # a guarded module must not wait for the collector when it is dropped
        self._samples = samples

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        module = self._module()
        assert module is not None, "the guard hangs on the module"
        for sample in self._samples:
            with torch.no_grad():
                made = fn(sample)
            if made.dtype != sample.dtype or made.device != sample.device:
                raise ModelError(
                    f"a streamed model cannot be converted from {sample.dtype} on {sample.device} to {made.dtype} on "
                    f"{made.device} afterwards: all its weights would have to be loaded",
                    module=type(module).__name__,
                    cure="Pass dtype= or device= to init_on_demand_weights_model, or odewei.materialize(model) first",
                )
        return module


def unguard(module: nn.Module) -> None:
    """Take the guard out."""
    module.__dict__.pop("_apply", None)
