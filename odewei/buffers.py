"""The persistent buffers of a model: they are loaded once, when it is built, and stay.

Knows modules and loaders. Reads buffers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from odewei.errors import MissingWeightError, ModelError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.plain_callable import CallableLoader
from odewei.loaders.tensors import is_castable, read_tensor
from odewei.matched_loader import MatchedLoader
from odewei.matching import BUILD_AS_MADE, SlotNames, bound_dtype
from odewei.meta_model import meta_tensors
from odewei.survey import Modules

__all__ = ["load_buffers"]


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
        elif isinstance(source, MatchedLoader) and not source.mismatched.keys().isdisjoint(buffer.names):
            problem = next(source.mismatched[name] for name in buffer.names if name in source.mismatched)
            if on_mismatch == "error":
                raise WeightMismatchError(problem, weight=buffer.names[0], cure=BUILD_AS_MADE)
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
        cure=BUILD_AS_MADE,
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
