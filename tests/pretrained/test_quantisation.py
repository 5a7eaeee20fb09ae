"""Quantised checkpoints: what can stream computes transformers' bits, the rest says what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import CheckpointError, MissingPackageError
from odewei.pretrained.quantisation import STREAMED
from tests.models import llama, mixtral, same_bits
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.pretrained.test_transformers_model import TEXT, check, loader_of, outputs, streamed

transformers = pytest.importorskip("transformers")

_BLOCK = 8


def quantised(folder: Path, **settings: Any) -> None:
    """Have the folder's configuration say how its weights are quantised."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def as_fp8(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every projection in blocks of float8 with their scales."""
    made = {}
    for name, value in found.items():
        if value.ndim != 2 or ("proj" not in name and "experts" not in name):
            made[name] = value
            continue
        rows, columns = (size // _BLOCK for size in value.shape)
        blocks = value.float().view(rows, _BLOCK, columns, _BLOCK)
        scales = blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448
        made[name] = (blocks / scales[:, None, :, None]).view(value.shape).to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = scales
    return made


@pytest.mark.parametrize("build", [llama, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_grained_fp8(build: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    """Blocks of float8 are dequantised a weight at a time when they are read, fused experts too."""
    kind = saved(lambda: build().to(dtype), tmp_path)
    assert any(value.dtype == torch.float8_e4m3fn for value in edit(tmp_path, as_fp8).values())
    quantised(tmp_path, quant_method="fp8", weight_block_size=[_BLOCK, _BLOCK], activation_scheme="dynamic")
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert model.dtype == dtype
        assert "model.layers.0.self_attn.q_proj.weight" in loader_of(model).computed
        assert "model.norm.weight" not in loader_of(model).computed
        assert not hasattr(model.config, "quantization_config")


def test_mxfp4(tmp_path: Path) -> None:
    """Experts in pairs of four-bit floats are dequantised when they are read, a fused weight at a time."""
    tiny = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=99, pad_token_id=0,
    )  # fmt: skip
    kind = saved(lambda: transformers.GptOssForCausalLM(tiny).bfloat16(), tmp_path)

    def pack(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, value in found.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                made[name] = value
                continue
            count, size, width = value.shape
            made[f"{name}_blocks"] = torch.randint(0, 256, (count, width, size // 32, 16), dtype=torch.uint8)
            made[f"{name}_scales"] = torch.randint(118, 124, (count, width, size // 32), dtype=torch.uint8)
        return made

    edit(tmp_path, pack)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantised(tmp_path, quant_method="mxfp4", modules_to_not_convert=kept)
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert len(loader_of(model).computed) == 4


@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="its modules are compiled, and there is no compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_weights_that_stay_packed(tmp_path: Path) -> None:
    """BitNet's modules hold packed bytes, which come and go as they are in the file and are unpacked in computing."""
    tiny = transformers.BitNetConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    kind = saved(lambda: transformers.BitNetForCausalLM(tiny).bfloat16(), tmp_path)

    def pack(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, value in found.items():
            rows, columns = value.shape if value.ndim == 2 else (0, 0)
            packed = "proj" in name
            made[name] = torch.randint(0, 256, (rows // 4, columns), dtype=torch.uint8) if packed else value
            if packed:
                made[f"{name}_scale"] = torch.rand(1).bfloat16()
        return made

    edit(tmp_path, pack)
    quantised(tmp_path, quant_method="bitnet", linear_class="bitlinear", quantization_mode="offline")
    kept = as_loaded(kind, tmp_path)
    with streamed(tmp_path, memory_budget="40KiB") as model:
        assert loader_of(model).computed == ()
        weight = dict(model.named_parameters())["model.layers.2.mlp.up_proj.weight"]
        assert (weight.dtype, tuple(weight.shape)) == (torch.uint8, (16, 64))
        for _ in range(2):
            assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
        assert odewei.report(model).evictions
        assert sum(buffer.nbytes for buffer in model.buffers()) < 1000


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "aqlm"}, "aqlm"),
    ],
)
def test_a_package_that_is_missing(
    settings: dict[str, Any], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the method and the package that its modules need."""
    if package == "bitsandbytes":
        for bits in (4, 8):
            monkeypatch.setattr(f"transformers.quantizers.quantizer_bnb_{bits}bit.is_bitsandbytes_available", bool)
    elif package == "compressed-tensors":
        for module in ("quantizers.quantizer_compressed_tensors", "utils.quantization_config"):
            monkeypatch.setattr(f"transformers.{module}.is_compressed_tensors_available", bool)
    elif _installed(package):
        pytest.skip(f"{package} is installed")
    saved(llama, tmp_path)
    quantised(tmp_path, **settings)
    with pytest.raises((MissingPackageError, CheckpointError), match=package) as raised:
        odewei.from_pretrained(tmp_path)
    assert settings["quant_method"] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_method_that_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its packages are there, a method that works on weights in memory is refused, and others are named."""

    class Quantiser:
        pre_quantized = True

    monkeypatch.setattr("transformers.quantizers.auto.get_hf_quantizer", lambda config, *_: (Quantiser(), config, None))
    saved(llama, tmp_path)
    quantised(tmp_path, quant_method="gptq", bits=4)
    with pytest.raises(CheckpointError, match=r"gptq cannot be streamed.*fp8"):
        odewei.from_pretrained(tmp_path)


def test_an_unknown_method(tmp_path: Path) -> None:
    """A method that transformers does not know is refused: its weights mean something else than their numbers."""
    saved(llama, tmp_path)
    quantised(tmp_path, quant_method="new")
    with pytest.raises(CheckpointError, match="new"):
        odewei.from_pretrained(tmp_path)


def as_fp8_whole(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every projection in float8 with one scale."""
    made = {}
    for name, value in found.items():
        made[name] = value
        if "proj" in name:
            scale = value.float().abs().amax() / 448
            made[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale
    return made


@pytest.mark.parametrize("dtype", ["auto", torch.float16])
@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (as_fp8, {"weight_block_size": [_BLOCK, _BLOCK], "activation_scheme": "dynamic"}),
        (as_fp8_whole, {"weight_block_size": None, "activation_scheme": "dynamic"}),
        (as_fp8_whole, {"weight_block_size": None, "activation_scheme": "static"}),
    ],
)
def test_scales_of_fp8(change: Any, settings: dict[str, Any], dtype: Any, tmp_path: Path) -> None:
    """Scales of blocks or of whole weights, some modules left as they are, in any dtype: transformers' values."""
    kind = saved(lambda: llama().bfloat16(), tmp_path)
    edit(tmp_path, lambda found: {**change(found), **{k: v for k, v in found.items() if "down_proj" in k}})
    if settings["activation_scheme"] == "static":
        scales = {f"model.layers.{n}.self_attn.q_proj.activation_scale": torch.ones(()) for n in range(2)}
        edit(tmp_path, lambda found: {**found, **scales})
    edit(tmp_path, lambda found: {k: v for k, v in found.items() if "down_proj.weight_scale" not in k})
    quantised(tmp_path, quant_method="fp8", modules_to_not_convert=["lm_head", "down_proj"], **settings)
    if dtype == "auto":
        check(kind, tmp_path)
        return
    kept = kind.from_pretrained(tmp_path, dtype=dtype)  # transformers leaves what it dequantises in the scales' dtype
    with streamed(tmp_path, dtype=dtype) as model:
        found = model.state_dict()
        for name, value in kept.state_dict().items():
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("scale", ["weight_scale", "scale_weight"])
def test_scales_that_the_method_does_not_know(scale: str, tmp_path: Path) -> None:
    """Scales by another name than the method's are not passed over."""
    saved(llama, tmp_path)
    edit(tmp_path, lambda found: {k.replace("weight_scale_inv", scale): v for k, v in as_fp8(found).items()})
    quantised(tmp_path, quant_method="fp8", weight_block_size=[_BLOCK, _BLOCK])
    with pytest.raises(CheckpointError, match=rf"scales of its own.*{scale}"):
        odewei.from_pretrained(tmp_path)


def test_every_method_of_transformers(tmp_path: Path) -> None:
    """Each that the installed transformers knows is streamed, or refused by its name, in one line."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    saved(llama, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for method in sorted(AUTO_QUANTIZER_MAPPING):
        quantised(tmp_path, quant_method=method)
        if method in STREAMED:
            continue
        with pytest.raises((CheckpointError, MissingPackageError), match=method) as raised:
            odewei.from_pretrained(tmp_path)
        assert "\n" not in str(raised.value)
    for nothing in (None, {}):
        (tmp_path / "config.json").write_text(json.dumps({**stored, "quantization_config": nothing}))
        odewei.close(odewei.from_pretrained(tmp_path))


def _installed(package: str) -> bool:
    from importlib import metadata

    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
