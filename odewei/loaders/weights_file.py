"""Which loader reads which kind of file: by what the file is, and by its name where that does not tell."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from odewei.errors import CheckpointError
from odewei.loaders.base import CheckpointFile
from odewei.loaders.file_kind import FileKind, look_at, unfinished
from odewei.loaders.file_loader import FileLoader
from odewei.loaders.names import Rename
from odewei.loaders.remote_path import AnyPath
from odewei.loaders.sums import Verify
from odewei.loaders.told import tell_once

__all__ = ["NUMPY_SUFFIXES", "TORCH_SUFFIXES", "is_weights_file", "loader_for", "open_weights_file"]

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NUMPY_SUFFIXES = (".npz", ".npy")
_LOADERS = {
    "safetensors": "odewei.loaders.safetensors_file:SafetensorsLoader",
    "torch": "odewei.loaders.torch_file:TorchLoader",
    "numpy": "odewei.loaders.numpy_file:NumpyLoader",
    "gguf": "odewei.loaders.gguf_file:GgufLoader",
}
"""What reads each kind of file. Imported with the first file of its kind: few processes need more than one."""

_KINDS = {
    ".safetensors": "safetensors",
    **dict.fromkeys(TORCH_SUFFIXES, "torch"),
    **dict.fromkeys(NUMPY_SUFFIXES, "numpy"),
    ".gguf": "gguf",
}


def is_weights_file(path: AnyPath) -> bool:
    """Whether ``open_weights_file`` reads a file for its name alone."""
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
    """The loader for one file of weights: by its first bytes, for remote files by the end of its name.

    Raises CheckpointNotFoundError, and CheckpointError for what is no file of weights, saying what it is.
    """
    loader = loader_for(path)
    return loader(path, device=device, dtype=dtype, rename=rename, prefix=prefix, verify=verify)


def loader_for(path: AnyPath, kind: FileKind | None = None) -> type[FileLoader]:
    """The class of loader that reads the file; ``kind`` is what it is, if that was looked at already."""
    file = CheckpointFile.stat(path)
    by_name = _KINDS.get(path.suffix.lower())
    if isinstance(path, Path):
        _check_finished(path)
        kind = kind or look_at(file)
    if kind is not None and (file.size or by_name is not None):
        if kind.reader is None or kind.reader == "index":
            raise kind.error(file)
        if kind.reader != by_name:
            tell_once(f"{str(path)!r} is {kind.what}, whatever its name says: it is read as one")
        return _imported(kind.reader)
    if by_name is None:
        raise CheckpointError(
            f"files that end in {path.suffix.lower()!r} are not read",
            file=str(path),
            cure=f"Use {', '.join(_KINDS)}, or an index that ends in .index.json",
        )
    return _imported(by_name)


def _imported(kind: str) -> type[FileLoader]:
    module, _, name = _LOADERS[kind].partition(":")
    found: type[FileLoader] = getattr(importlib.import_module(module), name)
    return found


def _check_finished(path: Path) -> None:
    """Raise CheckpointError for a file whose name says that its download goes on, or was given up."""
    name = unfinished(path.name)
    if name is not None:
        raise CheckpointError(
            "by its name this is the beginning of a download that did not finish",
            file=str(path),
            cure=f"Run the download again: it goes on, and gives the file its name ({name!r})",
        )
