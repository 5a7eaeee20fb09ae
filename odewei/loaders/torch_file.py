"""One file of ``torch.save`` (.pt, .pth, .bin): where in it the bytes of each tensor are.

Since torch 1.6 such a file is a zip archive: a pickle, and one uncompressed entry per storage. The pickle is read by
torch with ``weights_only=True``, always, after ``scan_pickle`` has found that it takes little memory, and onto the meta
device, which makes tensors without any; torch leaves the offset of each storage on it as ``_checkpoint_offset``
(torch/serialization.py). What that says is believed only where the directory of the archive says the same. A torch
that does not leave offsets is used through ``mmap=True``.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from typing import BinaryIO, NoReturn

import torch

from odewei.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError, WeightReadError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo
from odewei.loaders.file_loader import FileLoader, open_again, open_header, read_span
from odewei.loaders.names import Rename
from odewei.loaders.pickle_scan import scan_pickle
from odewei.loaders.remote_path import RemoteOptions, RemotePath
from odewei.loaders.sums import Verify
from odewei.loaders.tensors import check_plain, contiguous_stride
from odewei.loaders.zip_members import data_offset, read_stored

__all__ = ["TorchLoader"]

_RESAVE = "Load it where you trust it and save it again with torch.save, or convert it to safetensors"
_DOWNLOAD = "Download the file again; if it is whole, save it again with torch.save"


class TorchLoader(FileLoader):
    """The weights of one ``torch.save`` file: a mapping of names to tensors, at the top or under ``key``.

    Files that ask for more than tensors are refused (UnsafeCheckpointError); so are files of torch before 1.6.
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
        self._mapped: dict[str, torch.Tensor] = {}
        self._source: CheckpointFile | None = None

    def _read_headers(self) -> dict[str, WeightInfo]:
        self._source = file = self._file(self.path)
        with open_header(file) as stream:
            entries = _entries(stream, file)
            stream.seek(0)
            tensors = self._pick(_load(stream, file), file)
            if all(_offset(tensor) is not None for tensor in tensors.values()):
                return {name: _located(name, tensor, entries, file) for name, tensor in tensors.items()}
        if isinstance(self.path, RemotePath):
            _refuse(file, "the installed torch does not say where in the file the tensors are", "Download the file")
        self._mapped = self._map(file)
        return {name: _info(name, tensor, None) for name, tensor in self._mapped.items()}

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        if info.span is not None:
            read_span(info, buffer)
            return
        self.weights()
        assert self._source is not None
        mapped = self._mapped or self._map_again(self._source)
        _copy_mapped(info, mapped[info.name], self._source, buffer)

    def close(self) -> None:
        self._mapped = {}

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_mapped": {}}

    def _map(self, file: CheckpointFile) -> dict[str, torch.Tensor]:
        """The tensors over the mapped file. Pages of it are read when they are touched."""
        with open_header(file):
            return self._pick(_load(file.path, file), file)

    def _map_again(self, file: CheckpointFile) -> dict[str, torch.Tensor]:
        try:
            mapped = self._mapped = self._map(file)
        except CheckpointError as error:
            raise WeightReadError(error.problem, file=error.file, cure=error.cure) from error
        return mapped

    def _pick(self, found: object, file: CheckpointFile) -> dict[str, torch.Tensor]:
        """The flat mapping of names to tensors in what was unpickled."""
        if not isinstance(found, Mapping):
            _refuse(file, f"the file holds a {type(found).__qualname__}, not a mapping of names to tensors", _RESAVE)
        weights = found
        nested = [str(key) for key, value in found.items() if isinstance(value, Mapping)]
        if self.key is not None:
            if not isinstance(found.get(self.key), Mapping):
                keys = ", ".join(map(repr, nested)) or "none"
                _refuse(file, f"the file has no mapping under the key {self.key!r}", f"Keys with mappings: {keys}")
            weights, nested = found[self.key], []
        cure = None
        if nested:
            keys = " or ".join(f"key={name!r}" for name in nested[:10])
            cure = f"Name the mapping that holds the weights: TorchLoader(path, {keys})"
        tensors = {}
        for name, value in weights.items():
            tensor = tensors[str(name)] = check_plain(value, weight=str(name), file=str(file.path), cure=cure)
            if not isinstance(name, str):
                _refuse(file, f"the key {name!r} is a {type(name).__qualname__}, not the name of a weight", _RESAVE)
            if tensor.is_conj() or tensor.is_neg():
                raise CheckpointError(
                    "the tensor was saved as a lazy conjugate or negative: its bytes are not its values",
                    weight=name,
                    file=str(file.path),
                    cure="Save .resolve_conj().resolve_neg() of it",
                )
        return tensors


def _refuse(file: CheckpointFile, problem: str, cure: str) -> NoReturn:
    raise CheckpointError(problem, file=str(file.path), cure=cure)


