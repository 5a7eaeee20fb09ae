"""A model of transformers, built without weights and streamed from its folder.

What its own ``from_pretrained`` does between the configuration and the finished model, in the same order, with
transformers' own functions where what they do is theirs to define; only the weights are not loaded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odewei.errors import CheckpointError, MissingWeightError, OdeweiError, WeightMismatchError
from odewei.hf import known_to_transformers
from odewei.loaders import open_checkpoint
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.meta_model import build_without_weights
from odewei.pretrained.adapters import add_adapter
from odewei.pretrained.bitsandbytes_modules import (
    have_parameters_hold_bitsandbytes,
    is_part,
    settle_bitsandbytes,
    with_parts_as_parameters,
)
from odewei.pretrained.build import Place
from odewei.pretrained.classes import choose
from odewei.pretrained.converted import ConvertedLoader
from odewei.pretrained.dtypes import dtype_plan, settle_dtype
from odewei.pretrained.folder import Weights, names_of, open_weights
from odewei.pretrained.joined import JoinedLoader
from odewei.pretrained.missing import initialise, really_missing, tell_unexpected
from odewei.pretrained.naming import grouped
from odewei.pretrained.options import Asked
from odewei.pretrained.quantisation import (
    check_scales,
    find_quantiser,
    have_parameters_hold_what_is_packed,
    is_bitsandbytes,
)
from odewei.pretrained.ties import untied, without_source
from odewei.torch import init_on_demand_weights_model

__all__ = ["build_transformers"]

_log = logging.getLogger("odewei")


def build_transformers(folder: Path, place: Place, stored: Mapping[str, object], asked: Asked) -> nn.Module:
    """The streamed model of a folder; ``stored`` is what its config.json holds."""
    chosen, settings, arguments = choose(folder, stored, asked)
    device = torch.device(asked.stream.get("device") or "cpu")
    quantiser, settings = find_quantiser(settings, folder, device)
    weights = _weights(folder, place, settings, asked)
    settings, dtype = settle_dtype(settings, asked.dtype, weights, quantiser)
    settings.name_or_path = place.name
    model: Any = build_without_weights(
        known_to_transformers(lambda: _build(chosen, settings, arguments, dtype, quantiser)), draws=False
    )
    transforms, loader = _converted(model, weights.loader, quantiser, dtype, device, asked)
    others = _leave_out_mismatched(model, loader, asked) if quantiser is None else set()
    _settle_missing(model, loader, others, weights.loader, quantiser, folder, asked)
    model.eval()
    model.set_use_kernels(False)  # as transformers leaves it, unless kernels are asked for
    if place.file is None:
        _adjust_generation(model, folder, asked)
    if quantiser is not None:
        model.hf_quantizer = quantiser
        quantiser.postprocess_model(model)
    # Every name was looked for above, ties and what may be missing included.
    streamed = asked.stream.copy()
    streamed.pop("verify", None)  # that was the loader's
    streamed["on_missing"] = "init"
    made = init_on_demand_weights_model(lambda: model, loader, **streamed)
    if place.adapter is not None:
        add_adapter(made, place.adapter, asked, transforms, dtype, quantiser)
    return made


def _weights(folder: Path, place: Place, settings: Any, asked: Asked) -> Weights:
    """The weights that transformers would take, with the files that the configuration's class adds."""
    verify = asked.stream.get("verify", "size")
    if place.file is not None:
        return Weights(open_checkpoint(place.file, verify=verify), (place.file,), None)
    names = names_of("transformers", asked.variant, asked.use_safetensors)
    explicit = getattr(settings, "transformers_weights", None)
    found = open_weights(folder, names, explicit, verify=verify, variant=asked.variant)
    more = [folder / name for name in getattr(type(settings), "extra_files", ()) if (folder / name).is_file()]
    more = [path for path in more if path not in found.files]
    if not more:
        return found
    loaders = [found.loader, *(open_checkpoint(path, verify=verify) for path in more)]
    return Weights(JoinedLoader(loaders), (*found.files, *more), found.metadata)


def _build(chosen: Any, config: Any, arguments: Mapping[str, object], dtype: torch.dtype, quantiser: Any) -> nn.Module:
    """The model as transformers builds it before loading: in its dtype, nothing tied, modules replaced that hold
    quantised weights.
    """
    from transformers import initialization
    from transformers.modeling_utils import local_torch_dtype
    from transformers.monkey_patching import apply_patches, patch_output_recorders

    with ExitStack() as contexts:
        for context in (local_torch_dtype(dtype, chosen.__name__), initialization.no_tie_weights(), apply_patches()):
            contexts.enter_context(context)
        model: Any = chosen(copy.deepcopy(config), **arguments)
        patch_output_recorders(model)
        if quantiser is not None:
            quantiser.preprocess_model(model=model, dtype=dtype, device_map=None, checkpoint_files=[])
            have_parameters_hold_what_is_packed(model)
            if is_bitsandbytes(quantiser):
                have_parameters_hold_bitsandbytes(model)
    assert isinstance(model, nn.Module)
    return model


