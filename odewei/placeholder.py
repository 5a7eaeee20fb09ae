"""A parameter whose bytes are elsewhere: shape, dtype, device and ``requires_grad`` without storage.

It is what *iterating* the parameters of a streamed model yields (``parameters()``, ``named_parameters()``), so that
code that asks a model for its device or dtype hears the truth and loads nothing. It is an ``nn.Parameter`` to
``isinstance``. An operation that reaches it loads the weight and goes on with the real tensor.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol, Self

import torch
from torch.utils._pytree import tree_map_only

from odewei.copies import Skeleton

__all__ = ["Origin", "Placeholder", "with_real"]

_CPU = torch.device("cpu")


class Origin(Protocol):
    """Who has the real tensors. Any thread calls it."""

    def lease(self, unit: int, name: str, frame: FrameType) -> tuple[torch.Tensor, Callable[[], None]]:
        """Load the real tensor if need be, and lease its unit for the call that runs in ``frame``.

        What is returned second returns the lease: until then the unit stays, and what is written into the tensor is
        noticed.
        """


class Placeholder(torch.Tensor):
    """Made with :meth:`make`. ``weight_name`` is the checkpoint's name of the weight, ``unit`` the unit it is in."""

    unit: int
    weight_name: str
    _origin: weakref.ref[Origin]
    _is_param = True

    @classmethod
    def make(
        cls,
        unit: int,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        stride: tuple[int, ...] | None,
        origin: weakref.ref[Origin],
        device: torch.device = _CPU,
    ) -> Self:
        """``origin`` is asked when an operation needs the values, which are on ``device`` then."""
        with torch.inference_mode(False), torch.no_grad():
            return cls.make_inside(unit, name, shape, dtype, stride, origin, device)

    @classmethod
    def make_inside(
        cls,
        unit: int,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        stride: tuple[int, ...] | None,
        origin: weakref.ref[Origin],
        device: torch.device,
    ) -> Self:
        """``make``, for whoever makes many: to be called without gradients and outside of inference mode."""
        kind = _Compact if cls is Placeholder else cls
        made: Any = torch.Tensor._make_wrapper_subclass(
            kind, shape, strides=stride, dtype=dtype, device=device, requires_grad=False
        )
        made.unit, made.weight_name, made._origin = unit, name, origin
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return _Detached.of(args[0])
        return with_real(func, args, kwargs)

    def replace(self, parameter: torch.nn.Parameter) -> None:
        """Make the object that is a parameter without values be like this one, for all who have it.

        Raises RuntimeError if somebody has a weak reference to it.
        """
        made = _Aside.make(
            self.unit,
            self.weight_name,
            tuple(self.shape),
            self.dtype,
            tuple(self.stride()),
            self._origin,
            self.device,
        )
        torch.utils.swap_tensors(parameter, made)  # type: ignore[no-untyped-call]

    @property
    def is_detached(self) -> bool:
        """Whether this is what ``detach`` makes of a parameter: no parameter, and as little loaded."""
        return not self._is_param

    def fetch(self) -> torch.Tensor:
        """The real tensor, loaded now if need be."""
        tensor, release = self.lease(sys._getframe())
        release()
        return tensor

    def lease(self, frame: FrameType) -> tuple[torch.Tensor, Callable[[], None]]:
        """See :meth:`Origin.lease`."""
        origin = self._origin()
        if origin is None:
            raise ReferenceError(f"the model of weight {self.weight_name!r} is gone")
        return origin.lease(self.unit, self.weight_name, frame)

    def numpy(self, *, force: bool = False) -> Any:
        return self.fetch().detach().numpy(force=force)

    def tolist(self) -> Any:
        return self.fetch().tolist()

    def data_ptr(self) -> int:
        return self.fetch().data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """Within a copy of the whole model what stands for the weight there; otherwise a parameter with its values."""
        if id(self) not in memo:
            skeleton = Skeleton.found_in(memo, self._origin())
            memo[id(self)] = (
                torch.nn.Parameter(self.fetch().detach().clone(), requires_grad=False)
                if skeleton is None
                else skeleton.parameter(self.unit, self.weight_name)
            )
        found: torch.nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        real = torch.nn.Parameter(self.fetch().detach().clone(), requires_grad=False)
        return real.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.weight_name!r}, {tuple(self.shape)}, {self.dtype}, on demand)"


class _Compact(Placeholder):
    """Nearly all: without a dictionary each."""

    __slots__ = ("_origin", "unit", "weight_name")


class _Aside(Placeholder):
    """What a parameter becomes that the model keeps somewhere else, too: laid out in memory as parameters are."""


class _Detached(Placeholder):
    """What ``detach`` makes: not a parameter any more."""

    _is_param = False

    @classmethod
    def of(cls, placeholder: Placeholder) -> _Detached:
        shape, stride = tuple(placeholder.shape), tuple(placeholder.stride())
        unit, name, origin = placeholder.unit, placeholder.weight_name, placeholder._origin
        return cls.make(unit, name, shape, placeholder.dtype, stride, origin, placeholder.device)


def with_real(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    """Call ``func`` with the real tensor in place of every placeholder, loaded if need be and leased until it ends."""
    return _call_leased(func, args, dict(kwargs or {}), sys._getframe())


def _call_leased(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> Any:
    """``frame`` is the caller's, at whose end the leases end: a frame that held itself would keep the tensors until the
    collector comes by.
    """
    releases: list[Callable[[], None]] = []

    def real(placeholder: Placeholder) -> torch.Tensor:
        tensor, release = placeholder.lease(frame)
        releases.append(release)
        return tensor

    written = list(_written(func, args, kwargs))
    try:
        args = tree_map_only(Placeholder, real, args)
        found = func(*args, **tree_map_only(Placeholder, real, kwargs))
        for placeholder in written:
            torch.autograd.graph.increment_version(real(placeholder))
        return found
    finally:
        for release in reversed(releases):
            release()


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
