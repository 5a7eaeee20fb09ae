"""The weight of a table that is only looked up: ``F.embedding`` on it reads the rows that the ids ask for.

It is what a module's attribute *and* iterating its parameters hand out for such a table. What is done with it decides,
not which module does it: a look-up takes rows; questions about shape, dtype, device and the like are answered at once;
anything else loads the whole table and goes on with the real tensor (see ``in_parts``).

Look-ups whose ids are not plain numbers in memory (under ``vmap``, tracers and dispatch modes, which want to see every
operation) take the whole table too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from odewei.in_parts import InParts, is_watched
from odewei.placeholder import Origin
from odewei.scheduler.row_slots import Ids
from odewei.scheduler.rows import RowTable

__all__ = ["LookedUp"]


class LookedUp(InParts):
    """Made with :meth:`of`."""

    _table: RowTable

    @classmethod
    def of(
        cls, unit: int, table: RowTable, origin: weakref.ref[Origin], resident: Callable[[], nn.Parameter | None]
    ) -> LookedUp:
        """``unit`` and ``origin`` as for Placeholder. ``resident`` returns the real tensor if it is loaded now: the
        user may have written into it.
        """
        place = table.place
        made = cls.make(unit, place.weight, (place.rows, place.columns), place.dtype, None, origin)
        made._table, made._resident = table, resident
        return made

    @classmethod
    def _from_a_part(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        arguments = _LOOK_UPS.get(func)
        return arguments and _look_up(func, *arguments(*args, **kwargs))


def _of_functional(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Any, Any, int | None, bool]:
    """The signature of ``torch.nn.functional.embedding``. Ids, table, padding, and whether the call writes."""
    return input, weight, padding_idx, max_norm is not None


def _of_torch(
    weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> tuple[Any, Any, int | None, bool]:
    """That of ``torch.embedding``, which does not look at ``padding_idx`` when it goes forward."""
    return indices, weight, None, False


_LOOK_UPS: dict[Callable[..., Any], Callable[..., tuple[Any, Any, int | None, bool]]] = {
    nn.functional.embedding: _of_functional,
    torch.embedding: _of_torch,
}


def _look_up(func: Callable[..., Any], ids: Any, weight: Any, padding_idx: int | None, writes: bool) -> Any:
    """The rows, or None: this call needs the whole table. Weights are frozen, so what only backward uses is not."""
    if not isinstance(weight, LookedUp) or type(ids) not in (torch.Tensor, nn.Parameter) or writes or is_watched():
        return None
    real = weight._resident()
    if real is not None:
        return _call(func, ids, real, padding_idx)
    place = weight._table.place
    rows = _as_rows(ids, place.rows)
    if rows is None or not (padding_idx is None or -place.rows <= padding_idx < place.rows):
        like = torch.empty((1, 1), dtype=place.dtype, device="cpu").expand(place.rows, place.columns)
        _call(func, ids, like, padding_idx)  # raises what it would raise for the table
        return None
    return weight._table.look_up(rows).view(*ids.shape, place.columns)


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
