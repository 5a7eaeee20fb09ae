"""Checkpoints of torch.distributed.checkpoint: ``.distcp`` files, and a ``.metadata`` that says what is where in them.

The metadata is a pickle of plain classes (torch/distributed/checkpoint/metadata.py, filesystem.py); it is read
without being run. Each piece of a tensor lies in a ``.distcp`` file as a file of ``torch.save``. A tensor that several
processes have saved in pieces is gathered from them.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from odewei.loaders.base import CheckpointFile, WeightInfo, WeightPart
from odewei.loaders.checkpoint_index import check_shard_name
from odewei.loaders.file_loader import FileLoader, open_header, read_span
from odewei.loaders.gathering import read_part
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.pickle_reader import PickleReader
from odewei.loaders.pickle_values import Named
from odewei.loaders.tensors import contiguous_stride
from odewei.loaders.torch_archive import read_torch_file
from odewei.loaders.torch_file import weight_of_record

__all__ = ["NO_TENSOR", "DistributedLoader"]

NO_TENSOR = "this is no tensor"
_METADATA = ".metadata"
_MAX_METADATA_NBYTES = 1 << 30
_FREE_NBYTES = 32 << 20
_NBYTES_OF_BYTE = 64  # of what is made of a byte of metadata
_MAX_CHUNKS = 4096
_CURE = "Download the folder again; if it is whole, save it again with torch.distributed.checkpoint"
_CONVERT = (
    "Convert it where you trust it: torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, 'model.pt')"
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor: where in it, and where in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: tuple[str, int, int]


class DistributedLoader(FileLoader):
    """The tensors of a folder that torch.distributed.checkpoint has written, by their full names ("model.0.weight").

    What is no tensor, or was packed in another way than ``torch.save``'s, is an error only for who asks for it.
    """

    def _check_path(self) -> None:
        if not isinstance(self.path, Path):
            raise CheckpointError(
                "a checkpoint of torch.distributed is read from a local folder only",
                file=str(self.path),
                cure="Download it first",
            )
        CheckpointFile.stat(self.path / _METADATA)

    @property
    def place(self) -> Path | None:
        return self.path / _METADATA if isinstance(self.path, Path) else None

    def _read_headers(self) -> Mapping[str, WeightInfo]:
        assert isinstance(self.path, Path)
        metadata = self._file(self.path / _METADATA)
        if metadata.size > _MAX_METADATA_NBYTES:
            raise CorruptCheckpointError("the metadata are too long", file=str(metadata.path), cure=_CURE)
        with open_header(metadata) as stream:
            most = _FREE_NBYTES + _NBYTES_OF_BYTE * metadata.size
            try:
                tensors, refused = _tensors(PickleReader(stream, most, file=str(metadata.path)).load(), metadata)
            except ValueError as error:
                raise CorruptCheckpointError(
                    f"the metadata contradict themselves or are cut short: {error}", file=str(metadata.path), cure=_CURE
                ) from error
        pieces = self._read_pieces({piece.place for _, of in tensors.values() for piece in of}, metadata)
        infos: dict[str, WeightInfo] = {}
        for name, (shape, of) in tensors.items():
            try:
                infos[name] = _whole(
                    name, shape, [(piece, _found(pieces[piece.place], name)) for piece in of], metadata
                )
            except CorruptCheckpointError:
                raise
            except CheckpointError as error:
                refused[name] = error
        return KnownWeights(infos, refused)

    def _read_pieces(
        self, places: set[tuple[str, int, int]], metadata: CheckpointFile
    ) -> dict[tuple[str, int, int], WeightInfo | CheckpointError]:
        """The tensor at each place. Each file is opened once."""
        assert isinstance(self.path, Path)
        found: dict[tuple[str, int, int], WeightInfo | CheckpointError] = {}
        for name, of_file in itertools.groupby(sorted(places), lambda place: place[0]):
            check_shard_name(name, index=metadata.path)
            try:
                file = self._file(self.path / name)
            except CheckpointNotFoundError as error:
                found |= dict.fromkeys(of_file, error)
                continue
            with open_header(file) as stream:
                for place in of_file:
                    _, offset, nbytes = place
                    if offset + nbytes > file.size:
                        raise CorruptCheckpointError(
                            f"the file is truncated: {_METADATA} says that something lies at {offset} to "
                            f"{offset + nbytes}, it has {file.size} bytes",
                            file=str(file.path),
                            cure=_CURE,
                        )
                    found[place] = _piece(stream, file, offset, nbytes)
        return found

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        if not info.parts:
            read_span(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
        for part in info.parts:
            if part.source.nbytes:
                read_part(self, part, buffer.cast("B"))


def _piece(stream: BinaryIO, file: CheckpointFile, offset: int, nbytes: int) -> WeightInfo | CheckpointError:
    """The tensor whose file of torch.save lies there, or why it cannot be read."""
    inner = io.BufferedReader(_Slice(stream, offset, nbytes))
    try:
        contents = read_torch_file(inner, file, nbytes)
        return weight_of_record("", contents.value, contents, file, offset)
    except CorruptCheckpointError:
        raise
    except CheckpointError as error:
        return CheckpointError(error.problem, file=error.file, cure=_CONVERT)


def _found(piece: WeightInfo | CheckpointError, name: str) -> WeightInfo:
    if isinstance(piece, CheckpointError):
        raise type(piece)(piece.problem, weight=name, file=piece.file, cure=piece.cure)
    return piece


def _tensors(
    found: object, file: CheckpointFile
) -> tuple[dict[str, tuple[tuple[int, ...], list[_Piece]]], dict[str, CheckpointError]]:
    """Shape and pieces of each tensor; an error for each entry that is none. Raises ValueError."""
    state = _state(found, "Metadata")
    entries, storage = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise ValueError("they have no tensors or no places")
    places = dict(_places(storage))
    tensors: dict[str, tuple[tuple[int, ...], list[_Piece]]] = {}
    refused: dict[str, CheckpointError] = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, Named):
            raise ValueError("an entry has no name or is nothing that is saved")
        if not entry.name.endswith(".TensorStorageMetadata"):
            refused[name] = CheckpointError(
                NO_TENSOR, weight=name, file=str(file.path), cure="Leave it out of what the model needs"
            )
            continue
        try:
            tensors[name] = _tensor(name, _state(entry, "TensorStorageMetadata"), places)
        except KeyError:
            refused[name] = CheckpointError(
                "the tensor was packed, or its pieces have no place", weight=name, file=str(file.path), cure=_CONVERT
            )
    return tensors, refused


def _tensor(
    name: str, state: Mapping[str, object], places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]
) -> tuple[tuple[int, ...], list[_Piece]]:
    """Shape and pieces. Raises KeyError for a piece without a place, ValueError."""
    chunks = state.get("chunks")
    if not isinstance(chunks, list) or len(chunks) > _MAX_CHUNKS:
        raise ValueError(f"{name[:200]!r} is in no pieces, or in more than {_MAX_CHUNKS}")
    pieces = []
    for chunk in chunks:
        of = _state(chunk, "ChunkStorageMetadata")
        offsets = _counts(of.get("offsets"))
        pieces.append(_Piece(offsets, _counts(of.get("sizes")), places[name, offsets]))
    return _counts(state.get("size")), pieces


def _places(storage: Mapping[object, object]) -> Iterator[tuple[tuple[str, tuple[int, ...]], tuple[str, int, int]]]:
    """Where each piece of each tensor is: file, first byte, bytes. Packed ones are left out."""
    for key, info in storage.items():
        index, place = _state(key, "MetadataIndex"), _state(info, "_StorageInfo")
        name, path = index.get("fqn"), place.get("relative_path")
        first, nbytes = place.get("offset"), place.get("length")
        if index.get("offset") is None or place.get("transform_descriptors"):
            continue
        if not isinstance(name, str) or not isinstance(path, str) or type(first) is not int or type(nbytes) is not int:
            raise ValueError("a place is none")
        if first < 0 or nbytes < 0:
            raise ValueError("a place is before the file")
        yield (name, _counts(index.get("offset"))), (path, first, nbytes)


def _state(found: object, name: str) -> Mapping[str, object]:
    """The attributes of an object of that class."""
    if not isinstance(found, Named) or not found.name.endswith(f".{name}") or not isinstance(found.state, dict):
        raise ValueError(f"there is no {name} where one belongs")
    return {key: value for key, value in found.state.items() if isinstance(key, str)}


def _counts(found: object) -> tuple[int, ...]:
    if not isinstance(found, tuple) or not all(type(size) is int and 0 <= size < 2**63 for size in found):
        raise ValueError("sizes or offsets are none")
    return found


def _whole(
    name: str, shape: tuple[int, ...], pieces: list[tuple[_Piece, WeightInfo]], file: CheckpointFile
) -> WeightInfo:
    """The weight of its pieces, which have to cover it, each element once."""
    for piece, info in pieces:
        inside = len(piece.offsets) == len(shape) == len(piece.sizes) and all(
            first + size <= whole for first, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True)
        )
        if not inside or info.shape != piece.sizes or info.dtype != pieces[0][1].dtype:
            _contradiction(name, "a piece of the tensor is not what the metadata say", file)
    if sum(math.prod(piece.sizes) for piece, _ in pieces) != math.prod(shape) or _overlap([one for one, _ in pieces]):
        _contradiction(name, "the pieces of the tensor do not cover it, each element once", file)
    if len(pieces) == 1:
        info = pieces[0][1]
        return WeightInfo(name, info.dtype, shape, info.span, info.stride)
    if not pieces:
        raise CheckpointError("the tensor has no pieces", weight=name, file=str(file.path), cure=_CURE)
    steps = contiguous_stride(shape)
    parts = []
    for number, (piece, info) in enumerate(pieces):
        source = WeightInfo(f"{name}[{number}]", info.dtype, info.shape, info.span, info.stride)
        first = sum(offset * step for offset, step in zip(piece.offsets, steps, strict=True))
        parts.append(WeightPart(source, first, steps))
    return WeightInfo(name, pieces[0][1].dtype, shape, None, None, tuple(parts))


def _overlap(pieces: list[_Piece]) -> bool:
    """Whether two of them have an element in common."""
    for one, other in itertools.combinations([piece for piece in pieces if 0 not in piece.sizes], 2):
        if all(
            a < b + size_b and b < a + size_a
            for a, size_a, b, size_b in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
        ):
            return True
    return False


def _contradiction(name: str, problem: str, file: CheckpointFile) -> None:
    raise CorruptCheckpointError(problem, weight=name, file=str(file.path), cure=_CURE)


class _Slice(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, stream: BinaryIO, first: int, nbytes: int) -> None:
        self._stream, self._first, self._nbytes = stream, first, nbytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._stream.seek(self._first + self._at)
        found = self._stream.read(max(0, min(len(buffer), self._nbytes - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
