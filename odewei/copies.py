"""What stands for the weights of a streamed model while ``copy.deepcopy`` copies it: parameters without values.

Knows parameters and the memo of a copy. ``deep_copy`` makes a skeleton; the dictionaries and placeholders of the model,
which the copy comes across, ask for it. What else odewei hangs on modules stays out of copies (``leave_out``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from odewei.errors import ModelError
from odewei.survey import Weight

__all__ = ["Skeleton", "leave_out", "refuse_copy"]

_KEY = "odewei: the streamed model that is being copied"  # other keys of a memo are numbers

Memo = dict[Any, Any]
T = TypeVar("T")


def refuse_copy(*_: Any) -> NoReturn:
    """For ``__reduce_ex__`` of what hangs on every streamed model."""
    raise ModelError(
        "a streamed model cannot be pickled, and no part of it can be copied by itself",
        cure="Copy the whole model (copy.deepcopy), build it a second time, or call odewei.materialize(model) first",
    )


def leave_out(self: T, memo: Memo) -> T:
    """For ``__deepcopy__`` of what is taken out of a copy at its end."""
    Skeleton.of(memo)
    return self


class Skeleton:
    """The parameters of one copy: one for each weight, whatever refers to it.

    ``origin`` is what its placeholders come from. ``weight_of`` a unit and name, and ``changed``, its real parameter if
    it was written to: its values are copied.
    """

    def __init__(
        self,
        origin: object,
        weight_of: Callable[[int, str], Weight],
        changed: Callable[[int, str], nn.Parameter | None],
    ) -> None:
        self._origin = origin
        self._weight_of = weight_of
        self._changed = changed
        self._made: dict[tuple[int, str], nn.Parameter] = {}

    def parameter(self, unit: int, name: str) -> nn.Parameter:
        """What stands for a weight."""
        if (unit, name) not in self._made:
            self._made[unit, name] = self._make(unit, name)
        return self._made[unit, name]

    def _make(self, unit: int, name: str) -> nn.Parameter:
        weight, changed = self._weight_of(unit, name), self._changed(unit, name)
        if changed is not None:
            return nn.Parameter(changed.detach().clone(), requires_grad=False)
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        return nn.Parameter(empty, requires_grad=weight.requires_grad)

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
    def found_in(memo: Memo, origin: object) -> Skeleton | None:
        """That of the copy under way, if it is of the model with this origin."""
        found = memo.get(_KEY)
        return found if isinstance(found, Skeleton) and found._origin is origin else None

    @staticmethod
    def of(memo: Memo) -> Skeleton:
        """That of the copy under way. Raises ModelError if only a part of a streamed model is copied."""
        found = memo.get(_KEY)
        if not isinstance(found, Skeleton):
            refuse_copy()
        return found
