"""The keywords of ``init_on_demand_weights_model``, checked once, and what "auto" means for each.

Knows numbers and the machine's limits. Knows nothing of models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from odewei.errors import OptionsError
from odewei.scheduler.budget import parse_nbytes

__all__ = ["Granularity", "Options", "available_bytes"]

Granularity = Literal["auto", "block", "leaf"] | Callable[[str, nn.Module], bool]

_FOR_THE_REST = 0.8  # "auto" leaves a fifth of the available memory to activations and everybody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every keyword, validated. ``depth`` None stands for "auto", ``budget_bytes`` None likewise."""

    depth: int | None
    budget_bytes: int | None
    device: torch.device
    dtype: torch.dtype | None
    granularity: Granularity
    io: Literal["auto", "direct", "buffered"]
    num_readers: int
    on_missing: Literal["error", "init"]

    @classmethod
    def check(
        cls,
        *,
        prefetch_depth: int | str,
        memory_budget: int | str,
        host_budget: int | str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        granularity: Granularity,
        io: str,
        num_readers: int,
        enable_preloading: bool,
        on_missing: str,
    ) -> Options:
        """Validate. Raises OptionsError for a value that cannot work, NotImplementedError for one that cannot work
        yet.
        """
        _check_host_budget(host_budget)
        if num_readers < 1 or isinstance(num_readers, bool):
            raise OptionsError(f"num_readers={num_readers!r} cannot work", cure="Use at least 1; 4 suits most disks")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and _is_cast_target(dtype)):
            raise OptionsError(
                f"dtype={dtype!r} is no floating dtype of at least 16 bits", cure="Use torch.bfloat16, say"
            )
        if not callable(granularity):
            _check_choice("granularity", granularity, ("auto", "block", "leaf"))
        _check_choice("io", io, ("auto", "direct", "buffered"))
        _check_choice("on_missing", on_missing, ("error", "init"))
        if not isinstance(enable_preloading, bool):
            raise OptionsError(f"enable_preloading={enable_preloading!r} is neither True nor False")
        return cls(
            depth=_depth(prefetch_depth) if enable_preloading else 0,
            budget_bytes=_budget(memory_budget),
            device=_device(device),
            dtype=dtype,
            granularity=granularity,
            io=io,  # type: ignore[arg-type]
            num_readers=num_readers,
            on_missing=on_missing,  # type: ignore[arg-type]
        )

    def resolve_budget(self, weight_bytes: int) -> int:
        """The budget in bytes: as asked, or what the machine can spare now, and never more than all weights need."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        return min(weight_bytes, int(available_bytes() * _FOR_THE_REST))

    def resolve_direct(self, weight_bytes: int, budget_bytes: int) -> bool:
        """Whether to read past the page cache: yes when it cannot hold the weights besides what the budget takes."""
        if self.io == "auto":
            return weight_bytes > available_bytes() * _FOR_THE_REST - budget_bytes
        return self.io == "direct"


def available_bytes() -> int:
    """Memory that this process can still have: the smaller of what the machine and the process's cgroups leave."""
    return max(0, min([_machine_available(), *_cgroup_available()]))


def _machine_available() -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match is not None:
        return int(match[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_available() -> list[int]:
    """What each memory cgroup above this process leaves, v1 and v2. Reclaimable page cache counts as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if root == folder or root in folder.parents:
                found.extend(_left_in(folder, limit, usage))
    return found


def _left_in(folder: Path, limit: str, usage: str) -> list[int]:
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if allowed == "max" or int(allowed) >= 1 << 60:
        return []
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return [int(allowed) - max(0, used - cache)]


def _check_choice(keyword: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionsError(f"{keyword}={value!r} is not known", cure=f"Use one of {', '.join(map(repr, choices))}")


def _check_host_budget(host_budget: int | str) -> None:
    if host_budget != "auto":
        raise NotImplementedError(
            f"host_budget={host_budget!r}: host memory is budgeted apart for accelerators only, and these are not "
            "supported yet; leave host_budget at 'auto'"
        )


def _depth(prefetch_depth: int | str) -> int | None:
    if prefetch_depth == "auto":
        return None
    if isinstance(prefetch_depth, bool) or not isinstance(prefetch_depth, int) or prefetch_depth < 0:
        raise OptionsError(f"prefetch_depth={prefetch_depth!r} cannot work", cure="Use 0, a positive int, or 'auto'")
    return prefetch_depth


def _budget(memory_budget: int | str) -> int | None:
    if memory_budget == "auto":
        return None
    nbytes = parse_nbytes(memory_budget) if isinstance(memory_budget, str) else memory_budget
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes <= 0:
        raise OptionsError(f"memory_budget={memory_budget!r} cannot work", cure='Use bytes, "6GiB" or "auto"')
    return nbytes


def _device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise OptionsError(f"device={device!r} is not a device: {error}", cure="Use 'cpu'") from error
    if found.type != "cpu":
        raise NotImplementedError(
            f"device={str(found)!r}: only the CPU is supported yet; leave device at None or 'cpu'"
        )
    return found


def _is_cast_target(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2
