"""``copy.deepcopy`` of a streamed model: a second one, independent, that streams from the same checkpoint.

Everything but the weights is copied as usual: buffers, attributes, hooks of the user, parameters that the user has put
into the model or changed in place. Weights become parameters without values, and the copy streams like a new model.
What a parameter is follows from the object, not from its name, so that a model whose layers were moved, wrapped or
taken out is copied as it is now. Nothing of a streamed model can be pickled.
"""

from __future__ import annotations

import copy
import copyreg
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from odewei.copies import Skeleton, leave_out, refuse_copy
from odewei.errors import ModelError

__all__ = ["DeepCopy"]


class DeepCopy:
    """What ``copy.deepcopy`` finds as the method of one model. It does not keep the model alive.

    ``skeleton`` makes what stands for the weights; ``stream`` is given the copy, with everything on it that odewei had
    put on the model, to make it stream.
    """

    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(
        self, model: nn.Module, skeleton: Callable[[], Skeleton], stream: Callable[[nn.Module, Skeleton], object]
    ) -> None:
        self._model = weakref.ref(model)
        self._skeleton = skeleton
        self._stream = stream
        model.__dict__["__deepcopy__"] = self

    def __call__(self, memo: dict[Any, Any]) -> nn.Module:
        model = self._model()
        assert model is not None, "it hangs on the model"
        copied = _being_copied(sys._getframe(1))
        if copied is not None and copied is not model:
            return _reduced(copied, memo)  # a wrapper that looks up in the model what it lacks; the model's turn comes
        skeleton = self._skeleton()
        with skeleton.used_by(memo):
            made = _copied(model, memo)
        self._stream(made, skeleton)
        return made

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Have the model, or a copy of it, copied like any other module."""
        model.__dict__.pop("__deepcopy__", None)


def _being_copied(frame: FrameType) -> nn.Module | None:
    """What ``copy.deepcopy`` was called with, if this is its frame."""
    found = frame.f_locals.get("x") if frame.f_code is copy.deepcopy.__code__ else None
    return found if isinstance(found, nn.Module) else None


def _copied(model: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    """As ``copy.deepcopy`` does for a class that has no way of its own."""
    reduced: Any = model.__reduce_ex__(4)
    maker, arguments = reduced[:2]
    if maker is not copyreg.__newobj__ or len(arguments) != 1:  # type: ignore[attr-defined]
        raise ModelError(
            "the class says itself how it is copied, which would copy all weights",
            module=type(model).__name__,
            cure="Build it a second time from the same checkpoint",
        )
    return _reduced(model, memo)


def _reduced(module: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    """As ``copy.deepcopy`` does with what ``__reduce_ex__`` says of a module."""
    reduced: Any = module.__reduce_ex__(4)
    maker, arguments, state = (*reduced, None)[:3]
    made: nn.Module = maker(*(copy.deepcopy(one, memo) for one in arguments))
    memo[id(module)] = made
    if state is not None:
        made.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
    return made
