"""One file of ``torch.save`` (.pt, .pth, .bin, .ckpt): where in it the bytes of each tensor are.

The pickle is read by ``PickleReader``, which calls nothing; ``torch.load`` is not used. What the pickle says of a
tensor is believed only as far as its storage reaches in the file.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo
from odewei.loaders.file_loader import FileLoader, open_header, read_span
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.names import Rename
from odewei.loaders.pickle_values import Global, Named, TensorRecord, Unreadable
from odewei.loaders.plain_values import plain_metadata, plain_value
from odewei.loaders.remote_path import RemoteOptions
from odewei.loaders.sums import Verify
from odewei.loaders.tensors import contiguous_stride, view_as_weight
from odewei.loaders.told import tell_once
from odewei.loaders.torch_archive import TorchContents, read_torch_file

__all__ = ["TorchLoader", "weight_of_record"]

_RESAVE = "Load it where you trust it and save only its weights: torch.save(model.state_dict(), path)"
_DOWNLOAD = "Download the file again; if it is whole, save it again with torch.save"
_MAX_DEPTH = 4
_Values = Mapping[object, object]


class TorchLoader(FileLoader):
    """The weights of one ``torch.save`` file: a mapping of names to tensors, at the top or under ``key``.

    Without a ``key`` the weights may also lie deeper, as training checkpoints have them: where only one mapping in the
    file has tensors by their names, it is taken; of several each weight has the mapping's key before its name
    ("params_ema.conv.weight"). What is no tensor is an error only for who asks for it. Files that ask to call anything
    but what makes plain values are refused (UnsafeCheckpointError); nothing in them is ever called.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        prefix: str = "",
        storage_options: Mapping[str, object] | None = None,
        remote: RemoteOptions | None = None,
        verify: Verify = "size",
    ) -> None:
        super().__init__(
            path,
            device=device,
            dtype=dtype,
            rename=rename,
            prefix=prefix,
            storage_options=storage_options,
            remote=remote,
            verify=verify,
        )
        self.key = key
        self._values: dict[str, object] = {}
        self._metadata: object = None

    def _read_headers(self) -> Mapping[str, WeightInfo]:
        file = self._file(self.path)
        with open_header(file) as stream:
            contents = read_torch_file(stream, file)
        values, where, metadata = _choose(contents.value, self.key, file)
        self._metadata = metadata
        if where:
            tell_once(f"the weights of {str(file.path)!r} are those under {' and '.join(map(repr, where))}")
        infos: dict[str, WeightInfo] = {}
        refused: dict[str, CheckpointError] = {}
        for name, value in values.items():
            try:
                infos[name] = weight_of_record(name, value, contents, file)
            except CorruptCheckpointError:
                raise  # a span that leads out of its storage makes all of the file suspect
            except CheckpointError as error:
                refused[name] = error
        if refused and not infos:
            raise next(iter(refused.values()))
        self._values = dict(_plain(values, contents, file))
        return KnownWeights(infos, refused)

    def values(self) -> Mapping[str, object]:
        self.weights()
        return copy.deepcopy(self._names.values(self._values))  # each model's own

    def metadata(self) -> Mapping[str, Mapping[str, object]]:
        self.weights()
        return self._names.metadata(self._metadata)


def _plain(values: Mapping[str, object], contents: TorchContents, file: CheckpointFile) -> Iterator[tuple[str, object]]:
    """What is no tensor, as far as it is plain values; tensors are read where they are parts of a module's state."""
    for name, value in values.items():
        if isinstance(value, TensorRecord | Unreadable):
            continue

        def read(record: TensorRecord, name: str = name) -> torch.Tensor:
            info = weight_of_record(name, record, contents, file)
            raw = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
            read_span(info, raw.numpy().data)
            return view_as_weight(raw, info)

        try:
            yield name, plain_value(value, read if name.rpartition(".")[2] == "_extra_state" else None)
        except ValueError:
            continue  # nobody can be given it; it stays among the refused


