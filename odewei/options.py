"""The keywords of ``init_on_demand_weights_model``, checked once.

Knows numbers. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from odewei.errors import OptionsError
from odewei.memory_budget import MemoryBudget
from odewei.scheduler.machine import FOR_WEIGHTS, available_bytes

__all__ = ["Granularity", "Options"]

Granularity = Literal["auto", "block", "leaf"] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every keyword, validated. ``depth`` None stands for "auto". ``shares``: the budget may serve other models too."""

    depth: int | None
    budget: MemoryBudget
    shares: bool
    device: torch.device
    dtype: torch.dtype | None
    granularity: Granularity
    io: Literal["auto", "direct", "buffered"]
    num_readers: int
    on_missing: Literal["error", "init"]
    on_mismatch: Literal["error", "init"] = "error"
    strict: bool = False

    @classmethod
    def check(
        cls,
        *,
        prefetch_depth: int | str,
        memory_budget: int | str | MemoryBudget,
        host_budget: int | str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        granularity: Granularity,
        io: str,
        num_readers: int,
        enable_preloading: bool,
        on_missing: str,
        on_mismatch: str = "error",
        strict: bool = False,
    ) -> Options:
        """Validate. Raises OptionsError for a value that cannot work."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and _is_cast_target(dtype)):
            raise OptionsError(
                f"dtype={dtype!r} is no floating dtype of at least 16 bits", cure="Use torch.bfloat16, say"
            )
        if not callable(granularity):
            _check_choice("granularity", granularity, ("auto", "block", "leaf"))
        _check_choice("io", io, ("auto", "direct", "buffered"))
        _check_choice("on_missing", on_missing, ("error", "init"))
        _check_choice("on_mismatch", on_mismatch, ("error", "init"))
        _check_bool("enable_preloading", enable_preloading)
        _check_bool("strict", strict)
        return cls(
            depth=_depth(prefetch_depth) if enable_preloading else 0,
            budget=_budget(memory_budget, num_readers, host_budget),
            shares=isinstance(memory_budget, MemoryBudget),
            device=_device(device),
            dtype=dtype,
            granularity=granularity,
            io=io,  # type: ignore[arg-type]
            num_readers=num_readers,
            on_missing=on_missing,  # type: ignore[arg-type]
            on_mismatch=on_mismatch,  # type: ignore[arg-type]
            strict=strict,
        )

    def again(self) -> Options:
        """The same for a copy of the model: as much memory, unless it is shared."""
        return self if self.shares else replace(self, budget=self.budget.another())

    def resolve_direct(self, weight_bytes: int, budget_bytes: int) -> bool:
        """Whether to read past the page cache: yes when it cannot hold the weights besides what the budget takes."""
        if self.io == "auto":
            return weight_bytes > available_bytes() * FOR_WEIGHTS - budget_bytes
        return self.io == "direct"


def _check_choice(keyword: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionsError(f"{keyword}={value!r} is not known", cure=f"Use one of {', '.join(map(repr, choices))}")


def _check_bool(keyword: str, value: object) -> None:
    if not isinstance(value, bool):
        raise OptionsError(f"{keyword}={value!r} is neither True nor False")


def _depth(prefetch_depth: int | str) -> int | None:
    if prefetch_depth == "auto":
        return None
    if isinstance(prefetch_depth, bool) or not isinstance(prefetch_depth, int) or prefetch_depth < 0:
        raise OptionsError(f"prefetch_depth={prefetch_depth!r} cannot work", cure="Use 0, a positive int, or 'auto'")
    return prefetch_depth


def _budget(memory_budget: int | str | MemoryBudget, num_readers: int, host_budget: int | str) -> MemoryBudget:
    if not isinstance(memory_budget, MemoryBudget):
        return MemoryBudget(memory_budget, num_readers=num_readers, host_budget=host_budget)
    if host_budget != "auto":
        raise OptionsError(
            f"host_budget={host_budget!r} beside a MemoryBudget, which has one for all of its models",
            cure=f"Pass it there: MemoryBudget(..., host_budget={host_budget!r})",
        )
    return memory_budget


def _device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise OptionsError(f"device={device!r} is not a device: {error}", cure="Use 'cpu' or 'cuda', say") from error
    if found.type == "meta":
        raise OptionsError("device='meta' computes nothing", cure="Use 'cpu' or 'cuda', say")
    return torch.device("cpu") if found.type == "cpu" else found


def _is_cast_target(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2
