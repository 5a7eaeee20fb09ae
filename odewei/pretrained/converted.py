"""A loader that has a checkpoint's weights as a model of transformers or diffusers has them.

Most are places in files: under other names, in other shapes, gathered from several. The others are computed when they
are read, in the reader's thread, one conversion at a time: its sources are read, transformers' own operations run on
them, and the result is copied to its place. That takes their memory besides the budget for that moment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odewei.errors import WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.gathering import GatheringLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.tensors import check_plain, read_tensor
from odewei.pretrained.naming import Group
from odewei.pretrained.tracing import convert, traced

__all__ = ["ConvertedLoader"]


class ConvertedLoader(WeightsLoader):
    """``loader``'s weights, converted by ``groups``. ``model`` is the model without weights, of which the conversions
    ask shapes and dtypes. It will stream, so where conversions run later, what is kept is a copy without values.

    Raises WeightMismatchError if a conversion does not fit its sources.
    """

    def __init__(self, loader: WeightsLoader, groups: Iterable[Group], model: Any, config: Any) -> None:
        super().__init__()
        self._gathering = GatheringLoader(loader, {})  # reads gathered weights, whoever gathered them
        self._loader = loader
        self._config = config
        self._infos: dict[str, WeightInfo] = {}
        self._computed: dict[str, Group] = {}
        for group in groups:
            for name, one in traced(group, model, config).items():
                self._infos[name] = one.info
                if one.is_computed:
                    self._computed[name] = group
        self._model = _without_values(model) if self._computed and model is not None else None
        self._kept: dict[str, torch.Tensor] = {}

    def leave_out(self, name: str) -> None:
        """Have nothing under this name."""
        self._infos.pop(name, None)
        self._computed.pop(name, None)

    def keep(self, values: Mapping[str, torch.Tensor]) -> None:
        """Have these in memory, besides what is in files: weights that were initialised."""
        for name, value in values.items():
            self._kept[name] = value.contiguous()
            self._infos[name] = WeightInfo(name, value.dtype, tuple(value.shape), None)

    @property
    def place(self) -> Path | None:
        return self._loader.place

    @property
    def is_as_loaded(self) -> bool:
        return True  # transformers and diffusers set parameters one by one

    @property
    def computed(self) -> tuple[str, ...]:
        """The names of the weights that are computed, not only read."""
        return tuple(self._computed)

    def weights(self) -> Mapping[str, WeightInfo]:
        known = self._loader.weights()
        refused = known.refused if isinstance(known, KnownWeights) else {}
        lacking = {name: error for name, error in refused.items() if name not in self._infos}
        return KnownWeights(self._infos, lacking) if lacking else self._infos

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        kept = self._kept.get(info.name)
        if kept is not None and self._infos[info.name] is info:
            _copy(kept, buffer)
            return
        group = self._computed.get(info.name)
        if group is None or self._infos[info.name] is not info:
            self._gathering.read_into(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
        if not buffer.nbytes:
            return
        with torch.inference_mode(False), torch.no_grad():
            made = check_plain(self._compute(group, info.name), weight=info.name)
            if tuple(made.shape) != info.shape or made.dtype != info.dtype:
                raise WeightMismatchError(
                    f"the conversion gave {tuple(made.shape)} of {made.dtype}, not {info.shape} of {info.dtype}",
                    weight=info.name,
                    file=group.taken[0].info.file,
                    cure="This is a mistake in the conversion: report it",
                )
            _copy(made, buffer)

    def _compute(self, group: Group, name: str) -> torch.Tensor:
        def source(place: int) -> torch.Tensor:
            taken = group.taken[place]
            return read_tensor(self._loader, taken.info).to(dtype=taken.dtype or taken.info.dtype)

        if group.conversion is None:
            return source(0)
        return convert(group, source, self._model, self._config)[name]

    def close(self) -> None:
        self._loader.close()

    def __repr__(self) -> str:
        return f"<ConvertedLoader of {len(self._infos)} weights, {len(self._computed)} computed, over {self._loader!r}>"


def _copy(made: torch.Tensor, buffer: memoryview) -> None:
    if buffer.nbytes:
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        with torch.inference_mode(False), torch.no_grad():
            target.copy_(made.contiguous().view(-1).view(torch.uint8))


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a model without weights that has no values of buffers either."""
    meta = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo=meta)
