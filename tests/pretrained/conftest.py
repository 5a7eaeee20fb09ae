"""What tests of whole, tiny models share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are not worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package one that is not installed, for the test."""

    def hide(package: str) -> None:
        imported = importlib.import_module

        def without(name: str, *args: Any) -> ModuleType:
            if name == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return imported(name, *args)

        monkeypatch.setattr(importlib, "import_module", without)

    return hide
