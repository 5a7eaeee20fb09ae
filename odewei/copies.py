"""What stands for the weights of a streamed model while ``copy.deepcopy`` copies it: parameters without values.

Knows parameters and the memo of a copy. ``deep_copy`` makes a skeleton; the parameters of the model, which the copy
comes across, ask for it. Where there is none only a part of the model is copied: that becomes an ordinary one, with its
values. What else odewei hangs on modules stays out of copies (``leave_out``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from odewei.errors import ModelError
from odewei.survey import Weight

if TYPE_CHECKING:
    from odewei.placeholder import Home, Placeholder

__all__ = ["Inert", "Skeleton", "leave_out", "refuse_copy"]

_KEY = "odewei: the streamed model that is being copied"  # other keys of a memo are numbers

Memo = dict[Any, Any]


def refuse_copy(self: object, *_: Any) -> NoReturn:
    """For ``__reduce_ex__`` of what hangs on every streamed model."""
    stream = getattr(self, "_stream", None)
    if isinstance(self, dict):
        stream = next((value.home.stream for value in self.values() if hasattr(value, "home")), None)
    runtime = getattr(stream, "runtime", None)
    raise ModelError(
        "a streamed model cannot be pickled, nor can a part of it",
        module=getattr(runtime, "model_name", None) or type(self).__name__,
        cure="Pickle its state_dict(), an ordinary copy of the part (copy.deepcopy(part)), or call "
        "odewei.materialize(model) first",
    )


class Inert:
    """What a hook's object is in an ordinary copy of a part: it does nothing."""

    _experts = None

    def before(self, module: nn.Module, args: Any) -> None: ...

    def after(self, module: nn.Module, args: Any, output: Any) -> None: ...


def leave_out(self: object, memo: Memo) -> object:
    """For ``__deepcopy__`` of hooks: they are taken out of a copy at its end, or never do anything in it."""
    return self if isinstance(memo.get(_KEY), Skeleton) else Inert()


class Skeleton:
    """The parameters of one copy: one for each weight, whatever refers to it.

    ``stream`` is what the model's parameters come from, ``weight_of`` what it knows of one, and ``changed`` its real
    parameter if it was written to: its values are copied. ``weights`` are, by the numbers (``id``) of the parameters
    that were made without values, what they stand for.
    """

    def __init__(
        self,
        stream: object,
        weight_of: Callable[[Home], Weight],
        changed: Callable[[Home], nn.Parameter | None],
    ) -> None:
        self._stream = stream
        self._weight_of = weight_of
        self._changed = changed
        self._made: dict[tuple[int, str], nn.Parameter] = {}
        self.weights: dict[int, Weight] = {}

    def parameter(self, placeholder: Placeholder) -> nn.Parameter:
        """What stands for a weight."""
        home = placeholder.home
        key = home.unit, home.name
        if key not in self._made:
            self._made[key] = self._make(placeholder)
        return self._made[key]

    def _make(self, placeholder: Placeholder) -> nn.Parameter:
        changed = self._changed(placeholder.home)
        if changed is not None:
            return nn.Parameter(changed.detach().clone(), requires_grad=placeholder.requires_grad)
        weight = self._weight_of(placeholder.home)
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        made = nn.Parameter(empty, requires_grad=placeholder.requires_grad)
        self.weights[id(made)] = weight
        return made

    @contextmanager
    def used_by(self, memo: Memo) -> Iterator[None]:
        """Meanwhile this is what the copy with that memo finds. Copies of several models may lie within each other."""
        outer = memo.get(_KEY)
        memo[_KEY] = self
        try:
            yield
        finally:
            memo[_KEY] = outer

    @staticmethod
    def found_in(memo: Memo, stream: object) -> Skeleton | None:
        """That of the copy under way, if it is of the model with this stream."""
        found = memo.get(_KEY)
        return found if isinstance(found, Skeleton) and found._stream is stream else None
