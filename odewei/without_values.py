"""What torch's functions do to large tensors while a model is built: they get no values, and a tape notes what they
would have got.

A factory of more than so many elements makes a tensor on the meta device. Functions that are called with it compute
shapes only, and fills cost nothing. It says that it is on the CPU. Where the values themselves matter (``item``,
``bool``, numpy) they are made from the tape, for that call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from odewei.call_kinds import (
    BY_NUMBER,
    CHEAP,
    FACTORIES,
    HARMLESS,
    IN_PLACE,
    LIKE,
    MAY_DRAW,
    NORMAL,
    OTHER_DRAWS,
    PLAIN_FILLS,
    TO,
    UNIFORM,
    has_meta,
    is_cpu_device,
    is_on_cpu,
    is_view,
    numel,
    shape_of,
    tensors,
)
from odewei.owed_draws import OwedDraws, Position, draws_of_fill, draws_of_truncated_normal
from odewei.tape import Tape

__all__ = ["WithoutValues"]

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]
_Func = Callable[..., Any]

_AT_ONCE = 1 << 22  # elements; what is computed from no more than that is computed at once


class WithoutValues(TorchFunctionMode):
    """Entered around the user's function. ``large``: elements beyond which a tensor gets no values."""

    def __init__(self, tape: Tape, large: int) -> None:
        super().__init__()
        self.large = large
        self.suspended = False
        self._tape = tape
        self._owed: dict[torch.Generator, OwedDraws] = {}
        self._ways: dict[object, Callable[[_Func, _Args, _Kwargs], Any] | None] = dict.fromkeys(
            FACTORIES, self._factory
        )
        of_tensors: Any = torch.Tensor
        self._ways[of_tensors.device.__get__] = self._device
        self._ways[of_tensors.is_meta.__get__] = self._is_meta
        self._ways[of_tensors.is_cpu.__get__] = self._is_cpu
        self._ways[of_tensors.data.__set__] = self._set_data
        self._ways[torch.Tensor.data_ptr] = self._data_ptr
        self._ways[torch.Tensor.cpu] = self._cpu
        self._ways[torch.Tensor.__deepcopy__] = self._deepcopy

    def __torch_function__(
        self, func: _Func, types: tuple[type, ...], args: _Args = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            way = self._ways[func]
        except KeyError:
            way = self._learn(func)
        if way is None or self.suspended:  # a module calls a dozen of these for each factory
            return func(*args, **kwargs) if kwargs else func(*args)
        return way(func, args, dict(kwargs or {}))

    def settle(self) -> None:
        """Bring all generators to where they would be."""
        if self._owed:
            with torch._C.DisableTorchFunction():  # this may be called with the mode on
                for owed in self._owed.values():
                    owed.settle()

    def _learn(self, func: _Func) -> Callable[[_Func, _Args, _Kwargs], Any] | None:
        """How calls of a function are taken; None: as they are."""
        name = getattr(func, "__name__", "")
        way: Callable[[_Func, _Args, _Kwargs], Any] | None
        if name in ("__get__", "__set__", "__delete__") or name in HARMLESS:
            way = None
        elif name in UNIFORM or name in NORMAL or name in OTHER_DRAWS or name in PLAIN_FILLS:
            way = self._fill
        elif name in IN_PLACE or name in BY_NUMBER:
            way = self._by_number
        elif name != "normalize" and any(part in name for part in MAY_DRAW):
            way = self._random
        else:
            way = self._other
        if getattr(func, "__closure__", None) is None:  # what a closure holds must not be kept
            self._ways[func] = way
        return way

    # -- making and filling ------------------------------------------------------------------------------------------

    def _factory(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        fill = FACTORIES[func]
        if (
            not is_on_cpu(kwargs.get("device"))
            or numel(args, kwargs) <= self.large
            or kwargs.keys() & {"out", "names"}
            or kwargs.get("layout", torch.strided) is not torch.strided
        ):
            return func(*args, **kwargs) if fill is None else self._random(func, args, kwargs)
        kwargs.pop("pin_memory", None)
        generator = kwargs.pop("generator", None)
        made = func(*args, **{**kwargs, "device": "meta"})
        kwargs = {**kwargs, "device": "cpu", "dtype": made.dtype, "requires_grad": False}
        position = None
        if fill is not None:
            position = self._draw(draws_of_fill(fill, made, (), {}), generator, func, args, kwargs)
            kwargs |= {} if generator is None else {"generator": generator}
        self._tape.made(func, args, kwargs, made, position)
        return made

    def _fill(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        name = getattr(func, "__name__", "")
        if not args:  # torch.nn.init names it
            tensor, kwargs = kwargs.get("tensor"), {key: value for key, value in kwargs.items() if key != "tensor"}
            args = (tensor,)
        tensor = args[0]
        if not self._tape.has(tensor) or has_meta((*args[1:], *kwargs.values())):
            return (self._other if name in PLAIN_FILLS else self._random)(func, args, kwargs)
        position = None
        if name not in PLAIN_FILLS:
            generator = kwargs.get("generator")
            rest = {key: value for key, value in kwargs.items() if key != "generator"}
            if name in OTHER_DRAWS:
                draws = draws_of_fill(func, tensor, args[1:], rest)
            else:
                draws = draws_of_fill(torch.Tensor.normal_ if name in NORMAL else torch.Tensor.uniform_, tensor, (), {})
            position = self._draw(draws, generator, func, args, kwargs)
        self._tape.wrote(func, args, kwargs, [tensor], position=position, whole=True)
        return tensor  # there is nothing to fill, and torch would take its time to do so

    def _draw(
        self, draws: int | None, generator: torch.Generator | None, func: _Func, args: _Args, kwargs: _Kwargs
    ) -> Position:
        """Where the draws of a call begin. Those that cannot be counted are drawn, with memory for that moment."""
        owed = self._owed_by(generator)
        if draws is not None:
            return owed.owe(draws)
        self.settle()
        position = owed.position()
        flat, spec = tree_flatten((args, kwargs))
        real_args, real_kwargs = tree_unflatten([self._blank(leaf) for leaf in flat], spec)
        func(*real_args, **real_kwargs)
        return position

    def _blank(self, leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_meta:
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cpu")

    def _owed_by(self, generator: torch.Generator | None) -> OwedDraws:
        generator = torch.default_generator if generator is None else generator
        if generator not in self._owed:
            self._owed[generator] = OwedDraws(generator)
        return self._owed[generator]

    # -- answers -----------------------------------------------------------------------------------------------------

    def _device(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        return torch.device("cpu") if self._tape.has(args[0]) else func(*args)

    def _is_meta(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        """What torch asks before it draws a truncated normal is told apart: with wide bounds that is a normal one."""
        found = func(*args)
        if not found or not self._tape.has(args[0]):
            return found
        frame = sys._getframe(2)
        if frame.f_code is _TRUNCATED and "erfinv_" not in _TRUNCATED.co_names:
            known = frame.f_locals
            mean, std, generator = known["mean"], known["std"], known["generator"]
            draws = draws_of_truncated_normal(args[0], mean, std, known["a"], known["b"])
            if draws is not None:
                position = self._owed_by(generator).owe(draws)
                settings = {"mean": mean, "std": std, "generator": generator}
                self._tape.wrote(torch.Tensor.normal_, args, settings, [args[0]], position=position, whole=True)
                return True
        return False

    def _is_cpu(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        return self._tape.has(args[0]) or func(*args)

    def _data_ptr(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        """A number that tensors share which share memory, as code that looks for ties expects."""
        storage = self._tape.storage(args[0])
        return func(*args) if storage is None else storage + args[0].storage_offset() * args[0].element_size()

    def _cpu(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        return args[0] if self._tape.has(args[0]) else func(*args, **kwargs)

    def _deepcopy(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        made = func(*args, **kwargs)
        if self._tape.has(args[0]) and not self._tape.has(made):
            self._tape.made(torch.clone, (args[0].detach(),), {}, made)  # without the memo, which holds everything
        return made

    def _set_data(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        """``tensor.data = value``, where one of them has values and the other has not."""
        tensor, value = args
        if self._tape.has(tensor) and value.device.type == "cpu":
            value = self._tape.adopt(value)
        elif self._tape.has(value) and tensor.device.type == "cpu":
            kind: Any = type(tensor)
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            made = kind(empty, requires_grad=tensor.requires_grad) if kind is not torch.Tensor else empty
            torch._C._swap_tensor_impl(tensor, made)
        return func(tensor, value)

    # -- everything else ---------------------------------------------------------------------------------------------

    def _random(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        if not has_meta((*args, *kwargs.values())):
            self.settle()
            return func(*args, **kwargs)
        fill = LIKE.get(func)
        if fill is not None and self._tape.has(args[0]) and kwargs.keys() <= {"dtype", "requires_grad"}:
            made = func(*args, **kwargs)
            position = self._draw(draws_of_fill(fill, made, (), {}), None, func, args, kwargs)
            self._tape.made(func, args, {**kwargs, "requires_grad": False}, made, position)
            return made
        flat, spec = tree_flatten((args, kwargs))
        self.settle()
        generator = next((leaf for leaf in flat if isinstance(leaf, torch.Generator)), None)
        return self._for_real(func, flat, spec, self._owed_by(generator).position())

    def _by_number(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        """Elementwise, with nothing but numbers: the shape is known."""
        plain = args and not kwargs and all(isinstance(one, int | float) for one in args[1:])
        if not plain or not self._tape.has(args[0]) or not args[0].is_floating_point():
            return self._other(func, args, kwargs)
        tensor: torch.Tensor = args[0]
        if getattr(func, "__name__", "") in IN_PLACE:
            self._tape.wrote(func, args, kwargs, [tensor])
            return tensor
        if not tensor.is_contiguous() or (tensor.requires_grad and torch.is_grad_enabled()):
            return self._other(func, args, kwargs)
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self._tape.made(func, args, kwargs, made)
        return made

    def _other(self, func: _Func, args: _Args, kwargs: _Kwargs) -> Any:
        """Shapes now, values never or later: what is written or made is noted."""
        if not has_meta((*args, *kwargs.values())):
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        fakes = [leaf for leaf in flat if self._tape.has(leaf)]
        if not fakes:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in CHEAP or name in TO or sum(fake.numel() for fake in fakes) > _AT_ONCE:
            return self._by_shape(func, flat, spec)
        return self._for_real(func, flat, spec)

    def _by_shape(self, func: _Func, flat: list[Any], spec: TreeSpec) -> Any:
        if getattr(func, "__name__", "") in TO:
            flat = [_META if is_cpu_device(leaf) else leaf for leaf in flat]
        shapes = [shape_of(leaf) for leaf in flat]
        before = [leaf._version if isinstance(leaf, torch.Tensor) else 0 for leaf in shapes]
        meta_args, meta_kwargs = tree_unflatten(shapes, spec)
        try:
            result = func(*meta_args, **meta_kwargs)
        except Exception:  # for want of values, or as it would with them, which shows when it has them
            return self._for_real(func, flat, spec)
        written = [
            place
            for place, (leaf, version) in enumerate(zip(shapes, before, strict=True))
            if isinstance(leaf, torch.Tensor) and leaf._version != version
        ]
        if not self._has_no_values(result, flat, shapes) or any(shapes[place] is not flat[place] for place in written):
            return self._for_real(func, flat, spec)
        cpu_args, cpu_kwargs = tree_unflatten([_CPU if leaf is _META else leaf for leaf in flat], spec)
        if written:
            self._tape.wrote(func, cpu_args, cpu_kwargs, [flat[place] for place in written], result)
        elif any(leaf.is_meta and not self._tape.has(leaf) for leaf in tensors(result)):
            self._tape.made(func, cpu_args, cpu_kwargs, result)
        return result

    def _has_no_values(self, result: object, flat: Sequence[object], shapes: Sequence[object]) -> bool:
        """Whether a result is tensors without values only, and none of those that stood in for real ones."""
        ours = {id(shape) for leaf, shape in zip(flat, shapes, strict=True) if shape is not leaf}
        bases = {
            shape.untyped_storage()._cdata
            for leaf, shape in zip(flat, shapes, strict=True)
            if shape is not leaf and isinstance(shape, torch.Tensor)
        }
        return all(
            leaf is None
            or (
                isinstance(leaf, torch.Tensor)
                and id(leaf) not in ours
                and not (leaf.is_meta and leaf.untyped_storage()._cdata in bases)
            )
            for leaf in tree_leaves(result)
        )

    def _for_real(self, func: _Func, flat: Sequence[Any], spec: TreeSpec, position: Position | None = None) -> Any:
        """Call it with values. What it writes into tensors without values is noted; ``position``: where it draws."""
        places = [place for place, leaf in enumerate(flat) if self._tape.has(leaf)]
        values = dict(zip(places, self._tape.values([flat[place] for place in places]), strict=True))
        real = [values.get(place, _CPU if leaf is _META else leaf) for place, leaf in enumerate(flat)]
        before = {place: value._version for place, value in values.items()}
        args, kwargs = tree_unflatten(real, spec)
        with torch.no_grad():
            result = func(*args, **kwargs)
        if position is None and is_view(result, list(values.values())):
            return self._by_shape(func, list(flat), spec)
        written = [flat[place] for place, value in values.items() if value._version != before[place]]
        if written:
            cpu_args, cpu_kwargs = tree_unflatten([_CPU if leaf is _META else leaf for leaf in flat], spec)
            self._tape.wrote(func, cpu_args, cpu_kwargs, written, position=position)
        return next((flat[place] for place, value in values.items() if value is result), result)

    def __repr__(self) -> str:
        return f"<WithoutValues beyond {self.large} elements, {self._tape!r}>"


_CPU, _META = torch.device("cpu"), torch.device("meta")
_TRUNCATED = torch.nn.init._no_grad_trunc_normal_.__code__
