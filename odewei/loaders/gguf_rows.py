"""Which rows of a GGUF file llama.cpp keeps in another order than transformers, and back. Pure.

Rotary embedding turns pairs of a head's elements. transformers pairs the first half with the second, llama.cpp, for
some architectures, neighbours; so the conversion of these (``LlamaModel.permute`` in conversion/llama.py of
https://github.com/ggml-org/llama.cpp) interleaves the two halves of the rows of each head of queries and keys. Which
architectures: those whose class there is derived from, or calls, that one, as read in November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["TURNED", "UNTURNED", "head_count", "places"]

TURNED: Final = frozenset(
    {"arcee", "granite", "granitehybrid", "granitemoe", "llama", "llama-embed", "mistral3", "olmo", "smollm3"}
)
"""Architectures whose rows are known to be in that order."""

UNTURNED: Final = frozenset({"arctic", "baichuan", "bailingmoe", "deci", "internlm2", "minicpm", "xverse"})
"""Architectures that are turned in a way of their own, or another way in files of another year."""

_TURNED_NAME = re.compile(r"blk\.(\d+)\.attn_([qk])\.(?:weight|bias)")


def head_count(name: str, architecture: str, counts: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many heads the rows of a tensor are of; None if its rows are in the order of transformers.

    ``counts`` are the metadata about attention heads: one number, or one a layer. Raises ValueError if they do not say.
    """
    found = _TURNED_NAME.fullmatch(name)
    if found is None or architecture not in TURNED:
        return None
    key = f"{architecture}.attention.head_count"
    heads = counts.get(f"{key}_kv") or counts.get(key) if found[2] == "k" else counts.get(key)
    if not heads:
        raise ValueError(f"the metadata have no {key}")
    layer = int(found[1])
    if len(heads) > 1 and layer >= len(heads):
        raise ValueError(f"the metadata have {key} for {len(heads)} layers only")
    return heads[layer] if len(heads) > 1 else heads[0]


def places(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Where each row of the file belongs. Raises ValueError if so many heads cannot have so many rows."""
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows are not those of {heads} heads of an even size")
    row = np.arange(rows, dtype=np.intp)
    size = rows // heads
    return row - row % size + row % 2 * (size // 2) + row % size // 2
