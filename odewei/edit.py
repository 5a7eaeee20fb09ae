"""Editing a model that is larger than memory: what is written into weights goes to new files, and streams on from
there.

A weight that was written to is the user's, and its unit stays in memory; after many edits nothing would be left of the
budget. Within ``edit`` the units that were written to are saved one by one, each into a file of its own, and read from
there from then on, as others are from the checkpoint. Files and checkpoint are never written over.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from odewei.errors import OptionsError, WeightReadError
from odewei.loaders.safetensors_file import read_header
from odewei.runtime import Runtime, runtime_of

__all__ = ["edit"]

_INDEX = "model.safetensors.index.json"
_PART_OF_BUDGET = 4  # what was written to may take this part of it before it is saved; at least one unit

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def edit(model: Model, folder: str | os.PathLike[str]) -> Iterator[Model]:
    """While inside, weights may be changed without staying in memory: merge an adapter, prune, round, within the
    budget.

    Any way of writing into the parameters of the model will do, ``.data = ...`` of the same shape and dtype included.
    Units that were written to are saved as they fill up a part of the budget, and at the end; the model reads them from
    there from then on, so the folder has to stay as long as the model streams. ``save_pretrained`` and ``state_dict``
    afterwards hand out the edited model whole.

    What cannot be read back as it was stays in memory as it does without ``edit``: parameters of another shape or
    dtype, those that were put in the place of streamed ones, and tables and experts that are read in parts.

    Args:
        model: a streamed model, or a module that holds one.
        folder: where the edited weights go, as safetensors files with an index of their own (of the edited units only).
            Made if it does not exist; it must have no index yet.

    Raises:
        OptionsError: the folder has an index already, the model is on an accelerator, or it is being edited already.
        WeightReadError: a file cannot be written; what was edited is still in memory then, and nothing is lost.
    """
    runtime = runtime_of(model)
    path = Path(folder)
    if runtime.device.type != "cpu":
        raise OptionsError("a model on an accelerator cannot be edited", cure="Build it on the CPU to edit it")
    if (path / _INDEX).exists():
        raise OptionsError(f"the folder {path} has weights already", cure="Give a new folder")
    if runtime.binder.on_write is not None:
        raise OptionsError("the model is being edited already", cure="Leave the outer odewei.edit first")
    path.mkdir(parents=True, exist_ok=True)
    session = _Session(runtime, path)
    runtime.binder.on_write = session.wrote
    try:
        yield model
    finally:
        runtime.binder.on_write = None
        session.save_all()


class _Session:
    """The units that were written to and not saved yet, and the files that there are."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._runtime, self._folder = runtime, folder
        self._written: dict[int, None] = {}
        self._map: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._most_bytes = runtime.budget.limit_bytes // _PART_OF_BUDGET

    def wrote(self, unit: int) -> None:
        """Somebody has written into a unit, and is done with it for now."""
        with self._lock:
            self._written[unit] = None
            sizes = {one: self._runtime.account.units[one].nbytes for one in self._written}
            while len(sizes) > 1 and sum(sizes.values()) > self._most_bytes:
                oldest = next(iter(sizes))  # the last one may be written to again
                del sizes[oldest]
                self._save(oldest)

    def save_all(self) -> None:
        """Save what was written to, however that was done, and the index."""
        with self._lock:
            binder = self._runtime.binder
            written = {unit for unit in range(len(self._runtime.units)) if binder.was_written(unit, is_held=True)}
            for unit in sorted(written | set(self._written)):
                self._save(unit)
            index = {"metadata": {}, "weight_map": self._map}
            (self._folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _save(self, unit: int) -> None:
        self._written.pop(unit, None)
        runtime = self._runtime
        if not runtime.may_be_replaced(unit):
            return  # read in parts: it stays in memory
        path = self._folder / f"edited-{next(self._numbers):05}.safetensors"  # a unit may be saved more than once
        with torch.no_grad():
            tensors = {
                weight.name: runtime.binder.load(unit, weight.name).detach() for weight in runtime.units[unit].weights
            }
            versions = {weight: tensor._version for weight, tensor in tensors.items()}
            try:
                save_file({weight: tensor.contiguous() for weight, tensor in tensors.items()}, str(path))
            except Exception as error:
                raise WeightReadError(
                    f"the edited weights cannot be written: {error}",
                    module=runtime.units[unit].name,
                    file=str(path),
                    cure="Give a folder with room; the edited weights are still in memory",
                ) from error
        infos = read_header(path)
        runtime.replace(unit, infos, versions)
        self._map.update(dict.fromkeys(infos, path.name))
