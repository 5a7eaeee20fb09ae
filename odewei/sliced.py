"""A weight that holds the experts of a layer one after another: taking one, ``weight[i]``, reads that expert's piece.

As for tables (``looked_up``), what is done with the weight decides, not which module does it: a single place of the
first dimension is read by itself; anything else takes the whole weight (see ``in_parts``).

The pieces of one expert are one unit of the scheduler, the whole of each weight is another. Whichever of the two is
written to stays in memory. What was written into pieces is copied into the whole whenever the whole is used, and while
the whole is here, pieces are taken from it: there is one truth at a time.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from odewei.experts import ExpertPlan, piece_name
from odewei.in_parts import InParts, is_watched
from odewei.placeholder import Origin

__all__ = ["Experts", "Sliced", "SlicedWeight"]

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8})


Resident = Callable[[int, str], nn.Parameter | None]
"""The tensor of a unit by its name, if it is here."""


class _Call:
    """One forward of the module: which expert it is at, leased until it takes another."""

    __slots__ = ("frame", "release", "unit")

    def __init__(self, frame: FrameType) -> None:
        self.frame = frame
        self.unit = -1
        self.release: Callable[[], None] | None = None

    def let_go(self) -> None:
        release, self.unit, self.release = self.release, -1, None
        if release is not None:
            release()


class Experts:
    """The experts of one module at work. Methods may be called from any thread.

    While a thread is inside the module's forward it holds the expert that it took last, and no other.
    """

    def __init__(self, plan: ExpertPlan, first_unit: int) -> None:
        """``first_unit`` is the unit of expert 0; those of the others follow."""
        self.units = range(first_unit, first_unit + plan.count)
        self.weights = {weight.name: SlicedWeight(weight.name, weight.shape, self) for weight in plan.weights}
        self._origin: Callable[[], Origin | None] = lambda: None
        self._resident: Callable[[], Resident | None] = lambda: None
        self._want: Callable[[Sequence[int]], None] = lambda units: None
        self._local = threading.local()

    def connect(self, origin: weakref.ref[Origin], resident: Callable[[], Resident | None]) -> None:
        """Where units come from, as weak references."""
        self._origin, self._resident = origin, resident

    def announce_to(self, want: Callable[[Sequence[int]], None]) -> None:
        """``want`` tells the scheduler which units this thread will use next, none of them ending that."""
        self._want = want

    def enter(self, frame: FrameType) -> None:
        """This thread enters the module's forward, whose call runs in ``frame``."""
        self.leave()  # what an interrupt has left behind
        self._local.call = _Call(frame)

    def leave(self) -> None:
        """This thread leaves it."""
        call: _Call | None = getattr(self._local, "call", None)
        self._local.call = None
        if call is not None:
            call.let_go()

    @contextmanager
    def expected(self, places: Sequence[int]) -> Iterator[None]:
        """This thread will take these experts in this order meanwhile: their reads begin together, now."""
        self._want([self.units[place] for place in places])
        try:
            yield
        finally:
            self._want(())

    def piece(self, weight: str, place: int) -> torch.Tensor:
        """One expert's part of a weight, read if need be. A reference keeps its unit; the lease is the call's."""
        origin, resident = self._living(weight)
        unit, name = self.units[place], piece_name(weight, place)
        call: _Call | None = getattr(self._local, "call", None)
        if call is None:
            tensor, release = origin.lease(unit, name, sys._getframe())
            piece = tensor.detach()
            release()
            return piece
        held = resident(unit, name) if call.unit == unit else None
        if held is None:
            call.let_go()
            tensor, call.release = origin.lease(unit, name, call.frame)
            call.unit = unit
            return tensor.detach()
        return held.detach()

    def pieces_here(self, weight: str) -> Iterator[tuple[int, nn.Parameter]]:
        """The parts of a weight that are in memory by themselves."""
        _, resident = self._living(weight)
        for place, unit in enumerate(self.units):
            piece = resident(unit, piece_name(weight, place))
            if piece is not None:
                yield place, piece

    def _living(self, weight: str) -> tuple[Origin, Resident]:
        origin, resident = self._origin(), self._resident()
        if origin is None or resident is None:
            raise ReferenceError(f"the model of weight {weight!r} is gone")
        return origin, resident

    def __repr__(self) -> str:
        return f"<Experts: {len(self.units)} of {', '.join(self.weights)}>"


class SlicedWeight:
    """One weight of a module's experts."""

    def __init__(self, name: str, shape: tuple[int, ...], experts: Experts) -> None:
        self.name = name
        self.shape = shape
        self.experts = experts
        self._copied: dict[int, int] = {}  # the version of each piece that the whole has
        self._lock = threading.Lock()

    def take(self, index: Any) -> torch.Tensor | None:
        """``weight[index]`` if that is one expert; raises what torch raises for one that there is not."""
        place = _as_place(index)
        if place is None:
            return None
        if not -self.shape[0] <= place < self.shape[0]:
            torch.empty((), device="cpu").expand(self.shape)[place]
        return self.experts.piece(self.name, place % self.shape[0])

    def is_written(self) -> bool:
        """Whether a part that is in memory by itself was written to."""
        return any(piece._version for _, piece in self.experts.pieces_here(self.name))

    def catch_up(self, whole: nn.Parameter) -> None:
        """Copy into the whole weight what was written into pieces; it counts as written then, and stays.

        For whoever is about to use the whole.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for place, piece in self.experts.pieces_here(self.name):
                version = piece._version
                if version > self._copied.get(place, 0):
                    whole[place].copy_(piece)
                    self._copied[place] = version


class Sliced(InParts):
    """Made with :meth:`of`."""

    sliced: SlicedWeight

    @classmethod
    def of(
        cls,
        unit: int,
        weight: SlicedWeight,
        dtype: torch.dtype,
        origin: weakref.ref[Origin],
        resident: Callable[[], nn.Parameter | None],
        device: torch.device,
    ) -> Sliced:
        """``resident`` returns the whole weight if it is loaded now; the others as for Placeholder."""
        made = cls.make(unit, weight.name, weight.shape, dtype, None, origin, device)
        made.sliced, made._resident = weight, resident
        return made

    @classmethod
    def _from_a_part(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if func is not torch.Tensor.__getitem__ or not isinstance(args[0], Sliced) or is_watched():
            return None
        weight, index = args
        return weight.sliced.take(index) if weight._resident() is None else None  # a whole may have been written to


def _as_place(index: Any) -> int | None:
    """The index as one number; None if it is something else, or its value is not there to be seen."""
    if isinstance(index, int):
        return None if isinstance(index, bool) else index
    if type(index) is not torch.Tensor or index.dim() or index.dtype not in _INTEGERS:
        return None
    try:
        return int(index)
    except (RuntimeError, TypeError):  # batched, fake, meta
        return None
