"""Weights are right wherever, whenever and by whomever they are used."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.runtime import runtime_of
from odewei.scheduler.plan import Window
from tests import models as zoo


@pytest.fixture(params=[0, "auto"], ids=["plain", "prefetch"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The resident and the streamed twin of a small Llama, under 40 % of its weights."""
    build = zoo.CASES["llama"].build
    model = zoo.resident(build)
    path = zoo.save(model, tmp_path / "model.safetensors")
    budget = max(int(0.4 * zoo.weight_bytes(model)), zoo.smallest_budget(build, path))
    with zoo.streamed(build, path, memory_budget=budget, prefetch_depth=request.param) as streamed:
        yield model, streamed


def _inputs(seed: int = 1) -> dict[str, torch.Tensor]:
    return zoo.CASES["llama"].inputs(seed)


def test_reading_a_weight_outside_of_forward(pair: tuple[nn.Module, nn.Module]) -> None:
    """An attribute of any layer is the checkpoint's tensor, an nn.Parameter, before and after passes."""
    model, streamed = pair
    for _ in range(2):
        for name, parameter in model.named_parameters():
            owner, local = name.rsplit(".", 1)
            found = getattr(streamed.get_submodule(owner), local)
            assert isinstance(found, nn.Parameter)
            assert found is dict(streamed.named_parameters())[name]
            assert torch.equal(found, parameter)
        zoo.outputs(streamed, _inputs())


def test_iterating_parameters_loads_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    """Names, shapes, dtypes and devices of all parameters are known without reading, and none is on meta."""
    model, streamed = pair
    runtime_of(streamed).account.window = Window(0, 0)
    before = odewei.report(streamed).accesses
    described = {name: (p.shape, p.dtype, p.device) for name, p in streamed.named_parameters()}
    assert described == {name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()}
    assert all(isinstance(parameter, nn.Parameter) for parameter in streamed.parameters())
    assert (streamed.device, streamed.dtype) == (model.device, model.dtype)
    assert odewei.report(streamed).accesses == before


def test_printing_a_model_reads_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    """Its text is the resident model's; modules look for their biases to say whether they have one."""
    model, streamed = pair
    runtime_of(streamed).account.window = Window(0, 0)
    before = odewei.report(streamed).accesses
    assert str(streamed) == str(model)
    assert str(streamed.lm_head) == str(model.lm_head)
    assert odewei.report(streamed).accesses == before


def test_operations_on_iterated_parameters_load_them(pair: tuple[nn.Module, nn.Module]) -> None:
    """What named_parameters() and state_dict() hand out computes with the checkpoint's values."""
    model, streamed = pair
    state = streamed.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(streamed.named_parameters())[name].detach() + 0, parameter), name
        assert torch.equal(state[name], parameter), name


def test_a_kept_reference_stays_right(pair: tuple[nn.Module, nn.Module]) -> None:
    """Weights and views of them that the user keeps have their values while the model streams on, and no pass hangs."""
    model, streamed = pair
    kept = {name: module.weight[:] for name, module in streamed.named_modules() if isinstance(module, nn.Linear)}
    view = streamed.model.embed_tokens.weight[3:5]
    for seed in range(3):
        assert zoo.same_bits(zoo.outputs(streamed, _inputs(seed)), zoo.outputs(model, _inputs(seed)))
    for name, weight in kept.items():
        assert torch.equal(weight, model.get_submodule(name).weight)
    assert torch.equal(view, model.model.embed_tokens.weight[3:5])
    assert odewei.report(streamed).overdrafts > 0, "all weights are held: the report must say that the budget was not"
    del kept, weight, view


def test_a_weight_written_in_place_stays_changed(pair: tuple[nn.Module, nn.Module]) -> None:
    """What the user writes into a weight is never lost to an eviction."""
    model, streamed = pair
    with torch.no_grad():
        for one in (model, streamed):
            one.model.layers[2].mlp.up_proj.weight.mul_(2)
    for seed in range(3):
        assert zoo.same_bits(zoo.outputs(streamed, _inputs(seed)), zoo.outputs(model, _inputs(seed)))


def test_a_parameter_replaced_by_the_user_is_the_users(pair: tuple[nn.Module, nn.Module]) -> None:
    """Assigning a new parameter takes it out of streaming for good."""
    model, streamed = pair
    new = torch.randn(48)
    for one in (model, streamed):
        one.model.layers[1].input_layernorm.weight = nn.Parameter(new.clone())
    for seed in range(3):
        assert zoo.same_bits(zoo.outputs(streamed, _inputs(seed)), zoo.outputs(model, _inputs(seed)))
    assert torch.equal(streamed.model.layers[1].input_layernorm.weight, new)


def test_an_exception_in_forward_returns_every_lease(pair: tuple[nn.Module, nn.Module]) -> None:
    """After an exception in the middle nothing is leased and the next call is right."""
    model, streamed = pair

    def fail(module: nn.Module, args: object) -> None:
        raise ZeroDivisionError

    handle = streamed.model.layers[3].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        zoo.outputs(streamed, _inputs())
    handle.remove()
    assert runtime_of(streamed).driver.ledger.leases() == 0
    assert zoo.same_bits(zoo.outputs(streamed, _inputs()), zoo.outputs(model, _inputs()))


