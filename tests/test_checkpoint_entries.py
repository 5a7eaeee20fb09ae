"""What a checkpoint has besides a model's weights, or says wrongly of others, is no concern of that model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.errors import CheckpointError, MissingWeightError
from odewei.loaders import GatheringLoader, Stack, TorchLoader, open_checkpoint
from odewei.torch import init_on_demand_weights_model


def model_fn() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))


def weights() -> dict[str, Any]:
    torch.manual_seed(1)
    return dict(model_fn().state_dict())


def save_pickle(folder: Path) -> None:
    torch.save({**weights(), "epoch": 3, "note": "x", "mask": torch.eye(3).to_sparse(), 7: None}, folder / "model.bin")


def save_lightning(folder: Path) -> None:
    state = {"epoch": 3, "state_dict": weights(), "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}}]}
    torch.save(state, folder / "last.ckpt")


def save_index(folder: Path, **more: str) -> None:
    found = weights()
    save_file({name: found[name] for name in list(found)[:4]}, folder / "a.safetensors")
    save_file({**{name: found[name] for name in list(found)[4:]}, "unknown": torch.ones(1)}, folder / "b.safetensors")
    names = {name: "a.safetensors" if at < 4 else "b.safetensors" for at, name in enumerate(found)}
    del names["2.bias"]  # which the shard does hold
    index = {"weight_map": {**names, "nobody.needs": "a.safetensors", **more}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("save", [save_pickle, save_lightning, save_index])
@pytest.mark.parametrize("copied", [False, True])
def test_a_model_has_its_weights_and_nothing_else_matters(
    save: Callable[[Path], None], copied: bool, tmp_path: Path
) -> None:
    """Other entries, promises that a shard does not keep, and weights that the index forgets keep no model away."""
    save(tmp_path)
    loader = open_checkpoint(tmp_path)
    if copied:
        loader.weights()
        loader = pickle.loads(pickle.dumps(copy.deepcopy(loader)))
    resident = model_fn().eval()
    resident.load_state_dict(weights())
    streamed = init_on_demand_weights_model(model_fn, loader).eval()
    x = torch.ones(2, 8)
    with torch.no_grad():
        assert torch.equal(streamed(x), resident(x))
    odewei.close(streamed)


def test_who_needs_what_cannot_be_read_is_told_why(tmp_path: Path) -> None:
    """A model that needs such an entry gets its own error before anything is read, by either way of asking."""
    torch.save({**weights(), "2.weight": torch.eye(8).to_sparse()}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"sparse.*'2\.weight'.*to_dense"):
        init_on_demand_weights_model(model_fn, tmp_path)
    torch.save({**weights(), "1.running_mean": 5}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"this is a int.*'1\.running_mean'"):
        init_on_demand_weights_model(model_fn, tmp_path)
    (tmp_path / "model.bin").unlink()
    save_index(tmp_path, **{"0.weight": "b.safetensors"})  # the other shard has it
    assert "0.weight" in open_checkpoint(tmp_path).weights()
    save_index(tmp_path)
    loader = open_checkpoint(tmp_path)
    with pytest.raises(MissingWeightError, match=r"promises.*'nobody\.needs'"):
        GatheringLoader(loader, {"made": Stack(["nobody.needs", "0.bias"])}).weights()


def test_rename_and_prefix_reach_what_cannot_be_read(tmp_path: Path) -> None:
    """An entry that cannot be read can be left out by name, or asked for under another."""
    torch.save({"m.w": torch.ones(2), "m.epoch": 3}, tmp_path / "w.pt")
    assert list(TorchLoader(tmp_path / "w.pt", prefix="m.", rename={"epoch": None}).weights()) == ["w"]
    with pytest.raises(CheckpointError, match=r"this is a int.*'m\.epoch'"):
        TorchLoader(tmp_path / "w.pt", prefix="m.", rename={"epoch": "b"}).locate(["b"])
