"""``odewei.from_pretrained`` of a saved checkpoint gives the model that the library's own ``from_pretrained`` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import BudgetTooSmallError
from tests.models import same_bits, weight_bytes
from tests.pretrained.checkpoints import as_loaded
from tests.zoo.architecture import Architecture
from tests.zoo.check import SHARE, outputs, told_budget
from tests.zoo.test_zoo import FAMILIES

GENERATING = frozenset({"decoders", "encoder-decoders", "mixtures of experts", "state-space and recurrent"})
"""The families whose tokens are compared too, where a model can generate."""

QUICK = frozenset({"qwen2_moe", "t5", "llava"})


def _cases() -> list[Any]:
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.name in QUICK else pytest.mark.zoo)
        for family in FAMILIES
        for entry in family.entries
        if entry.needs in ("transformers", "diffusers")
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("entry", _cases())
def test_round_trip(entry: Architecture, tmp_path: Path, record_property: Any) -> None:
    """What save_pretrained wrote streams as the library loads it: the same weights and the same bits of a pass."""
    record_property("family", "from_pretrained")
    pytest.importorskip(entry.needs)
    torch.manual_seed(7)
    made: Any = entry.build()
    made.save_pretrained(tmp_path)
    kind = type(made)
    del made
    kept = as_loaded(kind, tmp_path)
    expected = outputs(kept, entry.inputs(1))
    nbytes = weight_bytes(kept)
    streamed = smallest_pretrained(tmp_path, int(SHARE * nbytes))
    try:
        assert type(streamed) is kind
        assert not streamed.training
        assert _described(streamed) == _described(kept)
        assert same_bits(outputs(streamed, entry.inputs(1)), expected)
        if entry.family in GENERATING and kept.can_generate():
            assert torch.equal(_generated(streamed, entry), _generated(kept, entry))
        report = odewei.report(streamed)
        assert report.bytes_read or report.rows_read
    finally:
        odewei.close(streamed)


def _generated(model: Any, entry: Architecture) -> torch.Tensor:
    prompt = entry.inputs(3)["input_ids"]
    mask = torch.ones_like(prompt)
    found: torch.Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    return found


def smallest_pretrained(folder: Path, budget_bytes: int) -> nn.Module:
    """Streamed under this budget, or the smallest that works."""
    for _ in range(5):
        try:
            return odewei.from_pretrained(folder, memory_budget=budget_bytes)
        except BudgetTooSmallError as error:
            budget_bytes = told_budget(error)
    raise AssertionError("no budget that odewei names is enough for it")


def _described(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Names, shapes and dtypes of all that a model has, and which are the same."""
    first: dict[int, str] = {}
    found: dict[str, tuple[Any, ...]] = {}
    values = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]  # kept, so that ids are theirs
    for name, value in values:
        found[name] = (first.setdefault(id(value), name), tuple(value.shape), value.dtype)
    return found
