"""A checkpoint under other names, or as a model takes it: the same bytes behind the same seam.

Knows loaders. What only names or shapes tell apart stays where it is; what has to be computed is computed when it is
read, in the reader's thread: that takes the memory of what it is computed of, besides the budget, for that moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.gathering import GatheringLoader
from odewei.loaders.tensors import view_as_weight

if TYPE_CHECKING:
    from odewei.op_program import Program

__all__ = ["MatchedLoader", "RenamedLoader", "read_stored"]


class RenamedLoader(WeightsLoader):
    """``loader``'s weights as ``infos`` has them, which are its own or made of its own."""

    def __init__(
        self,
        loader: WeightsLoader,
        infos: Mapping[str, WeightInfo],
        values: Mapping[str, object],
        metadata: Mapping[str, Mapping[str, object]],
    ) -> None:
        super().__init__(device=loader.device, dtype=loader.dtype)
        self.loader = loader
        self._infos, self._values, self._metadata = infos, values, metadata

    @property
    def place(self) -> Path | None:
        return self.loader.place

    def weights(self) -> Mapping[str, WeightInfo]:
        return self._infos

    def values(self) -> Mapping[str, object]:
        return self._values

    def metadata(self) -> Mapping[str, Mapping[str, object]]:
        return self._metadata

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        self.loader.read_into(info, buffer)

    def close(self) -> None:
        self.loader.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self._infos)} weights over {self.loader!r}>"


class MatchedLoader(RenamedLoader):
    """The weights of ``loader`` as a model's ``load_state_dict`` takes them; ``programs`` are those that are computed.

    What that said besides, by the model's names: ``settled`` are in place already; ``excused`` may be missing;
    ``mismatched`` have another shape in the model (with torch's words for it); ``unexpected`` nobody wants.
    """

    def __init__(
        self,
        loader: WeightsLoader,
        infos: Mapping[str, WeightInfo],
        programs: Mapping[str, Program],
        *,
        settled: frozenset[str],
        excused: frozenset[str],
        mismatched: Mapping[str, str],
        unexpected: tuple[str, ...],
    ) -> None:
        super().__init__(loader, infos, loader.values(), {})
        self._programs = programs
        self._gathering = GatheringLoader(loader, {})  # reads what is put together, whoever said of what
        self.settled, self.excused = settled, excused
        self.mismatched, self.unexpected = mismatched, unexpected

    @property
    def is_as_loaded(self) -> bool:
        return True

    @property
    def is_empty(self) -> bool:
        """Whether the model took nothing at all of the checkpoint."""
        return not self._infos and not self.settled

    def has_all(self, weights: Iterable[Sequence[str]]) -> bool:
        """Whether the model has taken each of the weights, of which these are the names."""
        return all(
            any(name in self._infos or name in self.settled or name in self.excused for name in names)
            for names in weights
        )

    @property
    def computed(self) -> tuple[str, ...]:
        """The names of the weights that are computed, not only read."""
        return tuple(self._programs)

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        program = self._programs.get(info.name)
        if program is None or self._infos[info.name] is not info:
            self._gathering.read_into(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
        if buffer.nbytes:
            made = program.run(lambda source: read_stored(self.loader, source))
            with torch.inference_mode(False), torch.no_grad():
                torch.frombuffer(buffer, dtype=torch.uint8).copy_(made.contiguous().view(-1).view(torch.uint8))


def read_stored(loader: WeightsLoader, info: WeightInfo) -> torch.Tensor:
    """Read one weight as it is stored, uncast, into memory of its own. Raises WeightReadError."""
    with torch.inference_mode(False), torch.no_grad():
        raw = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
        loader.read_into(info, raw.numpy().data)
        return view_as_weight(raw, info)
