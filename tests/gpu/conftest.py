"""The fixture ``device``: a real accelerator, or the reason why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        pytest.skip(f"torch {torch.__version__} finds no accelerator here")
    return str(found.type)