def _converted(
    model: Any, checkpoint: WeightsLoader, quantiser: Any, dtype: torch.dtype, device: torch.device, asked: Asked
) -> tuple[list[Any], ConvertedLoader]:
    """Transformers' conversions for the model, and the checkpoint's weights as the model has them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    expected = model.state_dict()
    plan = dtype_plan(model, dtype)

    def cast(target: str, info: WeightInfo, conversion: Any) -> torch.dtype | None:
        wanted = plan(target) or expected[target].dtype
        if quantiser is None or not quantiser.pre_quantized:
            return wanted
        if parts and is_part(target):
            return None
        kept: torch.dtype | None = quantiser.get_new_dtype(
            conversion, torch.empty(0, dtype=info.dtype, device="meta"), wanted
        )
        return kept

    parts = is_bitsandbytes(quantiser)
    mapping = None if asked.key_mapping is None else dict(asked.key_mapping)
    transforms = get_model_conversion_mapping(model, mapping, None if parts else quantiser)
    found = with_parts_as_parameters(checkpoint.weights()) if parts else checkpoint.weights()
    groups, left = grouped(found, expected, transforms, model.base_model_prefix, cast)
    check_scales((taken.info for group in groups for taken in group.taken), left.values())
    tell_unexpected(model, left)
    if parts:
        groups = settle_bitsandbytes(model, groups, checkpoint, device)
    loader = ConvertedLoader(checkpoint, groups, model, model.config)
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    return transforms, loader


def _leave_out_mismatched(model: nn.Module, loader: ConvertedLoader, asked: Asked) -> set[str]:
    """Have the loader leave out weights of another shape, if that is wanted. Returns their names.

    Raises WeightMismatchError.
    """
    left_out, expected, kind = set(), model.state_dict(), type(model).__name__
    for name, info in list(loader.weights().items()):
        wanted = tuple(expected[name].shape) if name in expected else info.shape
        if info.shape == wanted:
            continue
        if not asked.ignore_mismatched_sizes:
            raise WeightMismatchError(
                f"the checkpoint has shape {info.shape}, {kind} {wanted}",
                weight=name,
                file=info.file,
                cure="Give the configuration that it was made with, or ignore_mismatched_sizes=True to initialise "
                "such weights",
            )
        _log.warning("%s is initialised: the checkpoint has shape %s, %s %s", name, info.shape, kind, wanted)
        loader.leave_out(name)
        left_out.add(name)
    return left_out


def _settle_missing(
    model: Any,
    loader: ConvertedLoader,
    others: set[str],
    checkpoint: WeightsLoader,
    quantiser: Any,
    folder: Path,
    asked: Asked,
) -> None:
    """Tie what is to be tied, and initialise what the checkpoint lacks, and the ``others``, as transformers does.

    Raises MissingWeightError for what it would warn of, unless that is to be initialised.
    """
    known = loader.weights()
    missing = untied(model, model.state_dict(), loader) - others
    unfilled = without_source(model, missing | others)
    lacking = [name for name in really_missing(model, unfilled) if name not in others]
    ties = set(getattr(model, "all_tied_weights_keys", None) or ()) if others else set()
    lacking = [name for name in lacking if name not in ties]
    if lacking and asked.stream.get("on_missing", "error") == "error":
        raise _incomplete(lacking, loader, checkpoint, type(model).__name__, folder)
    if lacking:
        _log.warning("%s: initialised, for the checkpoint lacks them: %s", type(model).__name__, ", ".join(lacking))
    made = initialise(model, unfilled, known, is_quantised=quantiser is not None)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    loader.keep(made)


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


def _adjust_generation(model: Any, folder: Path, asked: Asked) -> None:
    """Give the model the generation settings that were asked for, or those of the folder."""
    if not (model.can_generate() and hasattr(model, "adjust_generation_fn")):
        return
    try:
        model.adjust_generation_fn(
            asked.generation_config,
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
            trust_remote_code=asked.trusts_code,
        )
    except Exception as error:
        raise CheckpointError(
            f"the generation settings cannot be used: {str(error).splitlines()[0][:300]}",
            file=str(folder / "generation_config.json"),
            cure="Download the file again, or take it away",
        ) from error
