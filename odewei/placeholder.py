"""A parameter whose bytes are elsewhere: one object for its whole life, whatever is in memory.

It is the parameter of the model: what ``module.weight`` is outside of forward passes, what ``parameters()`` yields,
what an optimizer keeps, what gradients are accumulated in. It has shape, dtype, device, ``requires_grad``, ``grad`` and
hooks, and no storage. Whatever else is done with it is done with the *real* tensor, loaded if need be (see
``substitution``): above torch's own decompositions, so that every function runs as it does for a resident model, to
the last bit.

What the user does to it that bytes in a file cannot follow (``.data = ...``, ``set_``, ``swap_tensors``) makes it an
ordinary parameter, the same object still: see ``become``.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from odewei.copies import Skeleton
from odewei.saved_weights import SavedWeights
from odewei.uncompiled import uncompiled

__all__ = ["Home", "Placeholder", "Stream", "become", "become_resident", "same_memory", "take_over", "with_dtype"]


class Stream(Protocol):
    """What the weights of one model come from. Whoever holds it keeps it alive; any thread calls it."""

    def lease(self, home: Home, frame: FrameType) -> tuple[torch.Tensor, Callable[[], None]]:
        """Load the real tensor if need be, and lease its unit for the call that runs in ``frame``.

        What is returned second returns the lease: until then the unit stays, and what is written into the tensor is
        noticed.
        """

    def resident(self, home: Home) -> torch.Tensor | None:
        """The real tensor if it is in memory; the reference keeps it."""

    def is_inside(self) -> bool:
        """Whether this thread is inside a forward pass."""

    def flag_changed(self, home: Home, requires_grad: bool) -> None:
        """The parameter was frozen or unfrozen."""

    def becomes_own(self, home: Home, nbytes: int) -> None:
        """The parameter is about to become an ordinary one of so many bytes: the user's own."""

    def moved(self, home: Home) -> None:
        """The parameter was put into a module, or taken out of one."""

    def wrote(self, home: Home) -> None:
        """Something that writes was called with the parameter, and has ended."""

    def is_edited(self) -> bool:
        """Whether somebody edits the model (see ``edit``)."""

    def put_back(self, home: Home, tensor: torch.Tensor) -> None:
        """``tensor`` is over the weight's memory, from which a function has taken the real tensor away."""

    def expose(self, home: Home) -> torch.Tensor:
        """The real tensor, loaded if need be, for whoever may write into its memory without torch."""

    @property
    def saved(self) -> SavedWeights:
        """The hooks for what autograd saves."""

    @property
    def runtime(self) -> Any:
        """The streamed model that it is of."""

    def kept_state(self, home: Home) -> torch.Tensor | None:
        """As ``saved_state``, if that has to be there before anybody saves over the checkpoint; None otherwise."""

    def saved_state(self, home: Home) -> torch.Tensor | None:
        """The weight as it is in the checkpoint, in memory that is not the budget's and stays where it is; None where
        it was written to.
        """


class Home:
    """Where one weight belongs: its unit and its name in the checkpoint. ``part``: what reads parts of it, if any.

    ``owner`` is the number (``id``) of the one object that is the parameter; others, the ``aliases``, are made of it.
    """

    __slots__ = ("_aliases", "name", "owner", "part", "stream", "unit")

    def __init__(self, stream: Stream, unit: int, name: str, part: Any = None) -> None:
        self.stream, self.unit, self.name, self.part = stream, unit, name, part
        self.owner = 0
        self._aliases: weakref.WeakValueDictionary[int, Placeholder] | None = None  # most weights never have one

    def add_alias(self, alias: Placeholder) -> None:
        """Another object than the parameter stands for the weight."""
        if self._aliases is None:
            self._aliases = weakref.WeakValueDictionary()
        self._aliases[id(alias)] = alias

    def aliases(self) -> list[Placeholder]:
        """Those that are left."""
        return [] if self._aliases is None else list(self._aliases.values())

    def __repr__(self) -> str:
        return f"<Home of {self.name!r}, unit {self.unit}>"


