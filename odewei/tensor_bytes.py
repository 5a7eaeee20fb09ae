"""How much memory tensors of any kind take. Knows what they consist of, and nothing of models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

__all__ = ["tensor_bytes"]

_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them, each counted once: of sparse ones what they hold, of wrappers what they wrap."""
    with torch._C.DisableTorchFunction():
        distinct = {id(tensor): tensor for tensor in tensors}
        parts = {id(part): part for tensor in distinct.values() for part in _parts(tensor)}
        return sum(part.numel() * part.element_size() for part in parts.values())


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from _parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED_ROWS:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in _COMPRESSED_COLUMNS:
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor  # nested and quantised ones too
