"""From a path to a loader."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from odewei.errors import CheckpointError, CheckpointNotFoundError
from odewei.loaders import (
    NumpyLoader,
    SafetensorsLoader,
    ShardedWeightsLoader,
    TorchLoader,
    WeightsLoader,
    open_checkpoint,
)


def put(folder: Path, *names: str) -> None:
    """Write a checkpoint of one weight under each name; the weight says by its name where it is from."""
    for name in names:
        path = folder / name
        if name.endswith(".index.json"):
            (folder / f"{name}.d").mkdir()
            save_file({name: torch.ones(1)}, folder / f"{name}.d" / "part.safetensors")
            path.write_text(json.dumps({"weight_map": {name: f"{name}.d/part.safetensors"}}))
        elif name.endswith(".safetensors"):
            save_file({name: torch.ones(1)}, path)
        elif name.endswith((".bin", ".pt", ".pth")):
            torch.save({name: torch.ones(1)}, path)
        elif name.endswith(".npz"):
            np.savez(path, **{name: np.ones(1, np.float32)})
        elif name.endswith(".npy"):
            np.save(path, np.ones(1, np.float32))
        else:
            path.write_text("{}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.safetensors", SafetensorsLoader),
        ("X.SAFETENSORS", SafetensorsLoader),
        ("x.bin", TorchLoader),
        ("x.pt", TorchLoader),
        ("x.pth", TorchLoader),
        ("x.npz", NumpyLoader),
        ("X.NPZ", NumpyLoader),
        ("x.index.json", ShardedWeightsLoader),
    ],
)
def test_a_file_is_opened_by_its_name(name: str, kind: type[WeightsLoader], tmp_path: Path) -> None:
    """The end of the name chooses the loader; device and dtype reach it."""
    put(tmp_path, name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    loader = open_checkpoint(tmp_path / name, device="cpu", dtype=torch.float16)
    assert type(loader) is kind
    assert loader.weights().keys() == {name.lower()}
    assert (loader.device, loader.dtype) == (torch.device("cpu"), torch.float16)


ORDER = [
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "other.index.json",
    "other.safetensors",
    "other.pth",
    "other.npz",
]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_of_several_files_in_a_folder_the_usual_one_is_taken(first: int, tmp_path: Path) -> None:
    """Usual names win, safetensors before torch files, indexes before single files; other files do not matter."""
    put(tmp_path, "config.json", "tokenizer.json", "README.md")
    for name in ORDER[first:]:
        put(tmp_path, name)
    found = open_checkpoint(str(tmp_path)).weights()
    assert found.keys() == {ORDER[first]}


def test_a_folder_of_arrays_is_one_checkpoint(tmp_path: Path) -> None:
    """All .npy files of a folder together are a checkpoint, if it has no other; wishes reach the loader."""
    put(tmp_path, "config.json", "x.a.npy", "x.b.npy", "c.npy")
    loader = open_checkpoint(tmp_path, dtype=torch.float16, prefix="x.", rename={"a": "z"})
    assert type(loader) is NumpyLoader
    assert (loader.dtype, loader.weights().keys()) == (torch.float16, {"z", "b"})
    put(tmp_path, "other.npz")
    assert open_checkpoint(tmp_path).weights().keys() == {"other.npz"}


def test_names_reach_every_kind_of_loader(tmp_path: Path) -> None:
    """A path with rename gives the model's names, whatever the file is."""
    for name in ORDER:
        put(tmp_path, name)
        assert open_checkpoint(tmp_path / name, rename=lambda _: "w").weights().keys() == {"w"}
        assert open_checkpoint(tmp_path / name, prefix=name[:3]).weights().keys() == {name[3:]}


@pytest.mark.parametrize(
    "names",
    [
        ("a.index.json", "b.index.json", "c.safetensors"),
        ("a.safetensors", "b.safetensors", "c.bin"),
        ("a.bin", "b.pt"),
        ("a.npz", "b.npz"),
    ],
)
def test_several_candidates_are_listed(names: tuple[str, ...], tmp_path: Path) -> None:
    """Where several files fit, none is guessed."""
    put(tmp_path, *names)
    with pytest.raises(CheckpointError, match=rf"{names[0]}, {names[1]}.*Name the file") as caught:
        open_checkpoint(tmp_path)
    assert not isinstance(caught.value, CheckpointNotFoundError)


def test_a_folder_without_a_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    """The error lists what was looked for and what was found, shortened."""
    with pytest.raises(
        CheckpointNotFoundError, match=r"looked for model\.safetensors\.index\.json.*there are no files"
    ):
        open_checkpoint(tmp_path)
    for i in range(10):
        put(tmp_path, f"{i}.txt")
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"there are 0\.txt, 1\.txt.* and 2 more"):
        open_checkpoint(tmp_path)


def test_other_files_are_refused_and_missing_ones_not_found(tmp_path: Path) -> None:
    """A file of another kind is refused with the kinds that are read; a path to nothing is not found."""
    put(tmp_path, "config.json")
    with pytest.raises(CheckpointError, match=r"'\.json'.*\.safetensors"):
        open_checkpoint(tmp_path / "config.json")
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path / "no such folder")
