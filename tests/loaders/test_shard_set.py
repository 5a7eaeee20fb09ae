"""Shards without an index are one checkpoint, if all of them are there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from odewei import verify
from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from odewei.loaders import ShardSetLoader, WeightsLoader, open_checkpoint
from odewei.loaders.shard_names import shard_sets

from .conformance import LoaderConformance, assert_same


def save_shards(
    folder: Path, tensors: dict[str, Any], count: int = 3, *, kind: str = "safetensors", first: int = 1
) -> None:
    """Deal the tensors out to so many shards."""
    for number in range(count):
        part = {name: tensor for at, (name, tensor) in enumerate(tensors.items()) if at % count == number}
        path = folder / f"model-{number + first:05}-of-{count:05}.{kind}"
        if kind == "safetensors":
            save_file({name: tensor.contiguous().clone() for name, tensor in part.items()}, path)
        else:
            torch.save(part, path)


TENSORS = {f"w{number}": torch.full((3,), float(number)) for number in range(5)}


class TestShardSetLoader(LoaderConformance):
    """The suite over three files."""

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> WeightsLoader:
        save_shards(folder, tensors)
        loader = open_checkpoint(folder, **options)
        assert isinstance(loader, ShardSetLoader)
        return loader


@pytest.mark.parametrize("kind", ["safetensors", "bin", "ckpt"])
@pytest.mark.parametrize("first", [0, 1])
def test_shards_are_found_by_their_names(kind: str, first: int, tmp_path: Path) -> None:
    """Of any kind, counted from one or from nothing, beside files that are no weights."""
    save_shards(tmp_path, TENSORS, kind=kind, first=first)
    (tmp_path / "config.json").write_text("{}")
    loader = open_checkpoint(tmp_path)
    for name, found in loader("", list(TENSORS)).items():
        assert_same(found, TENSORS[name])
    assert verify(tmp_path).ok
    assert len(verify(tmp_path).files) == 3


def test_other_entries_of_shards_are_errors_for_who_asks(tmp_path: Path) -> None:
    """What is no tensor in one of the files keeps nobody from reading the rest."""
    save_shards(tmp_path, {**TENSORS, "epoch": 3}, kind="bin")
    loader = open_checkpoint(tmp_path)
    assert loader.weights().keys() == TENSORS.keys()
    with pytest.raises(CheckpointError, match=r"this is a int.*'epoch'"):
        loader.weights()["epoch"]


def test_a_missing_shard_is_named_by_its_number(tmp_path: Path) -> None:
    """Which numbers lack is said, and that there is no index either."""
    save_shards(tmp_path, TENSORS)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"of the 3 shards.*missing: 2 \(there is no index.*Download"):
        open_checkpoint(tmp_path)


def test_names_that_repeat_are_refused(tmp_path: Path) -> None:
    """Two shards with a weight of one name are of different checkpoints."""
    save_shards(tmp_path, TENSORS)
    save_file({"w0": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"model-00001-of.*model-00002-of.*'w0'"):
        open_checkpoint(tmp_path).weights()
    assert "two shards" in verify(tmp_path).problems[0]


@pytest.mark.parametrize("extra", ["model-00004-of-00003.safetensors", "model-00001-of-00002.safetensors"])
def test_shards_of_another_set_are_told(extra: str, tmp_path: Path) -> None:
    """More shards than there should be, or of two sets, are refused."""
    save_shards(tmp_path, TENSORS)
    save_file({"x": torch.zeros(1)}, tmp_path / extra)
    with pytest.raises(CheckpointError, match=r"more shards|2 files that could be the checkpoint"):
        open_checkpoint(tmp_path)


def test_variants_are_sets_of_their_own() -> None:
    """Both ways of spelling a variant are told from the plain set; split GGUF is a set too, and refused elsewhere."""
    names = ["a-1-of-2.safetensors", "a-2-of-2.safetensors", "a.fp16-1-of-2.safetensors", "a-1-of-2.fp16.safetensors"]
    sets, others = shard_sets([*names, "model.safetensors", "a-1-of-0.bin"])
    assert [one.pattern for one in sets] == [
        "a-*-of-2.safetensors",
        "a.fp16-*-of-2.safetensors",
        "a-*-of-2.fp16.safetensors",
    ]
    assert [one.missing for one in sets] == [[], [2], [2]]
    assert others == ["model.safetensors", "a-1-of-0.bin"]


def test_split_gguf_is_refused_with_what_puts_it_together(tmp_path: Path) -> None:
    """The tool of llama.cpp is named."""
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"llama-gguf-split --merge"):
        open_checkpoint(tmp_path)
