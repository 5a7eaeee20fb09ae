"""What a checkpoint of transformers lacks, and what it has besides: by the rules, and with the functions, of the model.

What is missing is initialised as transformers does it, in its order, so that a seed gives the values that it gives.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from odewei.loaders.base import WeightInfo

__all__ = ["initialise", "really_missing", "tell_unexpected"]

_log = logging.getLogger("odewei")
_TOLD = 5


def really_missing(model: Any, missing: Collection[str]) -> list[str]:
    """What transformers would warn of: the model may say of names that they need not be in a checkpoint."""
    return sorted(_adjusted(model, missing, ()).missing_keys)


def tell_unexpected(model: Any, left: Mapping[str, WeightInfo]) -> None:
    """Log what the checkpoint has and the model does not, once, but for what the model knows of."""
    names = sorted(_adjusted(model, (), left).unexpected_keys)
    if names:
        told = ", ".join(names[:_TOLD]) + (f" and {len(names) - _TOLD} more" if len(names) > _TOLD else "")
        _log.warning("%s has no use for these weights of the checkpoint: %s", type(model).__name__, told)


def initialise(
    model: Any, missing: Collection[str], known: Mapping[str, WeightInfo], *, is_quantised: bool
) -> dict[str, torch.Tensor]:
    """Give buffers, and the ``missing`` weights, the values that transformers gives them. Returns those of weights,
    which have none in the model afterwards: they are read as all others are. ``known`` are the checkpoint's.
    """
    from transformers.modeling_utils import _load_parameter_into_model

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in known or name in tied:
            tensor._is_hf_initialized = True
            _have_it_trainable(tensor)
    made = [name for name in sorted(missing) if name not in tied and _is_without_values(model, name)]
    for name in made:
        empty = torch.empty_like(model.get_parameter_or_buffer(name), device="cpu")
        _load_parameter_into_model(model, name, empty)
    for module in model.modules():  # once more, and not in the dtype: so transformers gives buffers their values
        vars(module).pop("_is_hf_initialized", None)
    model._initialize_missing_keys(is_quantised)
    values = {name: model.get_parameter_or_buffer(name).detach() for name in made}
    for name, value in values.items():
        _load_parameter_into_model(model, name, nn.Parameter(value.to("meta"), value.is_floating_point()))
    return values


def _have_it_trainable(tensor: torch.Tensor) -> None:
    """As transformers makes each parameter that it loads, whatever the class says."""
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        tensor.requires_grad_(True)


def _is_without_values(model: Any, name: str) -> bool:
    found = model.get_parameter_or_buffer(name)
    return isinstance(found, torch.Tensor) and found.is_meta


def _adjusted(model: Any, missing: Collection[str], unexpected: Collection[str]) -> Any:
    from transformers.utils.loading_report import LoadStateDictInfo

    parts: dict[str, Any] = {
        one.name: {} if one.name == "conversion_errors" else set() for one in fields(LoadStateDictInfo)
    }
    info: Any = LoadStateDictInfo(
        **{**parts, "error_msgs": [], "missing_keys": set(missing), "unexpected_keys": set(unexpected)}
    )
    model._adjust_missing_and_unexpected_keys(info)
    return info
