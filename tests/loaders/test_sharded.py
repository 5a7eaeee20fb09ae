"""Checkpoints in several files."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from odewei.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingWeightError,
    UnsafeCheckpointError,
    WeightReadError,
)
from odewei.loaders import ShardedWeightsLoader

from .conformance import LoaderConformance, assert_same, read_bytes


def write_index(folder: Path, weight_map: dict[str, str], key: str = "weight_map") -> Path:
    path = folder / "index.json"
    path.write_text(json.dumps({"metadata": {}, key: weight_map}))
    return path


def save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)


def save_shards(tensors: dict[str, torch.Tensor], folder: Path, suffixes: list[str]) -> Path:
    """Deal the tensors out to as many shards as there are suffixes; the path of the index."""
    shards: dict[str, dict[str, torch.Tensor]] = {f"part-{i}{suffix}": {} for i, suffix in enumerate(suffixes)}
    for i, (name, tensor) in enumerate(tensors.items()):
        list(shards.values())[i % len(shards)][name] = tensor
    for shard, part in shards.items():
        save_shard(part, folder / shard)
    return write_index(folder, {name: shard for shard, part in shards.items() for name in part})


class TestShardedSafetensors(LoaderConformance):
    """The suite over three safetensors files."""

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> ShardedWeightsLoader:
        return ShardedWeightsLoader(save_shards(tensors, folder, [".safetensors"] * 3), folder, **options)


class TestShardedTorch(LoaderConformance):
    """The suite over two torch files."""

    keeps_strides = keeps_gaps = True

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> ShardedWeightsLoader:
        return ShardedWeightsLoader(save_shards(tensors, folder, [".bin", ".pth"]), folder, **options)


def test_arguments_are_taken_by_position(tmp_path: Path) -> None:
    """The order is index, folder, key, device, dtype; paths and device may be text."""
    save_shard({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    path = write_index(tmp_path, {"a": "x.safetensors"}, "weights")
    loader = ShardedWeightsLoader(str(path), str(tmp_path), "weights", "cpu", torch.float16)
    assert (loader.device, loader.dtype) == (torch.device("cpu"), torch.float16)
    assert loader("module", ["a"])["a"].dtype is torch.float16


def test_kinds_of_shards_can_be_mixed(tmp_path: Path) -> None:
    """safetensors, torch and NumPy files may stand in one index."""
    tensors = {f"w{i}": torch.full((2,), float(i)) for i in range(4)}
    loader = ShardedWeightsLoader(save_shards(tensors, tmp_path, [".safetensors", ".bin", ".pt", ".npz"]), tmp_path)
    for name, found in loader("module", list(tensors)).items():
        assert_same(found, tensors[name])


def test_shards_may_lie_elsewhere_than_the_index(tmp_path: Path) -> None:
    """Names of shards are relative to weights_dir, not to the index."""
    (tmp_path / "weights").mkdir()
    save_shard({"a": torch.ones(2)}, tmp_path / "weights" / "x.safetensors")
    loader = ShardedWeightsLoader(write_index(tmp_path, {"a": "x.safetensors"}), tmp_path / "weights")
    assert loader.weights().keys() == {"a"}


def test_links_in_the_folder_are_followed(tmp_path: Path) -> None:
    """A model hub's cache is a folder of links to files elsewhere: that is no escape."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_shard({"a": torch.ones(2)}, tmp_path / "blobs" / "x.safetensors")
    os.rename(tmp_path / "blobs" / "x.safetensors", tmp_path / "blobs" / "0a1b")
    os.symlink("../blobs/0a1b", tmp_path / "snapshot" / "x.safetensors")
    loader = ShardedWeightsLoader(write_index(tmp_path, {"a": "x.safetensors"}), tmp_path / "snapshot")
    assert_same(loader("module", ["a"])["a"], torch.ones(2))


