"""What autograd saves of streamed weights for the backward pass: references, which are read again there, not memory.

While a thread computes with gradients inside a streamed model, torch hands every tensor that it saves to ``pack``
(``torch.autograd.graph.saved_tensors_hooks``); one over a weight becomes a reference. Where others have hooks (the
user, checkpointing) these are left alone: they get everything, as with any model.

Knows the hooks of torch and what they are pushed for. One list of pushes a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

__all__ = ["SavedWeights", "WeightReference"]

_autograd = torch._C._autograd


class Weights(Protocol):
    """Where references come from, and what they lead to. Any thread calls it."""

    def refer(self, tensor: torch.Tensor) -> WeightReference | None:
        """A reference if the tensor is one over a weight's memory."""


class WeightReference:
    """A tensor over a weight: ``load`` gives its memory again; ``shape``, ``stride`` and ``offset`` are in elements.

    ``version`` is the weight's when it was saved: another one later means that it was written to.
    """

    __slots__ = ("_load", "_version", "dtype", "offset", "shape", "stride")

    def __init__(self, tensor: torch.Tensor, version: int, load: Callable[[], tuple[torch.Tensor, int]]) -> None:
        """``load`` returns a tensor that has the storage, and the weight's version at that time."""
        self._load, self._version = load, version
        self.shape, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        self.dtype = tensor.dtype

    def tensor(self) -> torch.Tensor:
        """The tensor, read again if need be. Raises RuntimeError, as torch does, if the weight was written to."""
        real, version = self._load()
        if version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"streamed weight of shape {list(self.shape)} is at version {version}; expected version "
                f"{self._version} instead"
            )
        with torch.inference_mode(False), torch.no_grad():
            made = torch.empty(0, dtype=self.dtype, device=real.device)
            return made.set_(real.untyped_storage(), self.offset, self.shape, self.stride)


class SavedWeights:
    """The hooks of one model."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def begin(self, key: object) -> None:
        """This thread computes with gradients until ``end`` with the same key."""
        pushed = self._push()
        _mine().append((key, pushed, self))

    def end(self, key: object) -> None:
        """What ``begin`` began, if it did."""
        mine = _mine()
        if mine and mine[-1][0] is key:
            _, pushed, hooks = mine.pop()
            if pushed:
                hooks._pop()

    @contextmanager
    def during(self) -> Iterator[None]:
        """This thread computes with gradients meanwhile."""
        key = object()
        self.begin(key)
        try:
            yield
        finally:
            self.end(key)

    @staticmethod
    def clear() -> None:
        """This thread is outside of every model: end what an interrupt has left behind."""
        mine = _mine()
        while mine:
            _, pushed, hooks = mine.pop()
            if pushed:
                hooks._pop()

    def _push(self) -> bool:
        if not _autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            return False  # a transform (torch.func) allows none: it saves nothing beyond itself
        if _autograd._top_saved_tensors_default_hooks(False) is not None:
            return False  # ours, or others', which count what they get (checkpointing)
        _autograd._push_saved_tensors_default_hooks(self._pack, _unpack)
        return True

    def _pop(self) -> None:
        top = _autograd._top_saved_tensors_default_hooks(False)
        if top is not None and top[1] is _unpack:  # otherwise somebody has pushed others in here and left them
            _autograd._pop_saved_tensors_default_hooks()

    def _pack(self, tensor: torch.Tensor) -> Any:
        found = self._weights.refer(tensor)
        if found is not None:
            return found
        return tensor if tensor.is_inference() else _Kept(tensor)


def _unpack(packed: Any) -> torch.Tensor:
    found: torch.Tensor = packed.tensor() if isinstance(packed, WeightReference | _Kept) else packed
    return found


class _Kept:
    """A tensor that is no weight. Where there are hooks torch leaves it to them to see that nobody wrote into it."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()  # an output that is saved would hold the node that holds it
        self._version = tensor._version

    def tensor(self) -> torch.Tensor:
        """As it was saved. Raises RuntimeError, as torch does, if it was written to."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self._tensor.type()} {list(self._tensor.shape)}] is at version {self._tensor._version}; expected "
                f"version {self._version} instead. Hint: enable anomaly detection to find the operation that failed to "
                "compute its gradient, with torch.autograd.set_detect_anomaly(True)."
            )
        return self._tensor


_local = threading.local()


def _mine() -> list[tuple[object, bool, SavedWeights]]:
    found: list[tuple[object, bool, SavedWeights]] | None = getattr(_local, "pushes", None)
    if found is None:
        found = _local.pushes = []
    return found
