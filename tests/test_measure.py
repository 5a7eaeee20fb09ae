"""Short measurements of the disk and of products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


def test_products_are_timed_where_torch_has_them() -> None:
    """A larger matrix takes longer, a dtype that cannot be multiplied by is left out."""
    small, large = ((64, 64), torch.float32), ((4096, 1024), torch.float32)
    found = product_seconds([small, large, ((8, 8), torch.bool)], 32)
    assert 0 < found[small] < found[large]
    assert ((8, 8), torch.bool) not in found
