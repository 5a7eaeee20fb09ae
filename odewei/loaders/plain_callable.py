"""A user's function as the source of weights, and how any source becomes one of the two kinds there are.

Knows functions and tensors. A function cannot say what it has before it is called, so it is no WeightsLoader.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from odewei.errors import CheckpointError, MissingWeightError, OptionsError
from odewei.loaders.base import WeightsLoader
from odewei.loaders.open_checkpoint import open_checkpoint
from odewei.loaders.state_dict import StateDictLoader
from odewei.loaders.sums import Verify, as_verify
from odewei.loaders.tensors import check_plain

__all__ = ["CallableLoader", "as_source"]


class CallableLoader:
    """Wraps ``function(module_name, weight_names) -> {name: tensor}``. Called from any thread.

    ``device`` and ``dtype`` are None: a function has no wishes. ``place`` is None: it has no file.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    place: Path | None = None

    def __init__(self, function: Callable[[str, Sequence[str]], Mapping[str, torch.Tensor]]) -> None:
        self.function = function

    def load(self, module_name: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Call the function and check its answer, which may hold more than ``names``.

        Tensors stay on their device and are the function's own, except that tensors made under inference mode, which
        no graph could use, are copied. Raises MissingWeightError and CheckpointError; what the function raises passes.
        """
        with torch.inference_mode(False), torch.no_grad():
            answer: object = self.function(module_name, list(names))
            if not isinstance(answer, Mapping):
                raise CheckpointError(
                    f"the function that loads weights returned a {type(answer).__qualname__}, not a mapping",
                    module=module_name,
                    cure="Return a dict of names to tensors",
                )
            for name in names:
                if name not in answer:
                    raise MissingWeightError(
                        f"the function that loads weights was asked for {len(names)} and returned {_brief(answer)}",
                        module=module_name,
                        weight=name,
                        cure="Return every weight that is asked for, under the name that is asked for",
                    )
            return {_named(name, module_name): _usable(name, value, module_name) for name, value in answer.items()}

    def close(self) -> None:
        """Nothing is open."""

    def __repr__(self) -> str:
        return f"<CallableLoader of {getattr(self.function, '__qualname__', self.function)!r}>"


def as_source(source: object, *, verify: Verify = "size") -> WeightsLoader | CallableLoader:
    """``source`` as the library uses it: a loader, a mapping of tensors, a path, or a function.

    ``verify`` is for the loader of a path; anything else than the default with another source is an OptionsError.
    Raises OptionsError for anything else, CheckpointError if what it names cannot be used.
    """
    if as_verify(verify) != "size" and not isinstance(source, str | os.PathLike):
        raise OptionsError(
            f"verify={verify!r} is for a path, the weights come from a {type(source).__qualname__}",
            cure="Give verify to the loader",
        )
    if isinstance(source, WeightsLoader | CallableLoader):
        return source
    if isinstance(source, Mapping):
        return StateDictLoader(source)
    if isinstance(source, str | os.PathLike):
        return open_checkpoint(source, verify=verify)
    if callable(source) and not isinstance(source, type):
        return CallableLoader(source)
    what = f"the class {source.__qualname__}" if isinstance(source, type) else f"a {type(source).__qualname__}"
    raise OptionsError(
        f"weights cannot be read from {what}",
        cure="Give a loader, a path, a mapping of tensors, or a function (module_name, weight_names) -> {name: tensor}",
    )


def _named(name: object, module_name: str) -> str:
    if isinstance(name, str):
        return name
    raise CheckpointError(
        f"the function that loads weights returned the key {name!r}, a {type(name).__qualname__}",
        module=module_name,
        cure="Names of weights are strings",
    )


def _usable(name: str, value: object, module_name: str) -> torch.Tensor:
    tensor = check_plain(value, weight=name, module=module_name)
    if tensor.is_meta:
        raise CheckpointError(
            "the function that loads weights returned a tensor on the meta device, which has no values",
            module=module_name,
            weight=name,
            cure="Return tensors that are loaded",
        )
    return tensor.clone() if tensor.is_inference() else tensor


def _brief(answer: Mapping[object, object]) -> str:
    names = [repr(name) for name in answer]
    shown = ", ".join(names[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
