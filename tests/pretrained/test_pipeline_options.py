"""Parts left out or given, variants, dtypes a part, and the other keywords of diffusers' own from_pretrained."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import odewei
from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError
from odewei.runtime import runtimes_in
from tests.models import same_bits
from tests.pretrained.test_pipelines import CALL, folder, models
from tests.zoo.test_pipelines import _ENTRIES, _image

diffusers = pytest.importorskip("diffusers")

__all__ = ["folder"]


@pytest.fixture
def streamed() -> Iterator[Any]:
    """Streams pipelines, whose models are closed at the end."""
    made: list[Any] = []

    def stream(path: Any, **options: Any) -> Any:
        made.append(odewei.stream_pipeline(path, memory_budget="2MiB", **options))
        return made[-1]

    yield stream
    for pipeline in made:
        for model in models(pipeline).values():
            odewei.close(model)


def loaded(path: Path, **options: Any) -> Any:
    """The pipeline as diffusers loads it, its weights frozen and in memory of their own."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, **options)
    for model in models(pipeline).values():
        for _, value in (*model.named_parameters(), *model.named_buffers()):
            value.data = value.data.clone()
    return pipeline


def same(pipeline: Any, kept: Any, part: str = "unet") -> bool:
    """Whether a model of both has the same weights. Quicker than an image of each."""
    ours, theirs = (dict(getattr(one, part).named_parameters()) for one in (pipeline, kept))
    return all(
        torch.equal(ours[name] + 0, value) for name, value in theirs.items() if "conv_in" in name or "time" in name
    )


def dtypes(pipeline: Any) -> dict[str, torch.dtype]:
    return {
        f"{part}.{name}": p.dtype for part, model in models(pipeline).items() for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def with_checker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline with a safety checker in its index whose files were never downloaded."""
    place = shutil.copytree(folder, tmp_path_factory.mktemp("checked") / "pipeline")
    index = json.loads((place / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (place / "model_index.json").write_text(json.dumps(index))
    return place


def test_parts_that_are_left_out(with_checker: Path, streamed: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A part that is given as None is neither looked for nor loaded; without that its missing files are an error."""
    out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kept = loaded(with_checker, **out)
    pipeline = streamed(with_checker, **out)
    assert pipeline.safety_checker is None
    assert pipeline.components.keys() == kept.components.keys()
    assert same_bits([_image(pipeline, 1, CALL)], [_image(kept, 1, CALL)])
    with pytest.raises(CheckpointNotFoundError, match=r"part 'safety_checker' has no folder.*safety_checker=None"):
        streamed(with_checker)


def test_models_that_are_left_out(folder: Path, streamed: Any) -> None:
    """So it is with models, for whoever runs only the others."""
    pipeline = streamed(folder, vae=None, text_encoder=None, tokenizer=None)
    assert set(models(pipeline)) == {"unet"}
    assert runtimes_in(pipeline.unet)


def test_parts_of_ones_own(folder: Path, streamed: Any) -> None:
    """A part that is given is taken as it is, a scheduler or a model; the others stream."""
    scheduler = diffusers.PNDMScheduler(num_train_timesteps=50, steps_offset=1, skip_prk_steps=True)
    torch.manual_seed(11)
    vae = _ENTRIES["AutoencoderKL"]().eval()
    kept = loaded(folder, scheduler=scheduler, vae=vae)
    pipeline = streamed(folder, scheduler=scheduler, vae=vae)
    assert pipeline.vae is vae
    assert pipeline.scheduler is scheduler
    assert runtimes_in(pipeline.unet)
    assert same_bits([_image(pipeline, 1, CALL)], [_image(kept, 1, CALL)])


def test_a_streamed_model_as_a_part(folder: Path, streamed: Any) -> None:
    """A model that streams already may be given, from a subfolder say."""
    unet = odewei.from_pretrained(folder, subfolder="unet", memory_budget="1MiB")
    pipeline = streamed(folder, unet=unet)
    assert pipeline.unet is unet
    assert same_bits([_image(pipeline, 1, CALL)], [_image(loaded(folder), 1, CALL)])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, {"unet": torch.bfloat16}, {"default": torch.float16, "vae": torch.float32}]
)
def test_dtypes(dtype: Any, folder: Path, streamed: Any) -> None:
    """One dtype for all parts, or one for each by its name and for the others the default, as diffusers has it."""
    kept = loaded(folder, dtype=dtype)
    for name in ("dtype", "torch_dtype"):
        assert dtypes(streamed(folder, **{name: dtype})) == dtypes(kept)


def test_dtypes_of_the_parts_own(folder: Path, tmp_path: Path, streamed: Any) -> None:
    """Without a dtype, models of transformers have that of their configuration, those of diffusers float32."""
    made = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    kept = loaded(tmp_path)
    pipeline = streamed(tmp_path)
    assert dtypes(pipeline) == dtypes(kept)
    assert len(set(dtypes(kept).values())) == 2


