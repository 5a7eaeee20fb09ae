"""Which library a path's checkpoint is of, and the model it becomes. Knows config.json's own keys only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError
from odewei.pretrained.folder import read_json
from odewei.pretrained.options import Asked

__all__ = ["Place", "build_pretrained", "load_pretrained", "located", "placed"]

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a checkpoint is: its folder, and what the user called it. ``adapter`` is a folder of peft's files to be put
    on top; ``file`` is the only file of weights, if that is what was named.
    """

    folder: Path
    name: str
    adapter: Path | None = None
    file: Path | None = None


def load_pretrained(path: str | os.PathLike[str], asked: Asked) -> nn.Module:
    """The streamed model at ``path``; see ``odewei.from_pretrained``."""
    if isinstance(path, str | os.PathLike) and os.path.isfile(path):
        return _of_one_file(Path(path), asked)
    folder = located(path, asked)
    was_found_inside = os.path.isdir(path) and folder != Path(path)
    return build_pretrained(placed(folder, str(folder) if was_found_inside else os.fspath(path), asked), asked)


def placed(folder: Path, name: str, asked: Asked) -> Place:
    """The checkpoint in the folder, and an adapter's where there is one: as transformers does, of the folder's own
    model if it has one, else of that which the adapter names.

    Raises CheckpointError.
    """
    inside = folder / asked.subfolder
    if not (inside / _ADAPTER).is_file():
        return Place(folder=folder, name=name)
    if (folder / _CONFIG).is_file() or (inside / _CONFIG).is_file():
        return Place(folder=folder, name=name, adapter=folder)
    base = read_json(inside / _ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointNotFoundError(
            "the folder has an adapter only, which does not say of which model: it has no base_model_name_or_path",
            file=str(inside / _ADAPTER),
            cure="Write the path of the model into it, or put the model's files beside it",
        )
    try:
        found = located(base, replace(asked, subfolder="", revision=None))
    except CheckpointError as error:
        raise type(error)(
            f"the adapter's model cannot be found: {error.problem}",
            file=str(inside / _ADAPTER),
            cure="Write its path into base_model_name_or_path, or put its files beside the adapter",
        ) from error
    return Place(folder=found, name=base, adapter=folder)


def build_pretrained(place: Place, asked: Asked) -> nn.Module:
    """The streamed model of a folder."""
    inside = place.folder if place.adapter not in (None, place.folder) else place.folder / asked.subfolder
    given = asked.config if place.file is not None else None
    stored = dict(given) if isinstance(given, Mapping) else read_json(inside / _CONFIG)
    if "_class_name" in stored:
        from odewei.pretrained.diffusers_model import build_diffusers

        return build_diffusers(inside, place, stored, asked)
    from odewei.pretrained.transformers_model import build_transformers

    return build_transformers(inside, place, stored, asked)


def located(path: str | os.PathLike[str], asked: Asked, **marks: Sequence[str]) -> Path:
    """The folder at ``path``, as it is asked for; ``marks`` as for ``hub.locate``."""
    from odewei.pretrained.hub import locate

    return locate(
        path,
        revision=asked.revision,
        local_files_only=asked.local_files_only,
        with_code=asked.trusts_code,
        token=asked.token,
        cache_dir=asked.cache_dir,
        force_download=asked.force_download,
        subfolder=asked.subfolder,
        variant=asked.variant,
        **marks,
    )


def _of_one_file(path: Path, asked: Asked) -> nn.Module:
    """The model whose weights are in one file, and whose configuration the user gives."""
    settings = asked.config
    if isinstance(settings, str | os.PathLike):
        settings = _read_settings(Path(settings), asked.subfolder)
    if settings is None:
        raise CheckpointError(
            "a folder was expected here, with a config.json and weights; this is a file",
            file=str(path),
            cure="Give its folder, or config= (and model_class=) beside the file; for weights alone use "
            "init_on_demand_weights_model(model_fn, path)",
        )
    place = Place(folder=path.parent, name=str(path), file=path)
    if isinstance(settings, Mapping):
        of_diffusers = "_class_name" in settings or _is_of_diffusers(asked.model_class)
        if of_diffusers:
            from odewei.pretrained.diffusers_model import build_diffusers

            return build_diffusers(path.parent, place, dict(settings), replace(asked, config=settings))
    from odewei.pretrained.transformers_model import build_transformers

    stored = dict(settings) if isinstance(settings, Mapping) else {}
    return build_transformers(path.parent, place, stored, replace(asked, config=settings))


def _read_settings(path: Path, subfolder: str) -> dict[str, object]:
    file = path / subfolder / _CONFIG if path.is_dir() else path
    if not file.is_file():
        raise OptionsError(f"config={str(path)!r} is neither a folder with a {_CONFIG} nor such a file")
    try:
        return read_json(file)
    except json.JSONDecodeError as error:  # pragma: no cover, read_json says it better
        raise OptionsError(f"config={str(path)!r} is no JSON: {error}") from error


def _is_of_diffusers(model_class: type | None) -> bool:
    return any(kind.__module__.partition(".")[0] == "diffusers" for kind in getattr(model_class, "__mro__", ()))
