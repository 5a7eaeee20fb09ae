"""The weights as ``state_dict()`` hands them out to be saved: in memory that is neither the budget's nor the model's.

What ``state_dict()`` holds are the parameters, detached (see ``placeholder``): written into, they change the model, as
those of any model do. Whoever saves them looks at their memory: that is, as long as the weight is as in the checkpoint,

- a private, copy-on-write map of the checkpoint's file, where the weight lies there as the model has it: page cache,
  which the system may drop;
- a map of a temporary file otherwise (gathered, cast, compressed weights, those of functions and remote files), filled
  when it is first looked at, one unit after another within the budget;
- of the files of ``torch.save`` and NumPy there is a copy from the first ``state_dict()`` on, without a name: whoever
  saves over such a file empties it first, and what is mapped of it would be gone, with the process. The copy is what is
  mapped, and what the model streams from when the file is not what it was. Files of safetensors are replaced when they
  are saved, and live on for whom has them open.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np
import torch

from odewei.errors import WeightReadError
from odewei.loaders.base import CheckpointFile, WeightInfo
from odewei.loaders.remote_file import RemoteFile
from odewei.placeholder import Home
from odewei.scheduler.file_table import FileTable, OpenFile

__all__ = ["SavedState"]


_PIECE_BYTES = 16 << 20  # what is copied at a time


class SavedState:
    """What is handed out of one model's weights. Methods may be called from any thread."""

    def __init__(
        self,
        infos: Callable[[str], tuple[WeightInfo | None, torch.dtype]],
        load: Callable[[Home], torch.Tensor],
        table: FileTable,
    ) -> None:
        """``infos`` says where a weight is and the dtype that it is bound in; ``load`` returns the real tensor;
        ``table`` opens the files.
        """
        self._infos = infos
        self._load = load
        self._table = table
        self._held: set[CheckpointFile] = set()
        self._lock = threading.RLock()
        self._files: weakref.WeakValueDictionary[CheckpointFile, _Map] = weakref.WeakValueDictionary()
        self._tensors: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()

    def tensor(self, home: Home) -> torch.Tensor:
        """The weight, in memory that stays where it is while anybody has the tensor.

        Raises WeightReadError if it cannot be read, or there is no room for the temporary file.
        """
        with self._lock:  # of one weight there is one: tied ones are recognised by that
            found = self._tensors.get(home.name)
            if found is None:
                found = self._mapped(home)
                if found is None:
                    found = self._spooled(home)
                self._tensors[home.name] = found
            return found

    def forget(self, names: Iterable[str]) -> None:
        """These weights are in other files now."""
        with self._lock:
            for name in names:
                self._tensors.pop(name, None)

    def prepare(self, home: Home) -> bool:
        """The weight may be saved over its own file soon: that goes on being read as it is, if it is replaced, and a
        copy of it if it is emptied.

        Whether the weight itself has to be copied now, because it is in no one place of a file.
        """
        info, _ = self._infos(home.name)
        if info is None:
            return False
        sources = [part.source for part in info.parts] or [info]
        files = {source.span.file for source in sources if source.span is not None}
        with self._lock:
            self._table.hold(files - self._held)
            self._held |= files
            for file in files:
                if _is_rewritten(file):
                    self._copy(file)
        return any(source.span is None and source.file is not None for source in sources)

    def _mapped(self, home: Home) -> torch.Tensor | None:
        """The weight over its file; None if it does not lie there as the model has it."""
        info, dtype = self._infos(home.name)
        if info is None or info.span is None or info.dtype != dtype:
            return None
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype, device="cpu")
        file, offset = info.span.file, info.span.offset
        if offset % info.dtype.itemsize:
            return None  # torch computes with whole elements
        if isinstance(file, RemoteFile) or offset + info.span.nbytes > file.size:
            return None  # touching a page beyond the end would kill the process
        mapped = self._files.get(file)
        if mapped is None:
            mapped = self._map(file)
            if mapped is None:
                return None
            self._files[file] = mapped
        count = info.nbytes // info.dtype.itemsize
        with torch.inference_mode(False), torch.no_grad():
            flat = torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=offset)
            return flat.view(info.shape) if info.stride is None else flat.as_strided(info.shape, info.stride)

    def _map(self, file: CheckpointFile) -> _Map | None:
        copy = self._table.copy_of(file)
        if copy is not None:
            return _map(copy, file)
        found: list[_Map | None] = []

        def work(opened: OpenFile) -> None:
            self._table.check(file, opened)
            found[:] = [_map(opened, file)]
            self._table.check(file, opened)

        self._table.use(file, work)
        return found[0]

    def _copy(self, file: CheckpointFile) -> None:
        """Have a copy of a file that may be emptied: what is read, and mapped, of it then is of the copy."""
        if self._table.copy_of(file) is not None:
            return
        mapped = self._map(file)
        pieces = range(0, file.size, _PIECE_BYTES)
        try:
            with _temporary(Path(str(file.path)).parent) as copy:
                for start in pieces:
                    if mapped is not None:
                        copy.write(mapped[start : start + _PIECE_BYTES])
                    else:
                        piece = np.empty(min(_PIECE_BYTES, file.size - start), np.uint8)
                        self._table.read(file, [piece], start, len(piece))
                        copy.write(piece.data)
                copy.flush()
                self._table.hold_copy(file, os.dup(copy.fileno()))
        except OSError as error:
            raise _no_room(str(file.path), error) from error

    def _spool(self, home: Home) -> IO[bytes]:
        info, _ = self._infos(home.name)
        source = None if info is None else next((part.source for part in info.parts), info)
        local = source is not None and source.span is not None and not isinstance(source.span.file, RemoteFile)
        if source is None or source.span is None or not local:
            return tempfile.TemporaryFile(prefix="odewei-")
        return _temporary(Path(str(source.span.file.path)).parent)

    def _spooled(self, home: Home) -> torch.Tensor:
        """The weight over a temporary file."""
        real = self._load(home).detach()
        try:
            with self._spool(home) as file:
                file.truncate(max(1, real.untyped_storage().nbytes()))
                memory = _Map(file.fileno(), 0, access=mmap.ACCESS_WRITE)
        except OSError as error:
            raise _no_room(home.name, error) from error
        with torch.inference_mode(False), torch.no_grad():
            flat = torch.frombuffer(memory, dtype=real.dtype, count=max(1, _extent(real)))
            made = flat.as_strided(real.shape, real.stride())
            made.copy_(real)
        return made


def _is_rewritten(file: CheckpointFile) -> bool:
    """Whether saving a file of this kind empties it first. Those of safetensors are replaced by another."""
    return not isinstance(file, RemoteFile) and file.path.suffix != ".safetensors"


class _Map(mmap.mmap):
    """That weak references can be made to."""


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size)


def _map(opened: OpenFile, file: CheckpointFile) -> _Map | None:
    """The file; None where it cannot be mapped (some network file systems)."""
    try:
        return _Map(opened.fd, file.size, access=mmap.ACCESS_COPY)
    except OSError:
        return None


def _temporary(folder: Path) -> IO[bytes]:
    """A file without a name: in this folder, where there was room for a checkpoint, or where temporary files go."""
    try:
        return tempfile.TemporaryFile(prefix=".odewei-", dir=folder)
    except OSError:
        return tempfile.TemporaryFile(prefix="odewei-")


def _no_room(weight: str, error: OSError) -> WeightReadError:
    return WeightReadError(
        f"there is no room for a temporary file with the weight: {error}",
        weight=weight,
        cure="Set TMPDIR to a folder with room for the weights of the model",
    )
