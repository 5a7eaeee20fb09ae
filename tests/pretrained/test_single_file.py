"""Files in the form of other programs: the weights, and the bits, of diffusers' own from_single_file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import odewei
from odewei.errors import CheckpointError, MissingWeightError, OptionsError
from odewei.runtime import runtime_of
from tests.models import llama, same_bits
from tests.pretrained.checkpoints import as_loaded, saved
from tests.zoo.check import outputs
from tests.zoo.diffusion import DIFFUSION

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

_ENTRIES = {entry.name: entry for entry in DIFFUSION.entries}
Weights = dict[str, torch.Tensor]


def replaced(name: str, pairs: dict[str, str]) -> str:
    for one, other in pairs.items():
        name = name.replace(one, other)
    return name


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_of_ldm(found: Weights, layers: int) -> Weights:
    """A UNet's weights with the names of the first Stable Diffusion, beside some of other parts."""

    def name_of(name: str) -> str:
        match = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
        if match is None:
            return replaced(name, _TOP)
        side, block, kind, number, rest = match.groups()
        if side == "mid":
            place = {"resnets": 2 * int(number), "attentions": 1}[kind]
            return f"middle_block.{place}.{replaced(rest, _RESNET) if kind == 'resnets' else rest}"
        first = int(block) * (layers + 1) + int(side == "down")
        home = "input_blocks" if side == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{home}.{first + layers}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            has_attention = any(one.startswith(f"up_blocks.{block}.attentions") for one in found)
            return f"{home}.{first + layers}.{2 if has_attention else 1}.{rest}"
        if kind == "resnets":
            return f"{home}.{first + int(number)}.0.{replaced(rest, _RESNET)}"
        return f"{home}.{first + int(number)}.1.{rest}"

    made = {f"model.diffusion_model.{name_of(name)}": value for name, value in found.items()}
    assert len(made) == len(found)
    return {**made, "cond_stage_model.logit_scale": torch.ones(()), "betas": torch.ones(3)}


