"""Which class a checkpoint of transformers is built with, and with which configuration.

Knows config.json and the names in transformers. Runs code of the checkpoint only where it is trusted.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from odewei.errors import CheckpointError, MissingPackageError, OdeweiError, OptionsError
from odewei.pretrained.folder import custom_code_refused
from odewei.pretrained.options import Asked, FileOptions, StreamOptions, required

__all__ = ["choose"]

_OLDEST = (5, 12)  # that was tried


def choose(folder: Path, stored: Mapping[str, object], asked: Asked) -> tuple[Any, Any, dict[str, object]]:
    """The class, a configuration of its own for it, and what else its ``__init__`` is to be given.

    ``stored`` is what config.json holds. Raises UnsafeCheckpointError, CheckpointError, OptionsError.
    """
    transformers = required("transformers", extra="hf", purpose="from_pretrained")
    _check_version(transformers.__version__)
    config, model_class = asked.config, asked.model_class
    if config is not None and not isinstance(config, transformers.PreTrainedConfig | Mapping | str | os.PathLike):
        raise OptionsError(
            f"config={type(config).__name__} is no configuration of transformers",
            cure="Give what AutoConfig.from_pretrained returns, or its path",
        )
    if model_class is not None and not _is_model_class(model_class, transformers):
        raise OptionsError(
            f"model_class={model_class!r} is neither a model class nor an auto class of transformers",
            cure="Give transformers.AutoModelForCausalLM, say, or leave it out",
        )
    if not stored and isinstance(config, transformers.PreTrainedConfig):
        stored = {"architectures": config.architectures}
    chosen: Any = model_class or _custom(folder, stored, asked.trusts_code) or _of_architectures(stored, transformers)
    own = chosen.config_class if chosen is not None and issubclass(chosen, nn.Module) else None
    settings, unused = _configuration(folder, stored, asked, own, transformers)
    if chosen is None or not issubclass(chosen, nn.Module):
        chosen = _of_auto_class(chosen or transformers.AutoModel, settings, folder, stored)
        settings = _of_its_text(settings, chosen)
    for name in ("attn_implementation", "experts_implementation"):
        if name in asked.overrides:  # composite configurations lose it when they make their parts
            setattr(settings, f"_{name}", asked.overrides[name])
            unused.pop(name, None)
    _check_known(unused, chosen, settings, given=config is not None)
    return chosen, settings, unused


def _configuration(
    folder: Path, stored: Mapping[str, object], asked: Asked, own: Any, transformers: Any
) -> tuple[Any, dict[str, object]]:
    """The configuration with the overriding values, and those of them that it does not have. ``own``: its class."""
    given: Any = asked.config
    values = dict(asked.overrides)
    if isinstance(given, transformers.PreTrainedConfig):
        return copy.deepcopy(given), values
    if isinstance(given, Mapping):
        kind = given.get("model_type")
        if not isinstance(kind, str) or (own is None and kind not in transformers.CONFIG_MAPPING):
            raise OptionsError(
                f"config= is a mapping whose model_type {kind!r} is unknown to transformers",
                cure="Give all that a config.json holds, or give single values as keywords: num_labels=3, say",
            )
        made = own or transformers.CONFIG_MAPPING[kind]
        read = functools.partial(made.from_dict, dict(given))
    elif given is not None:
        read = functools.partial((own or transformers.AutoConfig).from_pretrained, os.fspath(given))
    elif own is not None:
        read = functools.partial(own.from_pretrained, str(folder), local_files_only=True)
    else:
        _check_type(folder, stored, asked.trusts_code, transformers)
        read = functools.partial(
            transformers.AutoConfig.from_pretrained,
            str(folder),
            trust_remote_code=asked.trusts_code,
            local_files_only=True,
        )
    try:
        config, unused = read(return_unused_kwargs=True, **values)
    except Exception as error:
        raise CheckpointError(
            f"the configuration cannot be used: {_first_line(error)}",
            file=str(folder / "config.json"),
            cure="Download it again, or give config=",
        ) from error
    return config, {name: value for name, value in unused.items() if name in values}


def _of_its_text(config: Any, chosen: Any) -> Any:
    """The part of a composite configuration that a class for text alone is built with, as auto classes take it."""
    part = config.sub_configs.get("text_config")
    if part is None or chosen.config_class != part:
        return config
    found = config.get_text_config()
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        found.quantization_config = quantised
    return found


def _check_known(unused: Mapping[str, object], chosen: Any, config: Any, *, given: bool) -> None:
    """Raise OptionsError for what neither the configuration nor the class's ``__init__`` has."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {name for name, one in inspect.signature(chosen.__init__).parameters.items() if one.kind in kinds}
    for name in unused:
        if name in taken and name not in ("self", "config"):
            continue
        if given and hasattr(config, name):
            raise OptionsError(f"{name}= beside config=, which has that value too", cure="Set it in the configuration")
        known = (*StreamOptions.__annotations__, *FileOptions.__annotations__)
        similar = difflib.get_close_matches(name, known, 1)
        raise OptionsError(
            f"there is no option {name!r}, and {type(config).__name__} has no such value",
            cure=(f"Did you mean {similar[0]!r}? " if similar else "") + f"The options are {', '.join(known)}",
        )


