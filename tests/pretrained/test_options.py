"""Every keyword of the libraries' own from_pretrained is honoured as there, or refused by its name; none is ignored."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import CheckpointError, MissingWeightError, OptionsError, WeightMismatchError
from odewei.pretrained import options as keywords
from tests.models import bert, gpt2, llama, mixtral, same_bits, t5
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.pretrained.test_transformers_model import TEXT, outputs, streamed
from tests.zoo.check import outputs as called
from tests.zoo.diffusion import DIFFUSION

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

_UNET = DIFFUSION.entries[1]


def taken_by(function: Callable[..., Any]) -> set[str]:
    """The keywords that a from_pretrained takes: its parameters, and what it pops from the rest of them."""
    source = inspect.getsource(function)
    popped = set(re.findall(r"kwargs\.pop\(\s*\"(\w+)\"", source))
    for names in re.findall(r"for name in \[([^\]]*)\]:\s+_ = kwargs\.pop", source):
        popped |= set(re.findall(r"\"(\w+)\"", names))
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = {name for name, one in inspect.signature(function).parameters.items() if one.kind in kinds}
    return popped | named - {"cls", "pretrained_model_name_or_path"}


_OWN = {"_from_auto", "_from_pipeline", "_commit_hash", "gguf_file_path"}  # what the libraries say to themselves
_EVERYWHERE = {"dtype", "config", "revision", "local_files_only", "trust_remote_code"}


@pytest.mark.parametrize(
    "function",
    [
        transformers.PreTrainedModel.from_pretrained,
        transformers.AutoModel.from_pretrained,
        diffusers.ModelMixin.from_pretrained,
        diffusers.DiffusionPipeline.from_pretrained,
        diffusers.UNet2DConditionModel.from_single_file,
    ],
)
def test_every_keyword_has_an_answer(function: Callable[..., Any]) -> None:
    """Whatever the installed libraries take is known here: as an option, as a configuration's value, or as refused."""
    honoured = set(keywords._HONOURED) | set(keywords.PretrainedOptions.__annotations__) | _EVERYWHERE
    ours = honoured | set(keywords._REFUSED) | _OWN | {"torch_dtype", "device", "config_revision"}
    found = taken_by(function) - {"pretrained_model_link_or_path", "pretrained_model_link_or_path_or_dict"}
    assert len(found) > 5
    assert found - ours == set()


@pytest.mark.parametrize("name", sorted(keywords._REFUSED))
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    """It is refused by its name with what to do instead, before anything is looked for."""
    for call in (odewei.from_pretrained, odewei.stream_pipeline):
        with pytest.raises(OptionsError, match=rf"^{name}=.*is not done for a streamed model\. [A-Z]"):
            call(tmp_path / "none", **{name: "auto"})


@pytest.mark.parametrize("nothing", [None, False])
def test_what_asks_for_nothing(nothing: Any, tmp_path: Path) -> None:
    """What is refused may be said with None or False, which ask for nothing."""
    saved(gpt2, tmp_path)
    odewei.close(odewei.from_pretrained(tmp_path, **dict.fromkeys(keywords._REFUSED, nothing)))


def test_what_is_always_so(tmp_path: Path) -> None:
    """low_cpu_mem_usage and weights_only may be said where they ask for what is done anyway."""
    saved(gpt2, tmp_path)
    odewei.close(odewei.from_pretrained(tmp_path, low_cpu_mem_usage=True, weights_only=True, trust_remote_code=False))
    with pytest.raises(OptionsError, match=r"all weights in memory.*materialize"):
        odewei.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    with pytest.raises(OptionsError, match=r"pickle.*never"):
        odewei.from_pretrained(tmp_path, weights_only=False)


