"""What code does with tensors of a checkpoint, noted while it runs on tensors without values, and run again on values.

Knows operations of torch and places in checkpoints. Knows nothing of modules.

Each tensor of the checkpoint has a stand-in on the meta device. While an ``OpTape`` is entered, every operation that
reaches one is noted: what it reads, writes and makes, by the memory it is in, so that views and ``.data`` are followed.
Code that asks for values (``.item()``, ``if tensor.any()``, ``torch.equal``, ``.numpy()``) gets them: what was noted so
far is run on the sources, which are read for that moment. Afterwards ``describe`` says what a tensor is: a stretch of
a weight of the checkpoint, several put together, or a ``Program`` that computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from odewei.errors import ModelError
from odewei.loaders.base import Span, WeightInfo, WeightPart
from odewei.loaders.tensors import contiguous_stride, is_castable

__all__ = ["OpTape", "Program", "Read"]

Read = Callable[[WeightInfo], torch.Tensor]
"""Reads one weight as stored, into memory of its own."""

_META, _CPU = torch.device("meta"), torch.device("cpu")
_ASKS_FOR_LOOKS_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones")
_FILLS_ALL = ("copy_", "zero_", "fill_")
_COPIES = ("clone", "_to_copy")


@dataclass(frozen=True, slots=True)
class _Ref:
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
class _Op:
    """One call: ``args`` and ``kwargs`` have a ``_Ref`` for each tensor on the tape. ``made`` are those of its results
    that are new tensors, by their places among the results.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    made: Mapping[int, _Ref]
    fills: int | None  # the memory that is overwritten as a whole


@dataclass(frozen=True, slots=True)
class Program:
    """Computes one tensor of weights of a checkpoint. Independent of the tape; may run in any thread."""

    ops: tuple[_Op, ...]
    sources: Mapping[int, WeightInfo]
    constants: Mapping[int, torch.Tensor]
    result: _Ref

    def run(self, read: Read) -> torch.Tensor:
        """The tensor, computed anew, in memory of its own. Reads each source once."""
        with torch.inference_mode(False), torch.no_grad():
            memory = {key: read(info).untyped_storage() for key, info in self.sources.items()}
            memory |= {key: tensor.clone().untyped_storage() for key, tensor in self.constants.items()}
            for op in self.ops:
                if op.fills is not None and op.fills not in memory:  # a weight that is written before it is read
                    ref = next(ref for ref in _refs(op.args) if ref.key == op.fills)
                    memory[op.fills] = torch.empty(ref.shape, dtype=ref.dtype).untyped_storage()
                args = _mapped(op.args, lambda ref: _tensor(ref, memory))
                kwargs = _mapped(op.kwargs, lambda ref: _tensor(ref, memory))
                results = list(_tensors(op.func(*args, **kwargs)))
                for place, ref in op.made.items():
                    memory[ref.key] = _laid_out_as(results[place], ref).untyped_storage()
            return _tensor(self.result, memory)


