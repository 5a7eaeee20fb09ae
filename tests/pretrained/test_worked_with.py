"""Models of ``from_pretrained`` under what people do to models, beside those that transformers loads itself."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import odewei
from odewei.runtime import runtimes_in
from tests import models

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

Pair = tuple[Any, Any]
IDS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def both(folder: Path, share: float = 0.4, **options: Any) -> Iterator[Pair]:
    """The resident model and the one streamed in a share of its bytes."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    for one in (*model.parameters(), *model.buffers()):
        one.data = one.data.clone()  # aligned, as torch allocates
    budget = int(share * models.weight_bytes(model))
    streamed = odewei.from_pretrained(folder, memory_budget=budget, **options)
    try:
        yield model, streamed
    finally:
        odewei.close(streamed)


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def on_both(pair: Pair, do: Callable[[Any], Any]) -> list[Any]:
    found = []
    for one in pair:
        torch.manual_seed(11)
        found.append(do(one))
    return found


def assert_same(pair: Any) -> None:
    one, other = pair
    for _ in range(2):
        assert torch.equal(output(other), output(one))


def with_adapters(model: Any, **config: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = {"target_modules": "all-linear", "init_lora_weights": False, **config}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def losses(model: Any, optimizer: Any = torch.optim.SGD, steps: int = 3) -> list[Any]:
    """The losses and gradients of some steps of training."""
    chosen = optimizer([one for one in model.parameters() if one.requires_grad], lr=0.1)
    found: list[Any] = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found += [loss.item(), *(one.grad.sum().item() for one in model.parameters() if one.grad is not None)]
        chosen.step()
        chosen.zero_grad()
    return found


@pytest.mark.parametrize("depth", [0, "auto"])
def test_merging_adapters(depth: int | str, llama: Path, tmp_path: Path) -> None:
    """Merged weights are those of the resident model, in passes and in what is saved."""
    with both(llama, prefetch_depth=depth) as pair:
        wrapped = on_both(pair, with_adapters)
        assert_same(wrapped)
        merged = [one.merge_and_unload() for one in wrapped]
        assert_same(merged)
        merged[1].save_pretrained(tmp_path / "merged")
        assert_same((merged[0], transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")))


@pytest.mark.parametrize("depth", [0, "auto"])
def test_merging_within_the_budget(depth: int | str, llama: Path, tmp_path: Path) -> None:
    """Within ``odewei.edit`` what is merged and pruned goes to new files: no weight stays, and all are right."""
    with both(llama, prefetch_depth=depth) as pair:
        wrapped = on_both(pair, with_adapters)
        with odewei.edit(wrapped[1], tmp_path / "merged"):
            merged = [one.merge_and_unload() for one in reversed(wrapped)][::-1]
        assert_same(merged)
        for one in merged:
            linear = one.model.layers[1].mlp.up_proj
            prune.l1_unstructured(linear, "weight", amount=0.3)
        with odewei.edit(merged[1], tmp_path / "rounded"):
            for one in merged:
                prune.remove(one.model.layers[1].mlp.up_proj, "weight")
                for weight in one.parameters():
                    weight.data = weight.data.round(decimals=2)
        assert_same(merged)
        report = odewei.report(merged[1])
        assert report.peak_bytes <= report.budget_bytes
        assert (report.overdrafts, report.own_bytes) == (0, 0)
        assert report.evictions > report.units
        merged[1].save_pretrained(tmp_path / "saved")
        assert_same((merged[0], transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")))
        assert_same((merged[0], copy.deepcopy(merged[1])))


def test_edit_says_what_it_does_not_take(llama: Path, tmp_path: Path) -> None:
    """A folder that has weights, and a second edit at once, are refused by errors whose cure works."""
    with both(llama) as (_, streamed):
        with pytest.raises(odewei.OdeweiError, match="new folder"):
            _edit_where_weights_are(streamed, tmp_path)
        with (
            odewei.edit(streamed, tmp_path / "a"),
            pytest.raises(odewei.OdeweiError, match="already"),
            odewei.edit(streamed, tmp_path / "b"),
        ):
            pass


def _edit_where_weights_are(streamed: Any, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    with odewei.edit(streamed, folder):
        pass


def test_training_adapters_and_norms(llama: Path) -> None:
    """Weights that are unfrozen by name train; losses and gradients are those of the resident model."""
    with both(llama) as pair:
        wrapped = on_both(pair, lambda one: with_adapters(one, target_modules=["q_proj"]))
        for model in wrapped:
            for name, one in model.named_parameters():
                if "norm" in name:
                    one.requires_grad_(True)
        found, expected = on_both((wrapped[1], wrapped[0]), losses)
        assert found == expected
        assert len({loss for loss in expected if isinstance(loss, float)}) > 3
        assert_same(wrapped)


@pytest.mark.parametrize("depth", [0, "auto"])
def test_training_adapters_is_bounded(depth: int | str, llama: Path) -> None:
    """Without checkpointing, what autograd keeps of weights is read again: the budget holds, gradients are the same."""
    with both(llama, 0.3, prefetch_depth=depth) as pair:
        wrapped = on_both(pair, with_adapters)
        found, expected = on_both((wrapped[1], wrapped[0]), lambda one: losses(one, torch.optim.AdamW))
        assert found == expected
        report = odewei.report(wrapped[1])
        largest = max(record.nbytes for record in odewei.runtime.runtime_of(wrapped[1]).account.units)
        assert report.peak_bytes <= report.budget_bytes + largest
        assert report.escapes == 0


def test_training_everything(llama: Path) -> None:
    """All weights train as those of the resident model, and stay in memory as they are the user's by then."""
    with both(llama) as pair:
        found, expected = on_both(pair[::-1], lambda one: losses(one, torch.optim.AdamW))
        assert found == expected
        assert_same(pair)


def test_training_with_checkpointing(llama: Path) -> None:
    """Blocks that are computed again in the backward pass give the same losses and gradients."""
    with both(llama) as pair:
        for one in pair:
            one.train()
            one.gradient_checkpointing_enable()
        found, expected = on_both(pair[::-1], losses)
        assert found == expected


def test_generating(llama: Path) -> None:
    """The ordinary model's tokens: weights are trainable, as its class made them."""
    with both(llama) as pair:
        assert [one.requires_grad for one in pair[1].parameters()] == [
            one.requires_grad for one in pair[0].parameters()
        ]
        for options in ({"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False}):
            one, other = on_both(pair, lambda model, how=options: model.generate(IDS, max_new_tokens=8, **how))
            assert torch.equal(one, other)


def test_resizing_embeddings(llama: Path, tmp_path: Path) -> None:
    """New rows stay, tables agree with the configuration, and what is saved has them."""
    with both(llama) as pair:
        on_both(pair, lambda one: one.resize_token_embeddings(520, mean_resizing=False))
        assert_same(pair)
        looked_up = [one.get_input_embeddings()(torch.tensor([519])) for one in pair for _ in range(5)]
        assert all(torch.equal(one, looked_up[0]) for one in looked_up)
        assert pair[1].config.vocab_size == 520 == len(pair[1].lm_head.weight)
        pair[1].save_pretrained(tmp_path)
        assert_same((pair[0], transformers.LlamaForCausalLM.from_pretrained(tmp_path)))


def test_a_head_that_was_replaced_is_saved(llama: Path, tmp_path: Path) -> None:
    """What is in the model now is saved, not what it was built with; so are layers that were moved and left out."""
    with both(llama) as pair:

        def operate(model: Any) -> None:
            model.lm_head = nn.Linear(64, 512, bias=False)
            model.model.layers = nn.ModuleList([model.model.layers[index] for index in (2, 0)])
            model.config.num_hidden_layers = 2
            for index, layer in enumerate(model.model.layers):
                layer.self_attn.layer_idx = index

        on_both(pair, operate)
        assert_same(pair)
        pair[1].save_pretrained(tmp_path)
        assert_same((pair[0], transformers.LlamaForCausalLM.from_pretrained(tmp_path)))
        assert_same((pair[0], copy.deepcopy(pair[1])))


def test_copies_of_wrapped_models(llama: Path) -> None:
    """A copy streams its base weights and goes on when the original is closed, by its wrapper."""
    with both(llama) as pair:
        wrapped = on_both(pair, with_adapters)
        made = copy.deepcopy(wrapped[1])
        assert_same((wrapped[0], made))
        odewei.close(wrapped[1])
        with pytest.raises(odewei.errors.ClosedError):
            output(wrapped[1])
        assert_same((wrapped[0], made))
        assert odewei.report(made).weight_bytes == odewei.report(pair[1]).weight_bytes
        odewei.close(made)


@pytest.mark.parametrize("wrap", ["compile", "own module", "peft"])
def test_wrappers(wrap: str, llama: Path) -> None:
    """What acts on a streamed model acts on the one inside a wrapper."""

    class Own(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

    ways: dict[str, Callable[[Any], Any]] = {
        "compile": lambda one: torch.compile(one, backend="eager"),
        "own module": Own,
        "peft": with_adapters,
    }
    with both(llama) as pair:
        outer = ways[wrap](pair[1])
        if wrap != "compile":
            assert odewei.trace(outer, IDS).units
            with odewei.profile(outer):
                output(outer)
        assert odewei.report(outer).weight_bytes == odewei.report(pair[1]).weight_bytes
        odewei.materialize(outer)
        assert not runtimes_in(outer)
        assert type(pair[1].lm_head.weight) is nn.Parameter
        assert_same(pair) if wrap != "peft" else None


def test_a_part_keeps_the_stream(tmp_path: Path) -> None:
    """An encoder, a layer, or the parameters alone go on when the model they were taken from is dropped."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model.get_encoder()(ids).last_hidden_state
        for depth in (0, "auto"):
            streamed: Any = odewei.from_pretrained(tmp_path, memory_budget="100KiB", prefetch_depth=depth)
            encoder = streamed.get_encoder()
            kept = dict(streamed.named_parameters())
            del streamed
            gc.collect()
            for _ in range(2):
                assert torch.equal(encoder(ids).last_hidden_state, expected)
            del encoder
            gc.collect()
            assert all(torch.equal(kept[name], one) for name, one in model.named_parameters())
            odewei.close(nn.ParameterList(kept.values()))


def test_modules_to_save_are_copied(llama: Path) -> None:
    """PEFT copies a part: an ordinary one, with its values, that trains."""
    with both(llama) as pair:
        wrapped = on_both(pair, lambda one: with_adapters(one, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        found, expected = on_both((wrapped[1], wrapped[0]), losses)
        assert found == expected
        assert_same(wrapped)


def test_another_dtype_is_saved(llama: Path, tmp_path: Path) -> None:
    """Weights that are cast as they are read are saved as cast, one unit after another, within the budget."""
    resident = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    budget = int(0.6 * models.weight_bytes(resident))
    streamed = odewei.from_pretrained(llama, dtype=torch.bfloat16, memory_budget=budget)
    streamed.save_pretrained(tmp_path)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert found.dtype is torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), resident.parameters(), strict=True))
    report = odewei.report(streamed)
    assert (report.overdrafts, report.peak_bytes <= report.budget_bytes) == (0, True)
    odewei.close(streamed)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_saving_over_the_own_folder(safe: bool, llama: Path, tmp_path: Path) -> None:
    """The files are whole afterwards, and the streamed model goes on."""
    folder = tmp_path / "own"
    shutil.copytree(llama, folder)
    if not safe:
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with both(folder) as (model, streamed):
        assert torch.equal(output(streamed), output(model))
        if safe:
            streamed.save_pretrained(folder)
        else:
            torch.save(streamed.state_dict(), folder / "pytorch_model.bin")
        assert_same((model, transformers.LlamaForCausalLM.from_pretrained(folder)))
        assert_same((model, streamed))
    with both(folder) as pair:
        assert_same(pair)
