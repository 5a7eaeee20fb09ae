"""Brings the model's weights and the checkpoint's together, and refuses what does not fit, before the first forward.

Knows names, shapes and dtypes. Reads headers only. Where one tensor has several names in the checkpoint, the last that
``load_state_dict`` would copy counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from odewei.errors import MissingWeightError, ModelError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.tensors import is_castable
from odewei.matched_loader import MatchedLoader
from odewei.survey import Modules, Weight

__all__ = ["BUILD_AS_MADE", "Matched", "SlotNames", "bound_dtype", "init_missing", "match_weights", "move_to", "unused"]

BUILD_AS_MADE = (
    'Build the model with the configuration that the checkpoint was made with, or pass on_mismatch="init" to '
    "initialise what has another shape"
)
"""The cure of a shape that does not fit."""


@dataclass(frozen=True, slots=True)
class Matched:
    """What was found for the model: each weight's place by the weight's own name, among others that the checkpoint has,
    and the weights that have to be initialised: ``missing`` ones, and ``mismatched`` ones. ``settled`` have values.
    """

    infos: Mapping[str, WeightInfo]
    missing: tuple[Weight, ...]
    mismatched: tuple[Weight, ...] = ()
    settled: tuple[Weight, ...] = ()


class SlotNames:
    """All names that the model's parameters and persistent buffers have in a state dictionary, in the order of loading.

    A module that the model has twice gives two names to what is in it. Made when it is first asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[int, list[str]] | None = None

    def of(self, tensor: torch.Tensor) -> list[str]:
        """The names of one tensor."""
        return self._all().get(id(tensor), [])

    def __iter__(self) -> Iterator[str]:
        return (name for names in self._all().values() for name in names)

    def _all(self) -> dict[int, list[str]]:
        if self._found is None:
            self._found = {}
            for prefix, module in self._model.named_modules(remove_duplicate=False):
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None and name not in module._non_persistent_buffers_set:
                        self._found.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
        return self._found


