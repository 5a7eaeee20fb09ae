"""An adapter of peft on top of a streamed model of transformers, as its own from_pretrained puts it there.

The adapter's weights are ordinary parameters in memory; those beneath go on streaming. Its files are read by odewei's
loaders, so that no pickle runs; the rest is transformers' ``load_adapter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odewei.errors import CheckpointError, CheckpointNotFoundError, OdeweiError
from odewei.loaders import open_checkpoint, read_tensor
from odewei.pretrained.options import Asked, required
from odewei.runtime import runtime_of

__all__ = ["add_adapter"]

_SAFE, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def add_adapter(
    model: nn.Module, folder: Path, asked: Asked, transforms: Sequence[Any], dtype: torch.dtype, quantiser: Any
) -> None:
    """Put the adapter of the folder on the streamed model, which is closed if that fails.

    Raises MissingPackageError, CheckpointError.
    """
    inside = folder / asked.subfolder
    try:
        required("peft", extra=None, purpose=f"the adapter in {str(inside)!r}")
        _load(model, folder, _read(inside, asked), asked, transforms, dtype, quantiser)
    except OdeweiError:
        runtime_of(model).close()
        raise
    except Exception as error:
        runtime_of(model).close()
        raise CheckpointError(
            f"peft cannot put the adapter on the model: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
            file=str(inside / "adapter_config.json"),
            cure="Install the peft that it was made with, or move adapter_config.json away",
        ) from error


def _read(inside: Path, asked: Asked) -> dict[str, torch.Tensor]:
    names = [_SAFE, _PICKLE] if asked.use_safetensors is not False else [_PICKLE, _SAFE]
    for name in names[: 1 if asked.use_safetensors else 2]:
        if (inside / name).is_file():
            loader = open_checkpoint(inside / name, verify=asked.stream.get("verify", "size"))
            try:
                return {name: read_tensor(loader, info) for name, info in loader.weights().items()}
            finally:
                loader.close()
    raise CheckpointNotFoundError(
        f"the adapter has a configuration but no weights: looked for {', '.join(names)}",
        file=str(inside),
        cure="Download them, or move adapter_config.json away to have the model without the adapter",
    )


def _load(
    model: Any,
    folder: Path,
    weights: dict[str, torch.Tensor],
    asked: Asked,
    transforms: Sequence[Any],
    dtype: torch.dtype,
    quantiser: Any,
) -> None:
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(
        pretrained_model_name_or_path=str(folder),
        ignore_mismatched_sizes=asked.ignore_mismatched_sizes,
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        hf_quantizer=quantiser,
        weight_mapping=list(transforms),
        download_kwargs={"local_files_only": True, "subfolder": asked.subfolder},
    )
    model.load_adapter(str(folder), adapter_name=asked.adapter_name, adapter_state_dict=weights, load_config=settings)
