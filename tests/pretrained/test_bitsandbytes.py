"""Checkpoints quantised by bitsandbytes: streamed, they compute what transformers' own loading does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import odewei
from odewei.errors import CheckpointError, MissingWeightError, ModelError
from odewei.pretrained import bitsandbytes_modules, bitsandbytes_packing
from tests.models import same_bits
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.pretrained.test_transformers_model import TEXT, loader_of, outputs, streamed

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: dict[str, dict[str, Any]] = {
    "nf4, scales quantised too": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8 without outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}  # fmt: skip


def build() -> Any:
    """A llama of which every linear layer has a bias, and rows and columns that bitsandbytes takes."""
    settings = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, attention_bias=True, mlp_bias=True, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(settings).bfloat16()


def quantised(folder: Path, kind: str) -> Any:
    """Quantise a model with random weights and save it. Returns its class."""
    found = saved(build, folder / "plain")
    settings = transformers.BitsAndBytesConfig(**KINDS[kind])
    found.from_pretrained(folder / "plain", quantization_config=settings).save_pretrained(folder / "quantised")
    return found


@pytest.fixture(params=["as this processor wants it", "as stored"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the weights in the order of the processor, if it has one, and the plain way."""
    if request.param == "as stored":
        monkeypatch.setattr(bitsandbytes_modules, "can_pack", lambda dtype, settings: False)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(kind: str, order: str, tmp_path: Path) -> None:
    """Three passes and their units' comings and goings; the modules pass for bitsandbytes' own."""
    import bitsandbytes as bnb

    kept = as_loaded(quantised(tmp_path, kind), tmp_path / "quantised")
    with streamed(tmp_path / "quantised", memory_budget="120KiB") as model:
        for _ in range(3):
            assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
        assert odewei.report(model).evictions
        assert odewei.report(model).overdrafts == 0
        module = model.model.layers[0].mlp.up_proj
        assert isinstance(module, bnb.nn.Linear8bitLt if "int8" in kind else bnb.nn.Linear4bit)
        assert type(model.lm_head) is torch.nn.Linear
        computed = [name for name in loader_of(model).computed if name.endswith(".weight")]
        packs = (
            order == "as this processor wants it"
            and "int8" not in kind
            and bitsandbytes_packing.can_pack(torch.uint8, {"shape": [32, 64], "blocksize": 64})
        )
        assert len(computed) == (21 if packs else 0)


def test_tokens(tmp_path: Path) -> None:
    """Generating gives transformers' tokens."""
    kept = as_loaded(quantised(tmp_path, "nf4"), tmp_path / "quantised")
    with streamed(tmp_path / "quantised") as model:
        assert torch.equal(model.generate(**TEXT, max_new_tokens=5), kept.generate(**TEXT, max_new_tokens=5))


def test_several_threads(tmp_path: Path) -> None:
    """Each call has a module of its own."""
    kept = as_loaded(quantised(tmp_path, "nf4"), tmp_path / "quantised")
    inputs = [{"input_ids": torch.full((1, 3), number)} for number in range(8)]
    with streamed(tmp_path / "quantised", memory_budget="1MiB") as model, torch.no_grad():
        for one, found in zip(inputs, odewei.map(model, inputs, concurrency=4), strict=True):
            assert same_bits([found.logits], [kept(**one).logits])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients(kind: str, order: str, tmp_path: Path) -> None:
    """They are the resident model's, or it is said that there are none."""
    kept = as_loaded(quantised(tmp_path, kind), tmp_path / "quantised").model.layers[0].mlp
    hidden = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with streamed(tmp_path / "quantised") as model:
        ours = model.model.layers[0].mlp
        found, expected = (hidden.clone().requires_grad_() for _ in range(2))
        if getattr(ours.up_proj, "is_packed", False):
            with pytest.raises(ModelError, match="no gradients"):
                ours(found)
            return
        ours(found).float().sum().backward()
        kept(expected).float().sum().backward()
        assert found.grad is not None
        assert same_bits([found.grad], [expected.grad])


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda found: {key: value for key, value in found.items() if name not in key}


@pytest.mark.parametrize(
    ("kind", "part"),
    [("nf4", "absmax"), ("nf4", "quant_map"), ("nf4", "quant_state.bitsandbytes__nf4"), ("int8", "SCB")],
)
def test_a_part_that_is_missing(kind: str, part: str, tmp_path: Path) -> None:
    """It is named, with the weight and the file."""
    quantised(tmp_path, kind)
    edit(tmp_path / "quantised", _without(f"layers.1.mlp.up_proj.{'' if part == 'SCB' else 'weight.'}{part}"))
    with pytest.raises(MissingWeightError, match=part.partition(".")[0]) as raised:
        odewei.from_pretrained(tmp_path / "quantised")
    assert raised.value.weight == "model.layers.1.mlp.up_proj.weight"
    assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"shape": [256, 64], "blocksize": 64}',
        b'{"shape": [256, 128], "blocksize": 0}',
        b'{"shape": [256, 128], "blocksize": "a"}',
        b"[" * 100_000,
    ],
    ids=range(8),
)
def test_settings_that_do_not_fit(text: bytes, tmp_path: Path) -> None:
    """What a checkpoint says of a weight beside tensors is checked before anything is streamed."""
    quantised(tmp_path, "nf4")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    edit(tmp_path / "quantised", lambda found: {**found, name: torch.tensor(list(text), dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="does not fit the module") as raised:
        odewei.from_pretrained(tmp_path / "quantised")
    assert raised.value.weight == name


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (256, 128)])
def test_the_order_of_the_processor(shape: tuple[int, int], nested: bool) -> None:
    """Made by whole bytes, it is what bitsandbytes makes."""
    from bitsandbytes import functional

    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored, state = functional.quantize_4bit(numbers, blocksize=64, quant_type="nf4", compress_statistics=nested)
    described = state.as_dict()
    assert json.loads(json.dumps(described["shape"])) == list(shape)
    weight, scales = bitsandbytes_packing.PackedWeight(described), bitsandbytes_packing.PackedScales(described)
    weight.add_tensor("w", "w", "weight", stored)
    for name, value in described.items():
        if isinstance(value, torch.Tensor):
            scales.add_tensor("s", name, name, value)
    expected, packed = functional._convert_weight_packed_for_cpu(stored, state)
    assert torch.equal(weight.convert("w")["w"], expected)
    assert torch.equal(scales.convert("s")["s"], packed.absmax)
