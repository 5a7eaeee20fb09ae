"""What a checkpoint has in it, by layer and by size. Pure: knows names, dtypes, shapes and places; reads nothing.

Names that differ in their numbers only are one *pattern*: ``model.layers.3.mlp.up_proj.weight`` is one of
``model.layers.*.mlp.up_proj.weight``. What comes before the rest of a pattern's first number, ``model.layers.3``, is a
*layer*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from odewei.loaders.base import WeightInfo

__all__ = ["Contents", "Layers", "Tensors", "layer_of", "pattern_of"]

REST = "(the rest)"
"""What belongs to no layer."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """``count`` tensors of one pattern, dtype and shape, of ``nbytes`` bytes each."""

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int

    @property
    def total_bytes(self) -> int:
        return self.count * self.nbytes


@dataclass(frozen=True, slots=True)
class Layers:
    """The ``count`` layers of one pattern; the smallest and the largest of them in bytes, and all together."""

    pattern: str
    count: int
    least_bytes: int
    most_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint. ``files``: their bytes, headers included, by path; what is in no file is not among them.

    ``tensors`` and ``layers`` are in falling order of all their bytes. ``dtypes``: bytes of each.
    """

    nbytes: int
    count: int
    files: Mapping[str, int]
    dtypes: Mapping[str, int]
    layers: tuple[Layers, ...]
    tensors: tuple[Tensors, ...]

    @classmethod
    def of(cls, weights: Mapping[str, WeightInfo]) -> Contents:
        """What a loader's ``weights()`` says."""
        files: dict[str, int] = {}
        dtypes: dict[str, int] = {}
        counts: dict[tuple[str, str, tuple[int, ...], int], int] = {}
        layers: dict[str, int] = {}
        for name, info in weights.items():
            dtype = str(info.dtype).removeprefix("torch.")
            dtypes[dtype] = dtypes.get(dtype, 0) + info.nbytes
            key = (pattern_of(name), dtype, info.shape, info.nbytes)
            counts[key] = counts.get(key, 0) + 1
            layer = layer_of(name)
            layers[layer] = layers.get(layer, 0) + info.nbytes
            files.update(_files(info))
        tensors = [Tensors(*key[:3], count, key[3]) for key, count in counts.items()]
        return cls(
            nbytes=sum(dtypes.values()),
            count=len(weights),
            files=dict(sorted(files.items())),
            dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
            layers=_layers(layers),
            tensors=tuple(sorted(tensors, key=lambda found: (-found.total_bytes, found.pattern))),
        )


def pattern_of(name: str) -> str:
    """The name with ``*`` for each of its parts that is a number."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def layer_of(name: str) -> str:
    """The layer that a weight belongs to: its name up to the first part that is a number; ``REST`` if it has none."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return REST if first is None else ".".join(parts[: first + 1])


def _layers(sizes: Mapping[str, int]) -> tuple[Layers, ...]:
    by_pattern: dict[str, list[int]] = {}
    for layer, nbytes in sizes.items():
        by_pattern.setdefault(pattern_of(layer), []).append(nbytes)
    found = [
        Layers(pattern, len(nbytes), min(nbytes), max(nbytes), sum(nbytes)) for pattern, nbytes in by_pattern.items()
    ]
    return tuple(sorted(found, key=lambda layers: (-layers.total_bytes, layers.pattern)))


def _files(info: WeightInfo) -> dict[str, int]:
    """The files of a weight, or of what it is gathered from, with their bytes."""
    infos = [info, *(part.source for part in info.parts)]
    return {str(found.span.file.path): found.span.file.size for found in infos if found.span is not None}
