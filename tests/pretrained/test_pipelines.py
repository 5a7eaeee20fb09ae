"""stream_pipeline: every model of a pipeline streams under one budget, and the image is the resident pipeline's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError, UnsafeCheckpointError
from odewei.runtime import runtimes_in
from tests.models import same_bits, weight_bytes
from tests.zoo.test_pipelines import _ENTRIES, _image, _text_encoder, _tokenizer

diffusers = pytest.importorskip("diffusers")

CALL = {"prompt": "a cat", "height": 32, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion, saved."""
    torch.manual_seed(0)
    made = diffusers.StableDiffusionPipeline(
        text_encoder=_text_encoder(),
        unet=_ENTRIES["UNet2DConditionModel"](),
        vae=_ENTRIES["AutoencoderKL"](),
        tokenizer=_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=50, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    place = tmp_path_factory.mktemp("pipeline")
    made.save_pretrained(place)
    return place


@pytest.fixture
def resident(folder: Path) -> Any:
    """The pipeline as diffusers loads it, its weights frozen and in memory of their own."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    for model in models(pipeline).values():
        for _, value in (*model.named_parameters(), *model.named_buffers()):
            value.data = value.data.clone()
    return pipeline


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    """Pipelines whose models are closed at the end."""
    made: list[Any] = []
    yield made
    for pipeline in made:
        for model in models(pipeline).values():
            odewei.close(model)


def models(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def test_a_folder(folder: Path, resident: Any, closing: list[Any]) -> None:
    """All three models stream under one budget that cannot hold them; the rest is loaded as usual."""
    expected = _image(resident, 1, CALL), _image(resident, 2, CALL)
    total = sum(weight_bytes(model) for model in models(resident).values())
    budget = odewei.MemoryBudget(int(0.8 * total))
    pipeline: Any = odewei.stream_pipeline(folder, memory_budget=budget)
    closing.append(pipeline)
    assert type(pipeline) is diffusers.StableDiffusionPipeline
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    assert {name: type(model) for name, model in models(pipeline).items()} == {
        name: type(model) for name, model in models(resident).items()
    }
    for seed in (1, 1, 2):
        assert same_bits([_image(pipeline, seed, CALL)], [expected[seed - 1]])
    assert all(odewei.report(model).passes for model in models(pipeline).values() if model is not pipeline.vae)
    assert 0 < budget.peak_bytes <= budget.limit_bytes < total


def test_a_pipeline_that_was_built(resident: Any, closing: list[Any]) -> None:
    """Its models are replaced by streamed ones from the folder it was loaded from, once."""
    expected = _image(resident, 1, CALL)
    before = models(resident)
    pipeline: Any = odewei.stream_pipeline(resident, memory_budget="1MiB", prefetch_depth=2)
    closing.append(pipeline)
    assert pipeline is resident
    after = models(pipeline)
    assert not set(map(id, before.values())) & set(map(id, after.values()))
    assert same_bits([_image(pipeline, 1, CALL)], [expected])
    odewei.stream_pipeline(pipeline)
    assert models(pipeline) == after


def test_a_pipeline_and_its_folder(folder: Path, resident: Any, closing: list[Any]) -> None:
    """A pipeline that was put together by hand is told its folder."""
    expected = _image(resident, 1, CALL)
    made = diffusers.StableDiffusionPipeline(**resident.components, requires_safety_checker=False)
    with pytest.raises(OptionsError, match="folder="):
        odewei.stream_pipeline(made)
    pipeline: Any = odewei.stream_pipeline(made, folder=folder, memory_budget="1MiB")
    closing.append(pipeline)
    assert same_bits([_image(pipeline, 1, CALL)], [expected])


def test_a_failure_closes_what_was_built(folder: Path, tmp_path: Path) -> None:
    """Where one part cannot be built, the budget serves no model afterwards."""
    import shutil

    place = shutil.copytree(folder, tmp_path / "copy")
    (place / "vae" / "config.json").unlink()
    budget = odewei.MemoryBudget("1MiB")
    with pytest.raises(CheckpointNotFoundError, match=r"vae"):
        odewei.stream_pipeline(place, memory_budget=budget)
    assert budget._driver is not None
    budget._driver.close()
    assert not budget._driver.ledger.accounts


def edited(folder: Path, place: Path, **parts: object) -> Path:
    """A copy of the index of the folder's pipeline with these parts changed."""
    place.mkdir()
    index = json.loads((folder / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, **parts}))
    return place


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    """One model, an empty folder, a part without files, an unknown class and code of its own are one line each."""
    with pytest.raises(CheckpointNotFoundError, match=r"one model, not a pipeline.*from_pretrained"):
        odewei.stream_pipeline(folder / "unet")
    with pytest.raises(CheckpointNotFoundError, match=r"stream_pipeline"):
        odewei.from_pretrained(folder)
    with pytest.raises(CheckpointNotFoundError, match=r"has no model_index\.json"):
        odewei.stream_pipeline(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"part '[a-z_]*' has no folder"):
        odewei.stream_pipeline(edited(folder, tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"'unet' is of a class.*'NewUNet'"):
        odewei.stream_pipeline(edited(folder, tmp_path / "b", unet=["diffusers", "NewUNet"]))
    with pytest.raises(UnsafeCheckpointError, match=r"'unet'.*os\.system.*trust_remote_code=True"):
        odewei.stream_pipeline(edited(folder, tmp_path / "c", unet=["os", "system"]))
    with pytest.raises(OptionsError, match="is no pipeline"):
        odewei.stream_pipeline(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="no option"):
        odewei.stream_pipeline(folder, budget="1GiB")  # type: ignore[call-arg]


def test_the_runtime_is_found_for_each_part(folder: Path, closing: list[Any]) -> None:
    """Every model of the pipeline is a streamed one, in eval mode."""
    pipeline = odewei.stream_pipeline(folder)
    closing.append(pipeline)
    for model in models(pipeline).values():
        assert runtimes_in(model)
        assert not model.training
