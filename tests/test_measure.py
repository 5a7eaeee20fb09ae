"""Short measurements of the disk and of products."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from odewei import measure
from odewei.errors import WeightReadError
from odewei.loaders.base import CheckpointFile
from odewei.measure import product_seconds, sample_disk


@pytest.mark.parametrize("direct", [True, False])
def test_all_of_small_files_is_read(tmp_path: Path, direct: bool) -> None:
    """Files below the limit are read whole, twice, and progress is told each byte; odd ends are no matter."""
    files = []
    for index, nbytes in enumerate((1, 4096, 70_001)):
        (tmp_path / f"{index}").write_bytes(bytes(nbytes))
        files.append(CheckpointFile.stat(tmp_path / f"{index}"))
    told: list[int] = []
    sample = sample_disk(files, direct=direct, progress=told.append)
    assert sample is not None
    assert sample.nbytes == 1 + 4096 + 70_001
    assert sum(told) == 2 * sample.nbytes
    assert sample.bandwidth > 0
    assert direct or not sample.direct


def test_of_large_files_a_part_is_read(tmp_path: Path) -> None:
    """Chunks are spread over the file, about as many bytes as asked for."""
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 30)
    sample = sample_disk([CheckpointFile.stat(tmp_path / "sparse")], most_bytes=64 << 20)
    assert sample is not None
    assert sample.nbytes == 64 << 20


def test_nothing_to_read_and_a_file_that_is_gone(tmp_path: Path) -> None:
    """No files, or empty ones, give no sample; a file that was cut short is an error that names it."""
    assert sample_disk([]) is None
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    file = CheckpointFile.stat(path)
    path.write_bytes(bytes(100))
    with pytest.raises(WeightReadError, match=r"changed|too early") as raised:
        sample_disk([file])
    assert raised.value.file == str(path)


def test_products_are_timed_where_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are those of the fastest try and of all rows, though fewer are tried; a dtype that cannot be multiplied
    by is left out.
    """
    now = 0.0
    slowness = iter([9.0, 2.0, 1.0, 3.0] * 2)

    def linear(inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        nonlocal now
        product = functional.linear(inputs, matrix)
        now += matrix.numel() * next(slowness)
        return product

    monkeypatch.setattr(measure, "functional", SimpleNamespace(linear=linear))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    small, large = ((64, 64), torch.float32), ((1 << 15, 1024), torch.float32)
    found = product_seconds([small, large, ((8, 8), torch.bool)], 2)
    assert found == {small: 64 * 64, large: 1024 << 15}
