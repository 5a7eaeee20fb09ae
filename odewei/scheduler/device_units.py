"""A unit on its way to a device: flat bytes on the host, and tensors over a copy of them.

Knows bytes, placements, tensors. Knows nothing of streams, or of what is copied when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from odewei.scheduler.host_memory import Bytes, round_up
from odewei.scheduler.reader import Job, Resized, UnitReader
from odewei.scheduler.reads import Placement
from odewei.scheduler.records import UnitRecord
from odewei.scheduler.slab import ALIGNMENT

__all__ = ["DeviceUnit", "HostUnit", "Shelf"]


class HostUnit:
    """A unit of the host's tier: read as ever, and then one flat tensor."""

    __slots__ = ("_reader",)

    def __init__(self, reader: UnitReader) -> None:
        self._reader = reader

    @property
    def nbytes(self) -> int:
        return self._reader.nbytes

    @property
    def placements(self) -> Sequence[Placement]:
        return self._reader.placements

    def jobs(self) -> Sequence[Job]:
        return self._reader.jobs()

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        with torch.inference_mode(False):
            return {"": torch.from_numpy(slab)}


class Shelf:
    """What of one model is in host memory, by the places of its units. The client of its account in the host's tier."""

    def __init__(self) -> None:
        self._flat: dict[int, torch.Tensor] = {}

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self._flat[unit] = tensors[""]

    def retract(self, unit: int) -> None:
        del self._flat[unit]

    def bind(self, unit: int) -> None:
        """Nothing on the host is bound to anything."""

    def clear(self) -> None:
        """Let go of everything, after the driver has stopped."""
        self._flat.clear()

    def flat(self, unit: int) -> torch.Tensor:
        """The bytes of a unit that is there and leased."""
        return self._flat[unit]


class DeviceUnit:
    """A unit of the device's tier: how it gets there from its host unit, which has the same place on the shelf."""

    __slots__ = ("_place", "_reader", "_shelf", "host", "nbytes")

    def __init__(self, reader: UnitReader, shelf: Shelf, place: int) -> None:
        self._reader, self._shelf, self._place = reader, shelf, place
        self.nbytes = self._used_bytes()
        self.host: UnitRecord | None = None  # set when it has joined the host's tier

    @property
    def placements(self) -> Sequence[Placement]:
        return self._reader.placements

    def jobs(self) -> Sequence[Job]:
        return ()

    def source(self) -> torch.Tensor:
        """The bytes to copy, while the host unit is leased. Raises Resized if there are more or fewer than thought."""
        used = self._used_bytes()
        if used != self.nbytes:
            self.nbytes = used
            raise Resized(used)
        return self._shelf.flat(self._place)[:used]

    def tensors(self, slab: Any) -> dict[str, torch.Tensor]:
        """Tensors over ``slab``, bytes of the device. Each counts writes by itself."""
        with torch.inference_mode(False), torch.no_grad():
            return {place.name: _over(slab, place).data for place in self._reader.placements}

    def _used_bytes(self) -> int:
        """Without what only reading needs."""
        return max((round_up(place.offset + _extent(place), ALIGNMENT) for place in self._reader.placements), default=0)


def _extent(place: Placement) -> int:
    """Bytes from the first element to the last."""
    if 0 in place.shape:
        return 0
    if place.stride is None:
        return torch.Size(place.shape).numel() * place.dtype.itemsize
    return (1 + sum((size - 1) * step for size, step in zip(place.shape, place.stride, strict=True))) * (
        place.dtype.itemsize
    )


def _over(flat: torch.Tensor, place: Placement) -> torch.Tensor:
    nbytes = _extent(place)
    if not nbytes:
        return torch.empty(place.shape, dtype=place.dtype, device=flat.device)
    part = flat[place.offset : place.offset + nbytes].view(place.dtype)
    return part.view(place.shape) if place.stride is None else part.as_strided(place.shape, place.stride)
