"""What a function of torch does that is called with a placeholder: answered at once, from a part, or with real tensors.

What describes the weight is answered without loading anything; what can be done with a part of it is up to its kind (a
table's rows, a layer's experts); anything else loads the whole weight and goes on with the real tensor. torch asks
above its own decompositions (``__torch_function__``); where Python was passed by, it asks once more below autograd
(``__torch_dispatch__``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from odewei.placeholder import Home, Placeholder, become
from odewei.real import constant, in_graph
from odewei.uncompiled import uncompiled

__all__ = ["answer", "answer_below_autograd", "is_watched", "with_real"]

_DESCRIPTION = """
    __len__ _backward_hooks _base _grad _is_view _post_accumulate_grad_hooks backward device dim dtype element_size
    get_device grad grad_fn is_complex is_conj is_contiguous is_cpu is_cuda is_floating_point is_inference is_leaf
    is_meta is_mkldnn is_mps is_neg is_nested is_pinned is_quantized is_signed is_sparse is_sparse_csr is_xla is_xpu
    itemsize layout name nbytes ndim ndimension nelement numel output_nr register_hook
    register_post_accumulate_grad_hook requires_grad retain_grad retains_grad shape size storage_offset stride
    _use_count
"""

_SETTERS = ("grad", "_grad", "_backward_hooks", "_post_accumulate_grad_hooks")


def _functions(name: str) -> Iterator[Any]:
    """What torch calls when a tensor is asked for this: a method, a property's getter and setter, or a function."""
    of_tensor = getattr(torch.Tensor, name, None)
    if of_tensor is None:
        return
    yield of_tensor if callable(of_tensor) else of_tensor.__get__
    if name in _SETTERS:
        yield of_tensor.__set__
        yield of_tensor.__delete__
    function = getattr(torch, name, None)
    if callable(function) and not isinstance(function, type):
        yield function


_ANSWERED = frozenset(
    [function for name in _DESCRIPTION.split() for function in _functions(name)]
    + [torch._has_compatible_shallow_copy_type, torch.autograd.grad, torch.autograd.backward]
)
"""What is answered without loading anything: the weight's description, and what hangs on the parameter."""


_DETACH = frozenset([torch.Tensor.detach, torch.detach])
_POINTERS = frozenset(
    getattr(torch.Tensor, name) for name in ("_typed_storage", "data_ptr", "storage", "untyped_storage")
)
"""What tells where the memory is: it has to stay there as long as the one who was asked lives."""

_EXPORTS = frozenset(getattr(torch.Tensor, name) for name in ("__array__", "__dlpack__", "numpy", "share_memory_"))
"""What hands memory out that may be written into without torch."""

_IN_PLACE = frozenset(
    f"__{name}__"
    for name in [
        "setitem",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "imatmul",
        "ilshift",
        "irshift",
    ]
)


def answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What ``func`` returns; at least one of its arguments is a placeholder."""
    if func in _ANSWERED:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in _DETACH and isinstance(args[0], Placeholder):
        return args[0].detach()
    if torch.compiler.is_compiling():  # reading is nothing to be compiled: the graph breaks here
        return torch.compiler.disable(_answer)(func, args, kwargs)  # type: ignore[no-untyped-call]
    return _answer(func, args, kwargs)


@uncompiled
def _answer(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if func is torch.Tensor.view_as and args[0] is args[1]:  # how torch finds where gradients are accumulated
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args)
    if func == _VERSION:
        return _version(args[0])
    if func in _POINTERS:
        return func(args[0].content(), *args[1:], **kwargs)
    if func in _EXPORTS:
        return func(args[0].exported(), *args[1:], **kwargs)
    for argument in (*args, *kwargs.values()):
        part = argument.home.part if isinstance(argument, Placeholder) else None
        if part is not None:
            found = part.answer(argument, func, args, kwargs)
            if found is not None:
                return found
    return with_real(func, args, kwargs)


_VERSION = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def _version(placeholder: Placeholder) -> int:
    real = placeholder.home.stream.resident(placeholder.home)
    return 0 if real is None else real._version


@uncompiled
def answer_below_autograd(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The same for an operation that autograd has seen already."""
    if func is torch.ops.aten.detach.default:
        return args[0].detach()
    written = [one.home for one in _written(func, args, kwargs)]
    return _call_leased(func, args, dict(kwargs), sys._getframe(), below_autograd=written)


