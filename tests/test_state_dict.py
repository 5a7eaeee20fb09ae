"""state_dict() of a streamed model: the checkpoint's tensors, over its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import odewei
from odewei.runtime import runtime_of
from tests import models


def both(tmp_path: Path, name: str = "llama") -> tuple[models.ModelFn, nn.Module, Path]:
    build = models.CASES[name].build
    model = models.resident(build)
    return build, model, models.save(model, tmp_path / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert models.same_bits([found[name]], [tensor]), name


@pytest.mark.parametrize("name", ["llama", "gpt2 (tied)", "convnet", "recurrent"])
@pytest.mark.parametrize("depth", [0, "auto"])
def test_it_is_the_checkpoint_and_costs_no_memory(name: str, depth: int | str, tmp_path: Path) -> None:
    """Names, order and bits are the resident model's, none of it is read through the budget, before or after passes."""
    build, model, path = both(tmp_path, name)
    budget = models.smallest_budget(build, path)
    with models.streamed(build, path, memory_budget=budget, prefetch_depth=depth) as streamed:
        for _ in range(2):
            accesses = odewei.report(streamed).accesses
            state = streamed.state_dict()
            assert odewei.report(streamed).accesses == accesses
            assert not any(tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in state.values())
            assert_same(state, model.state_dict())
            models.outputs(streamed, models.CASES[name].inputs(0))
        assert odewei.report(streamed).overdrafts == 0
    assert_same(state, model.state_dict())  # it needs no model


def test_a_unit_that_leaves_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in memory when torch collected it, and has left since, becomes a tensor over the file all the same."""
    build, model, path = both(tmp_path)
    with models.streamed(build, path) as streamed:
        models.outputs(streamed, models.CASES["llama"].inputs(0))
        addresses = {module.weight.data_ptr() for module in streamed.modules() if isinstance(module, nn.Linear)}
        monkeypatch.setattr(runtime_of(streamed).binder, "find", lambda unit, name: None)
        state = streamed.state_dict()
        monkeypatch.undo()
        assert not addresses & {tensor.data_ptr() for tensor in state.values()}
        assert_same(state, model.state_dict())


def test_it_can_be_saved(tmp_path: Path) -> None:
    """With safetensors and torch; what was saved equals what was streamed."""
    build, model, path = both(tmp_path)
    with models.streamed(build, path) as streamed:
        save_file(streamed.state_dict(), tmp_path / "again.safetensors")
        torch.save(streamed.state_dict(), tmp_path / "again.pt")
    assert_same(load_file(tmp_path / "again.safetensors"), dict(sorted(load_file(path).items())))
    assert_same(torch.load(tmp_path / "again.pt"), dict(model.state_dict()))


def test_writing_into_it_changes_the_model_and_not_the_file(tmp_path: Path) -> None:
    """As for a resident model: its state has the memory of the model's weights."""
    build, model, path = both(tmp_path)
    before = path.read_bytes()
    with models.streamed(build, path) as streamed:
        for one in (model, streamed):
            for tensor in one.state_dict().values():
                tensor.mul_(0.5)
        inputs = models.CASES["llama"].inputs(0)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))
        assert_same(streamed.state_dict(), model.state_dict())
    assert path.read_bytes() == before


def test_changed_weights_are_the_changed_ones(tmp_path: Path) -> None:
    """Written in place (in memory or after the unit left) and replaced ones."""
    build, model, path = both(tmp_path)
    with models.streamed(build, path, memory_budget=models.smallest_budget(build, path)) as streamed:
        for one in (model, streamed):
            kept = one.model.layers[4].mlp.down_proj.weight
            models.outputs(one, models.CASES["llama"].inputs(0))
            with torch.no_grad():
                one.model.layers[1].mlp.up_proj.weight.mul_(2)
                kept.mul_(3)
            one.model.layers[2].input_layernorm.weight = nn.Parameter(torch.ones(48))
            del kept
        assert_same(streamed.state_dict(), model.state_dict())
        models.outputs(streamed, models.CASES["llama"].inputs(0))
        assert_same(streamed.state_dict(), model.state_dict())


def test_what_lies_in_no_file_as_the_model_has_it(tmp_path: Path) -> None:
    """Cast on load, or delivered from memory: right when it is used, and loaded then only."""
    build, model, path = both(tmp_path)
    for source, dtype in ((path, torch.bfloat16), (load_file(path), None)):
        with models.streamed(build, source, dtype=dtype, prefetch_depth=0) as streamed:
            state = streamed.state_dict()
            assert odewei.report(streamed).bytes_read == 0
            for name, tensor in model.state_dict().items():
                assert models.same_bits([state[name] + 0], [tensor.to(dtype or tensor.dtype) + 0]), name


def test_parts_prefixes_and_variables(tmp_path: Path) -> None:
    """A model within another, a part of it by itself, and keep_vars, which hands out the parameters."""
    build, model, path = both(tmp_path)
    with models.streamed(build, path) as streamed:
        assert_same(nn.Sequential(streamed).state_dict(), nn.Sequential(model).state_dict())
        part, expected = streamed.model.layers[1].state_dict(), model.model.layers[1].state_dict()
        assert_same({name: tensor + 0 for name, tensor in part.items()}, expected)
        kept = streamed.state_dict(keep_vars=True)
        assert all(isinstance(kept[name], nn.Parameter) for name, _ in model.named_parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state(assign: bool, tmp_path: Path) -> None:
    """Other values go in as they do into a resident model, and stay."""
    build, _, path = both(tmp_path)
    other = models.resident(build, seed=7)
    with models.streamed(build, path, memory_budget=models.smallest_budget(build, path)) as streamed:
        streamed.load_state_dict(other.state_dict(), assign=assign)
        for seed in range(2):
            inputs = models.CASES["llama"].inputs(seed)
            assert models.same_bits(models.outputs(streamed, inputs), models.outputs(other, inputs))
        assert_same(streamed.state_dict(), other.state_dict())


def test_a_file_that_was_replaced(tmp_path: Path) -> None:
    """Its bytes are never handed out as the model's."""
    build, _, path = both(tmp_path)
    with models.streamed(build, path, prefetch_depth=0) as streamed:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(odewei.OdeweiError, match="changed"):
            streamed.state_dict()["lm_head.weight"].sum()


def test_it_is_the_memory_of_a_model_that_became_ordinary(tmp_path: Path) -> None:
    """What was taken before shows what is written afterwards, as for any model; and ties stay ties."""
    build, model, path = both(tmp_path, "gpt2 (tied)")
    with models.streamed(build, path) as streamed:
        state, detached = streamed.state_dict(), next(streamed.parameters()).detach()
        odewei.materialize(streamed)
        assert not any(type(tensor) is not torch.Tensor for tensor in (*state.values(), detached))
        assert len({tensor.data_ptr() for tensor in state.values()}) == len(
            {tensor.data_ptr() for tensor in model.state_dict().values()}
        )
        for one in (model, streamed):
            for parameter in one.parameters():
                parameter.detach().numpy()[...] *= 2
        assert_same(state, model.state_dict())
        assert torch.equal(detached, next(model.parameters()))
