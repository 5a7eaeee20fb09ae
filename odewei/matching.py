"""Brings the model's weights and the checkpoint's together, and refuses what does not fit, before the first forward.

Knows names, shapes and dtypes. Reads headers only, and buffers, which are loaded once and stay.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from odewei.errors import MissingWeightError, ModelError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.plain_callable import CallableLoader
from odewei.loaders.tensors import is_castable, read_tensor
from odewei.meta_model import initial_values, is_built_to_be_loaded, meta_tensors
from odewei.survey import Modules, Weight

__all__ = ["Matched", "bound_dtype", "init_missing", "load_buffers", "match_weights", "move_to"]


@dataclass(frozen=True, slots=True)
class Matched:
    """What was found for the model: each weight's place by the weight's own name, among others that the checkpoint has,
    and the weights that are missing.
    """

    infos: Mapping[str, WeightInfo]
    missing: tuple[Weight, ...]


def bound_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that a weight is bound with: only floating ones of at least 16 bits are cast, all others stay
    verbatim.
    """
    return wanted if wanted is not None and is_castable(stored) else stored


def match_weights(weights: Sequence[Weight], loader: WeightsLoader, on_missing: str) -> Matched:
    """Find each weight in the checkpoint under any of its names.

    Raises WeightMismatchError if shape or kind of dtype differ, MissingWeightError unless ``on_missing`` is "init".
    """
    known = loader.weights()
    renamed: dict[str, WeightInfo] = {}
    missing = []
    for weight in weights:
        info = known.get(weight.name)
        if info is None:
            alias = next((name for name in weight.aliases if name in known), None)
            if alias is None:
                missing.append(weight)
                continue
            info = renamed[weight.name] = known[alias]
        _check_fits(weight, info)
    if missing and on_missing == "error":
        raise _missing(missing, known)
    return Matched(known if not renamed else {**known, **renamed}, tuple(missing))


def _check_fits(weight: Weight, info: WeightInfo) -> None:
    module = weight.module or None
    if info.shape != weight.shape:
        raise WeightMismatchError(
            f"the checkpoint has shape {info.shape}, the model {weight.shape}",
            module=module,
            weight=info.name,
            file=info.file,
            cure="Build the model with the configuration that the checkpoint was made with",
        )
    interchangeable = is_castable(info.dtype) and is_castable(weight.dtype)
    if info.dtype != weight.dtype and not interchangeable:
        raise WeightMismatchError(
            f"the checkpoint has {info.dtype}, the model {weight.dtype}, and neither can stand for the other",
            module=module,
            weight=info.name,
            file=info.file,
            cure="Build the model as the checkpoint was made (a quantised checkpoint needs its quantised modules)",
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


def load_buffers(
    model: nn.Module | Modules, source: WeightsLoader | CallableLoader, dtype: torch.dtype | None, on_missing: str
) -> None:
    """Load the persistent buffers for good, in place of those the model was built with.

    Raises MissingWeightError for a persistent buffer that the checkpoint lacks (unless ``on_missing`` is "init": then
    it stays as built), WeightMismatchError for another shape, ModelError for a buffer that has no values at all.
    """
    modules = Modules.of(model)
    wanted = {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in modules.items()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    for full_name, tensor in _read_buffers(source, wanted, dtype, on_missing).items():
        module, name = wanted[full_name]
        built = module._buffers[name]
        assert built is not None
        if tensor.shape != built.shape:
            raise WeightMismatchError(
                f"the checkpoint has shape {tuple(tensor.shape)} for a buffer, the model {tuple(built.shape)}",
                weight=full_name,
                cure="Build the model with the configuration that the checkpoint was made with",
            )
        module._buffers[name] = tensor.to(bound_dtype(tensor.dtype, dtype))
    for name in meta_tensors(modules):
        raise ModelError(
            f"the tensor {name!r} has no values: it was made on the meta device and the checkpoint does not have it",
            weight=name,
            cure="Have model_fn make it on the CPU",
        )


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


def _read_buffers(
    source: WeightsLoader | CallableLoader, wanted: Mapping[str, object], dtype: torch.dtype | None, on_missing: str
) -> dict[str, torch.Tensor]:
    if isinstance(source, CallableLoader):
        return dict(source.load("", list(wanted))) if wanted else {}
    found = source.locate(wanted)
    lacking = [name for name in wanted if name not in found]
    if lacking and on_missing == "error":
        raise MissingWeightError(
            f"the checkpoint lacks the buffer {lacking[0]!r}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)),
            weight=lacking[0],
            cure='Check that checkpoint and model belong together, or pass on_missing="init" to keep buffers as built',
        )
    return {name: read_tensor(source, info, dtype) for name, info in found.items()}


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