def bound_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that a weight is bound with: only floating ones of at least 16 bits are cast, all others stay
    verbatim.
    """
    return wanted if wanted is not None and is_castable(stored) else stored


def match_weights(
    model: nn.Module | Modules,
    weights: Sequence[Weight],
    loader: WeightsLoader,
    on_missing: str,
    *,
    on_mismatch: str = "error",
) -> Matched:
    """Find each weight in the checkpoint under any of its names.

    Raises WeightMismatchError if shape (unless ``on_mismatch`` is "init") or kind of dtype differ, MissingWeightError
    unless ``on_missing`` is "init", the loader's own error for what it has but cannot read.
    """
    modules = Modules.of(model)
    known, names = loader.weights(), SlotNames(modules.model)
    has_twins = _has_twins(modules)
    renamed: dict[str, WeightInfo] = {}
    missing: list[Weight] = []
    mismatched: list[Weight] = []
    excused: list[Weight] = []
    settled: list[Weight] = []
    has_values = loader.settled if isinstance(loader, MatchedLoader) else frozenset()
    for weight in weights:
        info = known.get(weight.name)
        if info is None or weight.tied or has_twins:
            found = _names_of(weight, modules, names)
            last = next((name for name in reversed(found) if name in known or name in has_values), None)
            if last in has_values:
                settled.append(weight)
                continue
            if last is None:
                said = _said_of(found, loader)
                (mismatched if said is _MISMATCHED else excused if said is _EXCUSED else missing).append(weight)
                continue
            if last != weight.name:
                info = renamed[weight.name] = known[last]
            if not loader.is_as_loaded:  # torch refuses whichever name has another shape
                info = next(
                    (known[name] for name in found if name in known and known[name].shape != weight.shape), info
                )
            elif _said_of(found, loader) is _MISMATCHED:
                mismatched.append(weight)
                continue
        assert info is not None
        if info.shape == weight.shape:
            _check_dtype(weight, info)
        elif on_mismatch == "init":
            mismatched.append(weight)
        else:
            raise _mismatch(f"the checkpoint has shape {info.shape}, the model {weight.shape}", weight, info)
    if mismatched and on_mismatch == "error":
        assert isinstance(loader, MatchedLoader)
        raise _mismatch(_problem(loader, mismatched[0], modules, names), mismatched[0], None)
    if missing and on_missing == "error":
        raise _missing(missing, known)
    infos = known if not renamed else {**known, **renamed}
    return Matched(infos, (*missing, *excused), tuple(mismatched), tuple(settled))


_MISMATCHED, _EXCUSED, _MISSING = "mismatched", "excused", "missing"


def _has_twins(modules: Modules) -> bool:
    """Whether a module is in several places of the model."""
    held = sum(child is not None for _, module in modules.items() for child in module._modules.values())
    return held >= len(modules.names)


def _names_of(weight: Weight, modules: Modules, names: SlotNames) -> list[str]:
    assert weight.module is not None
    parameter = modules.named[weight.module]._parameters[weight.local_name]
    assert parameter is not None
    return names.of(parameter)


def _said_of(names: Sequence[str], loader: WeightsLoader) -> str:
    """What is to be said of a weight that no name leads to."""
    if isinstance(loader, MatchedLoader):
        if any(name in loader.mismatched for name in names):
            return _MISMATCHED
        if any(name in loader.excused for name in names):
            return _EXCUSED
    return _MISSING


def _problem(loader: MatchedLoader, weight: Weight, modules: Modules, names: SlotNames) -> str:
    found = (loader.mismatched.get(name) for name in _names_of(weight, modules, names))
    return next(problem for problem in found if problem is not None)


def _check_dtype(weight: Weight, info: WeightInfo) -> None:
    interchangeable = is_castable(info.dtype) and is_castable(weight.dtype)
    if info.dtype != weight.dtype and not interchangeable:
        raise WeightMismatchError(
            f"the checkpoint has {info.dtype}, the model {weight.dtype}, and neither can stand for the other",
            module=weight.module or None,
            weight=info.name,
            file=info.file,
            cure="Build the model as the checkpoint was made (a quantised checkpoint needs its quantised modules)",
        )


def _mismatch(problem: str, weight: Weight, info: WeightInfo | None) -> WeightMismatchError:
    return WeightMismatchError(
        problem,
        module=weight.module or None,
        weight=weight.name if info is None else info.name,
        file=None if info is None else info.file,
        cure=BUILD_AS_MADE,
    )


def _missing(missing: Sequence[Weight], known: Mapping[str, WeightInfo]) -> MissingWeightError:
    first = missing[0]
    similar = [name for name in known if name.endswith(first.name.rsplit(".", 2)[-1])][:3]
    also = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    hint = f" (it has {', '.join(similar)}, ...)" if similar else ""
    return MissingWeightError(
        f"the checkpoint lacks the weight {first.name!r}{also}{hint}",
        module=first.module or None,
        weight=first.name,
        cure='Check that checkpoint and model belong together, or pass on_missing="init" to initialise what is missing',
    )


def unused(modules: Modules, weights: Sequence[Weight], loader: WeightsLoader) -> tuple[str, ...]:
    """The checkpoint's entries that the model has no use for, by the names that the loader gives them."""
    if isinstance(loader, MatchedLoader):
        return loader.unexpected
    if loader.is_as_loaded:
        return ()  # whoever made it has left out what is not used
    known = loader.weights()
    refused = known.refused if isinstance(known, KnownWeights) else {}
    entries = dict.fromkeys([*known, *refused, *loader.values()])  # what is no tensor may be among both of the latter
    for weight in weights:
        entries.pop(weight.name, None)
    if entries:  # buffers, and further names
        expected = frozenset(SlotNames(modules.model))
        return tuple(name for name in entries if name not in expected)
    return ()


def move_to(model: nn.Module | Modules, device: torch.device) -> None:
    """Move what has values to the device, for good: buffers, and parameters that the checkpoint lacks. What several
    modules share they share afterwards.
    """
    if device.type == "cpu":
        return
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # the old ones stay, so that no number comes twice
    for _, module in Modules.of(model).items():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                moved.setdefault(id(buffer), (buffer, buffer.to(device)))
                module._buffers[name] = moved[id(buffer)][1]
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                made = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), (parameter, made))[1]  # type: ignore[assignment]


def init_missing(model: nn.Module, missing: Sequence[Weight], dtype: torch.dtype | None) -> None:
    """Make the missing weights real and initialise them as their modules do; they are resident and stay.

    Uses the model's ``_init_weights`` (transformers) if it has one, else the module's ``reset_parameters``.
    """
    modules = dict(model.named_modules())
    initialise: Callable[[nn.Module], object] | None = getattr(model, "_init_weights", None)
    owners: dict[str, nn.Module] = {}
    for weight in missing:
        made = nn.Parameter(
            torch.empty(weight.shape, dtype=bound_dtype(weight.dtype, dtype)),
            requires_grad=weight.requires_grad,
        )
        for use in weight.uses:
            modules[use.module]._parameters[use.local_name] = made
            owners.setdefault(use.module, modules[use.module])
    for name, module in owners.items():
        reset = None if initialise is not None else getattr(module, "reset_parameters", None)
        with torch.no_grad():
            if initialise is not None:
                initialise(module)
            elif reset is not None:
                reset()
            else:
                raise ModelError(
                    "a missing weight cannot be initialised: its module has no reset_parameters()",
                    module=name,
                    cure="Add the weight to the checkpoint, or give the module a reset_parameters method",
                )
