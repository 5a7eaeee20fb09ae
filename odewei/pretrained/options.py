"""The keywords that ``from_pretrained`` hands on. Knows their names; what they may be is ``odewei.options``'s to say."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TypedDict

import torch

from odewei.errors import MissingPackageError, OptionsError
from odewei.memory_budget import MemoryBudget
from odewei.options import Granularity

__all__ = ["StreamOptions", "check_options", "required"]

_NOT_HANDED_ON = ("model_class", "config", "dtype", "revision", "local_files_only", "trust_remote_code")


class StreamOptions(TypedDict, total=False):
    """The keywords of ``init_on_demand_weights_model``, without ``dtype``, which is the model's here."""

    prefetch_depth: int | str
    memory_budget: int | str | MemoryBudget
    host_budget: int | str
    device: torch.device | str | None
    granularity: Granularity
    io: str
    num_readers: int
    enable_preloading: bool
    on_missing: str


def check_options(options: Mapping[str, object]) -> None:
    """Raise OptionsError for a keyword that there is not."""
    known = (*StreamOptions.__annotations__, *_NOT_HANDED_ON)
    for name in options:
        if name not in StreamOptions.__annotations__:
            similar = difflib.get_close_matches(name, known, 1)
            meant = f"Did you mean {similar[0]!r}? The" if similar else "The"
            raise OptionsError(f"there is no option {name!r}", cure=f"{meant} options are {', '.join(known)}")


def required(package: str, *, extra: str | None, purpose: str) -> ModuleType:
    """The package, imported. Raises MissingPackageError, which names ``extra`` if one of odewei's extras has it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        install = f'"odewei[{extra}]"' if extra else package
        raise MissingPackageError(
            f"{purpose} needs the package {package!r}, which is not installed", cure=f"pip install {install}"
        ) from error
