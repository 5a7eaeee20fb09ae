"""Brings the model's weights and the checkpoint's together, and refuses what does not fit, before the first forward.

Knows names, shapes and dtypes. Reads headers only. Where one tensor has several names in the checkpoint, the last that
``load_state_dict`` would copy counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from odewei.errors import MissingWeightError, ModelError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.tensors import is_castable
from odewei.matched_loader import MatchedLoader
from odewei.meta_model import initial_values, is_built_to_be_loaded
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
    if device.type != "cpu":
        with torch.inference_mode(False), torch.no_grad():
            _move_to(model, device)


def _move_to(model: nn.Module | Modules, device: torch.device) -> None:
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
    """Give the missing weights the values that they have in the ordinary model; they are resident and stay.

    Those are what ``model_fn`` gave them. Where a library loads its models without initialising them (transformers) its
    own way of initialising what is missing comes after. A model that was built before, without values, has only that,
    or its modules' ``reset_parameters``.

    Raises ModelError for a weight that gets no values.
    """
    modules = dict(model.named_modules())
    parameters = [_parameter(modules, weight) for weight in missing]
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        values = initial_values(model, parameters)
        unknown = []
        for weight, parameter, value in zip(missing, parameters, values, strict=True):
            wanted = bound_dtype(weight.dtype, dtype)
            if not parameter.is_meta:  # the function took it from elsewhere, with values
                if parameter.dtype != wanted:
                    parameter.data = parameter.data.to(wanted)
                continue
            if value is None:
                unknown.append(weight)
                value = torch.full(weight.shape, math.nan if wanted.is_floating_point else 0, dtype=wanted)
            made = nn.Parameter(value.to(wanted), requires_grad=weight.requires_grad)
            torch._C._swap_tensor_impl(parameter, made)  # whoever has the parameter has the values
        if hasattr(model, "_init_weights") and hasattr(model, "initialize_weights"):
            if unknown or is_built_to_be_loaded(model):
                _initialise_as_transformers(model, {id(parameter) for parameter in parameters})
        else:
            for name in dict.fromkeys(weight.module or "" for weight in unknown):
                getattr(modules[name], "reset_parameters", _nothing)()
        for weight in unknown:
            _check_initialised(weight, _parameter(modules, weight))


def _parameter(modules: Mapping[str, nn.Module], weight: Weight) -> nn.Parameter:
    found = modules[weight.module or ""]._parameters[weight.local_name]
    assert found is not None
    return found


def _initialise_as_transformers(model: Any, missing: Collection[int]) -> None:
    """As its ``from_pretrained`` does with the parameters that a checkpoint lacks: all others are marked as done."""
    marked = [
        tensor
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in missing and not getattr(tensor, "_is_hf_initialized", False)
    ]
    for tensor in marked:
        tensor._is_hf_initialized = True
    for module in model.modules():
        if any(id(parameter) in missing for parameter in module._parameters.values()):
            vars(module).pop("_is_hf_initialized", None)
    try:
        model.initialize_weights()
    finally:
        for tensor in marked:
            del tensor._is_hf_initialized


def _check_initialised(weight: Weight, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or bool(parameter.isnan().any()):
        raise ModelError(
            "a missing weight cannot be initialised: the model was built before, without values, and nothing in it "
            "says which",
            module=weight.module or None,
            weight=weight.name,
            cure="Add the weight to the checkpoint, or have model_fn build the model, not on the meta device",
        )


def _nothing() -> None:
    """For modules without ``reset_parameters``."""
