"""What a conversion of transformers does with its weights, found out by running it once on tensors without values.

Tensors on the meta device have shapes, strides and an identity of their memory. A result over the memory of a source is
a stretch of that source (chunks, splits, other shapes); one that came from ``torch.stack`` or ``torch.cat`` is a
recipe of ours; any other has to be computed. So nothing here knows the operations by name, and new ones are right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from odewei.errors import WeightMismatchError
from odewei.loaders.base import Span, WeightInfo
from odewei.loaders.gathering import Concat, Recipe, Stack, gather
from odewei.loaders.tensors import contiguous_stride, is_castable
from odewei.pretrained.naming import Group, Taken

__all__ = ["Traced", "Watch", "convert", "traced"]

_STACKS = frozenset({torch.stack})
_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})


@dataclass(frozen=True, slots=True)
class Traced:
    """A weight of the model: where its bytes are, or (``is_computed``) only its name, dtype and shape."""

    info: WeightInfo
    is_computed: bool


def traced(group: Group, model: Any, config: Any) -> dict[str, Traced]:
    """What the group makes, by the model's names. Reads nothing.

    Raises WeightMismatchError if the conversion does not fit its sources.
    """
    if group.conversion is None:
        taken = group.taken[0]  # of several weights with one name the first counts, as in transformers
        return {group.target: _renamed(group.target, taken.info, taken.dtype)}
    with torch.no_grad(), Watch(group.taken) as watch:
        made = convert(group, lambda place: watch.leaves[place], model, config)
        return {name: watch.described(name, tensor) for name, tensor in made.items()}


def convert(group: Group, tensor: Callable[[int], torch.Tensor], model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Run the group's conversion; ``tensor(place)`` is the tensor of its source at that place.

    Raises WeightMismatchError with the cause chained.
    """
    conversion = copy.deepcopy(group.conversion)
    for place, taken in enumerate(group.taken):
        conversion.add_tensor(group.target, taken.info.name, taken.pattern, tensor(place))
    try:
        made: Mapping[str, Any] = conversion.convert(group.target, model=model, config=config)
    except Exception as error:
        first = group.taken[0].info
        raise WeightMismatchError(
            f"transformers cannot make {group.target!r} of {len(group.taken)} weights of the checkpoint "
            f"({group.conversion}): {error}",
            weight=first.name,
            file=first.file,
            cure="Build the model with the configuration that the checkpoint was made with",
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _renamed(target: str, info: WeightInfo, dtype: torch.dtype | None) -> Traced:
    if dtype is None or dtype == info.dtype:
        return Traced(info, False)
    if is_castable(info.dtype) and is_castable(dtype):
        return Traced(replace(info, wanted=dtype), False)
    return Traced(WeightInfo(target, dtype, info.shape, None), True)


class Watch(TorchFunctionMode):
    """Notes what is stacked and joined of ``taken``, whose ``leaves`` are given to a conversion in their place.

    ``follows``: notes too of which sources each tensor is made, where there are many and each result has few.
    """

    def __init__(self, taken: Sequence[Taken], *, follows: bool = False) -> None:
        super().__init__()
        self.leaves = [torch.empty(one.info.shape, dtype=one.dtype or one.info.dtype, device="meta") for one in taken]
        self._taken = taken
        self._made_of: dict[int, set[int]] | None = {} if follows else None  # by storage, as views are one
        self._alive: list[torch.Tensor] = []  # so that no storage comes twice
        self._place = {leaf.untyped_storage()._cdata: place for place, leaf in enumerate(self.leaves)}
        self._known: dict[str, WeightInfo] = {}
        self._made: dict[int, tuple[torch.Tensor, Recipe | str | None]] = {}  # tensors are kept, so that ids are theirs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if (func in _STACKS or func in _JOINS) and isinstance(made, torch.Tensor) and "out" not in kwargs:
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            sources = [self._source(tensor) for tensor in tensors]
            kind = Stack if func in _STACKS else Concat
            whole = [source for source in sources if source is not None]
            recipe: Recipe | str | None = kind(whole, dim) if len(whole) == len(sources) else None
            if recipe is not None and kind is Concat and len(whole) == 1:
                recipe = whole[0]  # a copy, by the habit of some conversions
            self._made[id(made)] = (made, recipe)
        if self._made_of is not None:
            self._follow(func, made, (*args, kwargs))
        return made

    def sources(self, tensor: torch.Tensor) -> list[int]:
        """The places of the sources that a tensor is made of; of all, unless they are followed."""
        if self._made_of is None:
            return list(range(len(self._taken)))
        return sorted(self._parts_of(tensor))

    def _follow(self, func: object, made: object, given: tuple[object, ...]) -> None:
        parts = {place for tensor in _tensors(given) for place in self._parts_of(tensor)}
        written = [made, given[0]] if func is torch.Tensor.__setitem__ else [made]
        assert self._made_of is not None
        for tensor in _tensors(written):
            self._made_of.setdefault(tensor.untyped_storage()._cdata, set()).update(parts)
            self._alive.append(tensor)

    def _parts_of(self, tensor: torch.Tensor) -> set[int]:
        assert self._made_of is not None
        key = tensor.untyped_storage()._cdata
        place = self._place.get(key)
        return self._made_of.get(key, set()) | (set() if place is None else {place})

    def described(self, name: str, tensor: torch.Tensor) -> Traced:
        """What the result called ``name`` is."""
        shape = tuple(tensor.shape)
        source = self._source(tensor)
        if source is None or not self._goes_together(self.sources(tensor)):
            return Traced(WeightInfo(name, tensor.dtype, shape, None), True)
        info = self._known[source] if isinstance(source, str) else gather(name, source, self._known)
        assert info.shape == shape, "what torch made of tensors without values has the shape of the recipe"
        return Traced(info if tensor.dtype == info.dtype else replace(info, wanted=tensor.dtype), False)

    def _goes_together(self, places: Sequence[int]) -> bool:
        """Whether these sources have one dtype in the file, and casting may come after moving."""
        stored = {self._taken[place].info.dtype for place in places}
        wanted = {self._taken[place].dtype or self._taken[place].info.dtype for place in places}
        return len(stored) == len(wanted) == 1 and (stored == wanted or all(map(is_castable, stored | wanted)))

    def _source(self, tensor: object) -> Recipe | str | None:
        """What our recipes call the tensor: a recipe, or the name of a stretch of a source; None if it is neither."""
        if not isinstance(tensor, torch.Tensor):
            return None
        if id(tensor) in self._made:
            return None if tensor._version else self._made[id(tensor)][1]
        place = self._place.get(tensor.untyped_storage()._cdata)
        if place is None or not tensor.is_contiguous() or tensor._version or tensor.dtype != self.leaves[place].dtype:
            return None
        info = _stretch(self._taken[place].info, tuple(tensor.shape), int(tensor.storage_offset()))
        if info is None:
            return None
        key = f"{place}:{info.name}:{tensor.storage_offset()}:{info.shape}"
        self._known[key] = info
        return key


def _tensors(found: object) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, Mapping):
        yield from _tensors(list(found.values()))
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _tensors(one)


def _stretch(info: WeightInfo, shape: tuple[int, ...], offset: int) -> WeightInfo | None:
    """The elements from ``offset`` on of a weight, in this shape; None if they are no stretch of a file."""
    if shape == info.shape and not offset:
        return info
    if info.span is None or (info.stride is not None and info.stride != contiguous_stride(info.shape)):
        return None
    item = info.dtype.itemsize
    nbytes = torch.Size(shape).numel() * item
    span = Span(info.span.file, info.span.offset + offset * item, nbytes)
    assert offset * item + nbytes <= info.span.nbytes
    return replace(info, shape=shape, span=span, stride=None)
