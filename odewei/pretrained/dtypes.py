"""The dtype that transformers gives a model and each of its weights: asked of transformers' own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from odewei.errors import CheckpointError
from odewei.loaders import open_checkpoint
from odewei.pretrained.folder import Weights

__all__ = ["dtype_plan", "settle_dtype"]


def settle_dtype(
    config: Any, asked: torch.dtype | Mapping[str, torch.dtype] | None, weights: Weights, quantiser: Any
) -> tuple[Any, torch.dtype]:
    """The configuration, which says its dtype from now on, and the dtype that the model is built in.

    ``asked`` None is "auto". Raises CheckpointError where there is none that a model can be built in.
    """
    from transformers.modeling_utils import _get_dtype

    file = str(weights.files[0])
    try:
        config, dtype = _get_dtype(
            dtype="auto" if asked is None else asked,
            checkpoint_files=[str(path) for path in weights.files],
            config=config,
            sharded_metadata=None if weights.metadata is None else dict(weights.metadata),
            state_dict=None if file.endswith(".safetensors") or asked is not None else _of_pickle(weights),
            weights_only=True,
            hf_quantizer=quantiser,
        )
    except Exception as error:
        raise CheckpointError(
            f"transformers finds no dtype for the model: {(str(error).splitlines() or [''])[0][:300]}",
            file=file,
            cure="Say dtype=torch.bfloat16, or what it is",
        ) from error
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(
            f"the model would be built in {dtype}, which is no floating dtype",
            file=file,
            cure="Say dtype=torch.bfloat16, or what it is",
        )
    return config, dtype


def dtype_plan(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """Which dtype a weight has whatever the model's; None for most."""
    from transformers.core_model_loading import build_glob_alternation

    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: None
    alternation, by_group, *_ = build_glob_alternation(list(plan))

    def kept(name: str) -> torch.dtype | None:
        match = alternation.search(name)
        return None if match is None or match.lastgroup is None else plan[by_group[match.lastgroup]]

    return kept


def _of_pickle(weights: Weights) -> dict[str, torch.Tensor]:
    """What the first file holds, without values: transformers would have torch unpickle it."""
    infos = open_checkpoint(weights.files[0], verify="none").weights()
    return {name: torch.empty((), dtype=info.dtype, device="meta") for name, info in infos.items()}
