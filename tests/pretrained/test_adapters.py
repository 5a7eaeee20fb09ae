"""Adapters of peft in a model's folder, or in one of their own: as transformers' from_pretrained puts them on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import odewei
from odewei.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    MissingPackageError,
    OptionsError,
    UnsafeCheckpointError,
)
from tests.models import gpt2, llama, mixtral, same_bits
from tests.pretrained.checkpoints import as_loaded, saved
from tests.pretrained.test_transformers_model import TEXT, outputs, streamed
from tests.zoo.architecture import ids

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft asks it


def with_adapter(build: Callable[[], Any], base: Path, adapter: Path, **settings: Any) -> Any:
    """Save a model, and an adapter with random values for it. Returns the model's class."""
    kind = saved(build, base)
    options = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, **settings}
    model = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(**options))
    for name, value in model.named_parameters():
        if "modules_to_save" in name:
            value.data = value.data + 0.01
    model.save_pretrained(adapter)
    return kind


def check(kind: Any, path: Path, **options: Any) -> None:
    """The model with its adapter has transformers' names, dtypes, flags of the adapter, and outputs."""
    kept = kind.from_pretrained(path, **options).eval()
    for _, value in (*kept.named_parameters(), *kept.named_buffers()):
        value.data = value.data.clone()
    adapters = {name: value for name, value in kept.named_parameters() if "lora_" in name}
    assert adapters
    with streamed(path, **options) as model:
        found = dict(model.named_parameters())
        assert {name: (value.dtype, value.requires_grad) for name, value in found.items()} == {
            name: (value.dtype, value.requires_grad) for name, value in kept.named_parameters()
        }
        assert all(torch.equal(found[name], value) for name, value in adapters.items())
        assert all(not found[name].requires_grad for name in adapters)
        assert model.active_adapters() == kept.active_adapters()
        assert model.config.name_or_path == kept.config.name_or_path
        for _ in range(2):
            assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
        assert odewei.report(model).peak_bytes <= 256 << 10
        if model.can_generate():
            assert torch.equal(model.generate(ids(1), max_new_tokens=3), kept.generate(ids(1), max_new_tokens=3))
        model.disable_adapters()
        kept.disable_adapters()
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


