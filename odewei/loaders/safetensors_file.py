"""One safetensors file: its header, checked to the last byte before anything is read or allocated for it.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of the header, little
endian; the header, a JSON object of ``name: {"dtype", "shape", "data_offsets"}`` and an optional ``__metadata__`` of
strings; the data, which the tensors cover without gap or overlap. Whatever the reference implementation refuses is
refused here. Stricter than it, also: a name that occurs twice, a tensor described by anything but these three keys.

F4 has two elements in a byte. The header counts elements; torch's dtype for it counts pairs, so the last size is half.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import BinaryIO, NoReturn

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo
from odewei.loaders.file_loader import FileLoader, no_duplicates, open_header
from odewei.loaders.remote_path import as_place
from odewei.loaders.tensors import named_dtype

__all__ = ["SafetensorsLoader", "read_header"]

_MAX_HEADER_NBYTES = 100_000_000
_LENGTH_NBYTES = 8
_MAX_COUNT = 2**63 - 1  # torch counts elements in int64
_TOO_LARGE = 2**64
_KEYS = {"dtype", "shape", "data_offsets"}
_CURE = "Download the file again; if it is whole, it was written wrongly"


class SafetensorsLoader(FileLoader):
    """The weights of one ``.safetensors`` file. Every weight has a span."""

    def _read_headers(self) -> dict[str, WeightInfo]:
        return read_header(self.path)


def read_header(path: str | os.PathLike[str]) -> dict[str, WeightInfo]:
    """Every tensor of the file by name, with absolute offsets, in the order of the bytes.

    Raises CheckpointNotFoundError, CorruptCheckpointError for whatever contradicts the format, CheckpointError for a
    dtype that cannot be read here.
    """
    file = CheckpointFile.stat(as_place(path))
    with open_header(file) as stream:
        header = _header_bytes(stream, file)
    data_start = _LENGTH_NBYTES + len(header)
    infos = [_weight(name, entry, data_start, file) for name, entry in _parse(header, file).items()]
    infos.sort(key=_place)
    _check_cover(infos, data_start, file)
    return {info.name: info for info in infos}


def _refuse(
    file: CheckpointFile, problem: str, *, weight: str | None = None, cause: Exception | None = None
) -> NoReturn:
    raise CorruptCheckpointError(problem, weight=weight, file=str(file.path), cure=_CURE) from cause


def _header_bytes(stream: BinaryIO, file: CheckpointFile) -> bytes:
    """The header without its length. The length is believed only as far as the file goes."""
    if file.size < _LENGTH_NBYTES:
        _refuse(file, f"the file is truncated: expected at least {_LENGTH_NBYTES} bytes, it has {file.size}")
    nbytes = int.from_bytes(stream.read(_LENGTH_NBYTES), "little")
    if nbytes > _MAX_HEADER_NBYTES:
        _refuse(file, f"the header claims {nbytes} bytes, the format allows {_MAX_HEADER_NBYTES}: no safetensors file")
    if _LENGTH_NBYTES + nbytes > file.size:
        expected = _LENGTH_NBYTES + nbytes
        _refuse(file, f"the file is truncated within its header: expected {expected} bytes or more, it has {file.size}")
    return stream.read(nbytes)


def _parse(header: bytes, file: CheckpointFile) -> dict[str, object]:
    """The JSON object without ``__metadata__``; its values are not checked yet."""
    if not header.startswith(b"{"):
        _refuse(file, "the header does not begin with '{'")
    try:
        found = json.loads(header.decode("utf-8"), object_pairs_hook=no_duplicates, parse_int=_count)
        for name in found:
            name.encode()  # JSON can spell half a surrogate pair, which is no text
    except UnicodeError as error:
        _refuse(file, "the header is not UTF-8 text", cause=error)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"the header is not a JSON object: {error}", cause=error)
    metadata = found.pop("__metadata__", None)
    if not _is_metadata(metadata):
        _refuse(file, "the header's __metadata__ is not a mapping of strings to strings")
    tensors: dict[str, object] = found
    return tensors


def _count(text: str) -> int:
    """An unsigned 64-bit number; what is none (negative, also -0, or longer) becomes one that is refused later."""
    if text.startswith("-"):
        return -1
    return int(text) if len(text) <= 20 else _TOO_LARGE


def _is_metadata(found: object) -> bool:
    if found is None:
        return True
    if not isinstance(found, dict):
        return False
    try:
        return all(isinstance(value, str) and (key + value).encode() is not None for key, value in found.items())
    except UnicodeEncodeError:
        return False


def _weight(name: str, entry: object, data_start: int, file: CheckpointFile) -> WeightInfo:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        _refuse(file, f"a tensor is described by {_brief(entry)} instead of dtype, shape, data_offsets", weight=name)
    if not isinstance(entry["dtype"], str):
        _refuse(file, f"the dtype is {_brief(entry['dtype'])} instead of a name", weight=name)
    dtype = named_dtype(entry["dtype"], weight=name, file=str(file.path))
    shape, offsets = _counts(entry["shape"]), _counts(entry["data_offsets"])
    if shape is None:
        _refuse(file, f"the shape is {_brief(entry['shape'])}, not a list of sizes", weight=name)
    if offsets is None or len(offsets) != 2 or offsets[1] < offsets[0]:
        _refuse(file, f"data_offsets is {_brief(entry['data_offsets'])}, not begin and end", weight=name)
    bounded = dtype.itemsize
    for size in shape:
        bounded *= max(size, 1)  # so that a zero cannot hide sizes that do not fit
        if bounded > _MAX_COUNT:
            _refuse(file, f"the shape {_brief(list(shape))} has more elements than can be counted", weight=name)
    begin, end = offsets
    nbytes = _nbytes(entry["dtype"], dtype.itemsize, shape)
    if nbytes != end - begin:
        what = f"{entry['dtype']} of shape {_brief(list(shape))} takes {nbytes} bytes"
        _refuse(file, f"{what}, but its data_offsets hold {end - begin}", weight=name)
    if entry["dtype"] == "F4":
        shape = _in_pairs(shape, name, file)
    return WeightInfo(sys.intern(name), dtype, shape, Span(file, data_start + begin, end - begin))


def _nbytes(dtype: str, itemsize: int, shape: tuple[int, ...]) -> int | float:
    """What a tensor takes; not a whole number for an odd number of half bytes."""
    count = math.prod(shape)
    if dtype != "F4":
        return count * itemsize
    return count / 2 if count % 2 else count // 2


def _in_pairs(shape: tuple[int, ...], name: str, file: CheckpointFile) -> tuple[int, ...]:
    """The shape as torch has it. Rows of an odd number of elements share a byte, which no tensor can say."""
    if not shape or shape[-1] % 2:
        raise CheckpointError(
            f"F4 of shape {_brief(list(shape))} has rows that end within a byte",
            weight=name,
            file=str(file.path),
            cure="Pad the last dimension to an even size, or save the packed bytes as U8",
        )
    return (*shape[:-1], shape[-1] // 2)


def _counts(found: object) -> tuple[int, ...] | None:
    """A list of unsigned numbers, or None. ``True`` is no number, although Python says so."""
    if isinstance(found, list) and all(type(size) is int and 0 <= size < _TOO_LARGE for size in found):
        return tuple(found)
    return None


def _brief(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _place(info: WeightInfo) -> tuple[int, int]:
    assert info.span is not None
    return (info.span.offset, info.span.nbytes)


def _check_cover(infos: list[WeightInfo], data_start: int, file: CheckpointFile) -> None:
    """Refuse gaps, overlaps, and a file that is not as long as its tensors. ``infos`` are in the order of the bytes."""
    expected, before = data_start, "the header"
    for info in infos:
        offset, nbytes = _place(info)
        if offset != expected:
            what = "overlaps" if offset < expected else f"leaves a gap of {offset - expected} bytes after"
            _refuse(file, f"a tensor {what} {before}", weight=info.name)
        expected, before = offset + nbytes, repr(info.name)
    if file.size < expected:
        _refuse(file, f"the file is truncated: expected {expected} bytes, it has {file.size}")
    if file.size > expected:
        _refuse(file, f"the file has {file.size} bytes, but its tensors end at {expected}")
