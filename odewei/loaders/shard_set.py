"""A checkpoint in several files without an index: the headers of all of them say what is where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import WeightInfo
from odewei.loaders.file_loader import FileLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.names import Rename
from odewei.loaders.remote_path import AnyPath
from odewei.loaders.sums import Verify
from odewei.loaders.weights_file import open_weights_file

__all__ = ["ShardSetLoader"]


class ShardSetLoader(FileLoader):
    """The weights of several files, each of a kind that ``open_weights_file`` reads; ``path`` is the first of them.

    A name that two of the files have is refused (CorruptCheckpointError): nothing says which is meant.
    """

    def __init__(
        self,
        paths: Sequence[AnyPath],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        prefix: str = "",
        verify: Verify = "size",
    ) -> None:
        super().__init__(paths[0], device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify)
        self.paths = tuple(paths)
        self._loaders = {path: open_weights_file(path, verify=verify) for path in paths}
        self._shards: dict[str, AnyPath] = {}

    def _read_headers(self) -> Mapping[str, WeightInfo]:
        infos: dict[str, WeightInfo] = {}
        refused: dict[str, CheckpointError] = {}
        for path, loader in self._loaders.items():
            found = loader.weights()
            for name in found:
                if name in infos:
                    raise CorruptCheckpointError(
                        f"two shards have a weight of one name: {self._shards[name].name!r} and {path.name!r}",
                        weight=name,
                        file=str(path),
                        cure="They are of different checkpoints, or overlap: keep the files of one in the folder, or "
                        "give it an index (.index.json)",
                    )
                infos[name] = found[name]
                self._shards[name] = path
            if isinstance(found, KnownWeights):
                refused |= found.refused
        return KnownWeights(infos, refused)

    def values(self) -> Mapping[str, object]:
        found = {name: value for loader in self._loaders.values() for name, value in loader.values().items()}
        return self._names.values(found)

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        self.weights()
        self._loaders[self._shards[info.name]].read_into(info, buffer)

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
