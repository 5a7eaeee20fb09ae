"""Checkpoints of compressed-tensors (LLM Compressor makes them by GPTQ, AWQ, rounding), dequantised on reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import odewei
from odewei.errors import CheckpointError
from tests.models import same_bits
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.pretrained.test_bitsandbytes import build
from tests.pretrained.test_transformers_model import TEXT, loader_of, outputs, streamed

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")


def quantised(folder: Path, preset: str) -> Any:
    """Quantise the linear layers of a model with random weights by a preset, and save it. Returns its class."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    saved(build, folder / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    apply_quantization_config(
        model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen")
    )
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        grouped = module.weight.view(*module.weight_scale.shape, -1)
        scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    model.save_pretrained(folder / "quantised")
    compressor.update_config(folder / "quantised")
    return type(model)


@pytest.mark.parametrize("preset", ["W4A16", "W8A16"])
def test_same_bits(preset: str, tmp_path: Path) -> None:
    """What transformers makes of the weights when it first computes is made of each as it is read."""
    kept = as_loaded(quantised(tmp_path, preset), tmp_path / "quantised")
    with streamed(tmp_path / "quantised") as model:
        for _ in range(3):
            assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
        assert odewei.report(model).evictions
        assert len([name for name in loader_of(model).computed if name.endswith("weight")]) == 21
        assert dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_zero_points(tmp_path: Path) -> None:
    """Not symmetric ones, which transformers loads dequantised only."""
    kind = quantised(tmp_path, "W4A16_ASYM")
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    kept = as_loaded(kind, tmp_path / "quantised", quantization_config=dense)
    with streamed(tmp_path / "quantised") as model:
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


def test_experts(tmp_path: Path) -> None:
    """Four-bit experts, each by itself in the checkpoint, become the fused weights of the model."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = transformers.MixtralConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    kind = saved(lambda: transformers.MixtralForCausalLM(settings).bfloat16(), tmp_path)
    scheme = preset_name_to_scheme("W4A16", ["re:.*experts.*"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def pack(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, value in found.items():
            if ".experts." not in name:
                made[name] = value
                continue
            grouped = value.view(value.shape[0], -1, scheme.weights.group_size)
            scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
            packed = compressor.compress({"weight": value, "weight_scale": scale.to(value.dtype)}, scheme)
            made |= {name.removesuffix("weight") + part: tensor for part, tensor in packed.items()}
        return made

    assert any(value.dtype == torch.int32 for value in edit(tmp_path, pack).values())
    described = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
    ).to_dict()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {**described, "quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept = as_loaded(kind, tmp_path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    with streamed(tmp_path, memory_budget="600KiB") as model:
        for _ in range(2):
            assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
        assert odewei.report(model).evictions


def test_activations(tmp_path: Path) -> None:
    """Where what goes through the layers is quantised too, it is refused: weights alone are another model."""
    quantised(tmp_path, "W8A8")
    with pytest.raises(CheckpointError, match="not only weights") as raised:
        odewei.from_pretrained(tmp_path / "quantised")
    assert "\n" not in str(raised.value)


def test_scales_that_are_missing(tmp_path: Path) -> None:
    """A weight without its scales is an error that names it, not a number."""
    quantised(tmp_path, "W4A16")
    lost = "model.layers.1.mlp.up_proj.weight_scale"
    edit(tmp_path / "quantised", lambda found: {name: value for name, value in found.items() if name != lost})
    with pytest.raises(odewei.OdeweiError, match=r"layers\.1\.mlp\.up_proj"):
        odewei.from_pretrained(tmp_path / "quantised")
