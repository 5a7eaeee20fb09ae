"""Which weights of a model of transformers are one: those that its configuration ties, as far as the checkpoint agrees.

A checkpoint may have both names of a tied weight. Where their values are equal they are one weight; where not, the
checkpoint counts and not the configuration, as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from odewei.loaders.base import Span, WeightInfo, WeightsLoader
from odewei.loaders.file_loader import read_span
from odewei.loaders.tensors import read_tensor

__all__ = ["untied", "without_source"]

_PIECE_NBYTES = 1 << 20


def untied(model: Any, names: Iterable[str], loader: WeightsLoader) -> set[str]:
    """The names that are to be filled otherwise than from ``loader``: by tying, or not at all. ``names`` are those of
    the model's state dictionary.

    The model no longer ties what has different values in the checkpoint. Reads weights only where both names of a pair
    are in the checkpoint, a piece at a time.
    """
    known = loader.weights()
    missing = set(names) - known.keys()
    for target, source in _pairs(model).items():
        if target in known and source in known:
            if _have_same_values(loader, known[target], known[source]):
                missing.add(target)
            else:
                model.all_tied_weights_keys.pop(target)
    return missing


def without_source(model: Any, missing: set[str]) -> set[str]:
    """Those of the ``missing`` names that no tie will fill."""
    filled: set[str] = set()
    for target, source in _pairs(model).items():
        if target not in missing or source not in missing:
            filled |= {target, source}
    return missing - filled


def _pairs(model: Any) -> Mapping[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _have_same_values(loader: WeightsLoader, one: WeightInfo, other: WeightInfo) -> bool:
    if one.shape != other.shape:
        return False
    spans = one.span, other.span
    if (one.dtype, one.stride) != (other.dtype, other.stride) or None in spans:
        return torch.equal(read_tensor(loader, one), read_tensor(loader, other))
    return spans[0] == spans[1] or all(
        _piece(one, start) == _piece(other, start) for start in range(0, one.nbytes, _PIECE_NBYTES)
    )


def _piece(info: WeightInfo, start: int) -> bytearray:
    assert info.span is not None
    nbytes = min(_PIECE_NBYTES, info.nbytes - start)
    span = Span(info.span.file, info.span.offset + start, nbytes)
    piece = bytearray(nbytes)
    flat = replace(info, dtype=torch.uint8, shape=(nbytes,), span=span, stride=None)
    read_span(flat, memoryview(piece))
    return piece
