"""Saving, in each way there is, into new files and over the files that the model came from; and loading."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import odewei

from .action import action
from .side import Inapplicable, Side, tensors_of


def new_file(side: Side, name: str) -> Path:
    """A path at which there is nothing yet."""
    found = (side.folder / f"{number}-{name}" for number in itertools.count())
    return next(path for path in found if not path.exists())


def content(path: Path) -> object:
    """What is in a file or a folder: the tensors, without what depends on the day."""
    if path.is_dir():
        return {one.name: content(one) for one in sorted(path.iterdir())}
    if path.suffix == ".safetensors":
        return dict(sorted(load_file(path).items()))
    if path.suffix in (".bin", ".pt"):
        return torch.load(path)
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        return {key: value for key, value in found.items() if "name_or_path" not in key}  # the two folders
    return path.name


@action(often=1.5)
def save_by_torch(side: Side) -> object:
    path = new_file(side, "state.pt")
    torch.save(side.model.state_dict(), path)
    return content(path)


@action()
def save_by_safetensors(side: Side) -> object:
    path = new_file(side, "state.safetensors")
    save_model(side.model, str(path))
    return content(path)


@action()
def save_cloned(side: Side) -> object:
    """What people write for ``save_file``: contiguous clones."""
    path = new_file(side, "state.safetensors")
    save_file({name: value.detach().clone().contiguous() for name, value in side.model.state_dict().items()}, path)
    return content(path)


def _is_pretrained(side: Side) -> bool:
    return hasattr(side.model, "save_pretrained")


@action(often=2, only=_is_pretrained)
def save_pretrained(side: Side) -> object:
    if not _is_pretrained(side):
        raise Inapplicable("no save_pretrained")
    path = new_file(side, "folder")
    side.model.save_pretrained(path)
    side.kept["folder"] = path
    return content(path)


@action(lambda draw: {"key": draw.kept("folder"), "seed": draw.seed()}, often=4)
def load_what_was_saved(side: Side, key: str, seed: int) -> object:
    """Another model from what ``save_pretrained`` wrote."""
    path = side.keep(key)
    if not (path / "config.json").exists():
        raise Inapplicable("adapters were saved")
    if side.is_streamed:
        made = odewei.from_pretrained(path)
    else:
        import transformers
        from transformers import AutoConfig, AutoModel  # noqa: F401

        made = getattr(
            transformers, json.loads((path / "config.json").read_text())["architectures"][0]
        ).from_pretrained(path)
    with torch.no_grad():
        return list(tensors_of(made(**side.inputs(seed))))


@action(lambda draw: {"way": draw.one(("state", "save_pretrained"))}, often=0.5, holds=True)
def save_over_own_files(side: Side, way: str) -> object:
    """Over the files that the streamed model reads. They are right afterwards, and the model goes on, or it refuses."""
    if way == "save_pretrained":
        if side.plan.by != "folder" or not _is_pretrained(side):
            raise Inapplicable("not of a folder")
        side.model.save_pretrained(side.source)
        return content(side.source)
    path = side.source
    if path.is_dir():
        path = next((one for one in sorted(path.iterdir()) if one.suffix in (".bin", ".safetensors")), path)
    if not path.is_file():
        raise Inapplicable("no file")
    if path.suffix == ".bin":
        torch.save(side.model.state_dict(), path)
    else:
        save_model(side.model, str(path))
    return content(path)


@action(lambda draw: {"name": draw.module(nn.Linear, nn.LayerNorm)})
def state_of_a_part(side: Side, name: str) -> object:
    return dict(side.module(name).state_dict(prefix="part."))


@action(lambda draw: {"keep_vars": draw.one((True, False))}, often=1.5)
def state_dict(side: Side, keep_vars: bool) -> object:
    """All values, and which of them are one tensor."""
    state = side.model.state_dict(keep_vars=keep_vars)
    first: dict[int, str] = {}
    same = [first.setdefault(id(value), name) for name, value in state.items()]
    return state, same if keep_vars else None
