"""A model of transformers, built without weights and streamed from its folder.

What its own ``from_pretrained`` does between the configuration and the finished model, in the same order, with
transformers' own functions where what they do is theirs to define; only the weights are not loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odewei.errors import CheckpointError, MissingWeightError, OdeweiError
from odewei.hf import known_to_transformers
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.meta_model import build_without_weights
from odewei.pretrained.bitsandbytes_modules import (
    have_parameters_hold_bitsandbytes,
    is_part,
    settle_bitsandbytes,
    with_parts_as_parameters,
)
from odewei.pretrained.classes import choose
from odewei.pretrained.converted import ConvertedLoader
from odewei.pretrained.folder import TRANSFORMERS_WEIGHTS, open_weights
from odewei.pretrained.naming import grouped
from odewei.pretrained.options import StreamOptions
from odewei.pretrained.quantisation import find_quantiser, have_parameters_hold_what_is_packed, is_bitsandbytes
from odewei.pretrained.ties import tie
from odewei.torch import init_on_demand_weights_model

__all__ = ["build_transformers"]


def build_transformers(
    folder: Path,
    stored: Mapping[str, object],
    *,
    model_class: type | None,
    config: object,
    dtype: torch.dtype | None,
    trusts_code: bool,
    options: StreamOptions,
) -> nn.Module:
    """The streamed model of a folder; ``stored`` is what its config.json holds, ``dtype`` None stands for "auto"."""
    chosen, settings = choose(folder, stored, model_class=model_class, config=config, trusts_code=trusts_code)
    device = torch.device(options.get("device") or "cpu")
    quantiser, settings = find_quantiser(settings, folder, device)
    explicit, verify = getattr(settings, "transformers_weights", None), options.get("verify", "size")
    checkpoint = open_weights(folder, TRANSFORMERS_WEIGHTS, explicit, verify=verify)
    settings.name_or_path = str(folder)
    main = _set_dtype(settings, dtype, checkpoint, quantiser)
    model: Any = build_without_weights(
        known_to_transformers(lambda: _build(chosen, settings, main, quantiser)), draws=False
    )
    loader = _converted(model, checkpoint, quantiser, main, device)
    names = list(model.state_dict())
    missing = _really_missing(model, tie(model, names, loader))
    if missing and options.get("on_missing", "error") == "error":
        raise _incomplete(missing, loader, checkpoint, chosen.__name__, folder)
    model.eval()
    _adjust_generation(model, folder, trusts_code)
    if quantiser is not None:
        model.hf_quantizer = quantiser
        quantiser.postprocess_model(model)
    # Every name was looked for above, ties and what may be missing included.
    streamed = options.copy()
    streamed.pop("verify", None)  # that was the loader's
    streamed["on_missing"] = "init"
    return init_on_demand_weights_model(lambda: model, loader, **streamed)


def _set_dtype(config: Any, dtype: torch.dtype | None, loader: WeightsLoader, quantiser: Any) -> torch.dtype:
    """The dtype the model is built in: the one asked for, the configuration's, or the checkpoint's; the configuration
    says it from now on.
    """
    if dtype is None:
        named = getattr(config, "dtype", None)
        dtype = getattr(torch, named) if isinstance(named, str) else named
    if dtype is None:
        stored = [info.dtype for info in loader.weights().values()]
        dtype = next((one for one in stored if one.is_floating_point and one.itemsize > 1), torch.float32)
    if quantiser is not None:
        dtype = quantiser.update_dtype(dtype)
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is not None:
            part.dtype = dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _build(chosen: Any, config: Any, dtype: torch.dtype, quantiser: Any) -> nn.Module:
    """The model as transformers builds it before loading: in its dtype, nothing tied, modules replaced that hold
    quantised weights.
    """
    from transformers import initialization
    from transformers.modeling_utils import local_torch_dtype
    from transformers.monkey_patching import apply_patches, patch_output_recorders

    with ExitStack() as contexts:
        for context in (local_torch_dtype(dtype, chosen.__name__), initialization.no_tie_weights(), apply_patches()):
            contexts.enter_context(context)
        model: Any = chosen(copy.deepcopy(config))
        patch_output_recorders(model)
        if quantiser is not None:
            quantiser.preprocess_model(model=model, dtype=dtype, device_map=None, checkpoint_files=[])
            have_parameters_hold_what_is_packed(model)
            if is_bitsandbytes(quantiser):
                have_parameters_hold_bitsandbytes(model)
    for module in model.modules():  # once more, and not in the dtype: so transformers gives buffers their values
        vars(module).pop("_is_hf_initialized", None)
    model.initialize_weights()
    assert isinstance(model, nn.Module)
    return model


def _converted(
    model: Any, checkpoint: WeightsLoader, quantiser: Any, dtype: torch.dtype, device: torch.device
) -> ConvertedLoader:
    """The checkpoint's weights as the model has them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    expected = model.state_dict()
    plan = _dtype_plan(model, dtype)

    def cast(target: str, info: WeightInfo, conversion: Any) -> torch.dtype | None:
        wanted: torch.dtype = next((one for pattern, one in plan if pattern.search(target)), expected[target].dtype)
        if quantiser is None or not quantiser.pre_quantized:
            return wanted
        if parts and is_part(target):
            return None
        kept: torch.dtype | None = quantiser.get_new_dtype(
            conversion, torch.empty(0, dtype=info.dtype, device="meta"), wanted
        )
        return kept

    parts = is_bitsandbytes(quantiser)
    transforms = get_model_conversion_mapping(model, None, None if parts else quantiser)
    found = with_parts_as_parameters(checkpoint.weights()) if parts else checkpoint.weights()
    groups = grouped(found, expected, transforms, model.base_model_prefix, cast)
    if parts:
        groups = settle_bitsandbytes(model, groups, checkpoint, device)
    loader = ConvertedLoader(checkpoint, groups, model, model.config)
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    return loader