def test_names_that_nobody_knows(tmp_path: Path) -> None:
    """A keyword that is no option, no value of the configuration and no argument of the class is an error."""
    saved(llama, tmp_path)
    with pytest.raises(OptionsError, match=r"no option 'num_lables', and LlamaConfig has no such value"):
        odewei.from_pretrained(tmp_path, num_lables=3)  # type: ignore[call-arg]
    with pytest.raises(OptionsError, match=r"no option 'varient'.*Did you mean 'variant'"):
        odewei.from_pretrained(tmp_path / "none", varient="fp16")  # type: ignore[call-arg]
    with pytest.raises(OptionsError, match=r"no option '_commit_hash'"):
        odewei.from_pretrained(tmp_path, _commit_hash="0")  # type: ignore[call-arg]
    saved(_UNET.build, tmp_path / "unet")
    with pytest.raises(OptionsError, match=r"no option 'num_labels', and UNet2DModel has no such value"):
        odewei.from_pretrained(tmp_path / "unet", num_labels=3)
    for name, value in (("key_mapping", {"a": "b"}), ("ignore_mismatched_sizes", True), ("generation_config", 1)):
        with pytest.raises(OptionsError, match=rf"{name}= is not for a model of diffusers"):
            odewei.from_pretrained(tmp_path / "unet", **{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
        {"output_hidden_states": True},
        {"output_attentions": True, "attn_implementation": "eager"},
        {"use_cache": False},
        {"rms_norm_eps": 0.5},
        {"num_hidden_layers": 3},
        {"tie_word_embeddings": True},
        {"problem_type": "regression"},
        {"id2label": {0: "no", 1: "yes", 2: "maybe"}},
    ],
)
@pytest.mark.parametrize("auto", [False, True])
def test_values_of_the_configuration(values: dict[str, Any], auto: bool, tmp_path: Path) -> None:
    """Keywords override the configuration's values, as in transformers, by the class and by an auto class."""
    kind = saved(llama, tmp_path)
    call = transformers.AutoModelForCausalLM if auto else kind
    kept = as_loaded(call, tmp_path, **values)
    with streamed(tmp_path, model_class=call, **values) as model:
        assert model.config.to_dict() == kept.config.to_dict()
        assert model.config._attn_implementation == kept.config._attn_implementation
        assert same_bits(called(model, TEXT), called(kept, TEXT))


def test_values_of_a_composite_configuration(tmp_path: Path) -> None:
    """Implementations reach the parts of a composite configuration."""
    from tests.zoo.multimodal import MULTIMODAL

    entry = next(entry for entry in MULTIMODAL.entries if entry.name == "llava")
    kind = saved(entry.build, tmp_path)
    kept = as_loaded(kind, tmp_path, attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    chosen = {"text_config": "eager", "vision_config": "sdpa"}
    with streamed(tmp_path, attn_implementation=chosen) as model:
        for part in ("text_config", "vision_config"):
            ours, theirs = getattr(model.config, part), getattr(kept.config, part)
            assert ours._attn_implementation == theirs._attn_implementation
    odewei.hf.register_experts()
    kind = saved(mixtral, tmp_path / "mixtral")
    with streamed(tmp_path / "mixtral", experts_implementation="odewei") as model:
        assert model.config._experts_implementation == "odewei"


def test_the_text_part_of_a_composite_model(tmp_path: Path) -> None:
    """A class for text alone gets its part of a composite configuration, as auto classes of transformers have it."""
    config = transformers.Gemma3Config(
        text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 99, "pad_token_id": 0},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    saved(lambda: transformers.Gemma3ForConditionalGeneration(config), tmp_path)
    auto = transformers.AutoModelForCausalLM
    kept = as_loaded(auto, tmp_path)
    with streamed(tmp_path, model_class=auto) as model:
        assert type(model) is type(kept)
        assert type(model.config) is type(kept.config)
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


def test_configurations_of_ones_own(tmp_path: Path) -> None:
    """config= may be an object, what a config.json holds, or a path; what is beside it must not contradict it."""
    kind = saved(llama, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    kept = as_loaded(kind, tmp_path, rms_norm_eps=0.25)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({**stored, "rms_norm_eps": 0.25}))
    made = transformers.AutoConfig.from_pretrained(tmp_path / "other")
    for given in (made, {**stored, "rms_norm_eps": 0.25}, tmp_path / "other", str(tmp_path / "other")):
        for chosen in (None, kind, transformers.AutoModelForCausalLM):
            with streamed(tmp_path, config=given, model_class=chosen) as model:
                assert type(model) is kind
                assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
    with streamed(tmp_path, config=made, attn_implementation="eager") as model:
        assert model.config._attn_implementation == "eager"
    assert made._attn_implementation != "eager"
    with pytest.raises(OptionsError, match=r"rms_norm_eps= beside config=.*Set it in the configuration"):
        odewei.from_pretrained(tmp_path, config=made, rms_norm_eps=0.5)  # type: ignore[call-arg]
    with pytest.raises(OptionsError, match=r"a mapping whose model_type None is unknown.*single values as keywords"):
        odewei.from_pretrained(tmp_path, config={"rms_norm_eps": 0.5})


def test_arguments_of_the_class(tmp_path: Path) -> None:
    """What the configuration does not have and the class's __init__ does goes there: add_pooling_layer, say."""
    kind = saved(bert, tmp_path)
    kept = as_loaded(kind, tmp_path, add_pooling_layer=False)
    with streamed(tmp_path, add_pooling_layer=False) as model:
        assert model.pooler is None
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


@pytest.mark.parametrize("values", [{"num_labels": 5}, {"id2label": {0: "a", 1: "b", 2: "c"}}])
def test_a_new_head(values: dict[str, Any], tmp_path: Path) -> None:
    """A head that is initialised has transformers' values for the same seed, and leaves the same random state."""
    saved(bert, tmp_path)
    kind = transformers.BertForSequenceClassification
    with pytest.raises(MissingWeightError, match=r"classifier\.bias"):
        odewei.from_pretrained(tmp_path, model_class=kind, **values)
    torch.manual_seed(7)
    kept = as_loaded(kind, tmp_path, **values)
    after = torch.rand(3)
    torch.manual_seed(7)
    with streamed(tmp_path, model_class=kind, on_missing="init", **values) as model:
        assert torch.equal(torch.rand(3), after)
        assert model.classifier.weight.shape == kept.classifier.weight.shape
        for _ in range(2):
            assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in kept.state_dict().items())


