"""Checkpoints in the layout of Hugging Face, made here, and the models that the libraries themselves load from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["as_loaded", "edit", "saved"]


def as_loaded(kind: Any, folder: Path, **options: Any) -> Any:
    """What ``kind.from_pretrained`` loads, trainable as it comes, in memory of its own.

    Transformers leaves weights where they lie in the mapped file, at any multiple of 4 bytes or so, and some of torch's
    kernels give other last bits there than for memory that torch has aligned.
    """
    model = kind.from_pretrained(folder, **options).eval()
    for _, value in (*model.named_parameters(), *model.named_buffers()):
        value.data = value.data.clone()
    return model


def saved(build: Any, folder: Path, **options: Any) -> Any:
    """Save a model with random weights; ``options`` are those of save_pretrained. Returns its class."""
    torch.manual_seed(3)
    model: nn.Module = build()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(-0.5, 0.5)  # so that norms and biases count
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return type(model)


def edit(folder: Path, change: Any, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """Replace a checkpoint's weights by what ``change`` makes of them. Returns what is there now."""
    weights = {name: tensor.contiguous() for name, tensor in change(load_file(folder / file)).items()}
    (folder / file).unlink()
    save_file(weights, folder / file, metadata={"format": "pt"})
    return weights
