"""One safetensors file: its header, checked to the last byte before anything is read or allocated for it.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of the header, little
endian; the header, a JSON object of ``name: {"dtype", "shape", "data_offsets"}`` and an optional ``__metadata__`` of
strings; the data, which the tensors cover without gap or overlap. Whatever the reference implementation refuses is
refused here. Stricter than it, also: a name that occurs twice, a tensor described by anything but these three keys.

F4 has two elements in a byte. The header counts elements; torch's dtype for it counts pairs, so the last size is half.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo
from odewei.loaders.file_kind import kind_of
from odewei.loaders.file_loader import FileLoader, open_header
from odewei.loaders.json_pairs import JsonText
from odewei.loaders.remote_path import as_place
from odewei.loaders.tensors import named_dtype

__all__ = ["SafetensorsLoader", "read_header"]

_MAX_HEADER_NBYTES = 100_000_000
_MAX_ENTRY_NBYTES = 1 << 16  # a shape of some thousand dimensions
_LENGTH_NBYTES = 8
_EXPLAINING_NBYTES = 4096
_MAX_COUNT = 2**63 - 1  # torch counts elements in int64
_TOO_LARGE = 2**64
_NUMBER = rb"(?:0|[1-9][0-9]{0,17})"
_USUAL = re.compile(
    rb'\{"dtype": ?"([A-Z0-9_]{1,20})", ?"shape": ?\[((?:%b(?:, ?%b){0,100}+)?)\], ?"data_offsets": ?\[(%b), ?(%b)\]\}'
    % ((_NUMBER,) * 4)
)
_KEYS = {"dtype", "shape", "data_offsets"}
_CURE = "Download the file again; if it is whole, it was written wrongly"


class SafetensorsLoader(FileLoader):
    """The weights of one ``.safetensors`` file. Every weight has a span."""

    def _read_headers(self) -> dict[str, WeightInfo]:
        return read_header(self._file(self.path), is_whole=self.verify != "none")


def read_header(file: str | os.PathLike[str] | CheckpointFile, *, is_whole: bool = True) -> dict[str, WeightInfo]:
    """Every tensor of the file by name, with absolute offsets, in the order of the bytes.

    ``is_whole``: the file has to end where its tensors end. Raises CheckpointNotFoundError, CorruptCheckpointError for
    whatever contradicts the format, CheckpointError for a dtype that cannot be read here.
    """
    if not isinstance(file, CheckpointFile):
        file = CheckpointFile.stat(as_place(file))
    with open_header(file) as stream:
        header = _header_bytes(stream, file)
    infos = list(_parse(header, _LENGTH_NBYTES + len(header), file))
    infos.sort(key=_place)
    _check_cover(infos, _LENGTH_NBYTES + len(header), file, is_whole)
    return {info.name: info for info in infos}


def _refuse(
    file: CheckpointFile, problem: str, *, weight: str | None = None, cause: Exception | None = None
) -> NoReturn:
    raise CorruptCheckpointError(problem, weight=weight, file=str(file.path), cure=_CURE) from cause


def _header_bytes(stream: BinaryIO, file: CheckpointFile) -> bytes:
    """The header without its length. The length is believed only as far as the file goes."""
    start = stream.read(min(_LENGTH_NBYTES, file.size))
    nbytes = int.from_bytes(start, "little")
    if nbytes > _MAX_HEADER_NBYTES or nbytes < len(b"{}"):
        _explain(start, stream, file)
    if file.size < _LENGTH_NBYTES:
        _refuse(file, f"the file is truncated: expected at least {_LENGTH_NBYTES} bytes, it has {file.size}")
    if nbytes > _MAX_HEADER_NBYTES:
        _refuse(file, f"the header claims {nbytes} bytes, the format allows {_MAX_HEADER_NBYTES}: no safetensors file")
    if _LENGTH_NBYTES + nbytes > file.size:
        expected = _LENGTH_NBYTES + nbytes
        _refuse(file, f"the file is truncated within its header: expected {expected} bytes or more, it has {file.size}")
    return stream.read(nbytes)


def _explain(start: bytes, stream: BinaryIO, file: CheckpointFile) -> None:
    """Raise CheckpointError that says what the file is, if that can be told, where no header begins."""
    if start.isascii() or kind_of(start, file.size) is not None:
        kind = kind_of(start + stream.read(_EXPLAINING_NBYTES), file.size)
        if kind is not None:
            raise kind.error(file, "a safetensors file")


def _parse(header: bytes, data_start: int, file: CheckpointFile) -> Iterator[WeightInfo]:
    """The tensors that the header describes; each is checked by itself before the next is looked at."""
    if not header.startswith(b"{"):
        _refuse(file, "the header does not begin with '{'")
    names = set()
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # thousands of weights have the same
    try:
        text = JsonText(header, parse_int=_count)
        for name in text.pairs():
            if name in names:
                raise ValueError(f"the name {name[:200]!r} occurs twice")
            names.add(name)
            if name == "__metadata__":
                _skip_metadata(text, file)
            else:
                yield _weight(name, _entry(text), data_start, file, shapes)
        text.end()
    except UnicodeError as error:
        _refuse(file, "the header is not UTF-8 text", cause=error)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"the header is not a JSON object: {error}", cause=error)


def _entry(text: JsonText) -> object:
    """What describes a tensor. As the reference writes it, one expression reads it, which saves a third of all time."""
    match = _USUAL.match(text.text, text.at)
    if match is None:
        return text.flat_object(_MAX_ENTRY_NBYTES)
    text.at = match.end()
    text.skip_blanks()
    dtype, shape, begin, end = match.groups()
    sizes = [int(size) for size in shape.split(b",")] if shape else []
    return {"dtype": dtype.decode(), "shape": sizes, "data_offsets": [int(begin), int(end)]}


def _count(text: str) -> int:
    """An unsigned 64-bit number; what is none (negative, also -0, or longer) becomes one that is refused later."""
    if text.startswith("-"):
        return -1
    return int(text) if len(text) <= 20 else _TOO_LARGE


def _skip_metadata(text: JsonText, file: CheckpointFile) -> None:
    """Pass over what is of no use here, and has to be a mapping of strings to strings, or null."""
    try:
        if text.is_at(b"{"):
            text.skip_texts()
        elif text.value(len("null")) is not None:
            raise ValueError("it is something else")
    except ValueError as error:
        _refuse(file, f"the header's __metadata__ is not a mapping of strings to strings: {error}", cause=error)


def _weight(
    name: str,
    entry: object,
    data_start: int,
    file: CheckpointFile,
    shapes: dict[tuple[int, ...], tuple[int, ...]],
) -> WeightInfo:
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
    shape = shapes.setdefault(shape, shape)
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


def _check_cover(infos: list[WeightInfo], data_start: int, file: CheckpointFile, is_whole: bool) -> None:
    """Refuse gaps, overlaps, and, unless it need not be whole, a file that is not as long as its tensors. ``infos`` are
    in the order of the bytes.
    """
    expected, before = data_start, "the header"
    for info in infos:
        offset, nbytes = _place(info)
        if offset != expected:
            what = "overlaps" if offset < expected else f"leaves a gap of {offset - expected} bytes after"
            _refuse(file, f"a tensor {what} {before}", weight=info.name)
        expected, before = offset + nbytes, repr(info.name)
    if not is_whole:
        return
    if file.size < expected:
        _refuse(file, f"the file is truncated: expected {expected} bytes, it has {file.size}")
    if file.size > expected:
        _refuse(file, f"the file has {file.size} bytes, but its tensors end at {expected}")
