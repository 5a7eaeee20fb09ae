"""A checkpoint in several files with an index, the usual form of large models.

The index is read when the loader is made, the headers of all shards when the weights are first asked for. What index
and shards disagree about is an error for who needs it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from odewei.errors import CheckpointError, MissingWeightError
from odewei.loaders.base import CheckpointFile, WeightInfo
from odewei.loaders.checkpoint_index import read_index
from odewei.loaders.file_loader import FileLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.names import Rename
from odewei.loaders.remote_path import AnyPath, RemoteOptions, RemotePath, as_place
from odewei.loaders.sums import Verify, check_sum, find_sum
from odewei.loaders.told import tell_once
from odewei.loaders.weights_file import open_weights_file

__all__ = ["ShardedWeightsLoader"]


class ShardedWeightsLoader(FileLoader):
    """The weights that an index maps to files in ``weights_dir``, of any kinds that ``open_weights_file`` reads.

    The index at ``index_file_path`` holds the mapping of weights to names of files under ``weights_mapping_key``.
    Names that lead out of ``weights_dir`` are refused (UnsafeCheckpointError); links that lie in it are followed.
    Weights in a shard that the index does not map are there too; where an index and its shards disagree about a weight,
    that is an error only for who asks for it.

    With ``verify="sha256"`` the index's own sum is compared only if one is kept: an index holds no weights, and what it
    says of a shard the shard has to say too.
    """

    def __init__(
        self,
        index_file_path: str | os.PathLike[str],
        weights_dir: str | os.PathLike[str],
        weights_mapping_key: str = "weight_map",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rename: Rename | None = None,
        prefix: str = "",
        storage_options: Mapping[str, object] | None = None,
        remote: RemoteOptions | None = None,
        verify: Verify = "size",
    ) -> None:
        super().__init__(
            index_file_path,
            device=device,
            dtype=dtype,
            rename=rename,
            prefix=prefix,
            storage_options=storage_options,
            remote=remote,
            verify=verify,
        )
        if self.verify == "sha256" and isinstance(self.path, Path) and find_sum(self.path) is not None:
            check_sum(CheckpointFile.stat(self.path))
        folder = as_place(weights_dir, storage_options, remote)
        if isinstance(folder, RemotePath) and isinstance(self.path, RemotePath):
            folder = RemotePath(folder.url, self.path.remote)  # one cache, one look at each file
        self._index = read_index(self.path, folder, weights_mapping_key)
        if isinstance(folder, Path):
            _check_folder(folder)
        self._index.check_shards()
        self._shards: dict[str, AnyPath] = {}
        self._loaders = {shard: open_weights_file(shard, verify=self.verify) for shard in self._index.by_shard()}

    def _read_headers(self) -> Mapping[str, WeightInfo]:
        infos: dict[str, WeightInfo] = {}
        refused: dict[str, CheckpointError] = {}
        places: dict[str, AnyPath] = {}
        spare: dict[str, list[AnyPath]] = {}  # where weights are that the index does not map there
        for shard, names in self._index.by_shard().items():
            has = self._loaders[shard].weights()
            if isinstance(has, KnownWeights):
                refused |= {name: has.refused[name] for name in names if name in has.refused}
            for name in has:
                if self._index.shards.get(name) == shard:
                    infos[name], places[name] = has[name], shard
                else:
                    spare.setdefault(name, []).append(shard)
            lacking = (name for name in names if name not in infos and name not in refused)
            refused |= {name: _broken_promise(name, shard, self.path.name) for name in lacking}
        for name, shards in spare.items():
            if name in infos:
                continue  # the index says which one counts
            if len(shards) > 1:
                refused[name] = _two_of_one_name(name, shards)
                continue
            infos[name], places[name] = self._loaders[shards[0]].weights()[name], shards[0]
            if refused.pop(name, None) is not None or name not in self._index.shards:
                tell_once(f"the index {str(self.path)!r} does not say that {name!r} is in {shards[0].name!r}: it is")
        self._shards = places
        in_order = [*self._index.shards, *(name for name in infos if name not in self._index.shards)]
        return KnownWeights({name: infos[name] for name in in_order if name in infos}, refused)

    def values(self) -> Mapping[str, object]:
        found = {name: value for loader in self._loaders.values() for name, value in loader.values().items()}
        return self._names.values(found)

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        self.weights()
        self._loaders[self._shards[info.name]].read_into(info, buffer)  # by the name in the checkpoint

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()


def _broken_promise(name: str, shard: AnyPath, index: str) -> MissingWeightError:
    return MissingWeightError(
        f"the index {index!r} promises a weight in a shard that does not have it",
        weight=name,
        file=str(shard),
        cure="Index and shards are of different checkpoints: download all of them again",
    )


def _two_of_one_name(name: str, shards: Sequence[AnyPath]) -> CheckpointError:
    return CheckpointError(
        f"several shards have the weight, {', '.join(shard.name for shard in shards[:5])}, and the index names none",
        weight=name,
        file=str(shards[0]),
        cure="Name the right one in the index",
    )


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            "the shards are to be in a folder, this is a file",
            file=str(folder),
            cure=f"Give weights_dir={str(folder.parent)!r}, the folder that it is in, or use open_checkpoint(index)",
        )
