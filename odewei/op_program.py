"""Operations of torch that were noted, and how they are run again. See ``op_tape``, which notes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from odewei.loaders.base import WeightInfo
from odewei.loaders.tensors import contiguous_stride

__all__ = ["Op", "Program", "Read", "Ref", "is_plain", "key_of", "map_tensors", "ref_of", "refs_in", "tensors_in"]

Read = Callable[[WeightInfo], torch.Tensor]
"""Reads one weight as stored, into memory of its own."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor on the tape: where in which memory it is."""

    key: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool  # it covers all of its memory

    @property
    def is_contiguous(self) -> bool:
        return self.stride == contiguous_stride(self.shape) or 0 in self.shape or math.prod(self.shape) == 1


@dataclass(frozen=True, slots=True)
class Op:
    """One call: ``args`` and ``kwargs`` have a ``Ref`` for each tensor on the tape. ``made`` are those of its results
    that are new tensors, by their places among the results.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    made: Mapping[int, Ref]
    fills: int | None  # the memory that is overwritten as a whole


@dataclass(frozen=True, slots=True)
class Program:
    """Computes one tensor of weights of a checkpoint. Independent of the tape; may run in any thread."""

    ops: tuple[Op, ...]
    sources: Mapping[int, WeightInfo]
    constants: Mapping[int, torch.Tensor]
    result: Ref

    def run(self, read: Read) -> torch.Tensor:
        """The tensor, computed anew, in memory of its own. Reads each source once."""
        with torch.inference_mode(False), torch.no_grad():
            memory = {key: read(info).untyped_storage() for key, info in self.sources.items()}
            memory |= {key: tensor.clone().untyped_storage() for key, tensor in self.constants.items()}
            for op in self.ops:
                if op.fills is not None and op.fills not in memory:  # a weight that is written before it is read
                    ref = next(ref for ref in refs_in(op.args) if ref.key == op.fills)
                    memory[op.fills] = torch.empty(ref.shape, dtype=ref.dtype).untyped_storage()
                args = _mapped(op.args, lambda ref: _tensor(ref, memory))
                kwargs = _mapped(op.kwargs, lambda ref: _tensor(ref, memory))
                results = list(tensors_in(op.func(*args, **kwargs)))
                for place, ref in op.made.items():
                    memory[ref.key] = _laid_out_as(results[place], ref).untyped_storage()
            return _tensor(self.result, memory)


def is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def key_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def ref_of(tensor: torch.Tensor) -> Ref:
    shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
    whole = math.prod(shape) * tensor.dtype.itemsize == tensor.untyped_storage().nbytes()
    return Ref(key_of(tensor), tensor.dtype, shape, stride, offset, whole)


def _tensor(ref: Ref, memory: Mapping[int, torch.UntypedStorage]) -> torch.Tensor:
    """The tensor that a reference stands for; of what only its looks count, one without meaning."""
    if ref.key not in memory:
        return torch.empty_strided(ref.shape, ref.stride, dtype=ref.dtype)
    made: torch.Tensor = torch.empty(0, dtype=ref.dtype)
    return made.set_(memory[ref.key], ref.offset, ref.shape, ref.stride)


def _laid_out_as(tensor: torch.Tensor, ref: Ref) -> torch.Tensor:
    """``tensor`` in memory that is laid out as torch said it would be."""
    if tuple(tensor.stride()) == ref.stride and tensor.storage_offset() == ref.offset:
        return tensor
    extent = 1 + sum((size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=True))
    flat = torch.empty(ref.offset + (0 if 0 in ref.shape else extent), dtype=ref.dtype)
    laid_out = flat.as_strided(ref.shape, ref.stride, ref.offset)
    return laid_out.copy_(tensor)


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any], *, device: torch.device | None = None) -> Any:
    """``value`` with ``change`` applied to the tensors in it, and all devices replaced."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, torch.device):
        return value if device is None else device
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(one, change, device=device) for one in value)
    if isinstance(value, dict):
        return {name: map_tensors(one, change, device=device) for name, one in value.items()}
    return value


def _mapped(value: Any, change: Callable[[Ref], torch.Tensor]) -> Any:
    """``value`` with tensors for references, on the CPU."""
    if isinstance(value, Ref):
        return change(value)
    if isinstance(value, torch.device):
        return _CPU
    if isinstance(value, list | tuple):
        return type(value)(_mapped(one, change) for one in value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def refs_in(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from refs_in(one)
    elif isinstance(value, dict):
        yield from refs_in(list(value.values()))
