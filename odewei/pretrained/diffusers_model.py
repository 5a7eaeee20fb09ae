"""A model of diffusers, built without weights and streamed from its folder.

Knows the few rules by which diffusers loads: weights have the model's names (in old single files some attention blocks
have others, which the model itself corrects), floating ones are cast to the dtype asked for, else to the model's.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from odewei.errors import CheckpointError, OdeweiError, OptionsError
from odewei.loaders import open_checkpoint
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.meta_model import build_without_weights
from odewei.pretrained.build import Place
from odewei.pretrained.converted import ConvertedLoader
from odewei.pretrained.folder import Weights, names_of, open_weights
from odewei.pretrained.naming import Group, Taken
from odewei.pretrained.options import Asked, FileOptions, StreamOptions, required
from odewei.pretrained.quantisation import check_scales
from odewei.torch import init_on_demand_weights_model

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["build_diffusers", "tell_unexpected"]

_log = logging.getLogger("odewei")


def build_diffusers(folder: Path, place: Place, stored: Mapping[str, object], asked: Asked) -> nn.Module:
    """The streamed model of a folder, or of one file in the form of another program; ``stored`` is what its config.json
    holds.

    Raises CheckpointError, OptionsError, MissingPackageError.
    """
    chosen = _choose(folder, stored, asked.model_class)
    _refuse_what_models_lack(asked)
    if stored.get("quantization_config") is not None:
        raise CheckpointError(
            "a quantised checkpoint of diffusers cannot be streamed",
            file=str(folder / "config.json"),
            cure="Use one that is not quantised",
        )
    settings = _settings(chosen, folder, asked)
    dtype = _one_dtype(asked)
    streamed = asked.stream.copy()
    verify = streamed.pop("verify", "size")

    def build() -> nn.Module:
        with _default_dtype(dtype if place.file is None else None):
            made: nn.Module = chosen.from_config(settings)
        return made

    try:
        model: Any = build_without_weights(build, draws=False)
    except OdeweiError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{chosen.__name__} cannot be built with the configuration: {str(error).splitlines()[0][:300]}",
            file=str(folder / "config.json"),
            cure="Install a newer diffusers, or give config=",
        ) from error
    if place.file is not None:
        from odewei.pretrained.single_file import convert_single_file

        loader: WeightsLoader = convert_single_file(model, open_checkpoint(place.file, verify=verify), settings, dtype)
    else:
        names = names_of("diffusers", asked.variant, asked.use_safetensors)
        found = open_weights(folder, names, verify=verify, variant=asked.variant)
        loader = _converted(model, found, dtype)
        model.register_to_config(_name_or_path=place.name)
    return init_on_demand_weights_model(lambda: model, loader, **streamed).eval()


def _one_dtype(asked: Asked) -> torch.dtype | None:
    if isinstance(asked.dtype, Mapping):
        raise OptionsError("several dtypes for one model of diffusers", cure="Give one, or stream the pipeline")
    return asked.dtype


def _refuse_what_models_lack(asked: Asked) -> None:
    """Raise OptionsError for what transformers' models have and those of diffusers have not."""
    wanted = {
        "ignore_mismatched_sizes": asked.ignore_mismatched_sizes,
        "key_mapping": asked.key_mapping,
        "generation_config": asked.generation_config,
    }
    for name, value in wanted.items():
        if value:
            cure = "Build the model with the configuration that the checkpoint was made with"
            raise OptionsError(
                f"{name}= is not for a model of diffusers", cure=cure if "sizes" in name else "Leave it out"
            )


def _choose(folder: Path, stored: Mapping[str, object], model_class: type | None) -> Any:
    diffusers = required("diffusers", extra=None, purpose="a model of diffusers")
    if model_class is not None:
        if not (inspect.isclass(model_class) and issubclass(model_class, diffusers.ModelMixin)):
            raise OptionsError(
                f"model_class={model_class!r} is no model class of diffusers", cure="Leave it out, or give one"
            )
        return model_class
    name = stored.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (inspect.isclass(found) and issubclass(found, diffusers.ModelMixin)):
        raise CheckpointError(
            f"the model class {name!r} is unknown to diffusers {diffusers.__version__}",
            file=str(folder / "config.json"),
            cure="Install a newer diffusers, or give model_class=",
        )
    return found


def _settings(chosen: Any, folder: Path, asked: Asked) -> dict[str, object]:
    """The configuration that was given, or the folder's, with the overriding values."""
    given = asked.config
    if given is not None and not isinstance(given, Mapping | str | os.PathLike):
        raise OptionsError(
            "config= of a model of diffusers is a mapping, or the path of one", cure="Give a dict of its arguments"
        )
    known = chosen._get_init_keys(chosen)
    for name in asked.overrides:
        if name not in known:
            raise OptionsError(
                f"there is no option {name!r}, and {chosen.__name__} has no such value",
                cure=f"The options are {', '.join((*StreamOptions.__annotations__, *FileOptions.__annotations__))}",
            )
    if isinstance(given, Mapping):
        return {**given, **asked.overrides}
    path = str(folder) if given is None else os.fspath(given)
    try:
        found: Mapping[str, object] = chosen.load_config(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the configuration cannot be used: {str(error).splitlines()[0][:300]}",
            file=str(folder / "config.json"),
            cure="Download it again, or give config=",
        ) from error
    return {**found, **asked.overrides}


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _converted(model: Any, weights: Weights, dtype: torch.dtype | None) -> ConvertedLoader:
    """The checkpoint's weights as the model has them."""
    known = dict(weights.loader.weights())
    if weights.metadata is None:
        model._fix_state_dict_keys_on_load(known)  # moves entries to other names, whatever they are
        known = {name: info for name, info in known.items() if isinstance(info, WeightInfo)}
    expected = model.state_dict()
    kept = model._keep_in_fp32_modules or []
    kept = {kept} if isinstance(kept, str) else set(kept)

    def wanted(name: str, stored: torch.dtype) -> torch.dtype:
        if dtype is None:
            return expected[name].dtype  # type: ignore[no-any-return]
        if not stored.is_floating_point:
            return stored
        return torch.float32 if kept.intersection(name.split(".")) else dtype

    groups = [
        Group(name, None, [Taken(info, name, wanted(name, info.dtype))])
        for name, info in known.items()
        if name in expected
    ]
    left = {name: info for name, info in known.items() if name not in expected}
    check_scales((taken.info for group in groups for taken in group.taken), left.values())
    tell_unexpected(model, left)
    return ConvertedLoader(weights.loader, groups, None, None)


def tell_unexpected(model: Any, left: Mapping[str, WeightInfo]) -> None:
    """Log what the checkpoint has and the model does not, once, but for what the model knows of."""
    known = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    names = [name for name in left if not any(pattern.search(name) for pattern in known)]
    if names:
        told = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        _log.warning("%s has no use for these weights of the checkpoint: %s", type(model).__name__, told)
