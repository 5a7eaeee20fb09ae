"""What a plan for reading a unit is made of: the weights that are wanted, reads, and where tensors lie afterwards.

Plain data. Knows files and dtypes; opens nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from odewei.loaders.base import CheckpointFile, WeightInfo
from odewei.scheduler.host_memory import PAGE

__all__ = [
    "Cast",
    "CopiedRead",
    "LoaderRead",
    "Part",
    "PlacedRead",
    "Placement",
    "Read",
    "ReadSettings",
    "Wanted",
]


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """``direct``: past the page cache. ``chunk_bytes``: what one reader does at a time. ``scratch_bytes``: per
    reader.
    """

    direct: bool
    chunk_bytes: int = 32 << 20
    scratch_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        assert self.chunk_bytes % PAGE == 0
        assert self.scratch_bytes >= 2 * PAGE, "an element that is cast may lie across the end of a page"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A weight to be read, under the model's name for it, and the dtype it is wanted in."""

    name: str
    info: WeightInfo
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the wanted dtype."""
        return self.info.nbytes // self.info.dtype.itemsize * self.dtype.itemsize

    @property
    def casts(self) -> bool:
        return self.dtype != self.info.dtype


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies in its slab. ``stride`` None: contiguous."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Cast:
    source: torch.dtype
    target: torch.dtype


@dataclass(frozen=True, slots=True)
class Part:
    """``nbytes`` bytes at ``scratch_offset`` go to ``slab_offset``, cast or as they are."""

    scratch_offset: int
    nbytes: int
    slab_offset: int
    cast: Cast | None


@dataclass(frozen=True, slots=True)
class PlacedRead:
    """Read ``nbytes`` bytes at ``offset`` of the file straight into the slab; at least ``needed`` must come.

    With a ``shift``, one more page is read (into the scratch), and everything moves down by so many bytes: what lands
    in the slab is the file from ``offset + shift`` on. Neighbouring reads do not touch each other's bytes.
    """

    file: CheckpointFile
    offset: int
    nbytes: int
    needed: int
    slab_offset: int
    shift: int = 0


@dataclass(frozen=True, slots=True)
class CopiedRead:
    """Read ``nbytes`` bytes at ``offset`` of the file into a scratch buffer, then copy the parts; ``needed`` must
    come.
    """

    file: CheckpointFile
    offset: int
    nbytes: int
    needed: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class LoaderRead:
    """Let the loader deliver a weight that is in no file as it is; via ``staging_offset`` in the slab when it is
    cast.
    """

    info: WeightInfo
    slab_offset: int
    staging_offset: int | None
    cast: Cast | None

    @property
    def nbytes(self) -> int:
        return self.info.nbytes


Read = PlacedRead | CopiedRead | LoaderRead