def _check_version(version: str) -> None:
    """Raise MissingPackageError for a transformers that loads checkpoints by other rules."""
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < _OLDEST:
        raise MissingPackageError(
            f"from_pretrained needs transformers {'.'.join(map(str, _OLDEST))} or newer, and {version} is installed",
            cure="pip install --upgrade transformers, or use init_on_demand_weights_model with rename= and recipes",
        )


def _is_model_class(value: object, transformers: Any) -> bool:
    if not inspect.isclass(value):
        return False
    return issubclass(value, transformers.PreTrainedModel) or getattr(value, "_model_mapping", None) is not None


def _of_architectures(stored: Mapping[str, object], transformers: Any) -> Any:
    """The class that config.json names, if transformers has it."""
    named = stored.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel) else None


def _custom(folder: Path, stored: Mapping[str, object], trusts_code: bool) -> Any:
    """The class in the checkpoint's own code, if it is trusted and there is one."""
    references = stored.get("auto_map")
    if not trusts_code or not isinstance(references, Mapping):
        return None
    models = {key: value for key, value in references.items() if key.startswith("AutoModel") and isinstance(value, str)}
    named = stored.get("architectures")
    names = named if isinstance(named, list) else []
    fitting = [value for value in models.values() if value.rpartition(".")[2] in names] or list(models.values())
    if not fitting:
        return None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(fitting[0], str(folder), local_files_only=True)
    except OdeweiError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's own code cannot be used: {_first_line(error)}",
            file=str(folder / "config.json"),
            cure="Install what it imports, and keep its files beside config.json",
        ) from error


def _check_type(folder: Path, stored: Mapping[str, object], trusts_code: bool, transformers: Any) -> None:
    """Raise CheckpointError for a type of model that transformers does not know, UnsafeCheckpointError if the
    checkpoint's own code does.
    """
    kind, references = stored.get("model_type"), stored.get("auto_map")
    is_custom = isinstance(references, Mapping) and "AutoConfig" in references
    if kind in transformers.CONFIG_MAPPING or (is_custom and trusts_code):
        return
    what = f"the architecture {stored.get('architectures') or kind!r}"
    if is_custom:
        raise custom_code_refused(stored, folder, what)
    raise CheckpointError(
        f"{what} (model_type {kind!r}) is unknown to transformers {transformers.__version__}",
        file=str(folder / "config.json"),
        cure="Install a newer transformers, or give model_class= and config=",
    )


def _of_auto_class(auto: Any, config: Any, folder: Path, stored: Mapping[str, object]) -> Any:
    """The class that an auto class of transformers has for the configuration."""
    known = auto._model_mapping
    if type(config) not in known:
        if isinstance(stored.get("auto_map"), Mapping):
            raise custom_code_refused(stored, folder, f"a model of the type {config.model_type!r}")
        raise CheckpointError(
            f"{auto.__name__} has no class for the model type {config.model_type!r}",
            file=str(folder / "config.json"),
            cure="Give another model_class",
        )
    found = known[type(config)]
    if not isinstance(found, list | tuple):
        return found
    named = {one.__name__: one for one in found}
    return next((named[name] for name in config.architectures or () if name in named), found[0])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith(":"):
        lines[0] += " " + "".join(lines[1:2]).strip()
    return lines[0][:300]