class Placeholder(torch.Tensor):
    """A parameter of a streamed model, or what ``detach`` and ``.data`` make of one. Made by ``take_over``."""

    home: Home
    _is_param = True  # an nn.Parameter to isinstance

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        from odewei.substitution import answer  # it needs this class

        return answer(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        from odewei.substitution import answer_below_autograd

        return answer_below_autograd(func, args, kwargs or {})

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def is_owner(self) -> bool:
        """Whether this object is the model's parameter, and not something made of it."""
        return self.home.owner == id(self)

    @property
    def is_of_state(self) -> bool:
        """Whether ``state_dict()`` has made it."""
        return "_for_state" in self.__dict__

    @property
    def requires_grad(self) -> bool:
        return torch.Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.requires_grad.__set__(self, value)  # type: ignore[attr-defined]
        if self.is_owner:
            self.home.stream.flag_changed(self.home, bool(value))

    def requires_grad_(self, requires_grad: bool = True) -> Placeholder:
        self.requires_grad = requires_grad
        return self

    @uncompiled
    def detach(self) -> torch.Tensor:
        """Something without gradients over the same weight; loads nothing."""
        return self._alias(for_state=sys._getframe(1).f_code is _SAVES_STATE)

    @property
    def data(self) -> torch.Tensor:
        """As ``detach``: what is written into it is noticed, because both count writes together."""
        return self._alias()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, Placeholder) and value.home is self.home:
            return
        real = self.home.stream.resident(self.home)
        if real is not None and same_memory(real, value):
            return  # it was written into, which the real tensor has counted
        if self._takes_values_of(value):
            with torch.no_grad():
                self.detach().copy_(value)
            return
        become(self, value.fetch().clone() if isinstance(value, Placeholder) else value)

    def _takes_values_of(self, value: torch.Tensor) -> bool:
        """Whether the weight gets the values and streams on: while the model is edited, if they are of its kind."""
        like = value.shape == self.shape and value.dtype == self.dtype and value.layout is torch.strided
        return like and self.is_owner and self.home.stream.is_edited()

    def _alias(self, *, for_state: bool = False) -> Placeholder:
        with torch.inference_mode(False), torch.no_grad():
            made: Placeholder = _wrapper(type(self), self, False)  # type: ignore[assignment]
        made.__dict__.update(home=self.home, _is_param=False)
        if for_state:
            made.__dict__["_for_state"] = True
            made.__dict__["_mapped"] = self.home.stream.kept_state(self.home)
        self.home.add_alias(made)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and self.is_owner:  # torch.utils.swap_tensors
            self.home.stream.becomes_own(self.home, 0)
        super().__setattr__(name, value)

    # -- its values --------------------------------------------------------------------------------------------------

    def fetch(self) -> torch.Tensor:
        """The real tensor, loaded now if need be; the reference keeps it."""
        tensor, release = self.lease(sys._getframe())
        release()
        return tensor

    def lease(self, frame: FrameType) -> tuple[torch.Tensor, Callable[[], None]]:
        """See :meth:`Stream.lease`."""
        return self.home.stream.lease(self.home, frame)

    def exported(self) -> torch.Tensor:
        """For whoever may write into its memory without torch: what is written is noticed when the unit is to leave."""
        if self.is_of_state:
            return self.content()
        exposed = self.home.stream.expose(self.home)
        return exposed if self.is_owner else exposed.detach().requires_grad_(self.requires_grad)

    def content(self) -> torch.Tensor:
        """What is pickled, exported, or looked at without torch: its memory stays where it is while this lives.

        What ``state_dict()`` made has it outside of the budget, as long as the weight is as in the checkpoint.
        """
        if self.is_of_state:
            found = self.home.stream.saved_state(self.home)
            if found is not None:
                self.__dict__["_mapped"] = found  # as long as this lives
                return found
        exposed: torch.Tensor | None = self.__dict__.get("_exposed")
        if exposed is None:
            exposed = self.__dict__["_exposed"] = self.home.stream.expose(self.home).detach()
        return exposed

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Within a copy of the whole model what stands for the weight there; otherwise a tensor with its values."""
        if id(self) not in memo:
            skeleton = Skeleton.found_in(memo, self.home.stream)
            if skeleton is not None and self.is_owner:
                memo[id(self)] = skeleton.parameter(self)
            else:
                memo[id(self)] = self._copied(memo)
        found: torch.Tensor = memo[id(self)]
        return found

    def _copied(self, memo: dict[Any, Any]) -> torch.Tensor:
        """An ordinary parameter with the values; or a tensor, which shares its memory with others that are copied of
        the same weight, as copies of ordinary tensors do.
        """
        kept = None if self._is_param else memo.get(self.home)
        if kept is not None:
            return kept.detach()  # type: ignore[no-any-return]
        with torch.no_grad():
            values = self.fetch().detach().clone()
        if self._is_param:
            return nn.Parameter(values, requires_grad=self.requires_grad)
        memo[self.home] = values
        return values

    def __reduce_ex__(self, protocol: Any) -> Any:
        content = self.content().detach()
        if self._is_param:
            content = nn.Parameter(content, requires_grad=self.requires_grad)
        return content.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "Parameter" if self._is_param else "tensor"
        flag = ", requires_grad=True" if self.requires_grad else ""
        return f"{kind}({self.home.name!r}, {tuple(self.shape)}, {self.dtype}{flag}, on demand)"


_SAVES_STATE = nn.Module._save_to_state_dict.__code__


def _wrapper(
    kind: type[Placeholder], like: torch.Tensor, requires_grad: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor without storage. To be called without gradients and outside of inference mode."""
    with torch._C.DisableTorchFunctionSubclass():
        shape, stride, device = like.shape, like.stride(), like.device
        made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
            kind, shape, strides=stride, dtype=dtype or like.dtype, device=device, requires_grad=requires_grad
        )
    return made


