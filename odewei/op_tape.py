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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from odewei.errors import ModelError
from odewei.loaders.base import Span, WeightInfo, WeightPart
from odewei.loaders.tensors import contiguous_stride, is_castable
from odewei.op_program import Op, Program, Read, Ref, is_plain, key_of, map_tensors, ref_of, refs_in, tensors_in

__all__ = ["OpTape"]

_META, _CPU = torch.device("meta"), torch.device("cpu")
_ASKS_FOR_LOOKS_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones")
_FILLS_ALL = ("copy_", "zero_", "fill_")
_COPIES = ("clone", "_to_copy")


class OpTape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter it around the code. ``read`` reads sources where values are asked for. For one thread, once."""

    def __init__(self, read: Read) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read
        self._sources: dict[int, WeightInfo] = {}
        self._constants: dict[int, torch.Tensor] = {}
        self._valueless: dict[int, str] = {}
        self._known: set[int] = set()
        self._made_by: dict[int, Op] = {}
        self._written: set[int] = set()
        self._ops: list[Op] = []
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
        return is_plain(tensor) and tensor.is_meta and key_of(tensor) in self._known

    def was_written(self, tensor: torch.Tensor) -> bool:
        """Whether the code wrote into the tensor's memory."""
        return key_of(tensor) in self._written

    def has_values(self, tensor: torch.Tensor) -> bool:
        """Whether ``value`` can tell them, as far as the tensor is no weight that was left as it was built."""
        return self.has(tensor) and (key_of(tensor) not in self._valueless or self.was_written(tensor))

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with the values that it has at this moment."""
        return self._program(ref_of(tensor)).run(self._read)

    def describe(self, name: str, tensor: torch.Tensor) -> tuple[WeightInfo, Program | None]:
        """What the tensor is: a place, or what computes it (contiguous, as if it had been copied into the model)."""
        ref = ref_of(tensor)
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
        found = [tensor for tensor in tensors_in((args, kwargs)) if is_plain(tensor)]
        if not any(map(self.has, found)):
            made = func(*args, **kwargs)
            if any(is_plain(tensor) and tensor.is_meta for tensor in tensors_in(made)):
                self._note(func, args, kwargs, made)
            return made
        written = _written_arguments(func, args, kwargs)
        if any(not tensor.is_meta for tensor in written) or torch.Tag.data_dependent_output in func.tags:
            return func(*self._with_values(args), **self._with_values(kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._random(func, args, kwargs, written)
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
            for place, tensor in enumerate(tensors_in(made))
            if is_plain(tensor) and key_of(tensor) not in self._known
        }
        written = _written_arguments(func, args, kwargs)
        if not new and not written:
            return  # a view
        looks_only = func.overloadpacket.__name__ in _ASKS_FOR_LOOKS_ONLY
        fills = None
        if func.overloadpacket.__name__ in _FILLS_ALL and written and ref_of(written[0]).whole:
            fills = key_of(written[0])
        noted_args, noted_kwargs = self._noted(args), self._noted(kwargs)
        reads = [ref.key for ref in refs_in((noted_args, noted_kwargs)) if not looks_only]
        for tensor in new.values():
            self._keep(tensor)
        refs = {place: ref_of(tensor) for place, tensor in new.items()}
        op = Op(func, noted_args, noted_kwargs, tuple(reads), tuple(map(key_of, written)), refs, fills)
        self._ops.append(op)
        self._written.update(op.writes)
        self._made_by.update({ref.key: op for ref in refs.values()})

    def _random(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], written: list[torch.Tensor]) -> Any:
        """Draw random numbers once and for all. What is written to without values has none that could count."""

        def real(tensor: torch.Tensor) -> torch.Tensor:
            if not self.has(tensor):
                return tensor
            if any(tensor is one for one in written) and not self.has_values(tensor):
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            return self.value(tensor)

        real_args, real_kwargs = (map_tensors(one, real, device=_CPU) for one in (args, kwargs))
        made = func(*real_args, **real_kwargs)
        for tensor, drawn in zip(written, _written_arguments(func, real_args, real_kwargs), strict=True):
            self._note(torch.ops.aten.copy_.default, (tensor, drawn), {}, tensor)
        return written[0] if written else made

    def _noted(self, value: Any) -> Any:
        """Arguments as the tape keeps them: tensors by reference, those that have values copied."""

        def noted(tensor: torch.Tensor) -> object:
            if tensor.is_meta:
                if key_of(tensor) not in self._known:
                    self._valueless[self._keep(tensor)] = "a tensor on the meta device"
                return ref_of(tensor)
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._constants[self._keep(copied)] = copied
            return ref_of(copied)

        return map_tensors(value, noted)

    def _with_values(self, value: Any) -> Any:
        return map_tensors(value, lambda tensor: self.value(tensor) if self.has(tensor) else tensor, device=_CPU)

    def _keep(self, tensor: torch.Tensor) -> int:
        key = key_of(tensor)
        self._kept.append(tensor)
        self._known.add(key)
        return key

    # -- describing --------------------------------------------------------------------------------------------------

    def _program(self, ref: Ref) -> Program:
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

    def _place(self, name: str, ref: Ref) -> WeightInfo | None:
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

    def _only_writer(self, ref: Ref) -> Op | None:
        writers = [op for op in self._ops if ref.key in op.writes]
        return writers[0] if len(writers) == 1 else None

    def _copied(self, name: str, source: Ref, ref: Ref) -> WeightInfo | None:
        """Of a copy, where the original is; casts between floating dtypes are left to binding, as of other weights."""
        if source.dtype != ref.dtype and not (is_castable(source.dtype) and is_castable(ref.dtype)):
            return None
        if source.key in self._written or source.key in self._valueless:
            return None  # it may have been another when it was copied
        info = self._place(name, source) if source.is_contiguous else None
        if info is None or source.dtype == ref.dtype or info.wanted is not None:
            return info
        return replace(info, wanted=ref.dtype)

    def _gathered(self, name: str, op: Op, ref: Ref) -> WeightInfo | None:
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


def _stretch(info: WeightInfo, ref: Ref) -> WeightInfo | None:
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


def _sizes(value: object) -> tuple[int, ...] | None:
    return value.shape if isinstance(value, Ref) else None


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    if not func._schema.is_mutable:
        return []
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def _as_meta(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor if tensor.is_meta else tensor.to(_META), device=_META)
