"""The parameter that computes: what a module's forward finds under the name of a streamed weight while its unit is
here.

It is made anew each time the unit arrives, over the unit's memory, and torch treats it like any parameter: a subclass
of ``nn.Parameter`` keeps all fast paths. It differs in one thing: ``.data`` counts writes together with the parameter
(torch's own does not), so that a write cannot be lost when the unit leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from odewei.errors import ModelError
from odewei.scheduler.transforms import untransformed

__all__ = ["Real", "constant", "in_graph"]


class Real(nn.Parameter):
    """Made by ``of``."""

    @classmethod
    def of(cls, tensor: torch.Tensor, requires_grad: bool) -> Real:
        """Over the memory of ``tensor``. To be called without gradients and outside of inference mode."""
        made: Real = torch.Tensor._make_subclass(cls, tensor, requires_grad)
        return made

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.detach(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        from odewei.binding import original_of  # it needs this class

        original = original_of(self)
        if original is None:
            raise ModelError(
                "the parameter of this weight cannot be found any more, so that its data cannot be replaced",
                cure="Assign to the parameter outside of the forward pass",
            )
        original.data = value

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            with torch.no_grad():
                memo[id(self)] = nn.Parameter(self.detach().clone(), requires_grad=self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = nn.Parameter(self.detach(), requires_grad=self.requires_grad)
        return copy.copy(made).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _Bridge(torch.autograd.Function):
    """From parameters that have no values to the tensors that have them: gradients are accumulated in the former.

    It saves nothing, so that graphs of several passes may go back through it, one after another.
    """

    @staticmethod
    def forward(ctx: Any, reals: Sequence[torch.Tensor], *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(real.detach() for real in reals)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *grads


_FIRST = (1 << 63) - 1  # nodes of higher numbers go first; that of gradients' accumulation has the highest there is


def in_graph(parameters: Sequence[torch.Tensor], reals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What computes with gradients for ``parameters``, each over the memory of its real tensor."""
    with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad(), torch.inference_mode(False), untransformed():
        made = _Bridge.apply(reals, *parameters)  # type: ignore[no-untyped-call]
    # What reaches it goes on at once, as into an ordinary parameter: contributions of several uses are added in order.
    made[0].grad_fn._set_sequence_nr(_FIRST)
    for one in made:
        one.__class__ = Real
    return list(made)


def constant(real: torch.Tensor) -> torch.Tensor:
    """Without gradients, and without the tracer's notice."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return real.detach()
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
