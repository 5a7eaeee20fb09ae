"""A model of diffusers, built without weights and streamed from its folder.

Knows the few rules by which diffusers loads: weights have the model's names (in old single files some attention blocks
have others, which the model itself corrects), floating ones are cast to the dtype asked for, else to the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from odewei.errors import CheckpointError, OdeweiError, OptionsError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.meta_model import build_without_weights
from odewei.pretrained.converted import ConvertedLoader
from odewei.pretrained.folder import DIFFUSERS_WEIGHTS, open_weights
from odewei.pretrained.naming import Group, Taken
from odewei.pretrained.options import StreamOptions, required
from odewei.torch import init_on_demand_weights_model

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["build_diffusers"]


def build_diffusers(
    folder: Path,
    stored: Mapping[str, object],
    *,
    model_class: type | None,
    config: object,
    dtype: torch.dtype | None,
    options: StreamOptions,
) -> nn.Module:
    """The streamed model of a folder; ``stored`` is what its config.json holds, ``dtype`` None stands for "auto".

    Raises CheckpointError, OptionsError, MissingPackageError.
    """
    chosen = _choose(folder, stored, model_class)
    if config is not None and not isinstance(config, Mapping):
        raise OptionsError("config= of a model of diffusers is a mapping", cure="Give a dict of its arguments")
    if stored.get("quantization_config") is not None:
        raise CheckpointError(
            "a quantised checkpoint of diffusers cannot be streamed",
            file=str(folder / "config.json"),
            cure="Use one that is not quantised",
        )
    settings = dict(config if config is not None else _settings(chosen, folder))
    streamed = options.copy()
    checkpoint = open_weights(folder, DIFFUSERS_WEIGHTS, verify=streamed.pop("verify", "size"))

    def build() -> nn.Module:
        with _default_dtype(dtype):
            made: nn.Module = chosen.from_config(settings)
        return made

    try:
        model = build_without_weights(build, draws=False)
    except OdeweiError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{chosen.__name__} cannot be built with the configuration: {str(error).splitlines()[0][:300]}",
            file=str(folder / "config.json"),
            cure="Install a newer diffusers, or give config=",
        ) from error
    loader = _converted(model, checkpoint, dtype)
    return init_on_demand_weights_model(lambda: model, loader, **streamed).eval()


def _choose(folder: Path, stored: Mapping[str, object], model_class: type | None) -> Any:
    diffusers = required("diffusers", extra=None, purpose="a model of diffusers")
    if model_class is not None:
        if not (inspect.isclass(model_class) and issubclass(model_class, diffusers.ModelMixin)):
            raise OptionsError(
                f"model_class={model_class!r} is no model class of diffusers", cure="Leave it out, or give one"
            )
        return model_class
    name = stored["_class_name"]
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (inspect.isclass(found) and issubclass(found, diffusers.ModelMixin)):
        raise CheckpointError(
            f"the model class {name!r} is unknown to diffusers {diffusers.__version__}",
            file=str(folder / "config.json"),
            cure="Install a newer diffusers, or give model_class=",
        )
    return found


def _settings(chosen: Any, folder: Path) -> Mapping[str, object]:
    try:
        found: Mapping[str, object] = chosen.load_config(str(folder), local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the configuration cannot be used: {str(error).splitlines()[0][:300]}",
            file=str(folder / "config.json"),
            cure="Download it again, or give config=",
        ) from error
    return found


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _converted(model: Any, checkpoint: WeightsLoader, dtype: torch.dtype | None) -> ConvertedLoader:
    """The checkpoint's weights as the model has them."""
    known = dict(checkpoint.weights())
    if "index" not in (checkpoint.place or Path()).name:
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
    return ConvertedLoader(checkpoint, groups, None, None)
