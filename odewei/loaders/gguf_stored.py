"""Types of tensors in GGUF files, and the bytes of those weights that are not in the file as they are.

Numbers, blocks and bytes are those of ggml (https://github.com/ggml-org/ggml/blob/master/include/ggml.h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from odewei.errors import CheckpointError
from odewei.loaders.base import Span, WeightInfo
from odewei.loaders.file_loader import read_span
from odewei.loaders.remote_file import RemoteFile

__all__ = ["OTHERS", "PLAIN", "QUANTISED", "Stored", "dequantiser"]

_PIECE_NBYTES = 1 << 18
_REMOTE_NBYTES = 1 << 22  # of a remote file, at a time

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

OTHERS = {
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
"""Types that are known by name only."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight that is not in the file as it is: its bytes there, the number of its type, and the heads that its rows
    are of if they are to be put back.
    """

    raw: Span
    kind: int
    shape: tuple[int, ...]
    heads: int | None

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row in the file."""
        return self.raw.nbytes // max(1, self.shape[0])

    def pieces(self, weight: str) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of the weight's elements, as torch has them, in the file's order; whole rows at a time if these are
        to be put back. ``weight`` is for messages. Raises WeightReadError.
        """
        if self.kind not in QUANTISED:
            yield from self._raw(weight, self.row_nbytes)
            return
        name, _, block_nbytes = QUANTISED[self.kind]
        dequantise = dequantiser(str(self.raw.file.path))
        unit = block_nbytes if self.heads is None else self.row_nbytes
        step = max(1, _PIECE_NBYTES // unit) * unit
        for piece in self._raw(weight, unit):
            for start in range(0, piece.size, step):
                blocks = piece[start : start + step].reshape(-1, block_nbytes)
                with np.errstate(all="ignore"):  # what a scale that is no number gives is no number, as it is there
                    yield dequantise(blocks, name).reshape(-1).view(np.uint8)

    def _raw(self, weight: str, unit: int) -> Iterator[npt.NDArray[np.uint8]]:
        """The stored bytes, in turn, in whole units of so many."""
        most = _REMOTE_NBYTES if isinstance(self.raw.file, RemoteFile) else _PIECE_NBYTES
        step = max(1, most // unit) * unit
        for start in range(0, self.raw.nbytes, step):
            nbytes = min(step, self.raw.nbytes - start)
            piece = bytearray(nbytes)
            span = replace(self.raw, offset=self.raw.offset + start, nbytes=nbytes)
            read_span(WeightInfo(weight, torch.uint8, (nbytes,), span), memoryview(piece))
            yield np.frombuffer(piece, np.uint8)


def dequantiser(file: str) -> Callable[[npt.NDArray[np.uint8], str], npt.NDArray[np.float32]]:
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
