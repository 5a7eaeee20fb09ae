"""One weight of the model from many of the checkpoint: recipes, which are data, and the loader that follows them.

A recipe says how ``torch.stack`` and ``torch.cat`` would make the weight. What comes of it is a list of places: where
each element of each source goes. So nothing is put together in memory: sources are read to where they stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from odewei.errors import CheckpointError, MissingWeightError, OptionsError, WeightMismatchError
from odewei.loaders.base import Span, WeightInfo, WeightPart, WeightsLoader
from odewei.loaders.file_loader import read_span
from odewei.loaders.known_weights import KnownWeights, named
from odewei.loaders.names import Rename
from odewei.loaders.tensors import contiguous_stride

__all__ = ["Concat", "GatheringLoader", "Recipe", "Stack", "cut_places", "gather", "lies_in_places", "read_part"]

_PIECE_NBYTES = 1 << 20
_MOVED_AS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # copies of these keep every bit


@dataclass(frozen=True, slots=True, init=False)
class Stack:
    """What ``torch.stack`` makes of the sources: names in the checkpoint, or recipes."""

    sources: tuple[Recipe | str, ...]
    dim: int

    def __init__(self, sources: Iterable[Recipe | str], dim: int = 0) -> None:
        object.__setattr__(self, "sources", _checked(type(self), sources, dim))
        object.__setattr__(self, "dim", dim)


@dataclass(frozen=True, slots=True, init=False)
class Concat:
    """What ``torch.cat`` makes of the sources: names in the checkpoint, or recipes."""

    sources: tuple[Recipe | str, ...]
    dim: int

    def __init__(self, sources: Iterable[Recipe | str], dim: int = 0) -> None:
        object.__setattr__(self, "sources", _checked(type(self), sources, dim))
        object.__setattr__(self, "dim", dim)


Recipe = Stack | Concat


def _checked(kind: type, sources: object, dim: object) -> tuple[Recipe | str, ...]:
    found = tuple(sources) if isinstance(sources, Iterable) and not isinstance(sources, str) else ()
    if not found or not all(isinstance(source, str | Stack | Concat) for source in found) or type(dim) is not int:
        raise OptionsError(
            f"{kind.__name__}({str(sources)[:200]}, dim={dim!r}) is no recipe",
            cure="Give it one or more names of weights, or recipes, and the number of a dimension",
        )
    return found


class GatheringLoader(WeightsLoader):
    """The weights of another loader, some of them gathered: ``recipes`` are by the names of what they make.

    Sources have the names that ``loader`` has them under. They are not weights of their own any more; the rest are.
    ``device`` and ``dtype`` are those of ``loader``, which this one closes.

    All checks are made when the headers are read, before any weight is: MissingWeightError for a source that is not
    there, WeightMismatchError for sources whose dtypes or shapes do not go together, CheckpointError for a recipe that
    makes what the checkpoint has.
    """

    def __init__(
        self,
        loader: WeightsLoader,
        recipes: Mapping[str, Recipe],
        *,
        rename: Rename | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(device=loader.device, dtype=loader.dtype, rename=rename, prefix=prefix)
        for name, recipe in recipes.items():
            if not isinstance(name, str) or not isinstance(recipe, Stack | Concat):
                raise OptionsError(
                    f"{name!r}: {recipe!r} is no recipe by a name", cure="Give Stack(...) or Concat(...)"
                )
        self.loader = loader
        self.recipes = dict(recipes)
        self._weights: Mapping[str, WeightInfo] | None = None

    @property
    def place(self) -> Path | None:
        return self.loader.place

    def weights(self) -> Mapping[str, WeightInfo]:
        if self._weights is None:  # two threads at once find the same
            known = self.loader.weights()
            made = {name: gather(name, recipe, known) for name, recipe in self.recipes.items()}
            used = {source for recipe in self.recipes.values() for source in _names(recipe)}
            found = {name: info for name, info in known.items() if name not in used}
            refused = known.refused if isinstance(known, KnownWeights) else {}
            for name, info in made.items():
                if name in found:
                    raise CheckpointError(
                        "a recipe makes a weight that the checkpoint has",
                        weight=name,
                        file=found[name].file,
                        cure="Take the recipe out, or have the loader's rename leave the weight out",
                    )
                found[name] = info
            self._weights = named(KnownWeights(found, refused) if refused else found, self._names, None)
        return self._weights

    def values(self) -> Mapping[str, object]:
        return self._names.values(self.loader.values())

    def metadata(self) -> Mapping[str, Mapping[str, object]]:
        return self._names.metadata(self.loader.metadata())

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        if not info.parts:
            self.loader.read_into(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
        for part in info.parts:
            if part.source.nbytes:
                read_part(self.loader, part, buffer.cast("B"))

    def close(self) -> None:
        self.loader.close()

    def __repr__(self) -> str:
        known = "headers not read yet" if self._weights is None else f"{len(self._weights)} weights"
        return f"<GatheringLoader of {len(self.recipes)} recipes over {self.loader!r}, {known}>"


def gather(name: str, recipe: Recipe, known: Mapping[str, WeightInfo]) -> WeightInfo:
    """The weight ``name`` that a recipe makes of the weights in ``known``. Pure.

    Raises MissingWeightError, WeightMismatchError.
    """
    sources = list(_names(recipe))
    for source in sources:
        if source not in known:
            raise MissingWeightError(
                f"the recipe for {name!r} needs a weight that the checkpoint does not have",
                weight=source,
                cure="Correct the name in the recipe (the loader's rename comes before it)",
            )
    first = known[sources[0]]
    for source in sources:
        if known[source].dtype != first.dtype:
            _mismatch(name, f"{source!r} has {known[source].dtype}, {sources[0]!r} has {first.dtype}", known[source])
    shape = _shape(recipe, name, known)
    parts = tuple(_places(recipe, 0, contiguous_stride(shape), name, known))
    return WeightInfo(name, first.dtype, shape, None, None, parts)


def lies_in_places(info: WeightInfo) -> bool:
    """Whether each place of the first dimension can be read by itself: one stretch of a file, or gathered from sources
    of its own.
    """
    if not info.shape or 0 in info.shape or info.stride is not None:
        return False
    if not info.parts:
        return info.span is not None
    step = math.prod(info.shape[1:])
    return all(_last(part) // step == part.offset // step for part in info.parts if part.source.nbytes)


def cut_places(info: WeightInfo) -> list[WeightInfo]:
    """The places of the first dimension of a weight that ``lies_in_places``, called ``name[0]`` and so on. Pure."""
    step = math.prod(info.shape[1:])
    spans: list[Span | None] = [None] * info.shape[0]
    parts: list[list[WeightPart]] = [[] for _ in spans]
    if info.span is not None:
        nbytes = step * info.dtype.itemsize
        spans = [Span(info.span.file, info.span.offset + place * nbytes, nbytes) for place in range(len(spans))]
    for part in info.parts:
        if part.source.nbytes:
            parts[part.offset // step].append(replace(part, offset=part.offset % step))
    return [
        WeightInfo(f"{info.name}[{place}]", info.dtype, info.shape[1:], span, None, tuple(parts[place]), info.wanted)
        for place, span in enumerate(spans)
    ]


def _last(part: WeightPart) -> int:
    """The last element of the gathered weight that a part fills."""
    return part.offset + sum((size - 1) * step for size, step in zip(part.source.shape, part.stride, strict=True))


def _names(recipe: Recipe | str) -> Iterator[str]:
    if isinstance(recipe, str):
        yield recipe
    else:
        for source in recipe.sources:
            yield from _names(source)


def _shape(recipe: Recipe | str, name: str, known: Mapping[str, WeightInfo]) -> tuple[int, ...]:
    """The shape of what a recipe makes. Raises WeightMismatchError if its sources do not go together."""
    if isinstance(recipe, str):
        return known[recipe].shape
    shapes = [_shape(source, name, known) for source in recipe.sources]
    dim = _dim(recipe, len(shapes[0]), name, known)
    for source, shape in zip(recipe.sources, shapes, strict=True):
        left, right = (list(one) for one in (shapes[0], shape))
        if isinstance(recipe, Concat) and len(left) == len(right):
            left[dim] = right[dim] = 0
        if left != right:
            names = [next(_names(one)) for one in (source, recipe.sources[0])]
            problem = f"what begins with {names[0]!r} has shape {shape}, what begins with {names[1]!r} {shapes[0]}"
            _mismatch(name, problem, known[names[0]])
    if isinstance(recipe, Concat):
        return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])
    return (*shapes[0][:dim], len(shapes), *shapes[0][dim:])


def _dim(recipe: Recipe, dimensions: int, name: str, known: Mapping[str, WeightInfo]) -> int:
    """The recipe's dimension, counted from the front, for sources of so many dimensions."""
    count = dimensions + isinstance(recipe, Stack)
    if not -count <= recipe.dim < count:
        problem = f"there is no dimension {recipe.dim} for {type(recipe).__name__} of {dimensions}-dimensional weights"
        _mismatch(name, problem, known[next(_names(recipe))])
    return recipe.dim % count


