"""From a path to the loader that fits: a file by its name, a folder by what is in it. Paths may be URLs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch

from odewei.errors import CheckpointError, CheckpointNotFoundError
from odewei.loaders.base import CheckpointFile, WeightsLoader
from odewei.loaders.file_kind import look_at
from odewei.loaders.folders import (
    INDEX_SUFFIX,
    METADATA_NAME,
    USUAL_NAMES,
    Start,
    choose_name,
    find_start,
    nothing_there,
)
from odewei.loaders.names import Rename
from odewei.loaders.remote_file import list_folder
from odewei.loaders.remote_path import RemoteOptions, RemotePath, as_place
from odewei.loaders.shard_names import ShardSet
from odewei.loaders.shard_set import ShardSetLoader
from odewei.loaders.sharded import ShardedWeightsLoader
from odewei.loaders.sums import Verify
from odewei.loaders.weights_file import is_weights_file, open_weights_file

__all__ = ["INDEX_SUFFIX", "choose", "open_checkpoint"]

_TRIED = USUAL_NAMES[:4]  # each is a request


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    rename: Rename | None = None,
    prefix: str = "",
    storage_options: Mapping[str, object] | None = None,
    remote: RemoteOptions | None = None,
    verify: Verify = "size",
) -> WeightsLoader:
    """The loader for a file that ``open_weights_file`` reads, an .index.json, or the checkpoint in a folder.

    In a folder the usual names of model hubs come first, safetensors before pickles and an index before a single file;
    then the only index, the only safetensors file, the only torch file, the only .npz file, the only .gguf file, where
    shards without an index ("model-00001-of-00003.safetensors") count as one file; then all .npy files together, and a
    checkpoint of torch.distributed; then the only checkpoint in the folders below, of a hub's cache its main revision
    (local ones only). A URL whose last name has none of the known endings is a folder.
    ``rename``, ``prefix`` and ``verify`` are the loader's (see ``FileLoader``); ``storage_options`` and ``remote`` are
    for URLs. Raises CheckpointNotFoundError, and CheckpointError where several files fit.
    """
    place = as_place(path, storage_options, remote)
    options = _Options(device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify)
    if isinstance(place, Path):
        start = choose(place)
        if start.kind == "distributed":
            from odewei.loaders.distributed import DistributedLoader  # few processes need it

            return DistributedLoader(start.path, **options)
        if start.kind == "shards":
            return ShardSetLoader(start.paths, **options)
        if start.kind == "arrays":
            from odewei.loaders.numpy_file import NumpyLoader  # few processes need it

            return NumpyLoader(start.path, **options)
        if start.kind == "index":
            return ShardedWeightsLoader(start.path, start.path.parent, **options)
        return open_weights_file(start.path, **options)
    chosen: RemotePath | ShardSet = place
    if not (place.name.endswith(INDEX_SUFFIX) or is_weights_file(place)):
        chosen = _choose_remote(place)
    if isinstance(chosen, ShardSet):
        return ShardSetLoader([place / name for name in chosen.in_order()], **options)
    if chosen.name.endswith(INDEX_SUFFIX):
        return ShardedWeightsLoader(chosen, chosen.parent, **options)
    return open_weights_file(chosen, **options)


class _Options(TypedDict):
    device: torch.device | str | None
    dtype: torch.dtype | None
    rename: Rename | None
    prefix: str
    verify: Verify


def choose(path: Path, *, deeper: bool = True) -> Start:
    """What the checkpoint at ``path``, a file or a folder, begins at; ``deeper``: it may lie in a folder below.

    Raises CheckpointError as ``open_checkpoint`` does.
    """
    if path.is_dir():
        return find_start(path, deeper=deeper)
    if path.name.endswith(INDEX_SUFFIX):
        return Start("index", (path,))
    if path.name == METADATA_NAME or path.suffix.lower() == ".distcp":
        return Start("distributed", (path.parent,))
    if path.suffix.lower() == ".json":
        kind = look_at(CheckpointFile.stat(path))
        if kind is not None and kind.reader == "index":
            return Start("index", (path,))
    return Start("file", (path,))


def _choose_remote(folder: RemotePath) -> RemotePath | ShardSet:
    """The same where there may be no listing: the usual names are tried."""
    refusal: CheckpointError | None = None
    for name in _TRIED:
        try:
            (folder / name).stat()
        except CheckpointNotFoundError:
            continue
        except CheckpointError as error:  # stores say so of what is not there, to those who may not list
            refusal = refusal or error
            continue
        return folder / name
    names = sorted(list_folder(folder))
    found = choose_name(names, folder)
    if isinstance(found, ShardSet):
        return found
    if found is not None:
        return folder / found
    raise refusal or nothing_there(names, folder, "")
