"""One of the two models, and what was kept of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .subjects import SUBJECTS, Inputs, Plan

__all__ = ["Inapplicable", "Side", "tensors_of"]


class Inapplicable(Exception):
    """What an action wants is not there: the model is another by now. Both models must say so."""


class Side:
    """The model, and what a user's variables hold: ``kept``, by the names that actions gave it.

    ``is_streamed`` is not to be asked by actions but for odewei's own functions. ``holds_weights`` becomes true when
    the user has written weights or holds some, which may take more memory than the budget.
    """

    def __init__(self, plan: Plan, model: nn.Module, folder: Path, source: Path, *, is_streamed: bool) -> None:
        self.plan = plan
        self.model = model
        self.folder = folder
        self.source = source
        self.is_streamed = is_streamed
        self.is_over = False  # nothing can be done to it any more
        self.holds_weights = False
        self.kept: dict[str, Any] = {}

    # -- finding -----------------------------------------------------------------------------------------------------

    def module(self, name: str) -> Any:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise Inapplicable(f"no module {name!r}") from None

    def parent(self, name: str) -> tuple[nn.Module, str]:
        head, _, last = name.rpartition(".")
        self.module(name)
        return self.module(head), last

    def parameter(self, name: str, via: str = "get") -> nn.Parameter:
        """One parameter, found as people find it."""
        if via == "iteration":
            found = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
        else:
            owner, _, last = name.rpartition(".")
            module = self.module(owner)
            if last not in module._parameters or module._parameters[last] is None:
                raise Inapplicable(f"no parameter {name!r}")
            found = getattr(module, last) if via == "attribute" else self.model.get_parameter(name)
        if found is None:
            raise Inapplicable(f"no parameter {name!r}")
        return found

    def keep(self, key: str) -> Any:
        """What was kept under a name."""
        if key not in self.kept:
            raise Inapplicable(f"nothing was kept as {key!r}")
        return self.kept[key]

    # -- calling -----------------------------------------------------------------------------------------------------

    def inputs(self, seed: int) -> Inputs:
        return SUBJECTS[self.plan.subject].inputs(torch.Generator().manual_seed(seed))

    def call(self, seed: int) -> Any:
        """One pass over drawn inputs."""
        return self.model(**self.inputs(seed))

    def loss(self, seed: int) -> torch.Tensor:
        """A number that depends on all outputs."""
        found = [one.float().square().mean() for one in tensors_of(self.call(seed)) if one.is_floating_point()]
        return torch.stack(found).sum()


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """All tensors in what a call returned."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_of(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_of(one)


@contextmanager
def mode(name: str) -> Iterator[None]:
    """``no_grad``, ``inference`` or ``grad``."""
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}[name]():
        yield