def _dtype_plan(model: Any, dtype: torch.dtype) -> list[tuple[re.Pattern[str], torch.dtype]]:
    """The names whose weights keep another dtype than the model's, by patterns."""
    return [(re.compile(name.replace("*", ".*")), kept) for name, kept in model._get_dtype_plan(dtype).items()]


def _really_missing(model: Any, missing: Iterable[str]) -> list[str]:
    """What transformers would warn of: the model may say of names that they need not be in a checkpoint."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return sorted(name for name in missing if not any(pattern.search(name) for pattern in patterns))


def _incomplete(
    missing: list[str], loader: ConvertedLoader, checkpoint: WeightsLoader, model: str, folder: Path
) -> OdeweiError:
    if not loader.weights():
        names = ", ".join(list(checkpoint.weights())[:3])
        return CheckpointError(
            f"none of the checkpoint's weights belongs to {model}: they are called {names}, ...",
            file=str(folder),
            cure="Give the model_class that the checkpoint was made with",
        )
    also = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return MissingWeightError(
        f"the checkpoint lacks {missing[0]!r}{also}, which {model} has",
        weight=missing[0],
        file=str(folder),
        cure='Give the model_class that it was made with, or on_missing="init" to initialise what is missing',
    )


def _adjust_generation(model: Any, folder: Path, trusts_code: bool) -> None:
    """Give the model the generation settings of the folder."""
    if not (model.can_generate() and hasattr(model, "adjust_generation_fn")):
        return
    try:
        model.adjust_generation_fn(
            None,
            False,
            None,
            str(folder),
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision=None,
            subfolder="",
            trust_remote_code=trusts_code,
        )
    except Exception as error:
        raise CheckpointError(
            f"the generation settings cannot be used: {str(error).splitlines()[0][:300]}",
            file=str(folder / "generation_config.json"),
            cure="Download the file again, or take it away",
        ) from error
