"""deepcopy gives a second model that streams; nothing else of a streamed model can be copied or pickled."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.runtime import runtime_of, runtimes_in
from tests import models


def check(model: nn.Module, streamed: nn.Module, name: str) -> None:
    for seed in range(2):
        inputs = models.CASES[name].inputs(seed)
        assert models.same_bits(models.outputs(streamed, inputs), models.outputs(model, inputs))


@pytest.mark.parametrize("depth", [0, "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2 (tied)", "recurrent", "convnet"])
def test_a_deep_copy_streams(name: str, depth: int | str, tmp_path: Path) -> None:
    """It has the same bits under the same budget, and neither model needs the other."""
    build = models.CASES[name].build
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    budget = max(int(0.5 * models.weight_bytes(model)), models.smallest_budget(build, path))
    with models.streamed(build, path, memory_budget=budget, prefetch_depth=depth) as streamed:
        check(model, streamed, name)
        before = odewei.report(streamed).bytes_read
        made = copy.deepcopy(streamed)
        if name != "recurrent":  # nn.LSTM looks at its weights when it is copied
            read = odewei.report(streamed).bytes_read - before
            assert read <= budget, "only what the scheduler reads ahead by itself"
        assert type(made) is type(streamed)
        assert made.training is False
        check(model, made, name)
        odewei.close(streamed)
        check(model, made, name)
        report = odewei.report(made)
        assert report.budget_bytes == budget
        assert report.peak_bytes <= budget
        assert [n for n, _ in made.named_parameters()] == [n for n, _ in model.named_parameters()]
        again = copy.deepcopy(made)
        odewei.close(made)
        check(model, again, name)
        odewei.close(again)


def test_what_the_user_changed_is_copied(tmp_path: Path) -> None:
    """Weights written in place, parameters and modules put in, hooks; the copies are independent afterwards."""
    build = models.CASES["llama"].build
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    with models.streamed(build, path, memory_budget=models.smallest_budget(build, path)) as streamed:
        calls: list[str] = []
        for one in (model, streamed):
            with torch.no_grad():
                one.model.layers[1].mlp.up_proj.weight.mul_(2)
            one.model.layers[2].input_layernorm.weight = nn.Parameter(torch.full((48,), 0.5))
            one.model.layers[3].extra = nn.Linear(4, 4)
            one.register_forward_hook(lambda *_: calls.append("called"))
        models.outputs(streamed, models.CASES["llama"].inputs(0))
        made = copy.deepcopy(streamed)
        check(model, made, "llama")
        assert len(calls) == 1 + 2 * 2, "the hook was copied"
        assert torch.equal(made.model.layers[3].extra.weight, streamed.model.layers[3].extra.weight)
        with torch.no_grad():
            made.model.layers[2].input_layernorm.weight.zero_()
            made.model.layers[1].mlp.up_proj.weight.zero_()
            made.model.layers[4].mlp.up_proj.weight.zero_()
        check(model, streamed, "llama")
        odewei.close(made)


def test_handles_of_hooks_are_copied(tmp_path: Path) -> None:
    """A module that keeps the handle of a hook, as transformers does for gradient checkpointing: copies of copies."""
    build = models.CASES["llama"].build
    path = models.save(models.resident(build), tmp_path / "model.safetensors")
    called: list[nn.Module] = []
    with models.streamed(build, path) as streamed:
        for module in streamed.modules():
            module.kept_handle = module.register_forward_hook(lambda module, args, output: called.append(module))
        made: list[nn.Module] = [streamed]
        for _ in range(3):
            made.append(copy.deepcopy(made[-1]))
        odewei.materialize(made[2])
        made.append(copy.deepcopy(made[2]))
        for one in made:
            called.clear()
            models.outputs(one, models.CASES["llama"].inputs(0))
            assert {id(module) for module in called} <= {id(module) for module in one.modules()}
            count = len(called)
            for module in one.modules():
                module.kept_handle.remove()
            models.outputs(one, models.CASES["llama"].inputs(0))
            assert len(called) == count > 10
        odewei.close(made[1])
        odewei.close(made[3])


def test_a_model_inside_another_object(tmp_path: Path) -> None:
    """A pipeline of two streamed models under one budget is copied with both, and they share the budget."""
    build = models.CASES["bert"].build
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    budget = odewei.MemoryBudget(3 * models.smallest_budget(build, path))
    with (
        models.streamed(build, path, memory_budget=budget) as one,
        models.streamed(build, path, memory_budget=budget) as other,
    ):
        pipeline = {"one": one, "list": [other, one]}
        made = copy.deepcopy(pipeline)
        assert made["list"][1] is made["one"] is not one  # type: ignore[index]
        for copied in made["list"]:
            check(model, copied, "bert")
            assert runtime_of(copied).budget is budget
        check(model, one, "bert")
        assert budget.peak_bytes <= budget.limit_bytes
        for copied in made["list"]:
            odewei.close(copied)


def test_a_dropped_copy_closes(tmp_path: Path) -> None:
    """A copy lives and dies by itself."""
    build = models.CASES["llama"].build
    path = models.save(models.resident(build), tmp_path / "model.safetensors")
    with models.streamed(build, path) as streamed:
        made = copy.deepcopy(streamed)
        driver = runtime_of(made).driver
        del made
        gc.collect()
        assert not driver.ledger.accounts
        models.outputs(streamed, models.CASES["llama"].inputs(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_model_is_copied(tmp_path: Path) -> None:
    """The wrapper that torch.compile gives says itself how it is copied."""
    build = models.CASES["llama"].build
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    with models.streamed(build, path) as streamed:
        made = copy.deepcopy(torch.compile(streamed, backend="eager"))
        assert type(made) is type(torch.compile(model))
        assert made._orig_mod is not streamed
        with torch.no_grad():
            check(model, made, "llama")
        odewei.close(made)
        check(model, streamed, "llama")


def test_parts_and_pickles_are_refused(tmp_path: Path) -> None:
    """The message names the cure. After materialize everything goes."""
    build = models.CASES["llama"].build
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    with models.streamed(build, path) as streamed:
        for refused in (
            lambda: pickle.dumps(streamed),
            lambda: torch.save(streamed, io.BytesIO()),
            lambda: pickle.dumps(streamed.model.layers[0].mlp.up_proj),
        ):
            with pytest.raises(odewei.OdeweiError, match="materialize"):
                refused()
        for part in (lambda one: one.model.layers[0], lambda one: one.model.layers[0].mlp.up_proj):
            made = copy.deepcopy(part(streamed))
            assert not runtimes_in(made)
            for found in (made, pickle.loads(pickle.dumps(made))):
                expected = dict(part(model).named_parameters())
                assert all(type(one) is nn.Parameter for one in found.parameters())
                assert all(torch.equal(one, expected[name]) for name, one in found.named_parameters())
        check(model, streamed, "llama")
        odewei.materialize(streamed)
        made = copy.deepcopy(streamed)
        assert not runtimes_in(made)
        check(model, made, "llama")
        check(model, copy.deepcopy(pickle.loads(pickle.dumps(streamed))), "llama")


def test_a_copied_part_streams_again(tmp_path: Path) -> None:
    """A layer that was copied out of a streamed model gets streamed weights, in a copy of the whole model and in a
    model that is built of it: what the layer has kept of its first life does nothing.
    """

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3)))

    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    given = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with models.streamed(build, path, memory_budget=1200, granularity="leaf") as streamed, torch.no_grad():
        for one in (model, streamed):
            one[0] = copy.deepcopy(one[1])
            one[0][1].weight = one[2][1].bias
        made = copy.deepcopy(streamed)
        expected = model(given)
        for one in (streamed, made):
            assert torch.equal(one(given), expected)
        odewei.close(made)

        def again() -> nn.Module:
            return nn.Sequential(nn.Sequential(copy.deepcopy(streamed[1][0]), nn.LayerNorm(8)))

        weights = {f"0.{name}": value for name, value in models.resident(build)[0].state_dict().items()}
        with models.streamed(again, weights, granularity="leaf") as second:
            expected = models.resident(build)[0](given)
            assert torch.equal(second(given), expected)
