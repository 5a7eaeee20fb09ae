"""What an entry of the zoo is, and the inputs that entries share.

Classes are named, not imported: transformers and diffusers are imported when an entry is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = Callable[[int], dict[str, Any]]

VOCAB = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """``build`` makes the model with random weights; ``inputs(seed)`` are keyword arguments of its call.

    ``needs`` is the package that has the class. ``partly`` says why a pass may leave weights unused, so that what the
    budget lacks need not be read again in each; ``overdraws`` says why the
    budget cannot be kept. Both are empty for most.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    needs: str = "transformers"
    partly: str = ""
    overdraws: str = ""


class Family:
    """The entries of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[Architecture] = []

    def hf(
        self,
        name: str,
        model: str,
        inputs: Inputs,
        *,
        needs: str = "transformers",
        partly: str = "",
        overdraws: str = "",
        **config: Any,
    ) -> None:
        """A model of transformers, by its class name, and the fields of its configuration."""

        def build() -> nn.Module:
            cls = getattr(importlib.import_module("transformers"), model)
            made: nn.Module = cls(cls.config_class(**_copied(config)))
            return made

        self.entries.append(
            Architecture(
                name=name, family=self.name, build=build, inputs=inputs, needs=needs, partly=partly, overdraws=overdraws
            )
        )

    def diffusers(self, name: str, model: str, inputs: Inputs, **config: Any) -> None:
        """A model of diffusers, by its class name, and its arguments."""

        def build() -> nn.Module:
            made: nn.Module = getattr(importlib.import_module("diffusers"), model)(**_copied(config))
            return made

        self.entries.append(Architecture(name=name, family=self.name, build=build, inputs=inputs, needs="diffusers"))


def _copied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations change what they are given."""
    return {
        key: _copied(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
        for key, value in config.items()
    }


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(seed: int, length: int = 11) -> torch.Tensor:
    """Two sentences without special tokens."""
    return torch.randint(5, 90, (2, length), generator=generator(seed))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def text(seed: int) -> dict[str, Any]:
    return {"input_ids": ids(seed)}


def masked_text(seed: int) -> dict[str, Any]:
    """The second sentence is padded on the right."""
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": ids(seed), "attention_mask": mask}


def long_text(seed: int) -> dict[str, Any]:
    return {"input_ids": ids(seed, 64), "attention_mask": torch.ones(2, 64, dtype=torch.long)}


def pair(seed: int) -> dict[str, Any]:
    return {"input_ids": ids(seed), "decoder_input_ids": ids(seed + 1, 5)}


def image(size: int = 32, channels: int = 3) -> Inputs:
    return lambda seed: {"pixel_values": normal(seed, 2, channels, size, size)}


def wave(length: int = 1600) -> Inputs:
    return lambda seed: {"input_values": normal(seed, 2, length)}
