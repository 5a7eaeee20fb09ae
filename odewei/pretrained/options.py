"""The keywords that ``from_pretrained`` hands on, and packages that may be missing.

Knows names; what may be said for them is ``odewei.options``'s to judge.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypedDict

import torch

from odewei.errors import MissingPackageError, OptionsError
from odewei.loaders.sums import Verify, as_verify
from odewei.memory_budget import MemoryBudget
from odewei.options import Granularity, Options

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
    verify: Verify


def check_options(options: Mapping[str, object]) -> None:
    """Raise what ``init_on_demand_weights_model`` would raise for these keywords, before anything is downloaded or
    read; OptionsError for a keyword that there is not.
    """
    known = (*StreamOptions.__annotations__, *_NOT_HANDED_ON)
    for name in options:
        if name not in StreamOptions.__annotations__:
            similar = difflib.get_close_matches(name, known, 1)
            meant = f"Did you mean {similar[0]!r}? The" if similar else "The"
            raise OptionsError(f"there is no option {name!r}", cure=f"{meant} options are {', '.join(known)}")
    from odewei.torch import init_on_demand_weights_model

    defaults = inspect.signature(init_on_demand_weights_model).parameters
    values: dict[str, Any] = {name: defaults[name].default for name in (*StreamOptions.__annotations__, "dtype")}
    as_verify({**values, **options}["verify"])
    Options.check(**{name: value for name, value in {**values, **options}.items() if name != "verify"})


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