def with_real(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call ``func`` with the real tensor in place of every placeholder, loaded if need be and leased until it ends."""
    return _call_leased(func, args, dict(kwargs), sys._getframe())


def _call_leased(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    frame: FrameType,
    below_autograd: list[Home] | None = None,
) -> Any:
    """``frame`` is the caller's, at whose end the leases end: a frame that held itself would keep the tensors until the
    collector comes by.
    """
    writes = bool(below_autograd) or _writes(func, kwargs)
    call = _Call(frame, writes=writes, graph=below_autograd is None and torch.is_grad_enabled() and not writes)
    try:
        args, kwargs = tree_map_only(Placeholder, call.real, args), tree_map_only(Placeholder, call.real, kwargs)
        with call.saving():
            found = func(*args, **kwargs)
        for home in below_autograd or ():
            torch.autograd.graph.increment_version(call.tensors[id(home)])
        return call.given_back(found)
    finally:
        call.end()


class _Call:
    """The real tensors of one call."""

    def __init__(self, frame: FrameType, *, writes: bool, graph: bool) -> None:
        """``writes``: into its arguments. ``graph``: gradients are computed for placeholders."""
        self._frame, self._writes, self._graph = frame, writes, graph
        self._releases: list[Callable[[], None]] = []
        self._homes: list[Home] = []
        self._stood_for: list[tuple[Placeholder, torch.Tensor, tuple[Any, ...]]] = []
        self._before: list[torch.Tensor | None] = []  # what each had the memory of, if it may lose it
        self.tensors: dict[int, torch.Tensor] = {}  # by the number of their home

    def saving(self) -> AbstractContextManager[object]:
        """What autograd saves of weights meanwhile are references."""
        if not self._graph or not self._stood_for:
            return nullcontext()
        return self._stood_for[0][0].home.stream.saved.during()

    def real(self, placeholder: Placeholder) -> torch.Tensor:
        """What stands for it in the call."""
        for known, tensor, _ in self._stood_for:
            if known is placeholder:
                return tensor
        if placeholder.is_of_state and not self._writes:
            return placeholder.content()
        tensor, release = placeholder.lease(self._frame)
        self._releases.append(release)
        self._homes.append(placeholder.home)
        self.tensors[id(placeholder.home)] = tensor
        tensor = self._as_seen(placeholder, tensor)
        self._stood_for.append((placeholder, tensor, _metadata(tensor)))
        self._before.append(tensor.detach() if self._writes and placeholder.is_owner else None)
        return tensor

    def _as_seen(self, placeholder: Placeholder, tensor: torch.Tensor) -> torch.Tensor:
        if not self._writes and torch._C._get_tracing_state() is not None:
            return constant(tensor)
        if placeholder.requires_grad and not self._writes and (self._graph or torch._C._is_any_autocast_enabled()):
            return in_graph([placeholder], [tensor])[0]
        if placeholder.requires_grad == tensor.requires_grad:
            return tensor if placeholder.is_owner else tensor.detach().requires_grad_(tensor.requires_grad)
        return tensor.detach().requires_grad_(placeholder.requires_grad)

    def given_back(self, found: Any) -> Any:
        """What the call returns: a placeholder where it returns what it was given in its place."""
        for (placeholder, tensor, before), memory in zip(self._stood_for, self._before, strict=True):
            if _metadata(tensor) != before:  # set_, resize_, t_ and their like: not what is in the file any more
                if memory is not None:
                    placeholder.home.stream.put_back(placeholder.home, memory)
                become(placeholder, tensor)
        if isinstance(found, torch.Tensor):
            return self._given_back(found)
        if type(found) in (list, tuple):
            return type(found)(self._given_back(one) for one in found)
        return found

    def _given_back(self, found: Any) -> Any:
        return next((placeholder for placeholder, tensor, _ in self._stood_for if tensor is found), found)

    def end(self) -> None:
        for release in reversed(self._releases):
            release()
        written = self._homes if self._writes else []
        self._stood_for.clear()
        self._before.clear()
        self.tensors.clear()
        for home in written:
            home.stream.wrote(home)


def _metadata(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return ()
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset(), tensor.untyped_storage()._cdata


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function is one that writes into its arguments, by torch's way of naming them."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or kwargs.get("out") is not None


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Placeholder]:
    """The placeholders that an operation below autograd writes into: there torch does not count writes any more."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            values = value if isinstance(value, list | tuple) else (value,)
            yield from (one for one in values if isinstance(one, Placeholder))


def is_watched() -> bool:
    """Whether somebody records operations, or replaces them: rows that come from nowhere would mislead them."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
