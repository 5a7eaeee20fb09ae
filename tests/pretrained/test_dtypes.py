"""The dtype of a model and of each of its weights is that which transformers gives it, in every layout of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import odewei
from odewei.errors import CheckpointError, OptionsError
from tests.models import gpt2, llama, same_bits, t5
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.pretrained.test_transformers_model import TEXT, outputs, streamed
from tests.zoo.architecture import ids

transformers = pytest.importorskip("transformers")

Weights = dict[str, torch.Tensor]


def dtypes(model: Any) -> dict[str, torch.dtype]:
    """Of every parameter and buffer."""
    return {name: value.dtype for name, value in (*model.named_parameters(), *model.named_buffers())}


def said(folder: Path, dtype: str | None, **more: object) -> None:
    """Have the folder's configuration say this dtype, or none."""
    config = {**json.loads((folder / "config.json").read_text()), **more, "dtype": dtype}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def mixed(found: Weights) -> Weights:
    """Of three dtypes, so that the first name, the first in the file and the most frequent one differ in theirs."""
    made = {}
    for name, value in found.items():
        if "embed" in name or "lm_head" in name:
            made[name] = value.to(torch.float16)
        else:
            made[name] = value.to(torch.bfloat16) if "layers.1" in name or "norm" in name else value
    return made


