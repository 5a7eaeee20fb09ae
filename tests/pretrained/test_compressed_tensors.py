"""Checkpoints of compressed-tensors (LLM Compressor makes them by GPTQ, AWQ, rounding), dequantised on reading."""

from __future__ import annotations

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
