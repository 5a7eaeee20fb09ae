"""Checkpoints of torch.distributed.checkpoint are read from their own files, and nothing in them is run."""

import io
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import save as save_distributed
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from odewei import verify
from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders import DistributedLoader, WeightsLoader, open_checkpoint
from odewei.torch import init_on_demand_weights_model

from .conformance import LoaderConformance, assert_same


def save(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    """The folder that torch writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        save_distributed(state, storage_writer=FileSystemWriter(folder, **options), no_dist=True)
    return folder


class TestDistributedLoader(LoaderConformance):
    """The suite over a folder that torch has written."""

    keeps_strides = True

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> WeightsLoader:
        loader = open_checkpoint(save(dict(tensors), folder / "dcp"), **options)
        assert isinstance(loader, DistributedLoader)
        return loader


STATE: Mapping[str, Any] = {
    "model": {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
    "epoch": 3,
}


def test_a_nested_state_is_read_by_full_names(tmp_path: Path) -> None:
    """Keys of nested mappings are parts of the names; what is no tensor is an error for who asks."""
    save(dict(STATE), tmp_path)
    for place in (tmp_path, tmp_path / ".metadata", tmp_path / "__0_0.distcp"):
        loader = open_checkpoint(place, prefix="model.")
        assert loader.weights().keys() == {"0.weight", "0.bias"}
        assert_same(loader("", ["0.weight"])["0.weight"], STATE["model"]["0.weight"])
    known = open_checkpoint(tmp_path).weights()
    assert known.keys() == {"model.0.weight", "model.0.bias", "optimizer.state.0.step"}
    with pytest.raises(CheckpointError, match=r"no tensor.*'epoch'"):
        known["epoch"]
    assert verify(tmp_path).ok


def test_a_model_streams_from_it(tmp_path: Path) -> None:
    """A streamed model gives what the resident one gives."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    save({"model": model.state_dict()}, tmp_path)
    streamed = init_on_demand_weights_model(
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)),
        open_checkpoint(tmp_path, prefix="model."),
    )
    with torch.no_grad():
        assert torch.equal(streamed(torch.ones(1, 3)), model(torch.ones(1, 3)))


def in_pieces(folder: Path, whole: torch.Tensor, cuts: list[tuple[slice, ...]], **changes: Any) -> Path:
    """A folder as several processes write it, each a piece of one tensor."""
    chunks, storage, content = [], {}, b""
    for cut in cuts:
        piece = whole[cut].clone()
        offsets = torch.Size(part.start for part in cut)
        stream = io.BytesIO()
        torch.save(piece, stream)
        chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=piece.shape))
        storage[MetadataIndex("w", offsets)] = _info(changes.get("path", "__0_0.distcp"), len(content), stream.tell())
        content += stream.getvalue()
    size = changes.get("size", whole.shape)
    entries = {"w": TensorStorageMetadata(TensorProperties(dtype=whole.dtype), size, chunks)}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
    (folder / "__0_0.distcp").write_bytes(content[: changes.get("nbytes")])
    return folder


def _info(path: str, offset: int, length: int) -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(path, offset, length)


WHOLE = torch.arange(24.0).view(4, 6)
ROWS = [(slice(0, 1), slice(0, 6)), (slice(1, 4), slice(0, 6))]
COLUMNS = [(slice(0, 4), slice(0, 2)), (slice(0, 4), slice(2, 6))]
BOXES = [(slice(0, 2), slice(0, 3)), (slice(0, 2), slice(3, 6)), (slice(2, 4), slice(0, 6))]


@pytest.mark.parametrize("cuts", [ROWS, COLUMNS, BOXES], ids=["rows", "columns", "boxes"])
def test_pieces_are_put_together(cuts: list[tuple[slice, ...]], tmp_path: Path) -> None:
    """A tensor that several processes have saved in pieces is whole, read by itself and streamed."""
    in_pieces(tmp_path, WHOLE, cuts)
    assert_same(open_checkpoint(tmp_path)("", ["w"])["w"], WHOLE)

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.empty(4, 6))

        def forward(self) -> torch.Tensor:
            return self.w + 0

    with torch.no_grad():
        assert torch.equal(init_on_demand_weights_model(Holder, open_checkpoint(tmp_path))(), WHOLE)


@pytest.mark.parametrize("cuts", [ROWS[:1], [*ROWS, ROWS[0]], [ROWS[0], COLUMNS[0]]], ids=["gap", "twice", "overlap"])
def test_pieces_that_do_not_cover_are_refused(cuts: list[tuple[slice, ...]], tmp_path: Path) -> None:
    """Gaps and overlaps are named with the weight."""
    with pytest.raises(CorruptCheckpointError, match=r"(do not cover it|not what the metadata say).*'w'"):
        open_checkpoint(in_pieces(tmp_path, WHOLE, cuts)).weights()


def test_what_the_files_contradict_is_refused(tmp_path: Path) -> None:
    """A file cut short, another shape than the metadata say, and a path that leads out."""
    with pytest.raises(CorruptCheckpointError, match=r"truncated"):
        open_checkpoint(in_pieces(tmp_path, WHOLE, ROWS, nbytes=2000)).weights()
    with pytest.raises(CorruptCheckpointError, match=r"not what the metadata say|do not cover"):
        open_checkpoint(in_pieces(tmp_path, WHOLE, ROWS, size=torch.Size([3, 6]))).weights()
    with pytest.raises(UnsafeCheckpointError, match=r"leads out"):
        open_checkpoint(in_pieces(tmp_path, WHOLE, ROWS, path="../x.distcp")).weights()


def test_missing_files_are_errors_for_who_asks(tmp_path: Path) -> None:
    """A folder without one of its files gives what the others have."""
    in_pieces(tmp_path, WHOLE, ROWS, path="__1_0.distcp")
    with pytest.raises(CheckpointNotFoundError, match=r"__1_0\.distcp"):
        open_checkpoint(tmp_path).locate(["w"])
    assert "__1_0.distcp" in verify(tmp_path).problems[0]


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


def test_code_in_metadata_is_not_run(tmp_path: Path) -> None:
    """The metadata are a pickle; torch's own reader would run it."""
    save(dict(STATE), tmp_path)
    metadata = FileSystemReader(tmp_path).read_metadata()
    metadata.planner_data = _Evil(tmp_path / "ran")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeCheckpointError, match=r"asks for posix\.mkdir"):
        open_checkpoint(tmp_path).weights()
    assert "posix.mkdir" in verify(tmp_path).problems[0]
    assert not (tmp_path / "ran").exists()


def test_metadata_that_are_none_are_refused(tmp_path: Path) -> None:
    """A pickle of something else, and one cut short."""
    save(dict(STATE), tmp_path)
    whole = (tmp_path / ".metadata").read_bytes()
    for content in (b"", whole[:-50], pickle.dumps({"a": 1}), pickle.dumps([1])):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=r"metadata contradict themselves"):
            open_checkpoint(tmp_path).weights()
