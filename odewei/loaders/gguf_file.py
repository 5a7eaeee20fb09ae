"""GGUF, the files of llama.cpp: tensors as they are by span, quantised ones dequantised to float32 as they are read.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts of tensors and of
metadata; the metadata; for each tensor name, sizes (the fastest first), type and offset; padding; the data. The header
is read here, with every length checked against the file; the package ``gguf`` (extra ``gguf``) knows the quantisations
and is asked for 256 KiB at a time. Names in such files are those of llama.cpp: ``rename`` leads to a model's.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import CheckpointFile, Span, WeightInfo
from odewei.loaders.file_loader import FileLoader, open_header, read_span

__all__ = ["PLAIN", "QUANTISED", "GgufLoader"]

PLAIN: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
"""Types whose elements are stored as torch has them, by their numbers in ggml."""

QUANTISED: dict[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
"""Types that are dequantised: name, elements in a block, bytes of a block."""

_OTHERS = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
_TURNED = frozenset({"llama"})
"""Architectures whose query and key rows the conversion to GGUF puts into another order."""

_log = logging.getLogger("odewei")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_HEADER_NBYTES = 1 << 30
_MAX_NAME_NBYTES = 1 << 16
_MAX_DIMENSIONS = 8
_MAX_NESTING = 4
_MAX_COUNT = 2**63 - 1
_PIECE_NBYTES = 1 << 18
_CURE = "Download the file again; if it is whole, it was written wrongly"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as the header has it: ``offset`` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Quantised:
    """A quantised weight's blocks, and the number of their type."""

    raw: Span
    kind: int


class GgufLoader(FileLoader):
    """The tensors of one GGUF file (versions 2 and 3, little-endian). Quantised ones are float32 weights without spans.

    Raises CheckpointError for a quantisation that is not read, for one file of several, and where the package ``gguf``
    is needed and not installed.
    """

    def _read_headers(self) -> dict[str, WeightInfo]:
        self._quantised: dict[str, _Quantised] = {}
        file = self._file(self.path)
        with open_header(file) as stream:
            try:
                header = _Header(stream, file)
                data_start, tensors = header.read()
            except (struct.error, UnicodeDecodeError, EOFError) as error:
                _refuse(file, "the file is truncated, or no text, within its header", cause=error)
        found = {tensor.name: self._weight(tensor, data_start, file) for tensor in tensors}
        if len(found) != len(tensors):
            _refuse(file, "two tensors have the same name")
        self._check_disjoint(found.values(), file)
        if self._quantised:
            _dequantiser(str(self.path))
        if header.architecture in _TURNED:
            _log.warning(
                "%s is of the architecture %r, of which llama.cpp keeps the rows of attn_q and attn_k in another order "
                "than transformers does; they are read as the file has them, and give wrong results in a model of "
                "transformers",
                self.path,
                header.architecture,
            )
        return found

    def _check_disjoint(self, infos: Iterable[WeightInfo], file: CheckpointFile) -> None:
        """Refuse tensors that share bytes, which would let a small file have weights of any size."""
        end, before = 0, ""
        spans = [(info.span or self._quantised[info.name].raw, info.name) for info in infos]
        for span, name in sorted(spans, key=lambda one: (one[0].offset, one[0].nbytes)):
            if span.nbytes and span.offset < end:
                _refuse(file, f"the tensor overlaps {before!r}", weight=name)
            end, before = max(end, span.offset + span.nbytes), name

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        if info.span is not None:
            read_span(info, buffer)
            return
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
        self.weights()
        quantised = self._quantised[info.name]
        target, done = np.frombuffer(buffer, np.float32), 0
        for elements in _dequantised(quantised, info.name):
            target[done : done + elements.size] = elements
            done += elements.size

    def _weight(self, tensor: _Tensor, data_start: int, file: CheckpointFile) -> WeightInfo:
        quantisation = QUANTISED.get(tensor.kind)
        if quantisation is None and tensor.kind not in PLAIN:
            name = _OTHERS.get(tensor.kind, f"number {tensor.kind}")
            raise CheckpointError(
                f"the tensor has the type {name}; odewei does not dequantise it",
                weight=tensor.name,
                file=str(file.path),
                cure=f"Use a file in F16, BF16 or one of {', '.join(one for one, _, _ in QUANTISED.values())}",
            )
        dtype = PLAIN.get(tensor.kind, torch.float32)
        count = math.prod(tensor.shape)
        if quantisation is None:
            nbytes = count * dtype.itemsize
        else:
            what, block, block_nbytes = quantisation
            if not tensor.shape or tensor.shape[-1] % block:
                _refuse(file, f"{what} of shape {tensor.shape} has rows of no whole blocks", weight=tensor.name)
            nbytes = count // block * block_nbytes
        span = Span(file, data_start + tensor.offset, nbytes)
        if span.offset + nbytes > file.size and self.verify != "none":
            end = span.offset + nbytes
            _refuse(file, f"the tensor ends at {end}, the file at {file.size}: it is truncated", weight=tensor.name)
        if quantisation is None:
            return WeightInfo(tensor.name, dtype, tensor.shape, span)
        self._quantised[tensor.name] = _Quantised(span, tensor.kind)
        return WeightInfo(tensor.name, dtype, tensor.shape, None)