class OpTape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter it around the code. ``read`` reads sources where values are asked for. For one thread, once."""

    def __init__(self, read: Read) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read
        self._sources: dict[int, WeightInfo] = {}
        self._constants: dict[int, torch.Tensor] = {}
        self._valueless: dict[int, str] = {}
        self._known: set[int] = set()
        self._made_by: dict[int, _Op] = {}
        self._written: set[int] = set()
        self._ops: list[_Op] = []
        self._kept: list[torch.Tensor] = []  # so that no memory's number comes twice

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what happens meanwhile in this thread."""
        with torch.inference_mode(False), torch.no_grad(), _ToNumpy(self), self:
            yield

    def source(self, info: WeightInfo) -> torch.Tensor:
        """A new stand-in for a weight of the checkpoint."""
        stride = contiguous_stride(info.shape) if info.stride is None else info.stride
        tensor = torch.empty_strided(info.shape, stride, dtype=info.dtype, device=_META)
        self._sources[self._keep(tensor)] = info
        return tensor

    def without_values(self, tensor: torch.Tensor, name: str) -> None:
        """Note a tensor of the model that is on the meta device: code may write to it, not read it."""
        self._valueless[self._keep(tensor)] = name

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on the tape, without values of its own."""
        return _is_plain(tensor) and tensor.is_meta and _key(tensor) in self._known

    def was_written(self, tensor: torch.Tensor) -> bool:
        """Whether the code wrote into the tensor's memory."""
        return _key(tensor) in self._written

    def has_values(self, tensor: torch.Tensor) -> bool:
        """Whether ``value`` can tell them, as far as the tensor is no weight that was left as it was built."""
        return self.has(tensor) and (_key(tensor) not in self._valueless or self.was_written(tensor))

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with the values that it has at this moment."""
        return self._program(_ref(tensor)).run(self._read)

    def describe(self, name: str, tensor: torch.Tensor) -> tuple[WeightInfo, Program | None]:
        """What the tensor is: a place, or what computes it (contiguous, as if it had been copied into the model)."""
        ref = _ref(tensor)
        info = self._place(name, ref)
        if info is not None:
            return info, None
        program = self._program(ref)
        return WeightInfo(name, ref.dtype, ref.shape, None), program

    # -- noting ------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [tensor for tensor in _tensors((args, kwargs)) if _is_plain(tensor)]
        if not any(map(self.has, found)):
            made = func(*args, **kwargs)
            if any(_is_plain(tensor) and tensor.is_meta for tensor in _tensors(made)):
                self._note(func, args, kwargs, made)
            return made
        written = _written_arguments(func, args, kwargs)
        if any(not tensor.is_meta for tensor in written) or torch.Tag.data_dependent_output in func.tags:
            return func(*self._with_values(args), **self._with_values(kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags and not written:
            return func(*self._with_values(args), **self._with_values(kwargs))
        try:
            made = func(*_as_meta(args), **_as_meta(kwargs))
        except Exception:  # torch cannot say what comes out without looking at values
            if written:
                raise
            return func(*self._with_values(args), **self._with_values(kwargs))
        self._note(func, args, kwargs, made)
        return made

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Any) -> None:
        new = {
            place: tensor
            for place, tensor in enumerate(_tensors(made))
            if _is_plain(tensor) and _key(tensor) not in self._known
        }
        written = _written_arguments(func, args, kwargs)
        if not new and not written:
            return  # a view
        looks_only = func.overloadpacket.__name__ in _ASKS_FOR_LOOKS_ONLY
        fills = None
        if func.overloadpacket.__name__ in _FILLS_ALL and written and _ref(written[0]).whole:
            fills = _key(written[0])
        noted_args, noted_kwargs = self._noted(args), self._noted(kwargs)
        reads = [ref.key for ref in _refs((noted_args, noted_kwargs)) if not looks_only]
        for tensor in new.values():
            self._keep(tensor)
        refs = {place: _ref(tensor) for place, tensor in new.items()}
        op = _Op(func, noted_args, noted_kwargs, tuple(reads), tuple(map(_key, written)), refs, fills)
        self._ops.append(op)
        self._written.update(op.writes)
        self._made_by.update({ref.key: op for ref in refs.values()})

    def _noted(self, value: Any) -> Any:
        """Arguments as the tape keeps them: tensors by reference, those that have values copied."""

        def noted(tensor: torch.Tensor) -> object:
            if tensor.is_meta:
                if _key(tensor) not in self._known:
                    self._valueless[self._keep(tensor)] = "a tensor on the meta device"
                return _ref(tensor)
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._constants[self._keep(copied)] = copied
            return _ref(copied)

        return _map_tensors(value, noted)

    def _with_values(self, value: Any) -> Any:
        return _map_tensors(value, lambda tensor: self.value(tensor) if self.has(tensor) else tensor, device=_CPU)

    def _keep(self, tensor: torch.Tensor) -> int:
        key = _key(tensor)
        self._kept.append(tensor)
        self._known.add(key)
        return key

    # -- describing --------------------------------------------------------------------------------------------------

    def _program(self, ref: _Ref) -> Program:
        """What computes a tensor. Raises ModelError if that takes values that nobody has."""
        needed, ops = {ref.key}, []
        for op in reversed(self._ops):
            if needed.isdisjoint(op.writes) and needed.isdisjoint(made.key for made in op.made.values()):
                continue
            ops.append(op)
            if op.fills is not None:
                needed.discard(op.fills)
                reads = [key for key in op.reads if key != op.fills]
            else:
                reads = list(op.reads)
            needed.update(reads)
        lacking = next((self._valueless[key] for key in needed if key in self._valueless), None)
        if lacking is not None:
            raise ModelError(
                "loading a state dictionary into the model needs values that its weights had when it was built, and "
                "it was built without",
                weight=lacking,
                cure="Load the checkpoint once into the ordinary model, and stream what its state_dict() saves",
            )
        sources = {key: self._sources[key] for key in needed if key in self._sources}
        constants = {key: self._constants[key] for key in needed if key in self._constants}
        return Program(tuple(reversed(ops)), sources, constants, ref)

    def _place(self, name: str, ref: _Ref) -> WeightInfo | None:
        """Where the tensor's bytes are in the checkpoint; None if they are not there as they are."""
        if ref.key in self._sources and ref.key not in self._written:
            return _stretch(self._sources[ref.key], ref)
        if not ref.is_contiguous:
            return None
        op = self._made_by.get(ref.key)
        if ref.key in self._valueless:
            op = self._only_writer(ref)
        elif ref.key in self._written:
            op = None
        if op is None or not ref.whole:
            return None
        kind = op.func.overloadpacket.__name__
        if kind in _COPIES and _sizes(op.args[0]) == ref.shape:
            return self._copied(name, op.args[0], ref)
        if kind == "copy_" and op.fills == ref.key and _sizes(op.args[1]) == ref.shape:
            return self._copied(name, op.args[1], ref)
        if kind in ("cat", "stack"):
            return self._gathered(name, op, ref)
        return None

    def _only_writer(self, ref: _Ref) -> _Op | None:
        writers = [op for op in self._ops if ref.key in op.writes]
        return writers[0] if len(writers) == 1 else None

    def _copied(self, name: str, source: _Ref, ref: _Ref) -> WeightInfo | None:
        """Of a copy, where the original is; casts between floating dtypes are left to binding, as of other weights."""
        if source.dtype != ref.dtype and not (is_castable(source.dtype) and is_castable(ref.dtype)):
            return None
        if source.key in self._written or source.key in self._valueless:
            return None  # it may have been another when it was copied
        info = self._place(name, source) if source.is_contiguous else None
        if info is None or source.dtype == ref.dtype or info.wanted is not None:
            return info
        return replace(info, wanted=ref.dtype)

    def _gathered(self, name: str, op: _Op, ref: _Ref) -> WeightInfo | None:
        """Of what ``torch.cat`` and ``torch.stack`` made: which weights go where in it."""
        sources, stacks = op.args[0], op.func.overloadpacket.__name__ == "stack"
        dim = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
        dim %= len(ref.shape)
        rest = (*ref.stride[:dim], *ref.stride[dim + 1 :]) if stacks else ref.stride
        parts, at = [], ref.offset
        for source in sources:
            info = self._place(name, source) if source.is_contiguous else None
            if info is None or info.parts or info.stride is not None or info.dtype != ref.dtype or info.wanted:
                return None
            if len(source.shape) != len(rest):
                return None  # torch.cat takes empty tensors of one dimension with others
            parts.append(WeightPart(info, at, rest))
            at += ref.stride[dim] * (1 if stacks else source.shape[dim])
        return WeightInfo(name, ref.dtype, ref.shape, None, None, tuple(parts))


