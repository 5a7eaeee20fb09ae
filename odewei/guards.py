"""Refuses, with the cure, what would silently load a whole streamed model: converting, moving and copying it.

``module.to()``, ``.half()``, ``.cuda()`` and their like all go through ``nn.Module._apply``; one that would change
nothing is let pass. Knows modules and dtypes only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import torch
from torch import nn

from odewei.errors import ModelError

__all__ = ["guard", "refuse_copy", "unguard"]


def guard(module: nn.Module, dtypes: Collection[torch.dtype]) -> None:
    """Have ``module._apply`` accept only functions that leave tensors of these dtypes as they are."""
    samples = [torch.empty(1, dtype=dtype) for dtype in dtypes]
    kind = type(module).__name__
    alive = weakref.ref(module)  # a guarded module must not wait for the collector when it is dropped

    def apply_if_nothing_changes(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for sample in samples:
            with torch.no_grad():
                made = fn(sample)
            if made.dtype != sample.dtype or made.device != sample.device:
                raise ModelError(
                    f"a streamed model cannot be converted from {sample.dtype} on {sample.device} to {made.dtype} on "
                    f"{made.device} afterwards: all its weights would have to be loaded",
                    module=kind,
                    cure="Pass dtype= to init_on_demand_weights_model, or call odewei.materialize(model) first",
                )
        guarded = alive()
        assert guarded is not None, "the guard hangs on the module"
        return guarded

    module.__dict__["_apply"] = apply_if_nothing_changes


def unguard(module: nn.Module) -> None:
    """Take the guard out."""
    module.__dict__.pop("_apply", None)


def refuse_copy(*_: Any) -> NoReturn:
    """For ``__deepcopy__`` and ``__reduce_ex__`` of what hangs on every streamed model."""
    raise ModelError(
        "a streamed model can be neither copied nor pickled yet",
        cure="Build it a second time from the same checkpoint, or call odewei.materialize(model) first",
    )