def _entries(stream: BinaryIO, file: CheckpointFile) -> dict[int, int]:
    """Where the archive's storages begin in the file, with their lengths in bytes.

    Raises CheckpointError for what is no archive of tensors in this machine's byte order, CorruptCheckpointError for
    one that contradicts itself.
    """
    if stream.read(4) != b"PK\x03\x04":
        _refuse(file, "this is no zip archive: written by torch before 1.6, or no file of torch.save", _RESAVE)
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            # torch looks names up without regard to case, and as the directory spells them: a BYTEORDER would count.
            names = [member.orig_filename.partition("/")[2].lower() for member in members]
            if len(set(names)) != len(names):
                raise zipfile.BadZipFile("two entries have the same name")
            if "constants.pkl" in names:
                _refuse(file, "this is a TorchScript program, not a file of weights", "Save its state_dict() instead")
            places = [_place(member, stream, file) for member in members]

            def read(name: str) -> bytes:
                at = names.index(name)
                return read_stored(members[at], stream, places[at][0])

            # Not only wrong numbers: torch crashes when it swaps the bytes of a storage that has none.
            order = read("byteorder").decode() if "byteorder" in names else "little"
            if order != sys.byteorder:
                _refuse(file, f"the tensors are stored in {order!r} byte order, this machine differs", _RESAVE)
            if "data.pkl" not in names:
                raise zipfile.BadZipFile("there is no data.pkl in it")
            scan_pickle(read("data.pkl"), len(places), file=str(file.path))
            return dict(places)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise CorruptCheckpointError(
            f"the archive contradicts itself or is truncated (it has {file.size} bytes): {error}",
            file=str(file.path),
            cure=_DOWNLOAD,
        ) from error


def _place(member: zipfile.ZipInfo, stream: BinaryIO, file: CheckpointFile) -> tuple[int, int]:
    """First byte and length of a member's data."""
    if (
        member.compress_type != zipfile.ZIP_STORED
        or member.compress_size != member.file_size
        or member.flag_bits & 0x61
    ):
        raise zipfile.BadZipFile(f"entry {member.filename!r} is compressed or encrypted, torch.save does neither")
    return data_offset(member, stream, file.size), member.file_size


def _load(source: BinaryIO | os.PathLike[str], file: CheckpointFile) -> object:
    """Unpickle safely: an open file onto the meta device, a path over its mapped bytes."""
    mapped = isinstance(source, os.PathLike)
    try:
        with torch.inference_mode(False), torch.no_grad():
            place = "cpu" if mapped else "meta"
            loaded: object = torch.load(source, map_location=place, weights_only=True, mmap=mapped or None)
            return loaded
    except CheckpointError:
        raise  # the source is a remote file, and could not be read
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise UnsafeCheckpointError(
            f"the pickle in the file asks for {asked[1] if asked else 'more than tensors'}; it was not run",
            file=str(file.path),
            cure="Use a safetensors checkpoint, or save only tensors: torch.save(model.state_dict(), path)",
        ) from error
    except Exception as error:  # a mutilated pickle makes torch raise nearly anything
        reason = str(error).partition("\n")[0][:200]
        raise CorruptCheckpointError(
            f"torch cannot read the file's pickle ({type(error).__name__}: {reason})",
            file=str(file.path),
            cure=_DOWNLOAD,
        ) from error


def _info(name: str, tensor: torch.Tensor, span: Span | None) -> WeightInfo:
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return WeightInfo(name, tensor.dtype, shape, span, None if stride == contiguous_stride(shape) else stride)


def _offset(tensor: torch.Tensor) -> int | None:
    """Where torch says that the tensor's storage begins in the file, or None."""
    offset: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return offset


def _located(name: str, tensor: torch.Tensor, entries: Mapping[int, int], file: CheckpointFile) -> WeightInfo:
    """The weight with its span, if that lies within one entry of the archive."""
    base = _offset(tensor)
    assert base is not None
    nbytes = _info(name, tensor, None).nbytes
    first = int(tensor.storage_offset()) * tensor.dtype.itemsize
    if base not in entries or first < 0 or first + nbytes > entries[base]:
        raise CorruptCheckpointError(
            f"the tensor's bytes ({nbytes} from {base + first} on) are not within an entry of the archive",
            weight=name,
            file=str(file.path),
            cure=_DOWNLOAD,
        )
    return _info(name, tensor, Span(file, base + first, nbytes))


def _copy_mapped(info: WeightInfo, tensor: torch.Tensor, file: CheckpointFile, buffer: memoryview) -> None:
    """Copy a mapped tensor's bytes. The file's size is looked at first: touching a page beyond its end kills."""
    if buffer.nbytes != info.nbytes:
        raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
    with open_again(file, info.name):
        count = info.nbytes // info.dtype.itemsize
        if count:
            target = torch.frombuffer(buffer, dtype=torch.uint8)
            target.copy_(tensor.detach().as_strided((count,), (1,)).view(torch.uint8))