@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_weights_of_another_size(build: Callable[[], nn.Module], tmp_path: Path, caplog: Any) -> None:
    """They are an error, or with ignore_mismatched_sizes initialised as transformers does, ties included."""
    kind = saved(build, tmp_path)
    told = r"the checkpoint has shape \(\d+, \d+\), \w+ \(120, \d+\).*ignore_mismatched_sizes=True"
    with pytest.raises(WeightMismatchError, match=told):
        odewei.from_pretrained(tmp_path, vocab_size=120)  # type: ignore[call-arg]
    torch.manual_seed(5)
    kept = as_loaded(kind, tmp_path, vocab_size=120, ignore_mismatched_sizes=True)
    torch.manual_seed(5)
    with (
        caplog.at_level(logging.WARNING, "odewei"),
        streamed(tmp_path, vocab_size=120, ignore_mismatched_sizes=True) as model,
    ):
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in kept.state_dict().items())
        inputs = {**TEXT, "decoder_input_ids": TEXT["input_ids"]} if build is t5 else TEXT
        assert same_bits(outputs(model, **inputs), outputs(kept, **inputs))
    assert "is initialised: the checkpoint has shape" in caplog.text


@pytest.mark.parametrize("kind_of_name", ["prefix", "swap"])
def test_key_mapping(kind_of_name: str, tmp_path: Path) -> None:
    """key_mapping= renames the checkpoint's weights by patterns, as transformers does, before everything else."""
    kind = saved(llama, tmp_path)
    if kind_of_name == "prefix":
        edit(tmp_path, lambda found: {f"module.{name}": value for name, value in found.items()})
        mapping = {r"^module\.": ""}
    else:
        swap = {"q_proj": "wq", "k_proj": "wk"}

        def other(name: str) -> str:
            return re.sub("|".join(swap), lambda match: swap[match[0]], name)

        edit(tmp_path, lambda found: {other(name): value for name, value in found.items()})
        mapping = {r"\.wq\.": ".q_proj.", r"\.wk\.": ".k_proj."}
    with pytest.raises(CheckpointError):
        odewei.from_pretrained(tmp_path)
    kept = as_loaded(kind, tmp_path, key_mapping=mapping)
    with streamed(tmp_path, key_mapping=mapping) as model:
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


