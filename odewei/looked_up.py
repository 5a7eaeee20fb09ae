"""A table that is only looked up: ``F.embedding`` on it reads the rows that the ids ask for.

What is done with the weight decides, not which module does it: a look-up takes rows; anything else loads the whole
table and goes on with the real tensor (see ``substitution``).

Look-ups whose ids are not plain numbers in memory (under ``vmap``, tracers and dispatch modes, which want to see every
operation) take the whole table too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from odewei.placeholder import Placeholder
from odewei.scheduler.row_slots import Ids
from odewei.scheduler.rows import RowTable
from odewei.substitution import is_watched

__all__ = ["LookUps"]


class LookUps:
    """What answers look-ups in one table."""

    def __init__(self, table: RowTable) -> None:
        self.table = table

    def answer(
        self, weight: Placeholder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What a function gives, if it looks rows up; None: it takes the whole table."""
        arguments = _LOOK_UPS.get(func)
        return arguments and _look_up(func, self.table, weight, arguments(*args, **kwargs))


class _Arguments(NamedTuple):
    """Of a look-up. ``writes``: the call writes into the table."""

    ids: Any
    weight: Any
    padding_idx: int | None
    writes: bool
    scale_grad_by_freq: bool
    sparse: bool


def _of_functional(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Arguments:
    """The signature of ``torch.nn.functional.embedding``."""
    return _Arguments(input, weight, padding_idx, max_norm is not None, scale_grad_by_freq, sparse)


def _of_torch(
    weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> _Arguments:
    """That of ``torch.embedding``, which does not look at ``padding_idx`` when it goes forward."""
    return _Arguments(indices, weight, None if padding_idx < 0 else padding_idx, False, scale_grad_by_freq, sparse)


_LOOK_UPS: dict[Callable[..., Any], Callable[..., _Arguments]] = {
    nn.functional.embedding: _of_functional,
    torch.embedding: _of_torch,
}


def _look_up(func: Callable[..., Any], table: RowTable, weight: Placeholder, call: _Arguments) -> Any:
    """The rows, or None: this call needs the whole table."""
    ids, padding_idx = call.ids, call.padding_idx
    if call.weight is not weight or type(ids) not in (torch.Tensor, nn.Parameter) or call.writes or is_watched():
        return None
    if weight.home.stream.resident(weight.home) is not None:
        return None
    place = table.place
    rows = _as_rows(ids, place.rows)
    valid = func is torch.embedding or padding_idx is None or -place.rows <= padding_idx < place.rows
    if rows is None or not valid:
        like = torch.empty((1, 1), dtype=place.dtype, device="cpu").expand(place.rows, place.columns)
        _call(func, ids, like, padding_idx)  # raises what it would raise for the table
        return None
    found = table.look_up(rows).view(*ids.shape, place.columns)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return found
    if padding_idx is not None and padding_idx < 0:
        padding_idx += place.rows
    with torch._C.DisableTorchFunctionSubclass():
        return _Rows.apply(found, weight, ids, padding_idx, call.scale_grad_by_freq, call.sparse)  # type: ignore[no-untyped-call]


class _Rows(torch.autograd.Function):
    """Rows that were read, with gradients for the table: those of ``F.embedding``."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
        sparse: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.arguments = weight.shape[0], -1 if padding_idx is None else padding_idx, scale_grad_by_freq, sparse
        return rows.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_backward(grad, ids, *ctx.arguments), None, None, None, None


def _call(func: Callable[..., Any], ids: torch.Tensor, table: torch.Tensor, padding_idx: int | None) -> Any:
    if func is torch.embedding:
        return func(table, ids)
    return func(ids, table, padding_idx)


def _as_rows(ids: torch.Tensor, rows: int) -> Ids | None:
    """The ids as one stretch of row numbers; None if torch would not accept them, or they are not there to be seen."""
    if ids.dtype not in (torch.int64, torch.int32):
        return None
    try:
        found = ids.numpy().reshape(-1).astype(np.int64, copy=False)
    except (RuntimeError, TypeError):  # no values in host memory: batched, fake, meta, another device or layout
        return None
    return found if not len(found) or (found.min() >= 0 and found.max() < rows) else None
