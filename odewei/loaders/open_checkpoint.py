"""From a path to the loader that fits: a file by its name, a folder by what is in it. Paths may be URLs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from odewei.errors import CheckpointError, CheckpointNotFoundError
from odewei.loaders.base import WeightsLoader
from odewei.loaders.names import Rename
from odewei.loaders.numpy_file import NumpyLoader
from odewei.loaders.remote_file import list_folder
from odewei.loaders.remote_path import AnyPath, RemoteOptions, RemotePath, as_place
from odewei.loaders.sharded import TORCH_SUFFIXES, ShardedWeightsLoader, is_weights_file, open_weights_file
from odewei.loaders.sums import Verify

__all__ = ["INDEX_SUFFIX", "choose", "open_checkpoint"]

INDEX_SUFFIX = ".index.json"
_USUAL_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_ONLY_ONE_OF = ((INDEX_SUFFIX,), (".safetensors",), TORCH_SUFFIXES, (".npz",), (".gguf",))
_ARRAYS = ".npy"


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
    then the only index, the only safetensors file, the only torch file, the only .npz file, the only .gguf file; then
    all .npy files together (local ones only). A URL whose last name has none of the known endings is a folder.
    ``rename``, ``prefix`` and ``verify`` are the loader's (see ``FileLoader``); ``storage_options`` and ``remote`` are
    for URLs. Raises CheckpointNotFoundError, and CheckpointError where several files fit.
    """
    place = as_place(path, storage_options, remote)
    if isinstance(place, Path):
        chosen: AnyPath = choose(place)
    elif place.name.endswith(INDEX_SUFFIX) or is_weights_file(place):
        chosen = place
    else:
        chosen = _choose_remote(place)
    if chosen.name.endswith(INDEX_SUFFIX):
        return ShardedWeightsLoader(
            chosen, chosen.parent, device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify
        )
    if isinstance(chosen, Path) and chosen.is_dir():
        return NumpyLoader(chosen, device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify)
    return open_weights_file(chosen, device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify)


def choose(path: Path) -> Path:
    """The file that the checkpoint at ``path`` begins at, or the folder itself if it is one of arrays.

    Raises CheckpointError as ``open_checkpoint`` does for folders; a path that is none is returned as it is.
    """
    return _choose(path) if path.is_dir() else path


def _choose(folder: Path) -> Path:
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for name in _only_one(names, folder):
        return folder / name
    if any(name.lower().endswith(_ARRAYS) for name in names):
        return folder
    raise _nothing(names, folder, f", *{_ARRAYS}")


def _choose_remote(folder: RemotePath) -> RemotePath:
    """The same where there may be no listing: the usual names are tried."""
    refusal: CheckpointError | None = None
    for name in _USUAL_NAMES:
        try:
            (folder / name).stat()
        except CheckpointNotFoundError:
            continue
        except CheckpointError as error:  # stores say so of what is not there, to those who may not list
            refusal = refusal or error
            continue
        return folder / name
    names = sorted(list_folder(folder))
    for name in _only_one(names, folder):
        return folder / name
    raise refusal or _nothing(names, folder, "")


def _only_one(names: Sequence[str], folder: AnyPath) -> Iterator[str]:
    """The file that the checkpoint begins at, if there is one. Raises CheckpointError if several could be it."""
    for endings in _ONLY_ONE_OF:
        fitting = [name for name in names if name.lower().endswith(endings)]
        if len(fitting) > 1:
            raise CheckpointError(
                f"the folder has {len(fitting)} files that could be the checkpoint: {_brief(fitting)}",
                file=str(folder),
                cure="Name the file",
            )
        yield from fitting


def _nothing(names: Sequence[str], folder: AnyPath, also: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"the folder has no checkpoint: looked for {', '.join(_USUAL_NAMES)}, *{INDEX_SUFFIX}, *.safetensors, "
        f"*{', *'.join(TORCH_SUFFIXES)}, *.npz, *.gguf{also}; "
        f"there {'is' if len(names) == 1 else 'are'} {_brief(names)}",
        file=str(folder),
        cure="Name the folder or file of the checkpoint, or download it",
    )


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "no files"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
