"""What odewei offers to transformers: ``experts_implementation="odewei"``.

It is the model's own "eager" code, which takes one expert after the other, run after all routed experts of the layer
were asked for together: the first one computes while the others are being read. So its bits are those of "eager" by
construction, whatever the model computes. For a model that odewei does not stream it is "eager".

Imports transformers only where somebody else has, or asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from odewei.placeholder import Placeholder
from odewei.sliced import Experts, SlicedWeight

__all__ = ["NAME", "register_experts"]

NAME = "odewei"
"""What the implementation is called in configurations."""

_REGISTRY = "transformers.integrations.moe"


def register_experts() -> None:
    """Have transformers know the implementation. May be called again.

    Building a streamed model does the same if its model function uses transformers; a model that is built before that
    needs this call. Raises ImportError when there is no transformers 5.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward_experts)


def known_to_transformers(model_fn: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """``model_fn``, with the implementation registered before, or in time if the function itself loads transformers."""

    def build() -> nn.Module:
        if _register_if_loaded():
            return model_fn()
        try:
            return model_fn()
        except Exception:
            if not _register_if_loaded():
                raise
        return model_fn()  # the name may have been unknown; any other error comes again

    return build


def forward_experts(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of an experts module of transformers: its own code, with the routed experts on their way."""
    with ExitStack() as expected:
        for experts in _streamed(self):
            expected.enter_context(experts.expected(_routed((*args, *kwargs.values()), len(experts.units))))
        return _own_forward(type(self))(self, *args, **kwargs)


def _register_if_loaded() -> bool:
    """Whether transformers' registry is loaded, and so has the implementation now."""
    registry = getattr(sys.modules.get(_REGISTRY), "ALL_EXPERTS_FUNCTIONS", None)
    if registry is not None:
        registry.register(NAME, forward_experts)
    return registry is not None


def _streamed(module: nn.Module) -> list[Experts]:
    """What of the module's experts is read one by one; nothing if the model is not streamed, or reads them whole."""
    values: Iterable[object] = module._parameters.values()
    parts = (value.home.part for value in values if type(value) is Placeholder)
    return list(dict.fromkeys(part.experts for part in parts if isinstance(part, SlicedWeight)))


def _routed(arguments: Sequence[object], count: int) -> list[int]:
    """The experts that are used, in the order in which "eager" takes them. Numbers of none stand for "no expert"."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dtype in (torch.int64, torch.int32):
            return [place for place in sorted(set(argument.reshape(-1).tolist())) if 0 <= place < count]
    return []


def _own_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward that transformers' decorator has put its choice in the place of."""
    forwards: Iterable[Any] = (vars(base).get("forward") for base in kind.__mro__)
    own: Callable[..., Any] = next(one.__wrapped__ for one in forwards if hasattr(one, "__wrapped__"))
    return own