def test_an_interrupt_in_forward_is_survived(pair: tuple[nn.Module, nn.Module]) -> None:
    """torch runs no hooks after a KeyboardInterrupt; the next call returns what was left behind and is right."""
    model, streamed = pair

    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    for layer in (1, 4):
        handle = streamed.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            zoo.outputs(streamed, _inputs())
        handle.remove()
        sys.exc_info()
        assert zoo.same_bits(zoo.outputs(streamed, _inputs()), zoo.outputs(model, _inputs()))
        assert runtime_of(streamed).driver.ledger.leases() == 0


def test_four_threads_at_once(pair: tuple[nn.Module, nn.Module]) -> None:
    """Concurrent passes with different inputs are right and none hangs."""
    model, streamed = pair
    expected = {seed: zoo.outputs(model, _inputs(seed)) for seed in range(4)}
    right: list[bool] = []

    def work(seed: int) -> None:
        right.extend(zoo.same_bits(zoo.outputs(streamed, _inputs(seed)), expected[seed]) for _ in range(6))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 24


def test_layers_called_by_themselves_and_in_another_order(pair: tuple[nn.Module, nn.Module]) -> None:
    """Submodules are right when called directly, skipped, repeated or reversed."""
    model, streamed = pair
    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    order = [5, 5, 0, 3, 2, 1, 5, 0]
    with torch.no_grad():
        for index in order:
            left = streamed.model.layers[index].mlp(hidden)
            assert torch.equal(left, model.model.layers[index].mlp(hidden))
        del streamed.model.layers[2], model.model.layers[2]
    assert zoo.same_bits(zoo.outputs(streamed, _inputs()), zoo.outputs(model, _inputs()))


def test_modes(pair: tuple[nn.Module, nn.Module]) -> None:
    """Weights loaded under inference_mode work in grad mode, and gradients with respect to inputs are right."""
    model, streamed = pair
    with torch.inference_mode():
        streamed(**_inputs())
    embeds = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(1))
    grads = []
    for one in (model, streamed):
        for parameter in one.parameters():
            parameter.requires_grad_(False)
        leaf = embeds.clone().requires_grad_()
        one(inputs_embeds=leaf).logits.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


def test_escaped_output_views(tmp_path: Path) -> None:
    """A forward that returns a view of its own weight returns one that stays right."""

    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Embedding(50, 16) for _ in range(8))

        def forward(self) -> list[torch.Tensor]:
            return [part.weight[1:3] for part in self.parts]

    model = zoo.resident(Latents)
    path = zoo.save(model, tmp_path / "model.safetensors")
    for depth in (0, "auto"):
        with zoo.streamed(Latents, path, memory_budget=8192, prefetch_depth=depth) as streamed, torch.no_grad():
            first = streamed()
            assert zoo.same_bits(first, model())
            streamed()
            assert zoo.same_bits(first, model())
            del first


def test_materialize(pair: tuple[nn.Module, nn.Module]) -> None:
    """materialize() leaves an ordinary model with all weights; it may be called twice, and deep-copied."""
    model, streamed = pair
    threads = threading.active_count()
    assert odewei.materialize(streamed) is streamed
    assert odewei.materialize(streamed) is streamed
    assert threading.active_count() <= threads
    assert type(streamed.lm_head._parameters) is dict
    clone = copy.deepcopy(streamed)
    for one in (streamed, clone):
        assert zoo.same_bits(zoo.outputs(one, _inputs()), zoo.outputs(model, _inputs()))
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(streamed.named_parameters())[name], parameter)


def test_converting_and_pickling_are_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    """What would load or lose all weights is an error with the cure; what changes nothing is not."""
    model, streamed = pair
    for convert in (nn.Module.half, lambda one: one.to(torch.bfloat16), lambda one: one.share_memory().double()):
        with pytest.raises(odewei.OdeweiError, match="dtype="):
            convert(streamed)
    with pytest.raises(odewei.OdeweiError, match="materialize"):
        pickle.dumps(streamed)
    assert streamed.to("cpu").float() is streamed
    assert zoo.same_bits(zoo.outputs(streamed, _inputs()), zoo.outputs(model, _inputs()))
    odewei.materialize(streamed)
    assert pickle.loads(pickle.dumps(streamed)).half().lm_head.weight.dtype is torch.float16


def test_an_operation_on_a_placeholder_keeps_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    """What it worked on is free the moment it ends, without the collector: memory of weights cannot wait for that."""
    _, streamed = pair
    placeholder = next(iter(streamed.parameters()))
    gc.collect()
    gc.disable()
    try:
        argument = torch.ones(placeholder.shape)
        gone = weakref.ref(argument)
        with torch.no_grad():
            torch.add(placeholder, argument)
        del argument
        assert gone() is None
    finally:
        gc.enable()