def vae_of_ldm(found: Weights, blocks: int) -> Weights:
    """An autoencoder's weights with the names of the first Stable Diffusion; attention is a convolution there."""
    made = {}
    for name, value in found.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = replaced(name, {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"})
        if "mid_block.attentions.0" in name:
            pairs = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out"}
            name = replaced(name, {**pairs, "to_q": "q", "to_k": "k", "to_v": "v"})
            value = value[:, :, None, None] if value.ndim == 2 else value
        made[f"first_stage_model.{name}"] = value.contiguous()
    assert len(made) == len(found)
    return made


_SD3 = {
    "pos_embed.proj": "x_embedder.proj", "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2", "pos_embed.pos_embed": "pos_embed",
    "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip


def halves_changed(value: torch.Tensor) -> torch.Tensor:
    one, other = value.chunk(2, 0)
    return torch.cat([other, one])


def sd3_of_its_authors(found: Weights, layers: int) -> Weights:
    """An SD3's weights with the names of its authors: joined projections, some halves the other way round."""
    made = {}
    for name, value in found.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if match is None:
            swaps = name.startswith("norm_out")
            made[replaced(name, _SD3)] = halves_changed(value) if swaps else value
            continue
        number, inner, kind = match.groups()
        block = f"transformer_blocks.{number}"
        if inner in ("attn.to_q", "attn.add_q_proj"):
            names = [inner.replace("_q", f"_{one}") for one in "qkv"]
            joined = torch.cat([found[f"{block}.{one}.{kind}"] for one in names])
            side = "x_block" if inner == "attn.to_q" else "context_block"
            made[f"joint_blocks.{number}.{side}.attn.qkv.{kind}"] = joined
        elif inner in _SD3_BLOCK:
            swaps = inner == "norm1_context.linear" and int(number) == layers - 1
            made[f"joint_blocks.{number}.{_SD3_BLOCK[inner]}.{kind}"] = halves_changed(value) if swaps else value
    return {f"model.diffusion_model.{name}": value for name, value in made.items()}


_FORMS: dict[str, tuple[Callable[[Weights, int], Weights], int]] = {
    "UNet2DConditionModel": (unet_of_ldm, 1),
    "AutoencoderKL": (vae_of_ldm, 2),
    "SD3Transformer2DModel": (sd3_of_its_authors, 3),
}


def made(name: str, folder: Path, suffix: str = ".safetensors") -> tuple[Any, Path]:
    """The class, and a file in the form of another program beside the folder that has its config.json."""
    kind = saved(_ENTRIES[name].build, folder)
    form, count = _FORMS[name]
    weights = form(load_file(folder / "diffusion_pytorch_model.safetensors"), count)
    path = folder.with_name(f"{folder.name}{suffix}")
    if suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    return kind, path


def from_single_file(kind: Any, path: Path, config: Path, **options: Any) -> Any:
    """What diffusers loads, in memory of its own."""
    model = kind.from_single_file(str(path), config=str(config), **options).eval()
    for _, value in (*model.named_parameters(), *model.named_buffers()):
        value.data = value.data.clone()
    return model


@pytest.mark.parametrize("name", list(_FORMS))
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_file_of_another_program(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Every weight, dtype and output is that of diffusers' from_single_file; the weights stream from the file."""
    kind, path = made(name, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    kept = from_single_file(kind, path, tmp_path / "model", **({} if dtype is None else {"dtype": dtype}))
    model = odewei.from_pretrained(
        path, model_class=kind, config=config, dtype="auto" if dtype is None else dtype, memory_budget="256KiB"
    )
    try:
        assert type(model) is kind
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in kept.named_parameters()}
        assert {n: b.dtype for n, b in model.named_buffers()} == {n: b.dtype for n, b in kept.named_buffers()}
        inputs = {
            key: one.to(kept.dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one
            for key, one in _ENTRIES[name].inputs(1).items()
        }
        for _ in range(2):
            assert same_bits(outputs(model, inputs), outputs(kept, inputs))
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in kept.state_dict().items())
    finally:
        odewei.close(model)


def test_what_is_read_and_what_is_computed(tmp_path: Path) -> None:
    """Names, pieces of joined projections, and halves that change places are read; nothing is computed."""
    kind, path = made("SD3Transformer2DModel", tmp_path / "model")
    model = odewei.from_pretrained(path, model_class=kind, config=tmp_path / "model")
    try:
        source: Any = runtime_of(model)._source
        assert source.computed == ()
        assert source.weights()["transformer_blocks.0.attn.to_k.weight"].span is not None
        assert len(source.weights()["norm_out.linear.weight"].parts) == 2
    finally:
        odewei.close(model)


def test_what_is_neither_moved_nor_joined_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion with any other operation runs when the weight is read, on the sources that the weight is made of."""
    kind, path = made("AutoencoderKL", tmp_path / "model")
    from diffusers.loaders import single_file_model

    before = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKL"]["checkpoint_mapping_fn"]
    asked: list[set[str]] = []

    def doubled(checkpoint: Any, config: Any) -> Any:
        asked.append({name for name, value in checkpoint.items() if value.device.type == "cpu"})
        made = before(checkpoint=checkpoint, config=config)
        first, second = made["encoder.conv_in.weight"], made["encoder.conv_in.bias"]
        written = torch.zeros_like(first)
        written[:] = first * 2 + second[:, None, None, None]
        return {**made, "encoder.conv_in.weight": written}

    monkeypatch.setitem(
        single_file_model.SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKL"], "checkpoint_mapping_fn", doubled
    )
    kept = from_single_file(kind, path, tmp_path / "model")
    asked.clear()
    model = odewei.from_pretrained(path, model_class=kind, config=tmp_path / "model", memory_budget="256KiB")
    try:
        inputs = _ENTRIES["AutoencoderKL"].inputs(1)
        assert same_bits(outputs(model, inputs), outputs(kept, inputs))
        first = "first_stage_model.encoder.conv_in"
        read = [one for one in asked if one]  # without values: when it is found out what the weights are made of
        assert read
        assert all(one == {f"{first}.weight", f"{first}.bias"} for one in read)
    finally:
        odewei.close(model)


def test_a_file_with_the_names_of_diffusers(tmp_path: Path) -> None:
    """A file that has diffusers' names already is read as it is; so is a file of torch."""
    kind = saved(_ENTRIES["AutoencoderKL"].build, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = from_single_file(kind, path, tmp_path)
    model = odewei.from_pretrained(path, model_class=kind, config=tmp_path / "config.json")
    inputs = _ENTRIES["AutoencoderKL"].inputs(1)
    assert same_bits(outputs(model, inputs), outputs(kept, inputs))
    odewei.close(model)
    kind, other = made("AutoencoderKL", tmp_path / "torch", ".pt")
    model = odewei.from_pretrained(other, config=tmp_path / "torch")
    assert type(model) is kind
    assert same_bits(outputs(model, inputs), outputs(from_single_file(kind, other, tmp_path / "torch"), inputs))
    odewei.close(model)


def test_one_file_of_transformers(tmp_path: Path) -> None:
    """A file of weights and a configuration are a model of transformers, as its own from_pretrained has the folder."""
    kind = saved(llama, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    kept = as_loaded(kind, tmp_path)
    path = (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    for given in (config, tmp_path, json.loads((tmp_path / "config.json").read_text())):
        model = odewei.from_pretrained(path, config=given)
        assert type(model) is kind
        assert model.config.name_or_path == str(path)
        assert same_bits(outputs(model, ids), outputs(kept, ids))
        odewei.close(model)


def test_mistakes(tmp_path: Path) -> None:
    """No configuration, a class without a conversion, weights of another model and lost scales are one line each."""
    kind, path = made("AutoencoderKL", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"a folder was expected.*config="):
        odewei.from_pretrained(path)
    with pytest.raises(OptionsError, match=r"neither a folder with a config\.json"):
        odewei.from_pretrained(path, model_class=kind, config=tmp_path)
    other = saved(_ENTRIES["UNet2DModel"].build, tmp_path / "other")
    with pytest.raises(CheckpointError, match="diffusers reads no single files for a UNet2DModel"):
        odewei.from_pretrained(path, model_class=other, config=tmp_path / "other")
    wrong, _ = made("SD3Transformer2DModel", tmp_path / "sd3")
    with pytest.raises(CheckpointError, match=r"diffusers cannot convert the file"):
        odewei.from_pretrained(path, model_class=wrong, config=tmp_path / "sd3")
    whole = load_file(path)
    lacking = {name: value for name, value in whole.items() if "conv_in.weight" not in name}
    save_file(lacking, path)
    with pytest.raises(MissingWeightError, match=r"conv_in\.weight"):
        odewei.from_pretrained(path, model_class=kind, config=tmp_path / "model")
    name = "first_stage_model.encoder.conv_in"
    save_file({**whole, f"{name}.weight": whole[f"{name}.weight"].to(torch.float8_e4m3fn),
               f"{name}.scale_weight": torch.ones(1)}, path)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"scales of its own.*scale_weight"):
        odewei.from_pretrained(path, model_class=kind, config=tmp_path / "model")
