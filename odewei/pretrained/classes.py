"""Which class a checkpoint of transformers is built with, and with which configuration.

Knows config.json and the names in transformers. Runs code of the checkpoint only where it is trusted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from odewei.errors import CheckpointError, MissingPackageError, OdeweiError, OptionsError
from odewei.pretrained.folder import custom_code_refused
from odewei.pretrained.options import required

__all__ = ["choose"]

_OLDEST = (5, 12)  # that was tried


def choose(
    folder: Path, stored: Mapping[str, object], *, model_class: type | None, config: object, trusts_code: bool
) -> tuple[Any, Any]:
    """The class and a configuration of its own for it. ``stored`` is what config.json holds.

    Raises UnsafeCheckpointError, CheckpointError, OptionsError.
    """
    transformers = required("transformers", extra="hf", purpose="from_pretrained")
    _check_version(transformers.__version__)
    if config is not None and not isinstance(config, transformers.PreTrainedConfig):
        raise OptionsError(
            f"config={type(config).__name__} is no configuration of transformers",
            cure="Give what AutoConfig.from_pretrained returns",
        )
    if model_class is not None and not _is_model_class(model_class, transformers):
        raise OptionsError(
            f"model_class={model_class!r} is neither a model class nor an auto class of transformers",
            cure="Give transformers.AutoModelForCausalLM, say, or leave it out",
        )
    chosen: Any = model_class or _custom(folder, stored, trusts_code) or _of_architectures(stored, transformers)
    if chosen is not None and issubclass(chosen, nn.Module) and config is None and chosen.config_class is not None:
        return chosen, _own_config(chosen.config_class, folder)
    if config is None:
        config = _auto_config(folder, stored, trusts_code, transformers)
    if chosen is None or not issubclass(chosen, nn.Module):
        chosen = _of_auto_class(chosen or transformers.AutoModel, config, folder, stored)
    return chosen, copy.deepcopy(config)


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


def _own_config(config_class: Any, folder: Path) -> Any:
    try:
        return config_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise _unusable(folder, error) from error


def _auto_config(folder: Path, stored: Mapping[str, object], trusts_code: bool, transformers: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, references = stored.get("model_type"), stored.get("auto_map")
    is_custom = isinstance(references, Mapping) and "AutoConfig" in references
    if kind not in CONFIG_MAPPING and not (is_custom and trusts_code):
        what = f"the architecture {stored.get('architectures') or kind!r}"
        if is_custom:
            raise custom_code_refused(stored, folder, what)
        raise CheckpointError(
            f"{what} (model_type {kind!r}) is unknown to transformers {transformers.__version__}",
            file=str(folder / "config.json"),
            cure="Install a newer transformers, or give model_class= and config=",
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trusts_code, local_files_only=True
        )
    except Exception as error:
        raise _unusable(folder, error) from error


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


def _unusable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the configuration cannot be used: {_first_line(error)}",
        file=str(folder / "config.json"),
        cure="Download it again, or give config=",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
