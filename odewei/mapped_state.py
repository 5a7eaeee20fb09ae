"""``state_dict()`` of a streamed model: equal to the checkpoint, and backed by its files instead of by memory.

Each weight becomes a tensor over a private, copy-on-write map of the checkpoint's file: it takes page cache that the
system may drop, none of the budget, and what is written into it changes neither file nor model. Weights that are not
in a local file as the model has them (remote, cast on load, delivered by a function) stay placeholders, loaded when
they are used; those that were changed in place are the changed ones.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from torch import nn

from odewei.binding import Binder
from odewei.copies import leave_out, refuse_copy
from odewei.layout import Layout
from odewei.loaders.base import CheckpointFile
from odewei.loaders.remote_file import RemoteFile
from odewei.placeholder import Placeholder
from odewei.scheduler.reader import cannot_read
from odewei.stock import Stock
from odewei.survey import Weight

__all__ = ["MappedState"]


class MappedState:
    """The hook that ``nn.Module.state_dict`` calls at its end, for the weights of one model."""

    __deepcopy__, __reduce_ex__ = leave_out, refuse_copy

    def __init__(self, layout: Layout, stock: Stock, binder: Binder) -> None:
        self._layout, self._stock, self._binder = layout, stock, binder

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        files: dict[CheckpointFile, mmap.mmap] = {}
        for unit, weight in self._layout.weights():
            keys = [
                key
                for use in weight.uses
                if _is_detached(state.get(key := prefix + use.name)) and self._binder.is_streamed(use)
            ]
            if not keys:
                continue
            changed = self._binder.changed(unit, weight.name)
            value = self._mapped(weight, files) if changed is None else changed.detach()
            if value is not None:
                state.update(dict.fromkeys(keys, value))

    def remove(self, module: nn.Module) -> None:
        """Take it out of the model, or of a copy of it."""
        for key, hook in list(module._state_dict_hooks.items()):
            if hook is self:
                del module._state_dict_hooks[key]

    def _mapped(self, weight: Weight, files: dict[CheckpointFile, mmap.mmap]) -> torch.Tensor | None:
        """The weight over its file; None if it does not lie there as the model has it."""
        info = self._stock.infos.get(weight.name)
        if info is None or info.span is None or info.dtype != self._stock.dtype(weight):
            return None
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype, device="cpu")
        if info.span.offset % info.dtype.itemsize:
            return None  # torch computes with whole elements
        file = info.span.file
        if isinstance(file, RemoteFile):
            return None
        if info.span.offset + info.span.nbytes > file.size:
            return None  # opened with verify="none": touching a page beyond the end would kill the process
        if file not in files:
            files[file] = _map(file)
        count = info.nbytes // info.dtype.itemsize
        with torch.inference_mode(False), torch.no_grad():
            flat = torch.frombuffer(files[file], dtype=info.dtype, count=count, offset=info.span.offset)
            return flat.view(info.shape) if info.stride is None else flat.as_strided(info.shape, info.stride)


def _is_detached(value: object) -> bool:
    """Whether ``value`` is a detached parameter, and not (``keep_vars``) the parameter itself."""
    return value.is_detached if isinstance(value, Placeholder) else type(value) is torch.Tensor


def _map(file: CheckpointFile) -> mmap.mmap:
    try:
        with open(file.path, "rb") as stream:
            file.check_unchanged(stream.fileno())
            return mmap.mmap(stream.fileno(), os.fstat(stream.fileno()).st_size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise cannot_read(file, error) from error
