"""From a path to the loader that fits: a file by its name, a folder by what is in it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from odewei.errors import CheckpointError, CheckpointNotFoundError
from odewei.loaders.base import WeightsLoader
from odewei.loaders.names import Rename
from odewei.loaders.numpy_file import NumpyLoader
from odewei.loaders.sharded import TORCH_SUFFIXES, ShardedWeightsLoader, open_weights_file
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
    verify: Verify = "size",
) -> WeightsLoader:
    """The loader for a file that ``open_weights_file`` reads, an .index.json, or the checkpoint in a folder.

    In a folder the usual names of model hubs come first, safetensors before pickles and an index before a single file;
    then the only index, the only safetensors file, the only torch file, the only .npz file, the only .gguf file; then
    all .npy files together. ``rename``, ``prefix`` and ``verify`` are the loader's (see ``FileLoader``).
    Raises CheckpointNotFoundError, and CheckpointError where several files fit.
    """
    chosen = choose(Path(path))
    if chosen.name.endswith(INDEX_SUFFIX):
        return ShardedWeightsLoader(
            chosen, chosen.parent, device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify
        )
    if chosen.is_dir():
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
    files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    for endings in _ONLY_ONE_OF:
        fitting = [file for file in files if file.name.lower().endswith(endings)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise CheckpointError(
                f"the folder has {len(fitting)} files that could be the checkpoint: {_brief(fitting)}",
                file=str(folder),
                cure="Name the file",
            )
    if any(file.name.lower().endswith(_ARRAYS) for file in files):
        return folder
    raise CheckpointNotFoundError(
        f"the folder has no checkpoint: looked for {', '.join(_USUAL_NAMES)}, *{INDEX_SUFFIX}, *.safetensors, "
        f"*{', *'.join(TORCH_SUFFIXES)}, *.npz, *.gguf, *{_ARRAYS}; "
        f"there {'is' if len(files) == 1 else 'are'} {_brief(files)}",
        file=str(folder),
        cure="Name the folder or file of the checkpoint, or download it",
    )


def _brief(files: list[Path]) -> str:
    shown = ", ".join(file.name for file in files[:8]) or "no files"
    return f"{shown} and {len(files) - 8} more" if len(files) > 8 else shown
