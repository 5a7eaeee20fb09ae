"""Refuses, with the cure, what would load a whole streamed model for good: converting and moving it.

``module.to()``, ``.half()``, ``.cuda()`` and their like all go through ``nn.Module._apply``. Of a streamed model's
weights only what leaves them as they are is let pass, and is then done with everything else that the model has:
buffers, adapters, parameters that are the user's own. Parts of the model are converted as ordinary modules are: their
weights are loaded and are the user's own from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from odewei.copies import leave_out, refuse_copy
from odewei.errors import ModelError
from odewei.module_binding import idle_of
from odewei.placeholder import Placeholder

__all__ = ["guard", "unguard"]


def guard(model: nn.Module) -> None:
    """Have ``_apply`` of a model accept only functions that leave its streamed weights as they are."""
    model.__dict__["_apply"] = _Apply(model)


class _Apply:
    """What stands in for a model's ``_apply``."""

    __slots__ = ("_model",)
    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # a guarded module must not wait for the collector when it is dropped

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        model = self._model()
        assert model is not None, "the guard hangs on the model"
        for name, sample in _samples(model):
            version = sample._version
            with torch.no_grad():
                made = fn(sample)
            if made is not sample or sample._version != version:
                raise ModelError(
                    f"the weights of a streamed model cannot be converted afterwards (from {_described(sample)} to "
                    f"{_described(made)}): all of them would have to be loaded",
                    module=type(model).__name__,
                    weight=name,
                    cure="Pass dtype= or device= when the model is built, or odewei.materialize(model) first",
                )

        def others(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if isinstance(tensor, Placeholder) else fn(tensor)

        type(model)._apply(model, others, recurse)  # type: ignore[no-untyped-call]
        return model


def _samples(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A small tensor like each kind of streamed weights, with the name of one."""
    known: set[tuple[Any, ...]] = set()
    for prefix, module in model.named_modules():
        for name, value in idle_of(module.__dict__["_parameters"]).items():
            if type(value) is Placeholder:
                kind = value.dim(), value.dtype, value.device
                if kind not in known:
                    known.add(kind)
                    full_name = f"{prefix}.{name}" if prefix else name
                    yield full_name, torch.empty((2,) * kind[0], dtype=kind[1], device=kind[2])


def _described(tensor: object) -> str:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    order = "" if tensor.is_contiguous() else " in another order"
    return f"{tensor.dtype} on {tensor.device}{order}"


def unguard(module: nn.Module) -> None:
    """Take the guard out."""
    module.__dict__.pop("_apply", None)
