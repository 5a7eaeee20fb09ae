"""Pipelines of diffusers whose models stream under one budget.

Knows model_index.json and where diffusers has the classes that it names. What is no model is left to diffusers.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from odewei.errors import CheckpointError, CheckpointNotFoundError, OdeweiError, OptionsError, UnsafeCheckpointError
from odewei.pretrained.build import build_pretrained, located, placed
from odewei.pretrained.folder import read_json
from odewei.pretrained.options import Asked, FileOptions, StreamOptions, required
from odewei.runtime import runtime_of, runtimes_in

__all__ = ["Pipeline", "stream_folder", "stream_parts"]

_INDEX = "model_index.json"


class Pipeline(Protocol):
    """A pipeline of diffusers: called with a prompt, say; its parts by their names."""

    @property
    def components(self) -> dict[str, object]: ...

    def register_modules(self, **parts: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> Any: ...


def stream_folder(path: str | os.PathLike[str], asked: Asked) -> Pipeline:
    """The pipeline of a folder with a model_index.json; see ``odewei.stream_pipeline``."""
    diffusers = required("diffusers", extra=None, purpose="stream_pipeline")
    _refuse_what_pipelines_lack(asked)
    folder = located(path, asked, marks=(_INDEX,))
    if not (folder / _INDEX).is_file() and (folder / "config.json").is_file():
        raise CheckpointNotFoundError(
            f"the folder has no {_INDEX}: it is one model, not a pipeline",
            file=str(folder),
            cure="Use odewei.from_pretrained",
        )
    index = read_json(folder / _INDEX)
    _check_parts(index, asked, diffusers)
    classes = {
        name: kind
        for name, value in index.items()
        if name not in asked.overrides
        and (kind := _model_class(name, value, folder, diffusers, asked.trusts_code)) is not None
    }
    with ExitStack() as undo:
        parts = _streamed(folder, classes, {}, _variants(folder, index, asked.variant), asked, undo)
        try:
            made: Pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=asked.trusts_code,
                variant=asked.variant,
                use_safetensors=asked.use_safetensors,
                **asked.overrides,
                **parts,
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


def stream_parts(pipeline: Pipeline, folder: str | os.PathLike[str] | None, asked: Asked) -> Pipeline:
    """``pipeline`` with each of its models replaced by a streamed one; see ``odewei.stream_pipeline``."""
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, dict):
        raise OptionsError(
            f"a {type(pipeline).__name__} is no pipeline of diffusers",
            cure="Give a folder with a model_index.json, or a pipeline",
        )
    _refuse_what_pipelines_lack(asked)
    for name in asked.overrides:
        raise OptionsError(
            f"{name}= beside a pipeline that was built", cure=f"Set it on the pipeline: pipeline.{name} = ..."
        )
    place = _folder(pipeline, folder)
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and not runtimes_in(part)}
    configs = {name: getattr(part, "config", None) for name, part in models.items()}
    classes = {name: type(part) for name, part in models.items()}
    variants = _variants(place, read_json(place / _INDEX), asked.variant) if asked.variant is not None else {}
    with ExitStack() as undo:
        made = _streamed(place, classes, configs, variants, asked, undo)
        pipeline.register_modules(**made)
        undo.pop_all()
    return pipeline


def _streamed(
    folder: Path,
    classes: Mapping[str, type],
    configs: Mapping[str, object],
    variants: Mapping[str, str],
    asked: Asked,
    undo: ExitStack,
) -> dict[str, nn.Module]:
    """A streamed model for each class, read from the subfolder of its name; closed by ``undo``."""
    made: dict[str, nn.Module] = {}
    for name, kind in classes.items():
        if not (folder / name).is_dir():
            raise CheckpointNotFoundError(
                f"the pipeline's part {name!r} has no folder there",
                file=str(folder),
                cure=f"Download it again, or say {name}=None if you do without it",
            )
        part = replace(
            asked,
            model_class=kind,
            config=configs.get(name),
            dtype=_dtype_of(name, asked.dtype),
            variant=variants.get(name),
            overrides={},
        )
        made[name] = build_pretrained(placed(folder / name, str(folder / name), part), part)
        undo.callback(runtime_of(made[name]).close)
    return made


def _dtype_of(name: str, dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> torch.dtype | None:
    """The dtype of a part; where several are given, that of its name, of "default", or float32: so diffusers has it."""
    if isinstance(dtype, Mapping):
        return dtype.get(name, dtype.get("default", torch.float32))
    return dtype


def _variants(folder: Path, index: Mapping[str, object], variant: str | None) -> Mapping[str, str]:
    """Which parts have weights of the variant; the others are read without it, as diffusers does."""
    if variant is None:
        return {}
    from diffusers.pipelines.pipeline_loading_utils import _identify_model_variants

    try:
        found: Mapping[str, str] = _identify_model_variants(folder=str(folder), variant=variant, config=dict(index))
    except (IndexError, OSError) as error:  # a file without an ending, in a part's folder
        raise CheckpointError(
            f"diffusers cannot tell which parts have the variant {variant!r}: {error}",
            file=str(folder),
            cure="Take files without an ending out of the folders of the pipeline's parts",
        ) from error
    if not found:
        raise CheckpointNotFoundError(
            f"no part of the pipeline has weights of the variant {variant!r}",
            file=str(folder),
            cure="Leave out variant=, or download that variant",
        )
    return found


def _refuse_what_pipelines_lack(asked: Asked) -> None:
    """Raise OptionsError for keywords that are for one model."""
    wanted = {
        "subfolder": asked.subfolder,
        "ignore_mismatched_sizes": asked.ignore_mismatched_sizes,
        "key_mapping": asked.key_mapping,
        "generation_config": asked.generation_config,
    }
    for name, value in wanted.items():
        if value:
            raise OptionsError(
                f"{name}= is for one model, not for a pipeline",
                cure="Stream that model with odewei.from_pretrained, and give it to stream_pipeline by its name",
            )


def _check_parts(index: Mapping[str, object], asked: Asked, diffusers: Any) -> None:
    """Raise OptionsError for a keyword, or a name in ``dtype``, that is no part of the pipeline."""
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(asked.dtype, Mapping):
        for part in asked.dtype:
            if part not in index and part != "default":
                raise OptionsError(
                    f"dtype= has the name {part!r}, which is no part of the pipeline", cure='Or use "default"'
                )
    if kind is None:
        return  # of the checkpoint's own code, or unknown: diffusers says so
    parts, values = diffusers.DiffusionPipeline._get_signature_keys(kind)
    for option in asked.overrides:
        if option not in parts and option not in values:
            raise OptionsError(
                f"there is no option {option!r}, and {name} has no such part",
                cure=f"Its parts are {', '.join(sorted(parts))}; "
                f"the options are {', '.join(FileOptions.__annotations__)}, {', '.join(StreamOptions.__annotations__)}",
            )


def _folder(pipeline: Pipeline, folder: str | os.PathLike[str] | None) -> Path:
    named = folder
    if named is None:
        named = dict(getattr(pipeline, "config", None) or {}).get("_name_or_path")
    if not named:
        raise OptionsError(
            "the pipeline does not know which folder it was loaded from", cure="Give folder=, the one with its parts"
        )
    return located(named, Asked(local_files_only=True), marks=(_INDEX,))


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