class _Header:
    """Reads the header from the start of ``stream``. No length is believed beyond the end of the file."""

    def __init__(self, stream: BinaryIO, file: CheckpointFile) -> None:
        self._stream = stream
        self._file = file
        self._end = min(file.size, _MAX_HEADER_NBYTES)
        self._alignment = 32
        self._keys: set[str] = set()
        self.architecture = ""  # as the metadata says

    def read(self) -> tuple[int, list[_Tensor]]:
        """Where the data start, and the tensors. Raises CheckpointError; struct.error and EOFError at the end."""
        if self._stream.read(4) != b"GGUF":
            _refuse(self._file, "this is no GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            what = "of a big-endian machine" if version and version % 65536 == 0 else f"of version {version}"
            problem = f"this is a GGUF file {what}; little-endian ones of version 2 and 3 are read"
            raise CheckpointError(problem, file=str(self._file.path), cure="Convert it with the tools of llama.cpp")
        tensors, entries = self._number("Q"), self._number("Q")
        if 24 * tensors + 13 * entries > self._file.size:
            _refuse(self._file, f"the header claims {tensors} tensors and {entries} entries of metadata")
        for _ in range(entries):
            self._entry()
        self._keys.clear()
        found = [self._tensor() for _ in range(tensors)]
        return -(-self._stream.tell() // self._alignment) * self._alignment, found

    def _entry(self) -> None:
        key, kind = self._text(), self._number("I")
        if key in self._keys:
            _refuse(self._file, f"the metadata has {key[:200]!r} twice")
        self._keys.add(key)
        if key == "general.architecture" and kind == _STRING:
            self.architecture = self._text()
            return
        value = self._value(kind, 0)
        if key == "general.alignment":
            if not isinstance(value, int) or value < 1 or value > 1 << 20 or value & (value - 1):
                _refuse(self._file, f"the alignment is {value!r}")
            self._alignment = value
        if key == "split.count" and isinstance(value, int) and value > 1:
            raise CheckpointError(
                f"this is one of {value} files of a GGUF checkpoint",
                file=str(self._file.path),
                cure="Put them together first: llama-gguf-split --merge",
            )

    def _value(self, kind: int, depth: int) -> object:
        """A value of the metadata; texts and arrays are passed over."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            self._skip(self._number("Q"))
            return None
        if kind != _ARRAY or depth == _MAX_NESTING:
            _refuse(self._file, f"the metadata has a value of the kind {kind} (or is nested too deeply)")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[inner]))
        else:
            for _ in range(count):
                self._value(inner, depth + 1)
        return None

    def _tensor(self) -> _Tensor:
        name = self._text()
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            _refuse(self._file, f"a tensor has {dimensions} dimensions", weight=name)
        sizes = [self._number("Q") for _ in range(dimensions)]
        if math.prod(max(size, 1) for size in sizes) * 8 > _MAX_COUNT:
            _refuse(self._file, f"the shape {sizes[::-1]} has more elements than can be counted", weight=name)
        kind, offset = self._number("I"), self._number("Q")
        if offset % self._alignment:
            _refuse(self._file, f"the offset {offset} is no multiple of {self._alignment}", weight=name)
        return _Tensor(name, tuple(reversed(sizes)), kind, offset)

    def _number(self, code: str) -> int:
        """A number; floats are of no use here, and only passed over."""
        found = struct.unpack(f"<{code}", self._stream.read(struct.calcsize(code)))[0]
        return int(found) if code not in ("f", "d") else 0

    def _text(self) -> str:
        nbytes = self._number("Q")
        if nbytes > _MAX_NAME_NBYTES:
            _refuse(self._file, f"the header has a name of {nbytes} bytes")
        return self._stream.read(nbytes).decode("utf-8")

    def _skip(self, nbytes: int) -> None:
        if nbytes > self._end - self._stream.tell():
            raise EOFError
        self._stream.seek(nbytes, 1)


def _dequantised(quantised: _Quantised, weight: str) -> Iterator[npt.NDArray[np.float32]]:
    """The elements of a weight, in turn."""
    name, _, block_nbytes = QUANTISED[quantised.kind]
    dequantise = _dequantiser(str(quantised.raw.file.path))
    raw = quantised.raw
    step = _PIECE_NBYTES // block_nbytes * block_nbytes
    for start in range(0, raw.nbytes, step):
        nbytes = min(step, raw.nbytes - start)
        piece = bytearray(nbytes)
        span = replace(raw, offset=raw.offset + start, nbytes=nbytes)
        read_span(WeightInfo(weight, torch.uint8, (nbytes,), span), memoryview(piece))
        with np.errstate(all="ignore"):  # what a scale that is no number gives is no number, as it is there
            yield dequantise(np.frombuffer(piece, np.uint8).reshape(-1, block_nbytes), name).reshape(-1)


def _dequantiser(file: str) -> Callable[[npt.NDArray[np.uint8], str], npt.NDArray[np.float32]]:
    """The function of the package ``gguf``, by the name of the type. Raises CheckpointError where it is not there."""
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError as error:
        raise CheckpointError(
            "the file has quantised tensors, and the package gguf is not installed",
            file=file,
            cure="Install it: pip install 'odewei[gguf]'",
        ) from error
    return lambda blocks, name: dequantize(blocks, GGMLQuantizationType[name])


def _refuse(
    file: CheckpointFile, problem: str, *, weight: str | None = None, cause: Exception | None = None
) -> NoReturn:
    raise CorruptCheckpointError(problem, weight=weight, file=str(file.path), cure=_CURE) from cause
