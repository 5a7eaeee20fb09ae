"""NumPy's files: a .npz archive, one .npy file, or a folder of them. Pickles are never read.

The format (numpy/lib/_format_impl.py): a magic, a version, the length of the header, the header, which is a Python
dictionary of ``descr``, ``fortran_order`` and ``shape`` as text, the elements. An .npz is a zip archive of such files.
Elements that lie in the file as they are have a span; deflated members and elements of another byte order are
delivered by ``read_into``, in 256 KiB of memory besides the buffer. What is refused: objects (pickles), dtypes that
torch lacks, and archives that claim more than their bytes can hold.
"""

from __future__ import annotations

import ast
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import torch

from odewei.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError, WeightReadError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo
from odewei.loaders.file_loader import FileLoader, open_again, open_header, read_span
from odewei.loaders.tensors import contiguous_stride
from odewei.loaders.zip_members import MAX_DEFLATE_RATIO, check_disjoint, data_offset, inflate

__all__ = ["NUMPY_DTYPES", "NumpyLoader", "arrays_in"]

NUMPY_DTYPES: dict[str, torch.dtype] = {
    "b1": torch.bool,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
"""What NumPy calls the dtypes that torch has too, without the byte order."""

_MAGIC = b"\x93NUMPY"
_ARCHIVE = (b"PK\x03\x04", b"PK\x05\x06")  # zipfile would look for one anywhere in a file
_UNREADABLE = 0x61  # encrypted in one way or another, or a patch
_MAX_HEADER_NBYTES = 10_000  # as in NumPy: longer ones could make the parser of Python overflow its stack
_HEAD_NBYTES = _MAX_HEADER_NBYTES + 12
_MAX_COUNT = 2**63 - 1
_KEYS = {"descr", "fortran_order", "shape"}
_NATIVE = "<" if sys.byteorder == "little" else ">"
_CURE = "Download the file again; if it is whole, save the array again with numpy.save or numpy.savez"


@dataclass(frozen=True, slots=True)
class _Array:
    """What a header says. ``swap`` is the dtype to swap from, in NumPy's words; None: this machine's byte order."""

    dtype: torch.dtype
    swap: str | None
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    header_nbytes: int


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight that is not in the file as it is: ``raw`` are its elements, or, if ``inflated_nbytes`` is not 0, the
    deflated file, with its header, of so many bytes and this checksum.
    """

    raw: Span
    swap: str | None
    header_nbytes: int
    inflated_nbytes: int
    crc: int


class NumpyLoader(FileLoader):
    """The arrays of an .npz file by their names, or of the .npy files in a folder, or of one, by the names of the files
    without the ending. Arrays in Fortran order keep their strides.
    """

    def _check_path(self) -> None:
        if not (isinstance(self.path, Path) and self.path.is_dir()):
            super()._check_path()

    def _read_headers(self) -> dict[str, WeightInfo]:
        self._packed: dict[str, _Packed] = {}
        if isinstance(self.path, Path) and self.path.is_dir():
            return {path.name[:-4]: self._one(path.name[:-4], self._file(path)) for path in arrays_in(self.path)}
        file = self._file(self.path)
        with open_header(file) as stream:
            begin = stream.read(len(_MAGIC))
            if begin != _MAGIC:
                if not begin.startswith(_ARCHIVE):
                    what = f"this is no archive of NumPy (it has {file.size} bytes), and no array; it was not read"
                    _refuse(what, None, str(self.path))
                return {info.name: info for info in self._members(stream, file)}
        return {self.path.stem: self._one(self.path.stem, file)}

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        if info.span is not None:
            read_span(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
        self.weights()
        packed, target = self._packed[info.name], buffer.cast("B")
        if packed.inflated_nbytes:
            _inflate_into(packed, target, info.name)
        else:
            read_span(WeightInfo(info.name, torch.uint8, (info.nbytes,), packed.raw), target)
        if packed.swap is not None and info.nbytes:
            np.frombuffer(target, packed.swap).byteswap(inplace=True)

    def _one(self, name: str, file: CheckpointFile) -> WeightInfo:
        """The array that is all of ``file``."""
        with open_header(file) as stream:
            array = parse_header(stream.read(_HEAD_NBYTES), weight=name, file=str(file.path))
        return self._plain(name, array, Span(file, 0, file.size), is_whole=self.verify != "none")

    def _members(self, stream: BinaryIO, file: CheckpointFile) -> Iterator[WeightInfo]:
        """The arrays of an archive."""
        try:
            with zipfile.ZipFile(stream) as archive:
                members = [member for member in archive.infolist() if not member.filename.endswith("/")]
                placed = [(member, data_offset(member, stream, file.size)) for member in members]
                check_disjoint(placed)
                names = [member.filename.removesuffix(".npy") for member in members]
                if len(set(names)) != len(names):
                    raise zipfile.BadZipFile("two entries have the same name")
                for member, begin in placed:
                    yield self._member(member, Span(file, begin, member.compress_size), stream)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
            raise CorruptCheckpointError(
                f"this is no archive of NumPy, contradicts itself or is truncated (it has {file.size} bytes): {error}",
                file=str(file.path),
                cure=_CURE,
            ) from error

    def _member(self, member: zipfile.ZipInfo, raw: Span, stream: BinaryIO) -> WeightInfo:
        name, path = member.filename.removesuffix(".npy"), str(raw.file.path)
        if member.flag_bits & _UNREADABLE or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = "the entry is encrypted, or compressed in a way that NumPy does not use"
            raise CheckpointError(problem, weight=name, file=path, cure="Save it with numpy.savez")
        stream.seek(raw.offset)
        if member.compress_type == zipfile.ZIP_STORED:
            if member.file_size != raw.nbytes:
                raise zipfile.BadZipFile(f"entry {member.filename!r} has two sizes")
            array = parse_header(stream.read(min(_HEAD_NBYTES, raw.nbytes)), weight=name, file=path)
            return self._plain(name, array, raw)
        if member.file_size > MAX_DEFLATE_RATIO * raw.nbytes:
            what = f"the entry claims {member.file_size} bytes, more than its {raw.nbytes} deflated bytes can hold"
            _refuse(what, name, path)
        try:
            array = parse_header(_first(inflate(stream, raw.nbytes)), weight=name, file=path)
        except zlib.error as error:
            _refuse(f"the deflated entry cannot be read: {error}", name, path, cause=error)
        info = _info(name, array, None)
        _check_length(array, info, member.file_size, path)
        self._packed[name] = _Packed(raw, array.swap, array.header_nbytes, member.file_size, member.CRC)
        return info

    def _plain(self, name: str, array: _Array, whole: Span, *, is_whole: bool = True) -> WeightInfo:
        """The weight of an array that lies with its header, and nothing else, in ``whole``."""
        info = _info(name, array, None)
        if is_whole:
            _check_length(array, info, whole.nbytes, str(whole.file.path))
        span = Span(whole.file, whole.offset + array.header_nbytes, info.nbytes)
        if array.swap is None:
            return _info(name, array, span)
        self._packed[name] = _Packed(span, array.swap, array.header_nbytes, 0, 0)
        return info


def arrays_in(folder: Path) -> list[Path]:
    """The .npy files of a folder, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(".npy"))


