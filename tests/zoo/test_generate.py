"""generate() gives the resident model's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import odewei
from tests.models import resident, save, weight_bytes
from tests.zoo.architecture import Architecture, ids
from tests.zoo.check import SHARE, smallest_streamed
from tests.zoo.decoders import DECODERS
from tests.zoo.experts import EXPERTS
from tests.zoo.pairs import PAIRS
from tests.zoo.recurrent import RECURRENT

_ENTRIES = {entry.name: entry for family in (DECODERS, PAIRS, EXPERTS, RECURRENT) for entry in family.entries}
_WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}
_CASES = [
    ("llama", "greedy"), ("llama", "sampled"), ("llama", "beams"), ("mistral", "greedy"), ("qwen3", "greedy"),
    ("gemma2", "greedy"), ("gemma3", "sampled"), ("gpt2", "beams"), ("gpt_neox", "greedy"), ("opt", "greedy"),
    ("bloom", "sampled"), ("falcon", "greedy"), ("mixtral", "greedy"), ("deepseek_v3", "greedy"), ("mamba", "greedy"),
    ("mamba2", "sampled"), ("jamba", "greedy"), ("recurrent_gemma", "greedy"), ("t5", "greedy"), ("t5", "beams"),
    ("bart", "beams"), ("mbart", "greedy"), ("marian", "sampled"), ("m2m_100", "greedy"), ("led", "greedy"),
]  # fmt: skip
_QUICK = {("gemma2", "greedy"), ("t5", "beams")}


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(*case, marks=() if case in _QUICK else pytest.mark.zoo) for case in _CASES],
)
def test_same_tokens(name: str, way: str, tmp_path: Path, record_property: Any) -> None:
    """The token ids equal the resident model's, twice in a row, and weights are read again while it generates."""
    record_property("family", "generate()")
    pytest.importorskip("transformers")
    entry = _ENTRIES[name]
    model = resident(entry.build)
    path = save(model, tmp_path / "model.safetensors")
    expected = _generated(model, entry, _WAYS[way])
    assert expected.shape[1] > 6
    with smallest_streamed(entry.build, path, int(SHARE * weight_bytes(model))) as streamed:
        for _ in range(2):
            assert torch.equal(_generated(streamed, entry, _WAYS[way]), expected)
        report = odewei.report(streamed)
        assert report.overdrafts == 0
        assert report.evictions
        assert report.bytes_read > 2 * report.weight_bytes


def _generated(model: Any, entry: Architecture, options: dict[str, Any]) -> torch.Tensor:
    length = next(iter(entry.inputs(3).values())).shape[1]
    prompt = ids(3, length)
    torch.manual_seed(5)
    mask = torch.ones_like(prompt)
    found: torch.Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, **options)
    return found