@pytest.mark.parametrize("safe", [True, False])
def test_variants(safe: bool, folder: Path, tmp_path: Path, streamed: Any) -> None:
    """variant= is that of the parts that have it; the others are read without, as diffusers does."""
    made = diffusers.DiffusionPipeline.from_pretrained(folder)
    made.unet.conv_in.weight.data.mul_(2)
    made.vae.to(torch.float16)
    made.save_pretrained(tmp_path / "all", variant="fp16", safe_serialization=safe)
    place = shutil.copytree(folder, tmp_path / "some")
    for path in (tmp_path / "all" / "unet").glob("*.fp16.*"):
        shutil.copy(path, place / "unet")
    if safe is False:
        (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for path in (tmp_path / "all", place):
        kept = loaded(path, variant="fp16")
        pipeline = streamed(path, variant="fp16")
        assert dtypes(pipeline) == dtypes(kept)
        assert same(pipeline, kept)
    with pytest.raises(CheckpointNotFoundError, match=r"no part of the pipeline has weights of the variant 'bf16'"):
        streamed(folder, variant="bf16")
    with pytest.raises(CheckpointNotFoundError, match=r"variant='fp16'"):
        streamed(tmp_path / "all")


def test_pickles(folder: Path, tmp_path: Path, streamed: Any) -> None:
    """use_safetensors=False reads files of torch, in several with an index too; True reads nothing else."""
    made = diffusers.DiffusionPipeline.from_pretrained(folder)
    made.save_pretrained(tmp_path, safe_serialization=False)
    unet = tmp_path / "unet"
    kept = loaded(folder)
    assert same(streamed(tmp_path), kept)
    with pytest.raises(CheckpointNotFoundError, match=r"no weights: looked for"):
        streamed(tmp_path, use_safetensors=True)
    (unet / "diffusion_pytorch_model.bin").unlink()
    made.unet.save_pretrained(unet, safe_serialization=False, max_shard_size="40KB")
    assert len(list(unet.glob("*-of-*.bin"))) > 2
    for asked in ({}, {"use_safetensors": False}):
        if asked:
            text_encoder = tmp_path / "text_encoder"
            torch.save(load_file(folder / "text_encoder" / "model.safetensors"), text_encoder / "pytorch_model.bin")
        assert same(streamed(tmp_path, **asked), kept)


def test_what_it_was_loaded_from(folder: Path, streamed: Any) -> None:
    """The pipeline's and the models' configurations are those of diffusers' own, with where they came from."""
    kept = loaded(folder)
    pipeline = streamed(str(folder))
    assert dict(pipeline.config) == {**kept.config, "_name_or_path": str(folder)}
    for name in ("unet", "vae"):
        ours, theirs = getattr(pipeline, name).config, getattr(kept, name).config
        assert dict(ours) == {**theirs, "_name_or_path": str(folder / name)}


def test_a_folder_around_a_pipeline(folder: Path, tmp_path: Path, streamed: Any, caplog: Any) -> None:
    """The cache of its repository, and a folder that holds nothing else, are read too."""
    shutil.copytree(folder, tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40))
    with caplog.at_level(logging.INFO, "odewei"):
        assert same(streamed(tmp_path / "models--someone--tiny"), loaded(folder))
        streamed(tmp_path)
    assert "its snapshot 0000000000" in caplog.text


def test_mistakes(folder: Path, streamed: Any) -> None:
    """Parts that the pipeline does not have, keywords of single models, and two folders are one line each."""
    with pytest.raises(OptionsError, match=r"no option 'text_encoder_2', and StableDiffusionPipeline has no such part"):
        streamed(folder, text_encoder_2=None)
    with pytest.raises(OptionsError, match=r"no option 'memory_buget'.*'memory_budget'"):
        streamed(folder, memory_buget="1GiB")
    with pytest.raises(OptionsError, match=r"dtype= has the name 'unett'"):
        streamed(folder, dtype={"unett": torch.float16})
    with pytest.raises(OptionsError, match=r"subfolder= is for one model"):
        streamed(folder, subfolder="unet")
    with pytest.raises(OptionsError, match=r"folder= beside a path"):
        streamed(folder, folder=folder)
    with pytest.raises(OptionsError, match=r"custom_pipeline=.*Build that pipeline"):
        streamed(folder, custom_pipeline="mine")
    with pytest.raises(OptionsError, match=r"vae= beside a pipeline that was built"):
        streamed(diffusers.DiffusionPipeline.from_pretrained(folder), vae=None)
    with pytest.raises(CheckpointError, match=r"diffusers cannot make the pipeline"):
        streamed(folder, scheduler=nn.Linear(2, 2), tokenizer=5)
