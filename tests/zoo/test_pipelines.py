"""Whole pipelines of diffusers, whose streamed parts share one budget, give the resident pipeline's image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odewei
from odewei.torch import init_on_demand_weights_model
from tests.models import resident, same_bits, save, smallest_budget, weight_bytes
from tests.zoo.architecture import VOCAB
from tests.zoo.check import SHARE
from tests.zoo.diffusion import DIFFUSION
from tests.zoo.multimodal import MULTIMODAL

pytestmark = pytest.mark.zoo

_ENTRIES = {entry.name: entry.build for family in (DIFFUSION, MULTIMODAL) for entry in family.entries}


def _text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB,
            max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def _streamed_parts(
    parts: dict[str, Callable[[], nn.Module]], folder: Path
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], odewei.MemoryBudget]:
    """The parts in memory, the parts streamed under one budget, and that budget."""
    kept = {name: resident(build) for name, build in parts.items()}
    paths = {name: save(kept[name], folder / f"{name}.safetensors") for name in parts}
    least = max(smallest_budget(build, paths[name]) for name, build in parts.items())
    total = sum(weight_bytes(part) for part in kept.values())
    budget = odewei.MemoryBudget(max(int(SHARE * total), least))
    streamed = {
        name: init_on_demand_weights_model(build, str(paths[name]), memory_budget=budget).eval()
        for name, build in parts.items()
    }
    assert budget.limit_bytes < total
    return kept, streamed, budget


def _check(
    parts: dict[str, Callable[[], nn.Module]], make: Callable[[dict[str, nn.Module]], Any], folder: Path, **call: Any
) -> None:
    kept, streamed, budget = _streamed_parts(parts, folder)
    try:
        expected = _image(make(kept), 1, call), _image(make(kept), 2, call)
        for seed in (1, 1, 2):
            assert same_bits([_image(make(streamed), seed, call)], [expected[seed - 1]])
        for name, part in streamed.items():
            report = odewei.report(part)
            assert report.bytes_read > report.weight_bytes, f"{name} was read once and kept"
            assert report.overdrafts == 0
        assert budget.peak_bytes <= budget.limit_bytes
    finally:
        for part in streamed.values():
            odewei.close(part)


def _image(pipeline: Any, seed: int, call: dict[str, Any]) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(generator=torch.Generator().manual_seed(seed), output_type="np", num_inference_steps=4, **call)
    return torch.from_numpy(found.images)


@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
def test_unconditional_pipeline(scheduler: str, tmp_path: Path, record_property: Any) -> None:
    """A DDPM and a DDIM pipeline over a streamed U-Net give the resident pipeline's image."""
    record_property("family", "pipelines")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install odewei[zoo])")

    def make(parts: dict[str, nn.Module]) -> Any:
        steps = getattr(diffusers, f"{scheduler}Scheduler")(num_train_timesteps=50)
        return getattr(diffusers, f"{scheduler}Pipeline")(unet=parts["unet"], scheduler=steps)

    _check({"unet": _ENTRIES["UNet2DModel"]}, make, tmp_path)


def test_stable_diffusion(tmp_path: Path, record_property: Any) -> None:
    """Text encoder, U-Net and decoder of Stable Diffusion share one budget, and give the resident pipeline's image."""
    record_property("family", "pipelines")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install odewei[zoo])")

    scheduler = diffusers.DDIMScheduler(num_train_timesteps=50, steps_offset=1, clip_sample=False)

    def make(parts: dict[str, nn.Module]) -> Any:
        return diffusers.StableDiffusionPipeline(
            **parts, tokenizer=_tokenizer(tmp_path), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    parts = {"text_encoder": _text_encoder, "unet": _ENTRIES["UNet2DConditionModel"], "vae": _ENTRIES["AutoencoderKL"]}
    _check(parts, make, tmp_path, prompt="a cat", height=32, width=32)


def _tokenizer(folder: Path) -> Any:
    """CLIP's, with letters for words."""
    from transformers import CLIPTokenizer

    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    tokens = ["<pad>", "<|startoftext|>", "<|endoftext|>", *letters, "ca"]
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
