"""What users get wrong: one line each, of the library's own errors, that says what to do."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import odewei
from odewei.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MissingPackageError,
    OdeweiError,
    OptionsError,
    UnsafeCheckpointError,
)
from odewei.pretrained.options import StreamOptions
from odewei.torch import init_on_demand_weights_model
from tests.models import gpt2, llama
from tests.pretrained.checkpoints import saved

transformers = pytest.importorskip("transformers")

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def refused(kind: type[OdeweiError], told: str, path: Any, **options: Any) -> OdeweiError:
    """from_pretrained raises this, in one line."""
    with pytest.raises(kind, match=told) as raised:
        odewei.from_pretrained(path, **options)
    assert "\n" not in str(raised.value)
    return raised.value


def configured(folder: Path, **changes: object) -> Path:
    """A Llama's folder with these entries of config.json changed; None takes one out."""
    saved(llama, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({name: one for name, one in config.items() if one is not None}))
    return folder


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    """A folder without config.json is told what is in it."""
    (tmp_path / "notes.txt").write_text("")
    refused(CheckpointNotFoundError, r"no checkpoint.*has no config\.json, but notes\.txt", tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    refused(CheckpointNotFoundError, r"stream_pipeline", tmp_path)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(CheckpointNotFoundError, r"an adapter only.*base_model_name_or_path", tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "model.gguf")
    refused(CheckpointNotFoundError, r"GgufLoader", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "\x00", "[" * 100_000])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    """A config.json that is no JSON object is corrupt."""
    (tmp_path / "config.json").write_text(text)
    refused(CorruptCheckpointError, r"config\.json", tmp_path)


def test_a_configuration_with_wrong_values(tmp_path: Path) -> None:
    """What the class does not take is told with the file."""
    refused(CheckpointError, r"configuration.*config\.json", configured(tmp_path, hidden_size="wide"))


def test_no_weights(tmp_path: Path) -> None:
    """A configuration without weights is told which names were looked for, and of a variant that is there."""
    folder = configured(tmp_path)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    refused(CheckpointNotFoundError, r"no weights.*pytorch_model\.bin.*variant", folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", 5])
def test_weights_outside_of_the_folder(name: object, tmp_path: Path) -> None:
    """A configuration that names weights elsewhere is refused."""
    refused(UnsafeCheckpointError, "outside of its folder", configured(tmp_path, transformers_weights=name))


def test_an_unknown_architecture(tmp_path: Path) -> None:
    """A class and type that transformers does not have are named, with its version."""
    folder = configured(tmp_path, architectures=["NewForCausalLM"], model_type="new")
    told = rf"NewForCausalLM.*'new'.*unknown to transformers {transformers.__version__}"
    refused(CheckpointError, told, folder)
    refused(CheckpointError, "unknown", configured(tmp_path, architectures=None, model_type=None))
    refused(CheckpointError, "unknown", configured(tmp_path, architectures=["os.system"], model_type="new"))


def test_code_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused unless it is trusted; then its class is built and streams."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = configured(tmp_path / "own", architectures=["OwnModel"], model_type="own", auto_map=auto)
    (folder / "own.py").write_text(f"raise RuntimeError('it ran')\n{_CODE}")
    refused(UnsafeCheckpointError, r"OwnModel.*own Python code.*trust_remote_code=True", folder)
    refused(CheckpointError, "it ran", folder, trust_remote_code=True)
    folder = configured(tmp_path / "good", architectures=["OwnModel"], model_type="own", auto_map=auto)
    (folder / "own.py").write_text(_CODE)
    model = odewei.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    odewei.close(model)


def test_code_that_is_not_needed(tmp_path: Path) -> None:
    """Where transformers has the class itself, code beside the checkpoint is not run and not asked about."""
    folder = configured(tmp_path, auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise RuntimeError('it ran')")
    model = odewei.from_pretrained(folder)
    assert type(model) is transformers.LlamaForCausalLM
    odewei.close(model)


def test_options(tmp_path: Path) -> None:
    """Unknown keywords are errors that name the known ones; wrong values are, before anything is looked for."""
    refused(OptionsError, r"no option 'memory_buget'.*Did you mean 'memory_budget'", tmp_path, memory_buget="1GiB")
    refused(OptionsError, r"device_map='auto'.*device= for the device", tmp_path, device_map="auto")
    refused(OptionsError, "prefetch_depth", "someone/some-model", prefetch_depth=-1)
    refused(OptionsError, "dtype", configured(tmp_path), dtype="int8")
    refused(OptionsError, "dtype", tmp_path, dtype="large")
    refused(OptionsError, "config", tmp_path, config={"hidden_size": 8})


def test_options_are_those_of_the_function_below() -> None:
    """Every keyword of init_on_demand_weights_model can be given, dtype with a meaning of its own; how names and shapes
    are matched is transformers' matter.
    """
    below = set(inspect.signature(init_on_demand_weights_model).parameters) - {"model_fn", "weights_loader_fn"}
    below -= {"on_mismatch", "strict"}
    assert set(StreamOptions.__annotations__) | {"dtype"} == below


def test_a_broken_generation_config_is_no_traceback(tmp_path: Path) -> None:
    """Generation settings that transformers refuses are an error that names the file."""
    folder = configured(tmp_path)
    (folder / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    refused(CheckpointError, r"generation_config\.json", folder)


def test_without_transformers(tmp_path: Path, missing: Callable[[str], None]) -> None:
    """The message names the extra."""
    folder = configured(tmp_path)
    missing("transformers")
    refused(MissingPackageError, r'transformers.*pip install "odewei\[hf\]"', folder)


def test_an_old_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version whose rules are others is refused, with both versions."""
    folder = configured(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.9.1")
    refused(MissingPackageError, r"needs transformers 5\.12 or newer, and 5\.9\.1 is installed", folder)


def test_without_diffusers(tmp_path: Path, missing: Callable[[str], None]) -> None:
    """The message names the package, which is in no extra of its own."""
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    missing("diffusers")
    refused(MissingPackageError, r"diffusers.*pip install diffusers", tmp_path)


def test_importing_odewei_imports_none_of_them() -> None:
    """import odewei needs neither transformers nor diffusers nor huggingface_hub."""
    told = "import sys, odewei; print(sorted({'transformers', 'diffusers', 'huggingface_hub'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_sums_are_checked_where_they_are_asked_for(tmp_path: Path) -> None:
    """``verify`` is the loader's of the folder's weights: a sum that is not theirs is refused, unless nobody asks."""
    folder = configured(tmp_path)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    refused(CheckpointError, "sha256|SHA-256", folder, verify="sha256")
    odewei.close(odewei.from_pretrained(folder, model_class=type(model)))


def test_a_weight_that_nobody_can_read_is_not_missing(tmp_path: Path) -> None:
    """Whatever the file calls it, it is an error; nothing is initialised in its place."""
    from safetensors.torch import load_file

    saved(gpt2, tmp_path)
    weights = {
        name.removeprefix("transformer."): value for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    assert "h.0.mlp.c_fc.weight" in weights
    (tmp_path / "model.safetensors").unlink()
    weights["h.0.mlp.c_fc.weight"] = weights["h.0.mlp.c_fc.weight"].to_sparse()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for on_missing in ("error", "init"):
        with pytest.raises(CheckpointError, match=r"sparse.*h\.0\.mlp\.c_fc\.weight"):
            odewei.from_pretrained(tmp_path, on_missing=on_missing)