def _choose(value: object, key: str | None, file: CheckpointFile) -> tuple[dict[str, object], list[str], object]:
    """The values by the names of weights, the keys that led to them, and the versions that are kept with them."""
    if not isinstance(value, Mapping):
        kind = value.name[:200] if isinstance(value, Named | Global) else type(value).__name__
        problem = f"the file holds a {_kind(value)}, not a mapping of names to tensors"
        _refuse(file, f"{problem} ({kind})" if isinstance(value, Named) else problem, _RESAVE)
    if key is not None:
        inner = value.get(key)
        if not isinstance(inner, Mapping):
            there = ", ".join(repr(name) for name, one in _texts(value) if isinstance(one, Mapping)) or "none"
            _refuse(file, f"the file has no mapping under the key {key!r}", f"Keys with mappings: {there}")
        return dict(_texts(inner)), [], plain_metadata(inner)
    found = [(".".join(path), inner) for path, inner in _mappings(value, (), _MAX_DEPTH)]
    if not found or not found[0][0]:
        return dict(_texts(value)), [], plain_metadata(value)
    keys = [path for path, _ in found]
    if len(found) == 1:
        return dict(_texts(found[0][1])), keys, plain_metadata(found[0][1])
    names = {f"{path}.{name}": one for path, inner in found for name, one in _texts(inner)}
    versions: dict[str, object] = {}
    for path, inner in found:
        metadata = plain_metadata(inner)
        if isinstance(metadata, Mapping):
            versions |= {f"{path}.{module}".removesuffix("."): one for module, one in metadata.items()}
    return names, keys, versions


def _mappings(value: _Values, where: tuple[str, ...], depth: int) -> Iterator[tuple[tuple[str, ...], _Values]]:
    """The outermost mappings with tensors by their names, and the keys that lead there."""
    if any(isinstance(one, TensorRecord | Unreadable) for _, one in _texts(value)):
        yield where, value
    elif depth:
        for name, one in _texts(value):
            if isinstance(one, Mapping):
                yield from _mappings(one, (*where, name), depth - 1)


def _texts(value: _Values) -> Iterator[tuple[str, object]]:
    """The items whose keys could be names."""
    return ((key, one) for key, one in value.items() if isinstance(key, str))


def _kind(value: object) -> str:
    """What Python calls a value of a pickle."""
    if isinstance(value, TensorRecord | Unreadable):
        return "Tensor"
    if isinstance(value, Named | Global):
        return value.name.rpartition(".")[2][:100]
    return type(value).__qualname__


def _refuse(file: CheckpointFile, problem: str, cure: str) -> NoReturn:
    raise CheckpointError(problem, file=str(file.path), cure=cure)


def weight_of_record(
    name: str, value: object, contents: TorchContents, file: CheckpointFile, shift: int = 0
) -> WeightInfo:
    """The weight with its span in ``file``, where the contents begin ``shift`` bytes behind its start.

    Raises CheckpointError for what bytes do not describe, CorruptCheckpointError for bytes outside of the storage.
    """
    if isinstance(value, Unreadable):
        raise CheckpointError(value.problem, weight=name, file=str(file.path), cure=value.cure)
    if not isinstance(value, TensorRecord):
        raise CheckpointError(
            f"a tensor was expected, this is a {_kind(value)}",
            weight=name,
            file=str(file.path),
            cure="Leave it out, or make it a tensor (torch.from_numpy, torch.tensor)",
        )
    if value.problem is not None:
        cure = "Save .resolve_conj().resolve_neg() of it"
        raise CheckpointError(value.problem, weight=name, file=str(file.path), cure=cure)
    stride = None if value.stride == contiguous_stride(value.shape) else value.stride
    nbytes = WeightInfo(name, value.dtype, value.shape, None, stride).nbytes
    storage = value.storage
    skipped = storage.first * storage.dtype.itemsize
    first = value.offset * value.dtype.itemsize
    begin, length = contents.places.get(storage.key, (0, -1))
    if first + nbytes > storage.count * storage.dtype.itemsize or skipped + first + nbytes > length:
        raise CorruptCheckpointError(
            f"the tensor's bytes ({nbytes} from {first} on) are not within an entry of the archive ({length} bytes)",
            weight=name,
            file=str(file.path),
            cure=_DOWNLOAD,
        )
    return WeightInfo(name, value.dtype, value.shape, Span(file, shift + begin + skipped + first, nbytes), stride)
