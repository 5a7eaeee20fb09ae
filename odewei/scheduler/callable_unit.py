"""A unit whose weights come from a function of the user instead of places in files.

The function runs in a reader thread. What it returns is copied into the unit's slab, aligned; what it returns beyond
what was asked is kept while the budget has room, so that a function that reads whole shards is not asked for each
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from odewei.errors import WeightMismatchError
from odewei.loaders.base import CheckpointFile
from odewei.scheduler.host_memory import Bytes, round_up
from odewei.scheduler.reader import FileTable, Job, Resized, tensors_over
from odewei.scheduler.reads import Placement
from odewei.scheduler.slab import ALIGNMENT, slab_bytes
from odewei.scheduler.slabs import SlabPool

__all__ = ["CallableUnit", "Expected"]

_MOST_RESIZES = 3

Load = Callable[[str, Sequence[str]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Expected:
    """A weight that the model has, before it was ever loaded."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class CallableUnit:
    """The weights of ``module``. ``cast`` says which dtype a loaded dtype becomes. Is its own, only job."""

    def __init__(
        self,
        module: str,
        weights: Sequence[Expected],
        load: Load,
        pool: SlabPool,
        cast: Callable[[torch.dtype], torch.dtype],
        wanted_elsewhere: Callable[[str], bool],
    ) -> None:
        self._module = module
        self._weights = weights
        self._load = load
        self._pool = pool
        self._cast = cast
        self._wanted_elsewhere = wanted_elsewhere
        self._resized = 0  # times in a row
        self.placements: Sequence[Placement]
        self.placements, self._nbytes = _layout(weights, {weight.name: cast(weight.dtype) for weight in weights})

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def jobs(self) -> Sequence[Job]:
        return [self]

    def tensors(self, slab: Bytes) -> dict[str, torch.Tensor]:
        return tensors_over(slab, self.placements)

    def files(self) -> Sequence[CheckpointFile]:
        return ()

    def run(self, slab: Bytes, files: FileTable) -> int:
        """Ask the function for what is not kept, and copy all into the slab. Resized if the dtypes were others."""
        found, nbytes_read = self._collect()
        dtypes = {weight.name: self._cast(found[weight.name].dtype) for weight in self._weights}
        self.placements, self._nbytes = _layout(self._weights, dtypes)
        if self._nbytes != len(slab):
            self._resized += 1
            if self._resized > _MOST_RESIZES:
                raise WeightMismatchError(
                    "weights_loader_fn returns the same weights in ever other dtypes",
                    module=self._module,
                    cure="Return each weight in one dtype",
                )
            for name, tensor in found.items():
                self._keep(name, tensor)
            raise Resized(self._nbytes)
        self._resized = 0
        for name, target in tensors_over(slab, self.placements).items():
            with torch.inference_mode(False), torch.no_grad():
                target.copy_(found[name])
        return nbytes_read

    def _collect(self) -> tuple[dict[str, torch.Tensor], int]:
        kept = {weight.name: self._pool.take_spare(weight.name) for weight in self._weights}
        found = {name: tensor for name, tensor in kept.items() if isinstance(tensor, torch.Tensor)}
        missing = [weight for weight in self._weights if weight.name not in found]
        if not missing:
            return found, 0
        answer = dict(self._load(self._module, [weight.name for weight in missing]))
        nbytes_read = sum(tensor.nbytes for tensor in answer.values())
        for weight in missing:
            found[weight.name] = self._checked(weight, answer.pop(weight.name))
        for name, tensor in answer.items():
            if self._wanted_elsewhere(name):
                self._keep(name, tensor)
        return found, nbytes_read

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor, without the larger memory that it may be a view of."""
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.detach().clone()
        self._pool.keep_spare(name, tensor, tensor.nbytes)

    def _checked(self, weight: Expected, tensor: torch.Tensor) -> torch.Tensor:
        same_kind = tensor.dtype == weight.dtype or (tensor.is_floating_point() and weight.dtype.is_floating_point)
        if tuple(tensor.shape) != weight.shape or not same_kind:
            raise WeightMismatchError(
                f"weights_loader_fn returned {tuple(tensor.shape)} of {tensor.dtype}, "
                f"the model has {weight.shape} of {weight.dtype}",
                module=self._module,
                weight=weight.name,
                cure="Return the weight that belongs to this model",
            )
        return tensor


def _layout(weights: Sequence[Expected], dtypes: Mapping[str, torch.dtype]) -> tuple[tuple[Placement, ...], int]:
    placements, used = [], 0
    for weight in weights:
        offset = round_up(used, ALIGNMENT)
        dtype = dtypes[weight.name]
        placements.append(Placement(weight.name, offset, dtype, weight.shape, None))
        used = offset + torch.Size(weight.shape).numel() * dtype.itemsize
    return tuple(placements), slab_bytes(used)
