"""A checkpoint in several files with an index, the usual form of large models.

Knows which loader reads which kind of file. The index is read when the loader is made, the headers of all shards when
the weights are first asked for.
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
from odewei.loaders.gguf_file import GgufLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.names import Rename
from odewei.loaders.numpy_file import NumpyLoader
from odewei.loaders.remote_path import AnyPath, RemoteOptions, RemotePath, as_place
from odewei.loaders.safetensors_file import SafetensorsLoader
from odewei.loaders.sums import Verify, check_sum, find_sum
from odewei.loaders.torch_file import TorchLoader

__all__ = ["NUMPY_SUFFIXES", "TORCH_SUFFIXES", "ShardedWeightsLoader", "is_weights_file", "open_weights_file"]

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NUMPY_SUFFIXES = (".npz", ".npy")
_KINDS: dict[str, type[FileLoader]] = {
    ".safetensors": SafetensorsLoader,
    **dict.fromkeys(TORCH_SUFFIXES, TorchLoader),
    **dict.fromkeys(NUMPY_SUFFIXES, NumpyLoader),
    ".gguf": GgufLoader,
}


def is_weights_file(path: AnyPath) -> bool:
    """Whether ``open_weights_file`` reads a file of that name."""
    return path.suffix.lower() in _KINDS


def open_weights_file(
    path: AnyPath,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    rename: Rename | None = None,
    prefix: str = "",
    verify: Verify = "size",
) -> FileLoader:
    """The loader for one file of weights, chosen by the end of its name.

    Raises CheckpointNotFoundError, and CheckpointError for any other kind of file.
    """
    CheckpointFile.stat(path)
    suffix = path.suffix.lower()
    if suffix not in _KINDS:
        raise CheckpointError(
            f"files that end in {suffix!r} are not read",
            file=str(path),
            cure=f"Use {', '.join(_KINDS)}, or an index that ends in .index.json",
        )
    return _KINDS[suffix](path, device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify)


class ShardedWeightsLoader(FileLoader):
    """The weights that an index maps to files in ``weights_dir``, of any kinds that ``open_weights_file`` reads.

    The index at ``index_file_path`` holds the mapping of weights to names of files under ``weights_mapping_key``.
    Names that lead out of ``weights_dir`` are refused (UnsafeCheckpointError); links that lie in it are followed.
    A weight that the index does not map, or maps to a shard that lacks it, is taken from the one shard that has it; if
    there is none such, that is an error for who asks for the weight.

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
        self._index.check_shards()
        self._shards: dict[str, AnyPath] = {}
        self._loaders = {shard: open_weights_file(shard, verify=self.verify) for shard in self._index.by_shard()}

    def _read_headers(self) -> Mapping[str, WeightInfo]:
        has = {shard: self._loaders[shard].weights() for shard in self._index.by_shard()}
        holders: dict[str, list[AnyPath]] = {}
        for shard, weights in has.items():
            refused = weights.refused if isinstance(weights, KnownWeights) else {}
            for name in (*weights, *refused):
                holders.setdefault(name, []).append(shard)
        found: dict[str, WeightInfo] = {}
        lacking: dict[str, CheckpointError] = {}
        for name in dict.fromkeys([*self._index.shards, *holders]):
            held, promised = holders.get(name, []), self._index.shards.get(name)
            chosen = promised if promised in held else held[0] if len(held) == 1 else None
            try:
                if chosen is None:
                    raise self._misplaced(name, promised, held)
                found[name] = has[chosen][name]
                self._shards[name] = chosen
            except CheckpointError as error:
                lacking[name] = error
        if lacking and not found:
            raise next(iter(lacking.values()))
        return KnownWeights(found, lacking) if lacking else found

    def _misplaced(self, name: str, promised: AnyPath | None, held: Sequence[AnyPath]) -> CheckpointError:
        """What to raise for a weight of which the index does not say rightly where it is, and neither do the shards."""
        if held:
            return CheckpointError(
                f"{len(held)} shards have a weight, and the index {self.path.name!r} does not say which one counts",
                weight=name,
                file=str(held[0]),
                cure="Map the weight in the index, or leave it out with rename=",
            )
        return MissingWeightError(
            f"the index {self.path.name!r} promises a weight in a shard that does not have it",
            weight=name,
            file=str(promised),
            cure="Index and shards are of different checkpoints: download all of them again",
        )

    def values(self) -> Mapping[str, object]:
        found = {name: value for loader in self._loaders.values() for name, value in loader.values().items()}
        return self._names.values(found)

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        self._loaders[self._shards[info.name]].read_into(info, buffer)  # by the name in the checkpoint

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