class _ToNumpy(TorchFunctionMode):
    """Gives values to who asks for an array: torch refuses before any operation is reached."""

    def __init__(self, tape: OpTape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist) and self._tape.has(args[0]):
            args = (self._tape.value(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _stretch(info: WeightInfo, ref: _Ref) -> WeightInfo | None:
    """The part of a weight that a tensor over its memory is; None if that is no stretch of a file."""
    if ref.dtype != info.dtype:
        return None
    stride = contiguous_stride(info.shape) if info.stride is None else info.stride
    if ref.shape == info.shape and ref.stride == stride and not ref.offset:
        return info
    if info.span is None or not ref.is_contiguous:
        return None
    item = info.dtype.itemsize
    span = Span(info.span.file, info.span.offset + ref.offset * item, math.prod(ref.shape) * item)
    return replace(info, shape=ref.shape, span=span, stride=None)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _ref(tensor: torch.Tensor) -> _Ref:
    shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
    whole = math.prod(shape) * tensor.dtype.itemsize == tensor.untyped_storage().nbytes()
    return _Ref(_key(tensor), tensor.dtype, shape, stride, offset, whole)


def _sizes(value: object) -> tuple[int, ...] | None:
    return value.shape if isinstance(value, _Ref) else None


def _tensor(ref: _Ref, memory: Mapping[int, torch.UntypedStorage]) -> torch.Tensor:
    """The tensor that a reference stands for; of what only its looks count, one without meaning."""
    if ref.key not in memory:
        return torch.empty_strided(ref.shape, ref.stride, dtype=ref.dtype)
    made: torch.Tensor = torch.empty(0, dtype=ref.dtype)
    return made.set_(memory[ref.key], ref.offset, ref.shape, ref.stride)


def _laid_out_as(tensor: torch.Tensor, ref: _Ref) -> torch.Tensor:
    """``tensor`` in memory that is laid out as torch said it would be."""
    if tuple(tensor.stride()) == ref.stride and tensor.storage_offset() == ref.offset:
        return tensor
    extent = 1 + sum((size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=True))
    flat = torch.empty(ref.offset + (0 if 0 in ref.shape else extent), dtype=ref.dtype)
    laid_out = flat.as_strided(ref.shape, ref.stride, ref.offset)
    return laid_out.copy_(tensor)


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    if not func._schema.is_mutable:
        return []
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def _as_meta(value: Any) -> Any:
    return _map_tensors(value, lambda tensor: tensor if tensor.is_meta else tensor.to(_META), device=_META)


def _map_tensors(value: Any, change: Callable[[torch.Tensor], Any], *, device: torch.device | None = None) -> Any:
    """``value`` with ``change`` applied to the tensors in it, and all devices replaced."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, torch.device):
        return value if device is None else device
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(one, change, device=device) for one in value)
    if isinstance(value, dict):
        return {name: _map_tensors(one, change, device=device) for name, one in value.items()}
    return value


def _mapped(value: Any, change: Callable[[_Ref], torch.Tensor]) -> Any:
    """``value`` with tensors for references, on the CPU."""
    if isinstance(value, _Ref):
        return change(value)
    if isinstance(value, torch.device):
        return _CPU
    if isinstance(value, list | tuple):
        return type(value)(_mapped(one, change) for one in value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _refs(value: Any) -> Iterator[_Ref]:
    if isinstance(value, _Ref):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _refs(one)
    elif isinstance(value, dict):
        yield from _refs(list(value.values()))
