"""A weight that need not be loaded whole: torch asks it, above its decompositions, before it calls a function with it.

What describes the weight is answered at once; what can be done with a part of it is up to the class (a table's rows, a
layer's experts); anything else loads the whole weight and goes on with the real tensor, so that every function runs as
it does for a resident model, to the last bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from odewei.placeholder import Placeholder, with_real

__all__ = ["InParts", "is_watched"]

_DESCRIPTION = """
    __len__ detach device dim dtype element_size get_device grad grad_fn is_complex is_conj is_contiguous is_cpu is_cuda
    is_floating_point is_inference is_leaf is_meta is_mkldnn is_mps is_neg is_nested is_pinned is_quantized is_signed
    is_sparse is_sparse_csr is_xla is_xpu itemsize layout name nbytes ndim ndimension nelement numel output_nr
    requires_grad requires_grad_ retains_grad shape size storage_offset stride
"""


def _functions(name: str) -> Iterator[Any]:
    """What torch calls when a tensor is asked for this: a method, a property's getter and setter, or a function."""
    of_tensor = getattr(torch.Tensor, name)
    yield of_tensor if callable(of_tensor) else of_tensor.__get__
    if name in ("grad", "requires_grad"):
        yield of_tensor.__set__
    function = getattr(torch, name, None)
    if callable(function) and not isinstance(function, type):
        yield function


_ANSWERED = frozenset(function for name in _DESCRIPTION.split() for function in _functions(name))
"""What is answered without loading anything: the weight's description."""


class InParts(Placeholder):
    """``_resident`` returns the real tensor if it is loaded now: the user may have written into it."""

    _resident: Callable[[], nn.Parameter | None]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():  # reading is nothing to be compiled: the graph breaks here
            return torch.compiler.disable(cls._answer)(func, args, kwargs)  # type: ignore[no-untyped-call]
        return cls._answer(func, args, kwargs)

    @classmethod
    def _answer(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        found = cls._from_a_part(func, args, kwargs or {})
        return with_real(func, args, kwargs) if found is None else found

    @classmethod
    @abstractmethod
    def _from_a_part(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The answer from a part of the weight; None: this takes all of it."""


def is_watched() -> bool:
    """Whether somebody records operations, or replaces them: rows that come from nowhere would mislead them."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