def parse_header(head: bytes, *, weight: str, file: str) -> _Array:
    """What ``head``, the first bytes of an .npy file, says of it. Pure; ``weight`` and ``file`` are for messages.

    Raises UnsafeCheckpointError for objects, CheckpointError for other dtypes that torch lacks, CorruptCheckpointError.
    """
    if not head.startswith(_MAGIC) or len(head) < 12:
        _refuse("this is not a NumPy array: it has no header of one (a pickle has none); it was not read", weight, file)
    version, first = tuple(head[6:8]), 10 if head[6] == 1 else 12
    if version not in ((1, 0), (2, 0), (3, 0)):
        _refuse(f"the version of the header is {version}, which NumPy does not have", weight, file)
    nbytes = int.from_bytes(head[8:first], "little")
    if nbytes > _MAX_HEADER_NBYTES:
        _refuse(f"the header claims {nbytes} bytes, NumPy reads {_MAX_HEADER_NBYTES}", weight, file)
    if first + nbytes > len(head):
        _refuse("the array is truncated within its header", weight, file)
    try:
        text = head[first : first + nbytes].decode("utf-8" if version == (3, 0) else "latin-1")
        found: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        _refuse(f"the header is not the text of a dictionary: {error}", weight, file, cause=error)
    if not isinstance(found, dict) or found.keys() != _KEYS or type(found["fortran_order"]) is not bool:
        _refuse("the header is no dictionary of descr, fortran_order and shape", weight, file)
    dtype, swap = _dtype(found["descr"], weight, file)
    shape = _shape(found["shape"], dtype.itemsize, weight, file)
    stride = None
    if found["fortran_order"] and 0 not in shape:
        stride = tuple(reversed(contiguous_stride(shape[::-1])))
        stride = None if stride == contiguous_stride(shape) else stride
    return _Array(dtype, swap, shape, stride, first + nbytes)


