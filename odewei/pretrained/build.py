"""Which library a folder's checkpoint is of, and the model it becomes. Knows config.json's own keys only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from odewei.errors import OptionsError
from odewei.pretrained.folder import read_json
from odewei.pretrained.options import StreamOptions

__all__ = ["build_pretrained"]


def build_pretrained(
    folder: Path,
    *,
    model_class: type | None,
    config: object,
    dtype: torch.dtype | str,
    trusts_code: bool,
    options: StreamOptions,
) -> nn.Module:
    """The streamed model of a folder; see ``odewei.from_pretrained``."""
    wanted = _dtype(dtype)
    stored = read_json(folder / "config.json")
    if "_class_name" in stored:
        from odewei.pretrained.diffusers_model import build_diffusers

        return build_diffusers(folder, stored, model_class=model_class, config=config, dtype=wanted, options=options)
    from odewei.pretrained.transformers_model import build_transformers

    return build_transformers(
        folder, stored, model_class=model_class, config=config, dtype=wanted, trusts_code=trusts_code, options=options
    )


def _dtype(dtype: object) -> torch.dtype | None:
    """The dtype that was asked for; None: what the library does by itself."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise OptionsError(
            f"dtype={dtype!r} is no floating dtype of at least 16 bits", cure='Use "auto", or torch.bfloat16, say'
        )
    return found
