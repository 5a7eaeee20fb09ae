"""What a file of ``torch.save`` holds, without ``torch.load``: its objects as records, and where its storages lie.

Since torch 1.6 such a file is a zip archive of a pickle and one stored entry for each storage
(torch/serialization.py, ``_save``); the entries' places are those that the archive's directory gives. Before, it was
five pickles one after another (a magic number, a version, the machine, the objects, the keys of the storages) and the
storages in the order of the keys, each behind the count of its elements (``_legacy_save``).
"""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, NoReturn

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import CheckpointFile
from odewei.loaders.file_kind import LEGACY_MAGIC, LEGACY_STARTS, ZIP_START, kind_of
from odewei.loaders.pickle_reader import PickleReader
from odewei.loaders.zip_members import data_offset, read_stored

__all__ = ["TorchContents", "read_torch_file"]

_LEGACY_VERSION = 1001
_PEEKED_NBYTES = 4096
_FREE_NBYTES = 32 << 20
_STORAGE_NBYTES = 8192
_MOST_LEGACY_NBYTES = 1 << 30
_RESAVE = "Load it where you trust it and save it again with torch.save, or convert it to safetensors"
_DOWNLOAD = "Download the file again; if it is whole, save it again with torch.save"


@dataclass(frozen=True, slots=True)
class TorchContents:
    """``value`` is what was saved, in records; ``places`` has first byte and length of each storage by its key."""

    value: object
    places: Mapping[str, tuple[int, int]]


def read_torch_file(stream: BinaryIO, file: CheckpointFile, nbytes: int | None = None) -> TorchContents:
    """The contents of a file that is open at its start; of a part of ``file``, ``nbytes`` is its length.

    Raises CheckpointError for what is none of torch.save, or of another byte order, CorruptCheckpointError for one that
    contradicts itself, UnsafeCheckpointError for one that asks to call what makes no weights.
    """
    size = file.size if nbytes is None else nbytes
    start = stream.peek(_PEEKED_NBYTES)[:_PEEKED_NBYTES]  # type: ignore[attr-defined]
    try:
        if start.startswith(ZIP_START):
            return _read_archive(stream, file, size)
        if start.startswith(LEGACY_STARTS):
            return _read_legacy(stream, file, size)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise CorruptCheckpointError(
            f"the file contradicts itself or is truncated (it has {size} bytes): {error}",
            file=str(file.path),
            cure=_DOWNLOAD,
        ) from error
    kind = kind_of(start, size)
    if kind is not None:
        raise kind.error(file, "a file of torch.save")
    _refuse(file, "this is no file of torch.save", _DOWNLOAD)


def _refuse(file: CheckpointFile, problem: str, cure: str) -> NoReturn:
    raise CheckpointError(problem, file=str(file.path), cure=cure)


def _read_archive(stream: BinaryIO, file: CheckpointFile, size: int) -> TorchContents:
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        # torch looks names up without regard to case, and as the directory spells them: a BYTEORDER would count.
        names = [member.orig_filename.partition("/")[2].lower() for member in members]
        if len(set(names)) != len(names):
            raise zipfile.BadZipFile("two entries have the same name")
        if "constants.pkl" in names:
            _refuse(file, "this is a TorchScript program, not a file of weights", "Save its state_dict() instead")
        if "data.pkl" not in names:
            raise zipfile.BadZipFile("there is no data.pkl in it, so torch.save has not written it")
        places = [_place(member, stream, size) for member in members]

        def read(name: str) -> bytes:
            at = names.index(name)
            return read_stored(members[at], stream, places[at][0])

        order = read("byteorder").decode() if "byteorder" in names else "little"
        if order != sys.byteorder:
            _refuse(file, f"the tensors are stored in {order[:40]!r} byte order, this machine differs", _RESAVE)
        most = _FREE_NBYTES + _STORAGE_NBYTES * len(places)
        value = PickleReader(BytesIO(read("data.pkl")), most, file=str(file.path)).load()
    spelt = [member.orig_filename.partition("/")[2] for member in members]
    return TorchContents(
        value, {name.removeprefix("data/"): place for name, place in zip(spelt, places, strict=True) if "data/" in name}
    )


def _place(member: zipfile.ZipInfo, stream: BinaryIO, size: int) -> tuple[int, int]:
    """First byte and length of a member's data."""
    if (
        member.compress_type != zipfile.ZIP_STORED
        or member.compress_size != member.file_size
        or member.flag_bits & 0x61
    ):
        raise zipfile.BadZipFile(f"entry {member.filename!r} is compressed or encrypted, torch.save does neither")
    return data_offset(member, stream, size), member.file_size


def _read_legacy(stream: BinaryIO, file: CheckpointFile, size: int) -> TorchContents:
    reader = PickleReader(stream, min(_FREE_NBYTES + 4 * size, _MOST_LEGACY_NBYTES), file=str(file.path))
    if (magic := reader.load()) != LEGACY_MAGIC or (version := reader.load()) != _LEGACY_VERSION:
        raise ValueError(f"the format is {'none' if magic != LEGACY_MAGIC else str(version)[:40]} of torch.save")
    reader.load()  # the machine that wrote it: storages are little-endian whatever it was
    value, keys = reader.load(), reader.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("there is no list of the storages")
    itemsizes = {key: record.dtype.itemsize for key, record in reader.storages.items()}
    places: dict[str, tuple[int, int]] = {}
    at = stream.tell()
    for key in keys:
        stream.seek(at)
        count = struct.unpack("<q", stream.read(8))[0]
        if key not in itemsizes:
            raise ValueError("there is a storage of no tensor")
        nbytes = count * itemsizes[key]
        if count < 0 or at + 8 + nbytes > size:
            raise ValueError("a storage ends behind the end of the file")
        places[key] = (at + 8, nbytes)
        at += 8 + nbytes
    return TorchContents(value, places)