def test_weights_that_the_index_does_not_map_are_there_too(tmp_path: Path) -> None:
    """A shard may hold more than the index says; where two shards have it, it is an error for who asks."""
    save_shard({"a": torch.ones(2), "extra": torch.ones(2), "twice": torch.ones(1)}, tmp_path / "x.safetensors")
    save_shard({"b": torch.ones(2), "twice": torch.zeros(1)}, tmp_path / "y.safetensors")
    loader = ShardedWeightsLoader(write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}), tmp_path)
    assert list(loader.weights()) == ["a", "b", "extra"]
    assert_same(loader("module", ["extra"])["extra"], torch.ones(2))
    with pytest.raises(CheckpointError, match=r"x\.safetensors, y\.safetensors.*index names none.*'twice'"):
        loader.locate(["twice"])
    path = write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    assert ShardedWeightsLoader(path, tmp_path, rename={"twice": None}).locate(["twice"]) == {}


def test_a_weight_in_another_shard_than_the_index_says_is_found(tmp_path: Path) -> None:
    """The only shard that has it is the right one."""
    save_shard({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_shard({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    loader = ShardedWeightsLoader(
        write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}), tmp_path
    )
    assert_same(loader("module", ["b"])["b"], torch.ones(2))


def test_of_two_copies_the_index_chooses(tmp_path: Path) -> None:
    """A weight that lies in two shards is read from the one that the index names."""
    save_shard({"a": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_shard({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    loader = ShardedWeightsLoader(write_index(tmp_path, {"a": "y.safetensors", "b": "x.safetensors"}), tmp_path)
    assert_same(loader("module", ["a"])["a"], torch.ones(2))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_promise_that_a_shard_does_not_keep_is_an_error(suffix: str, tmp_path: Path) -> None:
    """It names the weight, the shard and the cure, and is raised where the weight is asked for."""
    save_shard({"a": torch.ones(2)}, tmp_path / f"x{suffix}")
    loader = ShardedWeightsLoader(write_index(tmp_path, {"a": f"x{suffix}", "b": f"x{suffix}"}), tmp_path)
    assert list(loader.weights()) == ["a"]
    with pytest.raises(MissingWeightError, match="promises") as caught:
        loader.locate(["b"])
    assert (caught.value.weight, caught.value.file) == ("b", str(tmp_path / f"x{suffix}"))
    assert caught.value.cure


def test_a_missing_shard_is_said_at_once(tmp_path: Path) -> None:
    """The constructor names the missing shard and how many weights it would hold."""
    save_shard({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    path = write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"})
    with pytest.raises(CheckpointNotFoundError, match=r"'y\.safetensors', which holds 2 of the 3 weights") as caught:
        ShardedWeightsLoader(path, tmp_path)
    assert caught.value.file == str(tmp_path / "y.safetensors")


def test_an_unsafe_shard_is_never_opened(tmp_path: Path) -> None:
    """A checkpoint outside the folder is not read although it is there."""
    (tmp_path / "inside").mkdir()
    save_shard({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors")):
        with pytest.raises(UnsafeCheckpointError):
            ShardedWeightsLoader(write_index(tmp_path, {"a": name}), tmp_path / "inside")


def test_shards_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    """A shard that no loader reads is refused with the kinds that are read."""
    (tmp_path / "x.h5").touch()
    with pytest.raises(CheckpointError, match=r"'\.h5'.*x\.h5.*\.safetensors"):
        ShardedWeightsLoader(write_index(tmp_path, {"a": "x.h5"}), tmp_path)


def test_headers_are_read_when_first_asked_for(tmp_path: Path) -> None:
    """A corrupt shard is noticed by weights(), not by the constructor; once it is repaired the same loader works."""
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    loader = ShardedWeightsLoader(write_index(tmp_path, {"a": "x.safetensors"}), tmp_path)
    with pytest.raises(CorruptCheckpointError, match=r"x\.safetensors"):
        loader.weights()
    save_shard({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert loader.weights().keys() == {"a"}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_shard_that_is_truncated_in_use_is_noticed(suffix: str, tmp_path: Path) -> None:
    """The read after the change names weight and shard."""
    loader = ShardedWeightsLoader(save_shards({"a": torch.ones(2)}, tmp_path, [suffix]), tmp_path)
    info = loader.weights()["a"]
    os.truncate(tmp_path / f"part-0{suffix}", 60)
    with pytest.raises(WeightReadError, match=rf"60 now.*'a'.*part-0{suffix}"):
        read_bytes(loader, info)
