"""Parameters that users keep, write into, and put aside for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

import odewei
from odewei.runtime import runtime_of
from tests import models


def build() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)))


@pytest.fixture(params=[0, "auto"], ids=["plain", "prefetch"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The resident and the streamed twin, of which two layers fit into memory."""
    model = models.resident(build)
    path = models.save(model, tmp_path / "model.safetensors")
    budget = 2 * models.smallest_budget(build, path)
    with models.streamed(build, path, memory_budget=budget, prefetch_depth=request.param) as streamed:
        yield model, streamed


def drive_out(streamed: nn.Module, layer: int) -> None:
    """Use other layers until this one has left memory."""
    runtime = runtime_of(streamed)
    name = f"{layer}.0.weight"
    unit = next(index for index, unit in enumerate(runtime.units) if name in {one.name for one in unit.weights})
    for _ in range(50):
        if runtime.binder.find(unit, name) is None:
            return
        for other in range(len(streamed)):
            if other != layer:
                streamed[other](torch.ones(1, 32))
    raise AssertionError("the layer does not leave")


def check(model: nn.Module, streamed: nn.Module) -> None:
    for seed in range(3):
        inputs = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert models.same_bits([streamed(inputs)], [model(inputs)])


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "let go"])
@pytest.mark.parametrize("how", ["the parameter", "a view of it"])
def test_a_write_after_the_unit_left(keep: bool, how: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """It is not lost, whether or not the writer still holds what it wrote into when the unit comes back."""
    model, streamed = pair
    streamed[2](torch.ones(1, 32))  # so that it is in memory: a unit that loads for a view stays as long as the view
    weight = streamed[2][0].weight
    target = weight if how == "the parameter" else weight[3:7]
    del weight
    if how == "the parameter":  # a unit of which somebody has a view does not leave
        drive_out(streamed, 2)
    with torch.no_grad():
        target.mul_(3)
        (model[2][0].weight if how == "the parameter" else model[2][0].weight[3:7]).mul_(3)
    if not keep:
        del target
    check(model, streamed)
    check(model, streamed)
    assert odewei.report(streamed).evictions > 5


def test_a_write_just_before_the_unit_comes_back(pair: tuple[nn.Module, nn.Module]) -> None:
    """Writes of several times, in and out of memory, all count."""
    model, streamed = pair
    for step in range(3):
        weight = streamed[1][0].weight
        if step == 0:
            drive_out(streamed, 1)
        with torch.no_grad():
            weight.add_(1)
            model[1][0].weight.add_(1)
        del weight
        check(model, streamed)


WRITES = {
    "in place": lambda weight: weight.mul_(3),
    "copied": lambda weight: weight.copy_(torch.full_like(weight, 0.5)),
    "out": lambda weight: torch.add(torch.ones(32, 32), 1, out=weight),
    "several": lambda weight: torch._foreach_mul_([weight], 3),
    "initialised": nn.init.eye_,
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_through_parameters(how: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """What an operation writes into something from named_parameters() stays when the unit has come and gone."""
    model, streamed = pair
    for one in pair:
        drive_out(streamed, 2)
        with torch.no_grad():
            WRITES[how](dict(one.named_parameters())["2.0.weight"])
    for _ in range(2):
        check(model, streamed)
        for layer in (0, 1, 3, 4):
            drive_out(streamed, layer)


def test_what_was_only_read_is_not_kept(pair: tuple[nn.Module, nn.Module]) -> None:
    """A reference without a write costs nothing once it is dropped: the unit streams as before."""
    model, streamed = pair
    weight = streamed[2][0].weight
    drive_out(streamed, 2)
    del weight
    binder = runtime_of(streamed).binder
    check(model, streamed)
    assert not any(binder.was_written(unit) for unit in range(len(runtime_of(streamed).units)))
    drive_out(streamed, 2)


def test_a_parameter_stays_the_same_object(pair: tuple[nn.Module, nn.Module]) -> None:
    """While somebody holds it, a weight that comes back is the very parameter that was handed out."""
    _, streamed = pair
    weight = streamed[3][0].weight
    for _ in range(3):
        drive_out(streamed, 3)
        assert streamed[3][0].weight is weight


def test_functional_call(pair: tuple[nn.Module, nn.Module]) -> None:
    """Others' values for a while; afterwards the weights stream again."""
    model, streamed = pair
    inputs = torch.randn(2, 32)
    for names in (["2.0.weight"], ["1.0.weight", "4.0.bias"], [name for name, _ in model.named_parameters()]):
        for _ in range(2):
            state = {name: torch.randn_like(model.get_parameter(name)) for name in names}
            assert models.same_bits([functional_call(streamed, state, inputs)], [functional_call(model, state, inputs)])
        check(model, streamed)
    before = odewei.report(streamed).bytes_read
    check(model, streamed)
    assert odewei.report(streamed).bytes_read - before > 1.5 * models.weight_bytes(model)  # three passes
    for layer in range(6):
        drive_out(streamed, layer)


@pytest.mark.parametrize("here", [True, False], ids=["in memory", "not in memory"])
def test_another_parameter_put_back_by_hand(here: bool, pair: tuple[nn.Module, nn.Module]) -> None:
    """The user's own parameter is used while it is there; putting back what was there makes it stream again."""
    model, streamed = pair
    own = nn.Parameter(torch.randn(32, 32))
    before = {one: one[2][0].weight for one in pair}
    if not here:
        drive_out(streamed, 2)
    for one in pair:
        one[2][0].weight = own
    check(model, streamed)
    assert streamed[2][0].weight is own
    for one in pair:
        one[2][0].weight = before.pop(one)
    check(model, streamed)
    drive_out(streamed, 2)
    check(model, streamed)


@pytest.mark.parametrize("here", [True, False], ids=["in memory", "not in memory"])
def test_deleting_a_parameter(here: bool, pair: tuple[nn.Module, nn.Module]) -> None:
    """It is gone as from any module; one stored in its place later is the user's, what was there before streams."""
    model, streamed = pair
    before = {one: one[2][0].bias for one in pair}
    if not here:
        drive_out(streamed, 2)
    for one in pair:
        del one[2][0].bias
        assert "bias" not in dict(one[2][0].named_parameters())
        with pytest.raises(AttributeError):
            _ = one[2][0].bias
        with pytest.raises(AttributeError):
            del one[2][0].bias
        one[2][0].bias = None
    check(model, streamed)
    for one in pair:
        one[2][0].bias = before.pop(one)
    check(model, streamed)
    drive_out(streamed, 2)
    check(model, streamed)


@pytest.mark.parametrize("depth", [0, "auto"])
def test_one_weight_in_several_places_of_a_layer_that_is_called_again(depth: int | str, tmp_path: Path) -> None:
    """Gradients of all uses are added in the order in which backward comes to them, whatever is read together."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
            self.parts[2].weight = self.parts[0].weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.parts(hidden)
            return found

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                for layer in self.layers:
                    hidden = torch.tanh(layer(hidden))
            return hidden

    model = models.resident(Layers)
    path = models.save(model, tmp_path / "model.safetensors")
    with models.streamed(Layers, path, memory_budget=16384, granularity="block", prefetch_depth=depth) as streamed:
        assert {len(unit.weights) for unit in runtime_of(streamed).units} == {5}, "a layer is read together"
        for seed in range(5):
            given = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
            for one in (model, streamed):
                one.zero_grad()
                one(given).square().sum().backward()
            for (name, expected), found in zip(model.named_parameters(), streamed.parameters(), strict=True):
                assert models.same_bits([found.grad], [expected.grad]), name


def test_a_write_by_numpy_after_somebody_looked(pair: tuple[nn.Module, nn.Module]) -> None:
    """Memory that was handed out is looked at when a unit is to leave, and when the model is copied: by several
    threads, and again as long as somebody has it.
    """
    model, streamed = pair
    given = [one[2][0].weight.detach().numpy() for one in (model, streamed)]
    binder = runtime_of(streamed).binder
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            looked = [pool.submit(copy.deepcopy, streamed) for _ in range(2)]
            looked += [pool.submit(binder.was_written, unit) for unit in range(6) if not binder.is_held(unit)]
            for one in looked:
                made = one.result()
                if isinstance(made, nn.Module):
                    odewei.close(made)
            exposed = streamed[4][0].bias.detach().numpy()
            del exposed
    for array in given:
        array[:] = 3
    del array
    given.clear()
    check(model, streamed)
    made = copy.deepcopy(streamed)
    check(model, made)
    odewei.close(made)
