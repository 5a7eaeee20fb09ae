"""Resident models and their streamed twins under small budgets, for the tests of what breaks libraries of this kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import odewei
from tests import models as zoo

WIDTH = 16
DEPTHS = [0, "auto"]


def rows(seed: int, count: int = 3) -> torch.Tensor:
    """Some inputs of WIDTH columns."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def linears(count: int = 8) -> nn.ModuleList:
    """So many square layers."""
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))


class Block(nn.Module):
    """A residual block; torch needs its weights for the gradient of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Blocks(nn.Module):
    """Blocks, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@contextmanager
def twins(
    build: zoo.ModelFn, folder: Path, depth: int | str = "auto", *, fraction: float = 0.4, **options: object
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A resident model and the same one streamed from a file under a part of its bytes."""
    model = zoo.resident(build)
    path = zoo.save(model, folder / "model.safetensors")
    budget = max(int(fraction * zoo.weight_bytes(model)), zoo.smallest_budget(build, path, **options))
    assert budget < zoo.weight_bytes(model), "nothing would stream"
    with zoo.streamed(build, str(path), memory_budget=budget, prefetch_depth=depth, **options) as streamed:
        yield model, streamed


def assert_same(model: nn.Module, streamed: nn.Module, *calls: Sequence[torch.Tensor]) -> None:
    """Each call, in this order, gives the same bits by both."""
    with torch.no_grad():
        for args in calls:
            expected, found = list(zoo._tensors(model(*args))), list(zoo._tensors(streamed(*args)))
            assert expected
            assert zoo.same_bits(found, expected)


def assert_streams(streamed: nn.Module) -> None:
    """It did read weights again, and never took more than its budget."""
    report = odewei.report(streamed)
    assert report.bytes_read > report.weight_bytes > report.budget_bytes >= report.peak_bytes, report
    assert report.overdrafts == 0, report
