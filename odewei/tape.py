"""What was done to tensors without values, so that it can be done for real to those whose values are wanted after all.

While a model is built its large tensors are on the meta device. What makes one, or writes into one, is noted here. A
tensor is known by its storage: views, ``.data`` and the parameter that was made of it are one with it. Values are made
by doing again what was noted, for the tensors that are wanted and what they were computed from, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from odewei.errors import ModelError
from odewei.owed_draws import Position

__all__ = ["Tape"]

_KEPT_BYTES = 64 << 20  # of real tensors that were written into tensors without values


class _Place(NamedTuple):
    """A tensor without values: where it lies in which storage."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Lost(NamedTuple):
    """A real tensor that was not kept, because that took too much memory."""

    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One call. ``writes`` are storages that it changes, ``made`` which of the tensors it returned are new;
    ``whole``: nothing of what was in ``writes`` is left.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[_Place | None, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    whole: bool
    position: Position | None


class Tape:
    """The steps of one build, in order."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no number comes twice
        self._steps: list[_Step] = []
        self._given: dict[int, int] = {}  # storages that began as a real tensor: the place of that step
        self._kept_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._storages)

    def has(self, value: object) -> bool:
        """Whether it is a tensor whose values can be made."""
        return isinstance(value, torch.Tensor) and value.is_meta and _storage_of(value) in self._storages

    def storage(self, tensor: torch.Tensor) -> int | None:
        """The number of the storage that a tensor lies in, if it is one of these."""
        found = _storage_of(tensor) if tensor.is_meta else None
        return found if found in self._storages else None

    def made(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object,
        position: Position | None = None,
    ) -> None:  # fmt: skip
        """A call returned tensors without values, which nothing else has."""
        self._note(func, args, kwargs, result=result, position=position)

    def wrote(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any],
        written: Sequence[torch.Tensor], result: object = None, position: Position | None = None, *,
        whole: bool = False,
    ) -> None:  # fmt: skip
        """A call wrote into ``written``; ``whole``: into all of it, whatever was there."""
        whole = whole and all(_fills_storage(tensor) for tensor in written)
        self._note(func, args, kwargs, result=result, written=written, whole=whole, position=position)
        if whole:
            for tensor in written:
                self._drop_given(_storage_of(tensor))

    def adopt(self, real: torch.Tensor) -> torch.Tensor:
        """A tensor without values in the place of a real one, whose values it would have. It is not copied."""
        made = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
        self._forget_given(real.nbytes)
        self._given[_storage_of(made)] = len(self._steps)
        self._note(_given, (), {"value": real.detach()}, result=made, keep=True)
        return made

    def values(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Real tensors in the places of those without values; what shares memory still does.

        Raises ModelError where a value was not kept.
        """
        places = [_place(tensor) for tensor in tensors]
        wanted = {place.storage for place in places}
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            memory = _Replay(self._storages).run(self._steps_for(wanted))
            return [memory.tensor(place) for place in places]

    def nbytes(self, storages: Collection[int]) -> int:
        """Of so many storages."""
        return sum(self._storages[storage].nbytes() for storage in storages)

    def _steps_for(self, wanted: Collection[int]) -> list[_Step]:
        needed = set(wanted)
        chosen = []
        for step in reversed(self._steps):
            if needed.isdisjoint(step.writes):
                continue
            chosen.append(step)
            if step.whole:
                needed -= step.writes
            needed |= step.reads
        return chosen[::-1]

    def _note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *,
        result: object, written: Sequence[torch.Tensor] = (), whole: bool = False, keep: bool = False,
        position: Position | None = None,
    ) -> None:  # fmt: skip
        values, settings = tree_map(self._noted if not keep else _as_it_is, (args, dict(kwargs)))
        reads = frozenset(leaf.storage for leaf in _leaves((values, settings)) if isinstance(leaf, _Place))
        made = tuple(_place(one) if self._is_new(one) else None for one in _tensors(result))
        for tensor, place in zip(_tensors(result), made, strict=True):
            if place is not None:
                self._storages[place.storage] = tensor.untyped_storage()
        writes = frozenset({*map(_storage_of, written), *(place.storage for place in made if place is not None)})
        if whole:
            reads -= writes
        whole = whole or not written  # what is new holds nothing else
        self._steps.append(_Step(func, values, settings, made, reads, writes, whole, position))

    def _is_new(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta and _storage_of(tensor) not in self._storages

    def _noted(self, value: object) -> object:
        """An argument as it is kept: what has values may change, so it is copied, if there is room."""
        if not isinstance(value, torch.Tensor):
            return value
        if self.has(value):
            return _place(value)
        if value.is_meta:
            return _Lost(value.nbytes)
        nbytes = value.numel() * value.element_size()
        if self._kept_bytes + nbytes > _KEPT_BYTES:
            return _Lost(nbytes)
        self._kept_bytes += nbytes
        return value.detach().clone()

    def _forget_given(self, nbytes: int) -> None:
        """Make room for a real tensor. The one that came last is always kept: most are filled at once, which needs
        nothing of it.
        """
        held = {place: self._steps[place].kwargs["value"].nbytes for place in self._given.values()}
        for storage, place in list(self._given.items()):
            if sum(held.values()) + nbytes <= _KEPT_BYTES:
                return
            del held[place]
            self._drop_given(storage)

    def _drop_given(self, storage: int) -> None:
        place = self._given.pop(storage, None)
        if place is not None:
            kwargs = self._steps[place].kwargs
            kwargs["value"] = _Lost(kwargs["value"].nbytes)

    def __repr__(self) -> str:
        return f"<Tape of {len(self._steps)} steps on {len(self._storages)} storages>"


class _Replay:
    """Does steps again. ``_memory`` has the storages with values."""

    def __init__(self, storages: Mapping[int, torch.UntypedStorage]) -> None:
        self._storages = storages
        self._memory: dict[int, torch.UntypedStorage] = {}
        self._before: Position | None = None
        self._at: torch.Tensor | None = None

    def run(self, steps: Sequence[_Step]) -> _Replay:
        for step in steps:
            args, kwargs = self._real((step.args, step.kwargs))
            if step.position is None:
                result = step.func(*args, **kwargs)
            else:
                self._at = step.position.state(self._before, self._at)
                self._before = step.position
                with step.position.taken(self._at):
                    result = step.func(*args, **kwargs)
            if any(step.made):
                for place, tensor in zip(step.made, _tensors(result), strict=True):
                    if place is not None:
                        self._take(place, tensor)
        return self

    def tensor(self, place: _Place) -> torch.Tensor:
        """A tensor over the memory."""
        memory = self._memory.get(place.storage)
        if memory is None:
            memory = self._memory[place.storage] = torch.UntypedStorage(self._storages[place.storage].nbytes())  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=place.dtype, device="cpu")
        return empty.set_(memory, place.offset, place.shape, place.stride)

    def _take(self, place: _Place, tensor: torch.Tensor) -> None:
        nbytes = self._storages[place.storage].nbytes()
        looks = tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes()
        if looks == (place.shape, place.stride, place.offset, nbytes) and place.storage not in self._memory:
            self._memory[place.storage] = tensor.untyped_storage()
        else:
            self.tensor(place).copy_(tensor)

    def _real(self, values: tuple[Any, ...]) -> Any:
        def real(value: object) -> object:
            if isinstance(value, _Lost):
                raise ModelError(
                    f"a tensor that is made while the model is built takes its values from {value.nbytes} bytes that "
                    "were not kept",
                    cure="Make it in a function of torch (torch.empty and a fill, say), or add it to the checkpoint",
                )
            return self.tensor(value) if isinstance(value, _Place) else value

        return tree_map(real, values, is_leaf=_is_leaf)


def _given(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu").copy_(value)


def _as_it_is(value: object) -> object:
    return value


def _is_leaf(value: object) -> bool:
    return isinstance(value, _Place | _Lost)


def _leaves(values: object) -> Iterator[object]:
    yield from tree_leaves(values, is_leaf=_is_leaf)


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage_of(tensor: torch.Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _place(tensor: torch.Tensor) -> _Place:
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return _Place(_storage_of(tensor), tensor.dtype, shape, stride, int(tensor.storage_offset()))


def _fills_storage(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
