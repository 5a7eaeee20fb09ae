"""Brings the model's weights and the checkpoint's together, and refuses what does not fit, before the first forward.

Knows names, shapes and dtypes. Reads headers only, and buffers, which are loaded once and stay. Where one tensor has
several names in the checkpoint, the last that ``load_state_dict`` would copy counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from odewei.errors import MissingWeightError, ModelError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.plain_callable import CallableLoader
from odewei.loaders.tensors import is_castable, read_tensor
from odewei.matched_loader import MatchedLoader
from odewei.meta_model import meta_tensors
from odewei.survey import Modules, Weight

__all__ = ["Matched", "SlotNames", "bound_dtype", "init_missing", "load_buffers", "match_weights", "move_to", "unused"]

_BUILD_AS_MADE = (
    'Build the model with the configuration that the checkpoint was made with, or pass on_mismatch="init" to '
    "initialise what has another shape"
)


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
        cure=_BUILD_AS_MADE,
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


# -- buffers -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Buffer:
    """One persistent buffer, as the model was built with it, and all places that have it."""

    built: torch.Tensor
    names: list[str]
    places: list[tuple[nn.Module, str]]


def load_buffers(
    model: nn.Module | Modules,
    source: WeightsLoader | CallableLoader,
    dtype: torch.dtype | None,
    on_missing: str,
    on_mismatch: str = "error",
) -> tuple[str, ...]:
    """Load the persistent buffers for good. Returns the names of those that stay as built.

    As ``load_state_dict`` does, values are copied into the buffer that is there, so that whoever else has it has them
    too; a floating one that the checkpoint has in another floating dtype is replaced, everywhere in the model.
    Nothing is changed before everything is known to fit.

    Raises MissingWeightError for a persistent buffer that the checkpoint lacks (unless ``on_missing`` is "init": then
    it stays as built), WeightMismatchError for another shape (likewise ``on_mismatch``), ModelError for a buffer that
    has no values at all.
    """
    modules = Modules.of(model)
    found, kept = _read_buffers(source, _buffers(modules), dtype, on_missing, on_mismatch)
    with torch.inference_mode(False), torch.no_grad():
        for buffer, tensor in found:
            _fill(buffer, tensor, dtype)
    for name in meta_tensors(modules):
        raise ModelError(
            f"the tensor {name!r} has no values: it was made on the meta device and the checkpoint does not have it",
            weight=name,
            cure="Have model_fn make it on the CPU",
        )
    return kept


def _buffers(modules: Modules) -> list[_Buffer]:
    found: dict[int, _Buffer] = {}
    names = SlotNames(modules.model)
    for _, module in modules.items():
        for name, tensor in module._buffers.items():
            if tensor is not None:
                found.setdefault(id(tensor), _Buffer(tensor, [], [])).places.append((module, name))
    for buffer in found.values():
        buffer.names = names.of(buffer.built)
    return [buffer for buffer in found.values() if buffer.names]


def _read_buffers(
    source: WeightsLoader | CallableLoader,
    buffers: Sequence[_Buffer],
    dtype: torch.dtype | None,
    on_missing: str,
    on_mismatch: str,
) -> tuple[list[tuple[_Buffer, torch.Tensor]], tuple[str, ...]]:
    """The tensors for the buffers that are to be filled, and the names of those that stay as built."""
    if isinstance(source, CallableLoader):
        wanted = {buffer.names[0]: buffer for buffer in buffers}
        answer = source.load("", list(wanted)) if wanted else {}
        loaded = [(buffer, answer[name]) for name, buffer in wanted.items()]
        fitting = [one for one in loaded if _fits(one[0], tuple(one[1].shape), on_mismatch)]
        kept = {id(one[0]) for one in loaded} - {id(one[0]) for one in fitting}
        return fitting, tuple(buffer.names[0] for buffer in buffers if id(buffer) in kept)
    known, lacking, mismatched = source.weights(), [], []
    chosen: list[tuple[_Buffer, WeightInfo]] = []
    for buffer in buffers:
        name = next((name for name in reversed(buffer.names) if name in known), None)
        if name is not None and _fits(buffer, known[name].shape, on_mismatch, known[name]):
            chosen.append((buffer, known[name]))
        elif name is not None:
            mismatched.append(buffer.names[0])
        elif isinstance(source, MatchedLoader) and not source.settled.isdisjoint(buffer.names):
            continue
        elif _said_of(buffer.names, source) is _MISMATCHED:
            assert isinstance(source, MatchedLoader)
            problem = next(source.mismatched[name] for name in buffer.names if name in source.mismatched)
            if on_mismatch == "error":
                raise WeightMismatchError(problem, weight=buffer.names[0], cure=_BUILD_AS_MADE)
            mismatched.append(buffer.names[0])
        else:
            lacking.append(buffer.names[0])
    if lacking and on_missing == "error":
        raise MissingWeightError(
            f"the checkpoint lacks the buffer {lacking[0]!r}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)),
            weight=lacking[0],
            cure='Check that checkpoint and model belong together, or pass on_missing="init" to keep buffers as built',
        )
    return [(buffer, read_tensor(source, info, dtype)) for buffer, info in chosen], (*lacking, *mismatched)


def _fits(buffer: _Buffer, shape: tuple[int, ...], on_mismatch: str, info: WeightInfo | None = None) -> bool:
    if shape == tuple(buffer.built.shape):
        return True
    if on_mismatch == "init":
        return False
    raise WeightMismatchError(
        f"the checkpoint has shape {shape} for a buffer, the model {tuple(buffer.built.shape)}",
        weight=buffer.names[0],
        file=None if info is None else info.file,
        cure=_BUILD_AS_MADE,
    )


def _fill(buffer: _Buffer, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
    built, target = buffer.built, bound_dtype(tensor.dtype, dtype)
    if not (is_castable(target) and is_castable(built.dtype)):
        target = built.dtype  # as copying does: a mask that was stored as numbers is a mask again
    if target == built.dtype and _is_writable(built):
        built.copy_(tensor)
        return
    made = tensor.to(target)
    for module, name in buffer.places:
        module._buffers[name] = made


def _is_writable(tensor: torch.Tensor) -> bool:
    """Whether every element has a place of its own in ordinary memory."""
    if tensor.is_meta or tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    return all(step or size <= 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


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
