"""A weight that holds the experts of a layer one after another: taking one, ``weight[i]``, reads that expert's piece.

As for tables (``looked_up``), what is done with the weight decides, not which module does it: a single place of the
first dimension is read by itself; anything else takes the whole weight (see ``substitution``).

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
from typing import Any, Protocol

import torch
from torch import nn

from odewei.experts import ExpertPlan, piece_name
from odewei.placeholder import Placeholder
from odewei.substitution import is_watched

__all__ = ["Experts", "SlicedWeight"]

_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8})


class Units(Protocol):
    """Who has the tensors of units, by their names. Any thread calls it."""

    def lease(self, unit: int, name: str, frame: FrameType) -> tuple[torch.Tensor, Callable[[], None]]:
        """See ``placeholder.Stream.lease``."""

    def find(self, unit: int, name: str) -> nn.Parameter | None:
        """The tensor if it is here."""


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
        self._tensors: Callable[[], Units | None] = lambda: None
        self._want: Callable[[Sequence[int]], None] = lambda units: None
        self._local = threading.local()

    def connect(self, units: weakref.ref[Units]) -> None:
        """Where units come from."""
        self._tensors = units

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
        tensors = self._living(weight)
        unit, name = self.units[place], piece_name(weight, place)
        call: _Call | None = getattr(self._local, "call", None)
        if call is None:
            tensor, release = tensors.lease(unit, name, sys._getframe())
            piece = tensor.detach()
            release()
            return piece
        held = tensors.find(unit, name) if call.unit == unit else None
        if held is None:
            call.let_go()
            tensor, call.release = tensors.lease(unit, name, call.frame)
            call.unit = unit
            return tensor.detach()
        return held.detach()

    def pieces_here(self, weight: str) -> Iterator[tuple[int, nn.Parameter]]:
        """The parts of a weight that are in memory by themselves."""
        tensors = self._living(weight)
        for place, unit in enumerate(self.units):
            piece = tensors.find(unit, piece_name(weight, place))
            if piece is not None:
                yield place, piece

    def _living(self, weight: str) -> Units:
        tensors = self._tensors()
        if tensors is None:
            raise ReferenceError(f"the model of weight {weight!r} is gone")
        return tensors

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

    def take(self, index: Any, whole: Placeholder) -> torch.Tensor | None:
        """``weight[index]`` if that is one expert; raises what torch raises for one that there is not."""
        place = _as_place(index)
        if place is None:
            return None
        if not -self.shape[0] <= place < self.shape[0]:
            torch.empty((), device="cpu").expand(self.shape)[place]
        place %= self.shape[0]
        piece = self.experts.piece(self.name, place)
        if not (whole.requires_grad and torch.is_grad_enabled()):
            return piece
        with torch._C.DisableTorchFunctionSubclass():
            return _Piece.apply(piece, whole, place)  # type: ignore[no-untyped-call, no-any-return]

    def answer(
        self, whole: Placeholder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """What a function gives, if it takes one expert and the whole is not here, where it may have been written
        to."""
        if func is not torch.Tensor.__getitem__ or args[0] is not whole or is_watched():
            return None
        return self.take(args[1], whole) if whole.home.stream.resident(whole.home) is None else None

    def piece_names(self) -> Iterator[str]:
        """The names of the parts, as weights of their own."""
        return (piece_name(self.name, place) for place in range(len(self.experts.units)))

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


class _Piece(torch.autograd.Function):
    """One expert's part of a weight, with gradients for the whole."""

    @staticmethod
    def forward(ctx: Any, piece: torch.Tensor, whole: torch.Tensor, place: int) -> torch.Tensor:
        ctx.place, ctx.shape = place, whole.shape
        return piece.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        return None, torch.ops.aten.select_backward(grad, ctx.shape, 0, ctx.place), None


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