def laid_out(folder: Path, layout: str, *, pickled: bool = False) -> None:
    """The folder's weights in one dtype, in several within a file, or in several files each with its own."""
    found = load_file(folder / "model.safetensors")
    if layout == "uniform":
        found = {name: value.bfloat16() for name, value in found.items()}
    elif layout == "mixed":
        found = mixed(found)
    (folder / "model.safetensors").unlink()
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    store: Any = torch.save if pickled else lambda one, path: save_file(one, path, metadata={"format": "pt"})
    if layout != "shards":
        store(found, folder / f"{stem}.{ending}")
        return
    place = {name: 1 + ("layers" not in name) + ("layers.1" in name) for name in found}
    kinds = {1: torch.float16, 2: torch.float32, 3: torch.bfloat16}
    files = {name: f"{stem}-0000{number}-of-00003.{ending}" for name, number in place.items()}
    for number, kind in kinds.items():
        store({name: value.to(kind) for name, value in found.items() if place[name] == number},
              folder / f"{stem}-0000{number}-of-00003.{ending}")  # fmt: skip
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("asked", [{}, {"dtype": "auto"}, {"torch_dtype": torch.float16}])
@pytest.mark.parametrize("layout", ["uniform", "mixed", "shards"])
@pytest.mark.parametrize("said_dtype", [None, "float32", "bfloat16", "float16"])
def test_layouts(said_dtype: str | None, layout: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """{what the configuration says} x {how the weights are stored} x {what is asked for}: transformers' dtypes."""
    kind = saved(llama, tmp_path)
    said(tmp_path, said_dtype)
    laid_out(tmp_path, layout)
    kept = as_loaded(kind, tmp_path, **({"dtype": asked["torch_dtype"]} if "torch_dtype" in asked else asked))
    with streamed(tmp_path, **asked) as model:
        assert dtypes(model) == dtypes(kept)
        assert model.dtype == kept.dtype
        assert model.config.dtype == kept.config.dtype
        if layout == "mixed":
            assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


@pytest.mark.parametrize("layout", ["mixed", "shards"])
def test_pickles(layout: str, tmp_path: Path) -> None:
    """In files of torch the first weight is the first that was saved, of the first file."""
    kind = saved(llama, tmp_path)
    said(tmp_path, None)
    laid_out(tmp_path, layout, pickled=True)
    kept = as_loaded(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert dtypes(model) == dtypes(kept)


def test_an_index_that_says_its_dtype(tmp_path: Path) -> None:
    """Metadata of an index with a dtype come before the weights' own."""
    kind = saved(llama, tmp_path)
    said(tmp_path, None)
    laid_out(tmp_path, "shards")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": {"dtype": "bfloat16"}}))
    kept = as_loaded(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert model.dtype == torch.bfloat16
        assert dtypes(model) == dtypes(kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float64", {"": torch.bfloat16}])
def test_what_stays_in_float32(dtype: Any, tmp_path: Path) -> None:
    """Weights that a model keeps in float32 are kept in just those dtypes in which transformers keeps them."""
    kind = saved(t5, tmp_path)
    kept = as_loaded(kind, tmp_path, dtype=dtype)
    inputs = {**TEXT, "decoder_input_ids": ids(2, 5)}
    with streamed(tmp_path, dtype=dtype) as model:
        assert dtypes(model) == dtypes(kept)
        assert same_bits(outputs(model, **inputs), outputs(kept, **inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_stays_in_float32_by_pattern(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are those that a class names by patterns, strictly or not."""
    kind = saved(llama, tmp_path)
    monkeypatch.setattr(kind, "_keep_in_fp32_modules", ["layers.*.mlp"])
    monkeypatch.setattr(kind, "_keep_in_fp32_modules_strict", ["layers.1*norm"])
    kept = as_loaded(kind, tmp_path, dtype=dtype)
    with streamed(tmp_path, dtype=dtype) as model:
        assert dtypes(model) == dtypes(kept)
        assert len(set(dtypes(model).values())) == 2


def test_whole_numbers_and_small_floats_are_values(tmp_path: Path) -> None:
    """Weights stored as int8 or float8, without any scales, have the values that they are stored with."""
    kind = saved(llama, tmp_path)

    def packed(found: Weights) -> Weights:
        kinds = {"q_proj": torch.int8, "k_proj": torch.float8_e4m3fn, "v_proj": torch.int64, "o_proj": torch.uint8}
        return {
            name: (value * 3).to(next((one for part, one in kinds.items() if part in name), value.dtype))
            for name, value in found.items()
        }

    edit(tmp_path, packed)
    kept = as_loaded(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert dtypes(model) == dtypes(kept)
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


@pytest.mark.parametrize(
    ("stored", "scale"),
    [
        (torch.float8_e4m3fn, "weight_scale_inv"),
        (torch.float8_e4m3fn, "weight_scale"),
        (torch.float8_e5m2, "scale_weight"),
        (torch.int8, "SCB"),
        (torch.uint8, "weight.absmax"),
    ],
)
def test_scales_are_not_lost(stored: torch.dtype, scale: str, tmp_path: Path) -> None:
    """Packed weights with scales of which the configuration says nothing are refused, whatever the scales' names."""
    saved(llama, tmp_path)

    def packed(found: Weights) -> Weights:
        made = dict(found)
        for name, value in found.items():
            if name.endswith("q_proj.weight"):
                made[name] = value.to(stored)
                made[f"{name.removesuffix('weight')}{scale}"] = torch.ones(1)
        return made

    edit(tmp_path, packed)
    with pytest.raises(CheckpointError, match=rf"scales of its own.*{scale}.*quantization_config"):
        odewei.from_pretrained(tmp_path)


def test_no_floating_weight(tmp_path: Path) -> None:
    """Where there is none to take the dtype from, dtype= has to say it."""
    saved(llama, tmp_path)
    said(tmp_path, None)
    edit(tmp_path, lambda found: {name: value.to(torch.int8) for name, value in found.items()})
    with pytest.raises(CheckpointError, match=r"no floating dtype.*Say dtype="):
        odewei.from_pretrained(tmp_path)
    odewei.close(odewei.from_pretrained(tmp_path, dtype="float32"))


def test_two_names_of_dtype(tmp_path: Path) -> None:
    """torch_dtype is another name for dtype; both, and different, are refused."""
    saved(gpt2, tmp_path)
    with pytest.raises(OptionsError, match="two names of one thing"):
        odewei.from_pretrained(tmp_path, dtype=torch.float16, torch_dtype=torch.bfloat16)
    with streamed(tmp_path, torch_dtype="bfloat16") as model:
        assert model.dtype == torch.bfloat16