def _mismatch(name: str, problem: str, info: WeightInfo) -> NoReturn:
    raise WeightMismatchError(
        f"the recipe for {name!r} does not fit its sources: {problem}",
        weight=name,
        file=info.file,
        cure="Correct the recipe; what torch.stack or torch.cat would refuse cannot be gathered",
    )


def _places(
    recipe: Recipe | str, offset: int, stride: Sequence[int], name: str, known: Mapping[str, WeightInfo]
) -> Iterator[WeightPart]:
    """Where the sources go, if the element (i, j, ...) of what the recipe makes goes to ``offset`` and strides."""
    if isinstance(recipe, str):
        yield WeightPart(known[recipe], offset, tuple(stride))
        return
    stacks = isinstance(recipe, Stack)
    dim = _dim(recipe, len(stride) - stacks, name, known)
    rest = [*stride[:dim], *stride[dim + 1 :]] if stacks else stride
    for source in recipe.sources:
        yield from _places(source, offset, rest, name, known)
        offset += stride[dim] * (1 if stacks else _shape(source, name, known)[dim])


def read_part(loader: WeightsLoader, part: WeightPart, buffer: memoryview) -> None:
    """Read one source to its place in ``buffer``: straight if it is one stretch there, else a piece at a time."""
    item = part.source.dtype.itemsize
    if part.is_one_run:
        start = part.offset * item
        loader.read_into(part.source, buffer[start : start + part.source.nbytes])
        return
    target = _view(buffer, part.source.shape, part.stride, item, part.offset)
    for first, piece in _pieces(part.source):
        raw = memoryview(bytearray(piece.nbytes))
        if piece is part.source:
            loader.read_into(piece, raw)
        else:
            read_span(piece, raw)
        stride = contiguous_stride(piece.shape) if piece.stride is None else piece.stride
        rows = slice(first, first + piece.shape[0]) if piece.shape else ...
        target[rows] = _view(raw, piece.shape, stride, item, 0)


def _view(
    buffer: memoryview, shape: tuple[int, ...], stride: tuple[int, ...], item: int, offset: int
) -> npt.NDArray[np.generic]:
    """Elements of ``buffer``, from the element ``offset`` on. NumPy sees to it that they lie within it."""
    steps = [step * item for step in stride]
    return np.ndarray(shape, _MOVED_AS[item], buffer, offset=offset * item, strides=steps)


def _pieces(source: WeightInfo) -> Iterator[tuple[int, WeightInfo]]:
    """Stretches of rows of 1 MiB, each with its first row, as far as the source can be read by rows; else all of it."""
    if source.span is None or source.stride is not None or not source.shape or source.nbytes <= _PIECE_NBYTES:
        yield 0, source
        return
    row = source.nbytes // source.shape[0]
    rows = max(1, _PIECE_NBYTES // row)
    for first in range(0, source.shape[0], rows):
        count = min(rows, source.shape[0] - first)
        span = Span(source.span.file, source.span.offset + first * row, count * row)
        yield first, replace(source, shape=(count, *source.shape[1:]), span=span)