def test_generation_settings_of_ones_own(tmp_path: Path) -> None:
    """generation_config= takes the place of the folder's."""
    kind = saved(llama, tmp_path)
    given = transformers.GenerationConfig(max_new_tokens=4, num_beams=3, pad_token_id=0)
    kept = as_loaded(kind, tmp_path, generation_config=given)
    with streamed(tmp_path, generation_config=given) as model:
        assert model.generation_config == kept.generation_config
        assert torch.equal(model.generate(TEXT["input_ids"]), kept.generate(TEXT["input_ids"]))


def test_values_of_a_model_of_diffusers(tmp_path: Path) -> None:
    """Its arguments may be given by their names, its configuration as a mapping or a path."""
    kind = saved(_UNET.build, tmp_path)
    kept = as_loaded(kind, tmp_path, norm_eps=0.25)
    inputs = _UNET.inputs(1)
    stored = json.loads((tmp_path / "config.json").read_text())
    for given in ({"norm_eps": 0.25}, {"config": {**stored, "norm_eps": 0.25}}):
        with streamed(tmp_path, **given) as model:
            assert same_bits(called(model, inputs), called(kept, inputs))
            assert model.config["norm_eps"] == 0.25
    with streamed(tmp_path, config=tmp_path, norm_eps=0.25) as model:
        assert same_bits(called(model, inputs), called(kept, inputs))


_ATTRIBUTES = (
    "name_or_path", "is_quantized", "hf_quantizer", "quantization_method", "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict", "_tied_weights_keys", "all_tied_weights_keys", "base_model_prefix", "training",
    "main_input_name", "dtype", "is_gradient_checkpointing_", "_no_split_modules", "_hf_peft_config_loaded",
)  # fmt: skip


@pytest.mark.parametrize("build", [llama, gpt2, bert, t5, mixtral])
def test_what_a_model_says_of_itself(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Configuration, generation settings, ties and the rest of its attributes are those of the ordinary model."""
    kind = saved(build, tmp_path)
    torch.manual_seed(1)
    kept = kind.from_pretrained(tmp_path)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with streamed(tmp_path) as model:
        assert torch.equal(torch.get_rng_state(), after)
        for name in _ATTRIBUTES:
            assert getattr(model, name, None) == getattr(kept, name, None), name
        assert model.config.to_dict() == kept.config.to_dict()
        assert model.config.name_or_path == kept.config.name_or_path
        assert model.can_generate() == kept.can_generate()
        assert getattr(model, "generation_config", None) == getattr(kept, "generation_config", None)
        assert model.num_parameters() == kept.num_parameters()
        assert list(model.state_dict()) == list(kept.state_dict())
        ours, theirs = dict(vars(model)), dict(vars(kept))
        assert {name for name in theirs if name not in ours} == set()


def test_what_is_left_over_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that the model has no use for are named in the log; those that it knows of are not."""
    saved(llama, tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "another.weight": torch.ones(2)}
    edit(tmp_path, lambda found: {**found, **extra})
    with caplog.at_level(logging.WARNING, "odewei"), streamed(tmp_path):
        pass
    told = [record.getMessage() for record in caplog.records if record.name == "odewei"]
    assert told == ["LlamaForCausalLM has no use for these weights of the checkpoint: another.weight"]


def test_what_can_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are trainable where the libraries make them so: transformers all that are loaded, whatever the class
    says; diffusers as the class says.
    """

    def frozen(kind: type[nn.Module], name: str) -> None:
        before: Any = kind.__init__

        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            before(self, *args, **kwargs)
            getattr(self, name).requires_grad_(False)

        monkeypatch.setattr(kind, "__init__", build)

    def flags(model: nn.Module) -> dict[str, bool]:
        return {name: value.requires_grad for name, value in model.named_parameters()}

    kind, unet = saved(llama, tmp_path / "llama"), saved(_UNET.build, tmp_path / "unet")
    frozen(transformers.models.llama.modeling_llama.LlamaRMSNorm, "weight")
    frozen(diffusers.models.resnet.ResnetBlock2D, "norm1")
    for each, path in ((kind, tmp_path / "llama"), (unet, tmp_path / "unet")):
        kept = flags(each.from_pretrained(path))
        with streamed(path) as model:
            assert flags(model) == kept
    assert not all(kept.values())