@pytest.mark.parametrize(("build", "settings"), [(llama, {}), (gpt2, {"fan_in_fan_out": True})])
def test_an_adapter_in_the_models_folder(build: Callable[[], Any], settings: dict[str, Any], tmp_path: Path) -> None:
    """A folder with a model and an adapter is both, whatever model the adapter names."""
    kind = with_adapter(build, tmp_path / "base", tmp_path / "adapter", **settings)
    for path in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(path, tmp_path / "base")
    check(kind, tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """The adapter has the dtype that transformers gives it beside a model in another one."""
    kind = with_adapter(llama, tmp_path, tmp_path)
    check(kind, tmp_path, dtype=dtype)


def test_a_folder_that_is_only_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the one that base_model_name_or_path names, a folder here, seen from the working directory."""
    kind = with_adapter(llama, tmp_path / "base", tmp_path / "adapter")
    check(kind, tmp_path / "adapter")
    named(tmp_path / "adapter", "base")
    monkeypatch.chdir(tmp_path)
    check(kind, tmp_path / "adapter")
    check(kind, Path("adapter"), attn_implementation="eager", dtype=torch.bfloat16)


def named(folder: Path, base: object) -> None:
    """Have the adapter name this model."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


def test_pickled_adapters(tmp_path: Path) -> None:
    """adapter_model.bin is read, by odewei's own reader, where there is no safetensors file or it is asked for."""
    kind = with_adapter(llama, tmp_path, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "adapter_model.bin")
    save_file({name: value * 2 for name, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    with streamed(tmp_path) as model:
        assert torch.equal(_one(model), 2 * weights[_key(weights)])
    (tmp_path / "adapter_model.safetensors").unlink()
    with streamed(tmp_path) as model:  # transformers itself fails here
        assert torch.equal(_one(model), weights[_key(weights)])
        (tmp_path / "model.safetensors").rename(tmp_path / "kept.safetensors")
    torch.save(load_file(tmp_path / "kept.safetensors"), tmp_path / "pytorch_model.bin")
    check(kind, tmp_path, use_safetensors=False)


def _key(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights if "layers.0.self_attn.q_proj.lora_A" in name)


def _one(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    return found


def test_an_adapter_of_another_name_and_kind(tmp_path: Path) -> None:
    """adapter_name= is its name in the model; other methods of peft are put on alike."""
    kind = saved(llama, tmp_path)
    model = peft.get_peft_model(
        kind.from_pretrained(tmp_path),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                       init_ia3_weights=False),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    kept = as_loaded(kind, tmp_path, adapter_name="mine")
    with streamed(tmp_path, adapter_name="mine") as found:
        assert found.active_adapters() == ["mine"]
        assert same_bits(outputs(found, **TEXT), outputs(kept, **TEXT))


def test_an_adapter_on_gathered_experts(tmp_path: Path) -> None:
    """Beneath an adapter of the attention layers experts go on being gathered from the checkpoint."""
    kind = with_adapter(mixtral, tmp_path, tmp_path, target_modules=["q_proj", "v_proj"])
    kept = as_loaded(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


def test_mistakes(tmp_path: Path) -> None:
    """No name of a model, a model that is not there, no weights, and weights that do not fit are one line each."""
    with_adapter(llama, tmp_path / "base", tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    for base in (None, "", 5):
        named(adapter, base)
        with pytest.raises(CheckpointNotFoundError, match=r"does not say of which model.*base_model_name_or_path"):
            odewei.from_pretrained(adapter)
    named(adapter, str(tmp_path / "gone"))
    with pytest.raises(CheckpointNotFoundError, match=r"the adapter's model cannot be found: there is no such folder"):
        odewei.from_pretrained(adapter)
    named(adapter, str(tmp_path / "base"))
    (adapter / "adapter_model.safetensors").rename(adapter / "other.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"no weights: looked for adapter_model\.safetensors"):
        odewei.from_pretrained(adapter)
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "other.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({**json.loads(text), "peft_type": "NEW"}))
    with pytest.raises(CheckpointError, match=r"peft cannot put the adapter on the model.*adapter_config\.json"):
        odewei.from_pretrained(adapter)
    with pytest.raises(OptionsError, match=r"adapter_kwargs=.*load_adapter"):
        odewei.from_pretrained(adapter, adapter_kwargs={"subfolder": "x"})  # type: ignore[call-arg]


class _Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


def test_code_in_a_pickled_adapter(tmp_path: Path) -> None:
    """It is refused and not run, and the model is closed."""
    with_adapter(llama, tmp_path, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": _Code(tmp_path / "it ran")}, tmp_path / "adapter_model.bin")
    budget = odewei.MemoryBudget("1MiB")
    with pytest.raises(UnsafeCheckpointError, match=r"adapter_model\.bin"):
        odewei.from_pretrained(tmp_path, memory_budget=budget)
    assert not (tmp_path / "it ran").exists()
    assert budget._driver is not None
    budget._driver.close()
    assert not budget._driver.ledger.accounts


def test_without_peft(tmp_path: Path, missing: Callable[[str], None]) -> None:
    """An adapter that is there is not passed over: the package is named."""
    with_adapter(llama, tmp_path, tmp_path)
    missing("peft")
    with pytest.raises(MissingPackageError, match=r"the adapter in .* needs the package 'peft'"):
        odewei.from_pretrained(tmp_path)


@pytest.mark.parametrize("saved_too", [["lm_head"], ["norm"]])
def test_modules_that_an_adapter_brings_whole(saved_too: list[str], tmp_path: Path) -> None:
    """Modules that were trained with the adapter (modules_to_save) come with it, and are in memory as it is."""
    kind = with_adapter(llama, tmp_path, tmp_path, target_modules=["q_proj"], modules_to_save=saved_too)
    kept = as_loaded(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
