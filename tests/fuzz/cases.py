"""All kinds of cases, and one case from its number."""

import random
from importlib.util import find_spec

from .binaries import gguf_case, npy_case, npz_case, torch_case
from .case import Case
from .pickles import pickle_case
from .texts import index_case, safetensors_case, shards_case, sums_case

__all__ = ["KINDS", "make_case"]

_MAKERS = {
    "safetensors": safetensors_case,
    "index": index_case,
    "sums": sums_case,
    "shards": shards_case,
    "npy": npy_case,
    "npz": npz_case,
    "torch": torch_case,
    "pickle": pickle_case,
    "gguf": gguf_case,
}
_OFTEN = (
    ("safetensors",) * 5
    + ("index",) * 3
    + ("torch",) * 2
    + ("pickle",) * 2
    + ("npz",) * 2
    + ("npy", "gguf", "gguf", "sums", "shards")
)
KINDS = tuple(kind for kind in _MAKERS if kind != "gguf" or find_spec("gguf") is not None)


def make_case(seed: int, number: int, kind: str | None = None) -> Case:
    """Case ``number`` of the run with this seed; of one kind, or of the kind that its number gives."""
    rng = random.Random(f"{seed}/{number}")
    chosen = rng.choice([one for one in _OFTEN if one in KINDS])
    return _MAKERS[kind or chosen](rng)
