"""Which weights are tables that are only looked up, and how much of the budget their hot rows get.

The first is a guess from the code of the modules that own them. It decides only what is not read ahead; a wrong guess
costs time, because the weight itself (``looked_up``) is right whatever is done with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from odewei.loaders.base import WeightInfo
from odewei.scheduler.rows import TablePlace
from odewei.survey import Modules, Weight

__all__ = ["cache_shares", "find_tables", "table_place"]

_LARGE = 1 << 20  # bytes; smaller tables are read with their block
_WIDEST = torch.complex128.itemsize
_SMALLEST_CACHE = 1 << 20
_PART_OF_BUDGET = 64


def find_tables(model: nn.Module | Modules, weights: Sequence[Weight], infos: Mapping[str, WeightInfo]) -> list[Weight]:
    """The weights that are large, lie row after row in a file, and are looked up by every module that has them."""
    large = [
        weight
        for weight in weights
        if weight.numel * _WIDEST >= _LARGE and weight.name in infos and _lies_in_rows(infos[weight.name])
    ]
    modules = Modules.of(model).named if large else {}
    known: dict[tuple[type[nn.Module], str], bool] = {}  # a model has many layers, and few kinds of them

    def looks_up(kind: type[nn.Module], local_name: str) -> bool:
        found = known.get((kind, local_name))
        if found is None:
            found = known[kind, local_name] = _looks_up(kind, local_name)
        return found

    return [
        weight
        for weight in large
        if all(
            looks_up(type(modules[use.module]), use.local_name) and not _writes(modules[use.module])
            for use in weight.uses
        )
    ]


def table_place(table: Weight, info: WeightInfo, dtype: torch.dtype) -> TablePlace:
    """Where one of these tables lies; it is handed out in ``dtype``."""
    assert info.span is not None
    rows, columns = info.shape
    return TablePlace(table.name, table.module or "", info.span, rows, columns, info.dtype, dtype)


def _lies_in_rows(info: WeightInfo) -> bool:
    return info.span is not None and info.stride is None and len(info.shape) == 2 and info.nbytes >= _LARGE


def _looks_up(kind: type[nn.Module], local_name: str) -> bool:
    """Whether a method of the class names both the weight and a function ``embedding``: nn.Embedding, what is derived
    from it, and a module of the user's that calls ``F.embedding(ids, self.table)``.
    """
    methods = (
        inspect.unwrap(value) for base in kind.__mro__ for value in vars(base).values() if inspect.isfunction(value)
    )
    return any(
        {"embedding", local_name} <= set(method.__code__.co_names) for method in methods if inspect.isfunction(method)
    )


def _writes(module: nn.Module) -> bool:
    """Whether looking up renormalises the rows in place."""
    return getattr(module, "max_norm", None) is not None


def cache_shares(
    tables: Mapping[str, int], budget_bytes: int, smallest_bytes: int, all_bytes: int | None
) -> dict[str, int]:
    """Bytes of the budget for the hot rows of each table, given the tables' sizes.

    A budget for ``all_bytes`` keeps every row that was ever read (None: other models may need it). Otherwise each gets
    a small part of the budget, and all together at most half of what ``smallest_bytes``, the least that the units
    need, leaves.
    """
    if not tables or (all_bytes is not None and budget_bytes >= all_bytes):
        return dict(tables)
    wish = max(_SMALLEST_CACHE, budget_bytes // _PART_OF_BUDGET)
    room = max(0, budget_bytes - smallest_bytes) // 2 // len(tables)
    return {name: min(nbytes, wish, room) for name, nbytes in tables.items()}
