"""Quantised checkpoints of transformers: their modules hold what the checkpoint has, or it is dequantised on reading.

Knows which methods can stream: those whose weights are used as they are stored, or computed from their sources one
weight at a time. A method that changes all weights once they are in memory cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odewei.errors import CheckpointError, MissingPackageError
from odewei.loaders.base import WeightInfo
from odewei.survey import walk

__all__ = ["STREAMED", "check_scales", "find_quantiser", "have_parameters_hold_what_is_packed", "is_bitsandbytes"]

STREAMED = frozenset({"bitnet", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4"})
"""The methods that are streamed, as config.json calls them: those that were tried."""

_DEQUANTISED = frozenset({"fp8", "mxfp4"})
_PACKAGES = {
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "aqlm": "aqlm",
    "eetq": "kernels",
    "mxfp4": "kernels",
}
_SCALE = re.compile(r"scale|zero_?point|qzeros|absmax|SCB")
_NAMED = re.compile(r"pip install (?:-U |--upgrade )?[`'\"]?([A-Za-z][\w.-]*)")


def find_quantiser(config: Any, folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Transformers' quantiser for the configuration, None where the checkpoint is not quantised, and the configuration
    that it makes of it. For the CPU, what only accelerators compute with is dequantised.

    Raises MissingPackageError, CheckpointError for a method that cannot be streamed, or does not run here.
    """
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if not settings:
        return None, config
    method = _method(settings)
    file = str(folder / "config.json")
    if method == "compressed-tensors" and _quantises_activations(settings):
        raise CheckpointError(
            "the checkpoint is quantised by compressed-tensors, activations too, not only weights: that cannot be "
            "streamed, for its modules are made once all weights are in memory",
            file=file,
            cure="Use one whose weights only are quantised (W4A16, W8A16)",
        )
    if isinstance(settings, dict) and _is_dequantised(method, device):
        config.quantization_config = {**settings, "dequantize": True}
    quantiser, config = _ask_transformers(config, method, file)
    if quantiser is None:
        raise CheckpointError(
            f"the checkpoint is quantised in a way that the installed transformers does not know: {method!r}",
            file=file,
            cure="Install a newer transformers, or use a checkpoint that is not quantised",
        )
    if method not in STREAMED:
        raise CheckpointError(
            f"a checkpoint quantised by {method} cannot be streamed: its weights are put together, or changed, by its "
            "own code once all of them are in memory",
            file=file,
            cure=f"Use one that is not quantised, or quantised by {', '.join(sorted(STREAMED))}",
        )
    return quantiser, config


def _ask_transformers(config: Any, method: str, file: str) -> tuple[Any, Any]:
    from transformers.quantizers.auto import get_hf_quantizer

    try:
        quantiser, config, _ = get_hf_quantizer(config, None, None, True, {})
    except ImportError as error:
        named = _NAMED.search(str(error))
        package = named.group(1) if named else _PACKAGES.get(method, method)
        raise MissingPackageError(
            f"the checkpoint is quantised ({method}), and its modules need the package {package!r}",
            file=file,
            cure=f"pip install {package}",
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint is quantised ({method}), which does not run here: {str(error).splitlines()[0][:300]}",
            file=file,
            cure="Use a checkpoint that is not quantised, or a machine that the method runs on",
        ) from error
    return quantiser, config


def check_scales(taken: Iterable[WeightInfo], left: Iterable[WeightInfo]) -> None:
    """Raise CheckpointError where a weight of eight bits or fewer would be used without the scales stored beside it.

    ``taken`` are the checkpoint's weights that the model uses, ``left`` those that it has no use for.
    """
    packed: dict[str, WeightInfo] = {}
    for info in taken:
        if info.dtype.itemsize == 1 and info.dtype != torch.bool:
            packed[info.name] = packed[info.name.rpartition(".")[0]] = info
    for info in left:
        module, _, kind = info.name.replace(":", ".").rpartition(".")
        if _SCALE.search(kind) and module in packed:
            weight = packed[module]
            raise CheckpointError(
                f"the weight is stored in {weight.dtype} with scales of its own ({info.name!r}), of which the "
                "configuration says nothing: without them its values would be wrong",
                weight=weight.name,
                file=weight.file,
                cure="Say in config.json how it is quantised (quantization_config), or use a checkpoint that is not, "
                "such as what save_pretrained of the dequantised model writes",
            )


def is_bitsandbytes(quantiser: Any) -> bool:
    """Whether this quantiser of transformers, or None, is one of those of bitsandbytes."""
    return quantiser is not None and _method(quantiser.quantization_config).startswith("bitsandbytes")


def have_parameters_hold_what_is_packed(model: nn.Module) -> None:
    """Make the persistent buffers of a quantised model without weights parameters: they are its weights, in a form that
    its modules keep as buffers, which stay in memory.
    """
    for _, module, _ in walk(model):
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.numel() > 1 and name not in module._non_persistent_buffers_set:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _is_dequantised(method: str, device: torch.device) -> bool:
    """Whether weights are dequantised as they are read. compressed-tensors would do it when it first computes."""
    return method == "compressed-tensors" or (device.type == "cpu" and method in _DEQUANTISED)


def _quantises_activations(settings: Any) -> bool:
    groups = settings.get("config_groups") if isinstance(settings, dict) else getattr(settings, "config_groups", None)
    kinds = ("input_activations", "output_activations")
    return any(isinstance(group, dict) and group.get(kind) for group in dict(groups or {}).values() for kind in kinds)


def _method(settings: Any) -> str:
    found = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if found is None and isinstance(settings, dict):
        found = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else None
    return str(getattr(found, "value", found))
