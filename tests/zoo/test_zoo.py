"""Every architecture of the zoo computes the resident model's bits, and does stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.zoo.architecture import Architecture, Family
from tests.zoo.audio import AUDIO
from tests.zoo.check import check
from tests.zoo.decoders import DECODERS
from tests.zoo.detection import DETECTION
from tests.zoo.diffusion import DIFFUSION
from tests.zoo.encoders import ENCODERS
from tests.zoo.experts import EXPERTS
from tests.zoo.multimodal import MULTIMODAL
from tests.zoo.pairs import PAIRS
from tests.zoo.recurrent import RECURRENT
from tests.zoo.vision import VISION

FAMILIES: tuple[Family, ...] = (
    DECODERS, ENCODERS, PAIRS, EXPERTS, RECURRENT, VISION, DETECTION, AUDIO, MULTIMODAL, DIFFUSION,
)  # fmt: skip

QUICK = frozenset(
    {
        "gemma3",
        "gpt_neox",
        "albert (shared layers)",
        "deberta-v2",
        "longformer",
        "bart",
        "deepseek_v3",
        "mamba2",
        "resnet",
        "swin",
        "detr",
        "wav2vec2",
        "qwen2_vl",
        "UNet2DConditionModel",
    }
)


def _cases() -> list[Any]:
    entries = [entry for family in FAMILIES for entry in family.entries]
    names = {entry.name for entry in entries}
    assert len(names) == len(entries), "two entries have one name"
    assert names >= QUICK
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.name in QUICK else pytest.mark.zoo) for entry in entries
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("entry", _cases())
def test_same_bits(entry: Architecture, tmp_path: Path, record_property: Any) -> None:
    """Two passes and one with another input equal the resident model's byte for byte, in 40 % of the memory."""
    record_property("family", entry.family)
    pytest.importorskip("transformers")
    pytest.importorskip(entry.needs, reason=f"{entry.needs} is not installed (pip install odewei[zoo])")
    if entry.overdraws:
        record_property("overdraws", entry.overdraws)
    check(entry, tmp_path)
