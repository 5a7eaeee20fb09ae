"""bitsandbytes' order of four-bit weights for processors with AVX512-BF16, made in the threads that read.

There bitsandbytes puts a weight into another order when it is first used, once. A streamed one comes again and again,
and bitsandbytes' own way takes many times as long as computing with it; this one goes by whole bytes.

Rows go in blocks of 32. In the checkpoint a byte holds two neighbouring columns of a row, the first in its upper half.
In that order it holds one column of two rows, the upper half that of the row which is 16 further down.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["PackedScales", "PackedWeight", "can_pack"]


class _Conversion:
    """Like a conversion of transformers: it is given tensors, then makes others of them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """``settings``: what the checkpoint says of the weight beside tensors."""
        self.settings = settings
        self.given: dict[str, torch.Tensor] = {}

    def add_tensor(self, target: str, name: str, pattern: str, tensor: torch.Tensor) -> None:
        self.given[pattern] = tensor

    def convert(self, target: str, *, model: Any = None, config: Any = None) -> dict[str, torch.Tensor]:
        return {target: self.made()}

    def made(self) -> torch.Tensor:
        raise NotImplementedError


class PackedWeight(_Conversion):
    """Of ``weight`` as it is stored, (rows * columns / 2, 1) bytes, what computing wants: (rows, columns / 2)."""

    def made(self) -> torch.Tensor:
        rows, columns = self.settings["shape"]
        blocks = self.given["weight"].reshape(rows // 32, 2, 16, columns // 2)
        near, far = blocks[:, 0], blocks[:, 1]
        even = (far & 0xF0).bitwise_or_(near >> 4)
        odd = (far << 4).bitwise_or_(near & 0x0F)
        pairs = (odd.to(torch.int16) << 8).bitwise_or_(even)  # even columns first: such processors are little-endian
        return pairs.transpose(1, 2).contiguous().view(torch.uint8).view(rows, columns // 2)


class PackedScales(_Conversion):
    """Of ``absmax``, which may be quantised itself, what computing wants: (columns / block size, rows) scales."""

    def made(self) -> torch.Tensor:
        rows, columns = self.settings["shape"]
        scales = self.given["absmax"]
        if "nested_absmax" in self.given:
            from bitsandbytes.functional import QuantState, dequantize_blockwise

            state = QuantState(
                absmax=self.given["nested_absmax"],
                blocksize=self.settings["nested_blocksize"],
                code=self.given["nested_quant_map"],
                dtype=getattr(torch, self.settings["nested_dtype"]),
            )
            offset = torch.tensor(float(self.settings["nested_offset"]))
            scales = (dequantize_blockwise(scales, state) + offset).float()
        return scales.reshape(rows, columns // self.settings["blocksize"]).T.to(torch.bfloat16).contiguous()


def can_pack(weight: torch.dtype, settings: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes puts this weight into another order on this processor, and this one is it."""
    rows, columns = settings["shape"]
    whole = weight == torch.uint8 and rows % 32 == 0 and columns % settings["blocksize"] == 0
    return whole and _is_what_bitsandbytes_does()


@functools.cache
def _is_what_bitsandbytes_does() -> bool:
    """Whether the installed version wants this order here, found out with a small weight."""
    try:
        from bitsandbytes import functional

        if not functional.has_avx512bf16():
            return False
        numbers = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        stored, state = functional.quantize_4bit(numbers, blocksize=64, quant_type="nf4", compress_statistics=True)
        described = state.as_dict()
        expected, packed = functional._convert_weight_packed_for_cpu(stored, copy.deepcopy(state))
        weight, scales = PackedWeight(described), PackedScales(described)
        weight.given = {"weight": stored}
        scales.given = {name: value for name, value in described.items() if isinstance(value, torch.Tensor)}
        same = torch.equal(weight.made(), expected) and torch.equal(scales.made(), packed.absmax)
        return same and (packed.nested, packed.dtype, packed.packing_format_for_cpu) == (False, torch.bfloat16, True)
    except (ImportError, AttributeError, KeyError, TypeError, RuntimeError):
        return False
