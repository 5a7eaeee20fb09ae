"""The weights of several files as those of one checkpoint, where no index says which is where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from odewei.errors import CheckpointError
from odewei.loaders.base import WeightInfo, WeightsLoader

__all__ = ["JoinedLoader"]


class JoinedLoader(WeightsLoader):
    """What ``loaders`` have together. Raises CheckpointError where two have a weight of one name."""

    def __init__(self, loaders: Sequence[WeightsLoader]) -> None:
        super().__init__()
        self._loaders = tuple(loaders)
        self._infos: dict[str, WeightInfo] = {}
        self._owners: dict[str, WeightsLoader] = {}

    @property
    def place(self) -> Path | None:
        return self._loaders[0].place if self._loaders else None

    def weights(self) -> Mapping[str, WeightInfo]:
        if not self._owners:
            infos: dict[str, WeightInfo] = {}
            owners: dict[str, WeightsLoader] = {}
            for loader in self._loaders:
                for name, info in loader.weights().items():
                    if name in owners:
                        raise CheckpointError(
                            f"two shards without an index have a weight of this name; the other is in {info.file}",
                            weight=name,
                            file=infos[name].file,
                            cure="Download the index, or keep the shards of one checkpoint in the folder",
                        )
                    infos[name], owners[name] = info, loader
            self._infos, self._owners = infos, owners  # in this order: another thread may look
        return self._infos

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        self.weights()
        self._owners[info.name].read_into(info, buffer)

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()

    def __repr__(self) -> str:
        return f"<JoinedLoader of {len(self._loaders)} files>"