def take_over(
    kind: type[Placeholder],
    parameter: nn.Parameter,
    home: Home,
    dtype: torch.dtype,
    stride: tuple[int, ...] | None,
    device: torch.device,
) -> None:
    """Make a parameter without values, for all who have it, one that is streamed.

    ``dtype`` and ``stride`` (None: contiguous) are those it will have when it is loaded. To be called without gradients
    and outside of inference mode.
    """
    made: Any = torch.Tensor._make_wrapper_subclass(
        kind, parameter.shape, strides=stride, dtype=dtype, device=device, requires_grad=parameter.requires_grad
    )
    _swap(parameter, made)
    object.__setattr__(made, "__class__", nn.Parameter)  # it dies now
    parameter.__class__ = kind  # type: ignore[assignment]
    home.owner = id(parameter)
    # A small dictionary of its own: one that shares its keys with those of the class takes twice the room.
    parameter.__dict__ = {**parameter.__dict__, "home": home}


def with_dtype(placeholder: Placeholder, dtype: torch.dtype) -> None:
    """The weight turned out to have another dtype than was known before it was loaded."""
    with torch.inference_mode(False), torch.no_grad():
        made = _wrapper(type(placeholder), placeholder, placeholder.requires_grad, dtype)
        _swap(placeholder, made)


def become(placeholder: Placeholder, value: torch.Tensor) -> None:
    """Make it an ordinary parameter (or tensor, if it is not a parameter) over the memory of ``value``, for all who
    have it: from now on it is the user's own and not streamed. What was made of it goes on as it was, as when torch
    gives a parameter other data.
    """
    home, is_owner, is_param = placeholder.home, placeholder.is_owner, placeholder._is_param
    requires_grad = placeholder.requires_grad and (value.is_floating_point() or value.is_complex())
    shape, dtype = placeholder.shape, placeholder.dtype
    with torch._C.DisableTorchFunctionSubclass():
        grad, hooks = placeholder.grad, placeholder._backward_hooks
        after = getattr(placeholder, "_post_accumulate_grad_hooks", None)
    with torch.inference_mode(False), torch.no_grad():
        own: torch.Tensor = torch.Tensor._make_subclass(nn.Parameter, value.detach(), requires_grad)
        if grad is not None:  # which stays what it is, as when torch gives a parameter other data
            own = nn.Parameter(torch.zeros(1, dtype=dtype, device=value.device).expand(shape), requires_grad)
            own.grad = grad
            own.data = value.detach()
    if is_owner:
        home.stream.becomes_own(home, value.nbytes)
    kept = {key: found for key, found in placeholder.__dict__.items() if key not in _OURS}
    in_graphs = placeholder._use_count() > 1  # type: ignore[attr-defined]
    torch.Tensor.__setattr__(placeholder, "__class__", nn.Parameter if is_param else torch.Tensor)
    _swap(placeholder, own)
    if in_graphs and own.is_leaf and own.requires_grad:
        own.register_post_accumulate_grad_hook(functools.partial(_hand_on, placeholder))  # type: ignore[no-untyped-call]
    placeholder.__dict__.clear()
    placeholder.__dict__.update(kept)
    if hooks:
        placeholder._backward_hooks = hooks
    if after:
        placeholder._post_accumulate_grad_hooks = after


def become_resident(placeholder: Placeholder) -> None:
    """As ``become``, with the weight's own values: what was made of it shares their memory, as it did."""
    home = placeholder.home
    become(placeholder, placeholder.fetch().detach().clone())
    for alias in home.aliases():
        if type(alias) is Placeholder:
            become(alias, placeholder)


_OURS = frozenset({"home", "_is_param", "_for_state", "_exposed", "_mapped"})


def _hand_on(parameter: torch.Tensor, before: torch.Tensor) -> None:
    """A graph that was made before still accumulates gradients in what the parameter was."""
    grad, before.grad = before.grad, None
    if grad is not None and grad.shape == parameter.shape:
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """Swap what two objects are, below Python. Weak references stay what they were: unlike for
    ``torch.utils.swap_tensors``, the object means the same as before.
    """
    torch._C._swap_tensor_impl(one, other)


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two ordinary tensors are the same elements of the same memory, seen the same way."""
    return (
        not isinstance(other, Placeholder)
        and one.dtype == other.dtype
        and one.device == other.device
        and one.shape == other.shape
        and one.layout == other.layout == torch.strided
        and one.stride() == other.stride()
        and one.data_ptr() == other.data_ptr()
        and one.numel() > 0
    )