def _dtype(descr: object, weight: str, file: str) -> tuple[torch.dtype, str | None]:
    """The dtype that a header calls ``descr``, and its NumPy name if the bytes are in the other order."""
    match = re.fullmatch(r"([<>|=]?)([A-Za-z])([0-9]*)", descr) if isinstance(descr, str) else None
    order, kind, size = match.groups() if match is not None else ("", "", "")
    dtype = NUMPY_DTYPES.get(kind + size)
    if dtype is not None:
        swapped = order in ("<", ">") and order != _NATIVE and dtype.itemsize > 1
        return dtype, descr if swapped and isinstance(descr, str) else None
    if kind == "O":
        raise UnsafeCheckpointError(
            "the array holds Python objects, which are stored as a pickle; it was not read",
            weight=weight,
            file=file,
            cure="Save arrays of numbers only",
        )
    if kind == "V":
        problem = (
            f"the array is of raw bytes ({descr}): NumPy's files have no bfloat16 and no fp8, it may have been one"
        )
        cure = "Save it as float32, or as safetensors, which keeps its dtype"
    else:
        problem, cure = (
            f"torch has no dtype for NumPy's {str(descr)[:80]!r}",
            "Save the array in a dtype that torch has",
        )
    raise CheckpointError(problem, weight=weight, file=file, cure=cure)


def _shape(found: object, itemsize: int, weight: str, file: str) -> tuple[int, ...]:
    if not isinstance(found, tuple) or not all(type(size) is int and size >= 0 for size in found):
        _refuse(f"the shape is {str(found)[:80]}, not a tuple of sizes", weight, file)
    bounded = itemsize
    for size in found:
        bounded *= max(size, 1)
        if bounded > _MAX_COUNT:
            _refuse(f"the shape {str(found)[:80]} has more elements than can be counted", weight, file)
    return found


def _info(name: str, array: _Array, span: Span | None) -> WeightInfo:
    return WeightInfo(name, array.dtype, array.shape, span, array.stride)


def _check_length(array: _Array, info: WeightInfo, found: int, file: str) -> None:
    expected = array.header_nbytes + info.nbytes
    if found < expected:
        _refuse(f"the array is truncated: expected {expected} bytes, there are {found}", info.name, file)
    if found > expected:
        _refuse(f"the array takes {expected} bytes, but there are {found}", info.name, file)


def _first(pieces: Iterable[bytes]) -> bytes:
    """What a header may take of inflated bytes, or all there are."""
    head = b""
    for piece in pieces:
        head += piece[:_HEAD_NBYTES]
        if len(head) >= _HEAD_NBYTES:
            break
    return head


def _inflate_into(packed: _Packed, buffer: memoryview, weight: str) -> None:
    """Inflate the elements into ``buffer``. What inflates to more, or less, or other bytes is a WeightReadError."""
    done = crc = 0
    path = str(packed.raw.file.path)
    with open_again(packed.raw.file, weight) as stream:
        stream.seek(packed.raw.offset)
        try:
            for piece in inflate(stream, packed.raw.nbytes):
                if done + len(piece) > packed.inflated_nbytes:
                    raise zlib.error(f"it holds more than the {packed.inflated_nbytes} bytes that it claims")
                crc = zlib.crc32(piece, crc)
                elements = memoryview(piece)[max(packed.header_nbytes - done, 0) :]
                start = max(done - packed.header_nbytes, 0)
                buffer[start : start + len(elements)] = elements
                done += len(piece)
            if (done, crc) != (packed.inflated_nbytes, packed.crc):
                raise zlib.error("its length or its checksum is another one")
        except zlib.error as error:
            raise WeightReadError(
                f"the deflated array cannot be read: {error}", weight=weight, file=path, cure=_CURE
            ) from error


def _refuse(problem: str, weight: str | None, file: str, *, cause: Exception | None = None) -> NoReturn:
    raise CorruptCheckpointError(problem, weight=weight, file=file, cure=_CURE) from cause
