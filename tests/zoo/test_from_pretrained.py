"""``odewei.from_pretrained`` of a saved checkpoint gives the model that the library's own ``from_pretrained`` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import BudgetTooSmallError, CheckpointError
from tests.models import resident, same_bits, weight_bytes
from tests.pretrained.checkpoints import as_loaded
from tests.zoo.architecture import Architecture
from tests.zoo.check import SHARE, outputs, told_budget
from tests.zoo.test_zoo import FAMILIES

GENERATING = frozenset({"decoders", "encoder-decoders", "mixtures of experts", "state-space and recurrent"})
"""The families whose tokens are compared too, where a model can generate."""

AS_IN_THE_FILE = {
    ("chinese_clip", "text_model.embeddings.word_embeddings.weight"): "transformers writes zeros over the row of the "
    "padding token once it is loaded; odewei has what the checkpoint has",
}
"""Weights in which transformers changes what it has loaded."""

QUICK = frozenset({"qwen2_moe", "t5", "llava"})


def _cases() -> list[Any]:
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.name in QUICK else pytest.mark.zoo)
        for family in FAMILIES
        for entry in family.entries
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("entry", _cases())
def test_round_trip(entry: Architecture, tmp_path: Path, record_property: Any) -> None:
    """What save_pretrained wrote streams as the library loads it: the same weights and the same bits of a pass."""
    record_property("family", "from_pretrained")
    pytest.importorskip(entry.needs)
    made: Any = resident(entry.build, 7)
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("entry", [case for case in _cases() if case.values[0].needs != "diffusers"])
def test_base_model_in_half_precision(entry: Architecture, tmp_path: Path, record_property: Any) -> None:
    """AutoModel in bfloat16 gives transformers' base model: every weight and buffer; what it lacks is an error."""
    record_property("family", "from_pretrained, base model in bfloat16")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip(entry.needs)
    made: Any = resident(entry.build, 7)
    made.save_pretrained(tmp_path)
    wanted: dict[str, Any] = {"dtype": torch.bfloat16}
    try:
        kept, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, **wanted)
    except Exception as error:
        pytest.skip(f"transformers has no base model for it: {error}"[:200])
    if info["missing_keys"]:
        with pytest.raises(CheckpointError):
            odewei.from_pretrained(tmp_path, model_class=transformers.AutoModel, **wanted)
        return
    streamed = odewei.from_pretrained(tmp_path, model_class=transformers.AutoModel, **wanted)
    try:
        assert type(streamed) is type(kept)
        assert _described(streamed) == _described(kept)
        for name, value in kept.named_parameters():
            assert (entry.name, name) in AS_IN_THE_FILE or same_bits(
                [streamed.get_parameter(name).detach()], [value.detach()]
            ), name
        buffers = dict(streamed.named_buffers())
        for name, value in kept.named_buffers():
            assert same_bits([buffers[name]], [value]), name
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
    """Names, shapes, dtypes and flags of all that a model has, and which are the same."""
    first: dict[int, str] = {}
    found: dict[str, tuple[Any, ...]] = {}
    values = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]  # kept, so that ids are theirs
    for name, value in values:
        found[name] = (first.setdefault(id(value), name), tuple(value.shape), value.dtype, value.requires_grad)
    return found
