"""from_pretrained of diffusers' models: the same model, with the same bits, as diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import odewei
from odewei.errors import CheckpointError, CheckpointNotFoundError, MissingWeightError, OptionsError
from tests.models import same_bits
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.zoo.check import outputs
from tests.zoo.diffusion import DIFFUSION

diffusers = pytest.importorskip("diffusers")

_FILE = "diffusion_pytorch_model.safetensors"
_ENTRIES = {entry.name: entry for entry in DIFFUSION.entries}


def check(kind: Any, folder: Path, name: str, **options: Any) -> None:
    """The streamed model computes what ``kind.from_pretrained`` does, with the same dtypes."""
    kept = as_loaded(kind, folder, **{"torch_dtype" if key == "dtype" else key: one for key, one in options.items()})
    inputs = {
        key: one.to(kept.dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for key, one in _ENTRIES[name].inputs(1).items()
    }
    model = odewei.from_pretrained(folder, memory_budget="1MiB", **options)
    try:
        assert type(model) is kind
        assert not model.training
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in kept.named_parameters()}
        assert same_bits(outputs(model, inputs), outputs(kept, inputs))
    finally:
        odewei.close(model)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    """What save_pretrained wrote is streamed as the class that config.json names; floating weights in dtype=."""
    check(saved(_ENTRIES["UNet2DModel"].build, tmp_path), tmp_path, "UNet2DModel", **options)


def test_weights_in_another_dtype(tmp_path: Path) -> None:
    """A checkpoint in half precision is cast to float32, as diffusers does by itself."""
    kind = saved(_ENTRIES["UNet2DModel"].build, tmp_path)
    edit(tmp_path, lambda found: {name: value.half() for name, value in found.items()}, _FILE)
    check(kind, tmp_path, "UNet2DModel")


def test_several_files(tmp_path: Path) -> None:
    """A checkpoint in several files and their index is the same."""
    kind = saved(_ENTRIES["AutoencoderKL"].build, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(kind, tmp_path, "AutoencoderKL")


def test_old_names_of_attention(tmp_path: Path) -> None:
    """An autoencoder whose attention has the names of old checkpoints loads."""
    kind = saved(_ENTRIES["AutoencoderKL"].build, tmp_path)
    new_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, value in found.items():
            for new, one in new_names.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{one}.")
            made[name] = value
        return made

    assert any(".proj_attn." in name for name in edit(tmp_path, old, _FILE))
    check(kind, tmp_path, "AutoencoderKL")


def test_a_missing_weight(tmp_path: Path) -> None:
    """A weight that the checkpoint lacks is an error, unless on_missing="init"."""
    saved(_ENTRIES["UNet2DModel"].build, tmp_path)
    edit(tmp_path, lambda found: {name: one for name, one in found.items() if name != "conv_in.weight"}, _FILE)
    with pytest.raises(MissingWeightError, match=r"conv_in\.weight"):
        odewei.from_pretrained(tmp_path)
    odewei.close(odewei.from_pretrained(tmp_path, on_missing="init"))


def test_mistakes(tmp_path: Path) -> None:
    """An unknown class, one of another library, a configuration that does not fit, and no weights are one line each."""
    import transformers

    saved(_ENTRIES["UNet2DModel"].build, tmp_path)
    with pytest.raises(OptionsError, match="model_class"):
        odewei.from_pretrained(tmp_path, model_class=transformers.AutoModel)
    with pytest.raises(OptionsError, match="mapping"):
        odewei.from_pretrained(tmp_path, config=5)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / _FILE).rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"no weights.*variant only.*fp16"):
        odewei.from_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").rename(tmp_path / _FILE)
    (tmp_path / "config.json").write_text(json.dumps({**config, "down_block_types": ["NoSuchBlock"]}))
    with pytest.raises(CheckpointError, match=r"UNet2DModel cannot be built"):
        odewei.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "NewModel"}))
    with pytest.raises(CheckpointError, match=r"'NewModel' is unknown to diffusers"):
        odewei.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(CheckpointError, match="quantised"):
        odewei.from_pretrained(tmp_path)
