"""A checkpoint in several files with an index, the usual form of large models.

Knows which loader reads which kind of file. The index is read when the loader is made, the headers of all shards when
the weights are first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from odewei.errors import CheckpointError, MissingWeightError
from odewei.loaders.base import CheckpointFile, WeightInfo
from odewei.loaders.checkpoint_index import read_index
from odewei.loaders.file_loader import FileLoader
from odewei.loaders.gguf_file import GgufLoader
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
    Weights in a shard that the index does not map are left out.

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
        self._loaders = {shard: open_weights_file(shard, verify=self.verify) for shard in self._index.by_shard()}

    def _read_headers(self) -> dict[str, WeightInfo]:
        found: dict[str, WeightInfo] = {}
        for shard, names in self._index.by_shard().items():
            has = self._loaders[shard].weights()
            for name in names:
                if name not in has:
                    raise MissingWeightError(
                        f"the index {self.path.name!r} promises a weight in a shard that does not have it",
                        weight=name,
                        file=str(shard),
                        cure="Index and shards are of different checkpoints: download all of them again",
                    )
                found[name] = has[name]
        return {name: found[name] for name in self._index.shards}

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        self._loaders[self._index.shards[info.name]].read_into(info, buffer)  # by the name in the checkpoint

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
