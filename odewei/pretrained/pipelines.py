"""Pipelines of diffusers whose models stream under one budget.

Knows model_index.json and where diffusers has the classes that it names. What is no model is left to diffusers.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from odewei.errors import CheckpointError, CheckpointNotFoundError, OdeweiError, OptionsError, UnsafeCheckpointError
from odewei.pretrained.build import build_pretrained
from odewei.pretrained.folder import read_json
from odewei.pretrained.options import StreamOptions, required
from odewei.runtime import runtime_of, runtimes_in

__all__ = ["Pipeline", "stream_folder", "stream_parts"]

_INDEX = "model_index.json"


class Pipeline(Protocol):
    """A pipeline of diffusers: called with a prompt, say; its parts by their names."""

    @property
    def components(self) -> dict[str, object]: ...

    def register_modules(self, **parts: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> Any: ...


def stream_folder(folder: Path, *, dtype: torch.dtype | str, trusts_code: bool, options: StreamOptions) -> Pipeline:
    """The pipeline of a folder with a model_index.json; see ``odewei.stream_pipeline``."""
    diffusers = required("diffusers", extra=None, purpose="stream_pipeline")
    if not (folder / _INDEX).is_file() and (folder / "config.json").is_file():
        raise CheckpointNotFoundError(
            f"the folder has no {_INDEX}: it is one model, not a pipeline",
            file=str(folder),
            cure="Use odewei.from_pretrained",
        )
    index = read_json(folder / _INDEX)
    classes = {
        name: kind
        for name, value in index.items()
        if (kind := _model_class(name, value, folder, diffusers, trusts_code)) is not None
    }
    with ExitStack() as undo:
        parts = _streamed(folder, classes, {}, dtype=dtype, trusts_code=trusts_code, options=options, undo=undo)
        try:
            made: Pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trusts_code, **parts
            )
        except OdeweiError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"diffusers cannot make the pipeline {index.get('_class_name')!r}: {str(error).splitlines()[0][:300]}",
                file=str(folder / _INDEX),
                cure="Check the folder, or install a newer diffusers",
            ) from error
        undo.pop_all()
    return made


def stream_parts(
    pipeline: Pipeline,
    folder: str | os.PathLike[str] | None,
    *,
    dtype: torch.dtype | str,
    trusts_code: bool,
    options: StreamOptions,
) -> Pipeline:
    """``pipeline`` with each of its models replaced by a streamed one; see ``odewei.stream_pipeline``."""
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, dict):
        raise OptionsError(
            f"a {type(pipeline).__name__} is no pipeline of diffusers",
            cure="Give a folder with a model_index.json, or a pipeline",
        )
    place = _folder(pipeline, folder)
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and not runtimes_in(part)}
    configs = {name: getattr(part, "config", None) for name, part in models.items()}
    classes = {name: type(part) for name, part in models.items()}
    with ExitStack() as undo:
        made = _streamed(place, classes, configs, dtype=dtype, trusts_code=trusts_code, options=options, undo=undo)
        pipeline.register_modules(**made)
        undo.pop_all()
    return pipeline


def _streamed(
    folder: Path,
    classes: Mapping[str, type],
    configs: Mapping[str, object],
    *,
    dtype: torch.dtype | str,
    trusts_code: bool,
    options: StreamOptions,
    undo: ExitStack,
) -> dict[str, nn.Module]:
    """A streamed model for each class, read from the subfolder of its name; closed by ``undo``."""
    made: dict[str, nn.Module] = {}
    for name, kind in classes.items():
        if not (folder / name).is_dir():
            raise CheckpointNotFoundError(
                f"the pipeline's part {name!r} has no folder there", file=str(folder), cure="Download it again"
            )
        made[name] = build_pretrained(
            folder / name,
            model_class=kind,
            config=configs.get(name),
            dtype=dtype,
            trusts_code=trusts_code,
            options=options,
        )
        undo.callback(runtime_of(made[name]).close)
    return made


def _folder(pipeline: Pipeline, folder: str | os.PathLike[str] | None) -> Path:
    named = folder
    if named is None:
        named = dict(getattr(pipeline, "config", None) or {}).get("_name_or_path")
    if not named:
        raise OptionsError(
            "the pipeline does not know which folder it was loaded from", cure="Give folder=, the one with its parts"
        )
    from odewei.pretrained.hub import locate

    return locate(named, revision=None, local_files_only=True, with_code=False)


def _model_class(name: str, value: object, folder: Path, diffusers: Any, trusts_code: bool) -> type | None:
    """The class of a part that is a model; None for any other, and for parts that the pipeline does without.

    ``value`` is [library, class]. Libraries are transformers, diffusers and diffusers' own pipelines; nothing else is
    imported on the word of a file.
    """
    if name.startswith("_") or not isinstance(value, list) or [type(one) for one in value] != [str, str]:
        return None
    library, kind = value
    if library in ("transformers", "diffusers"):
        required(library, extra="hf" if library == "transformers" else None, purpose=f"the part {name!r}")
        home: Any = importlib.import_module(library)
    elif hasattr(diffusers.pipelines, library):
        home = getattr(diffusers.pipelines, library)
    elif trusts_code:
        return None  # diffusers loads it, with the code that comes with it
    else:
        raise UnsafeCheckpointError(
            f"the part {name!r} needs code that is neither in transformers nor in diffusers: {library}.{kind}",
            file=str(folder / _INDEX),
            cure="Read that code, and pass trust_remote_code=True if you want it to be run; it is not streamed then",
        )
    found = getattr(home, kind, None)
    if found is None:
        raise CheckpointError(
            f"the part {name!r} is of a class that the installed {library} does not have: {kind!r}",
            file=str(folder / _INDEX),
            cure=f"Install a newer {library}",
        )
    return found if inspect.isclass(found) and issubclass(found, nn.Module) else None
