"""Building changes nothing but the model: what is kept beside its modules, what was missing, the generator, modes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei import generator_jump
from odewei.errors import MissingWeightError, ModelError
from odewei.meta_model import build_without_weights
from odewei.tensor_bytes import tensor_bytes
from odewei.torch import init_on_demand_weights_model
from tests import models

SMALL, LARGE = 8, 160  # widths of square weights on both sides of what is given no values while building


@pytest.fixture(autouse=True)
def _less_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests need no large tensors."""
    monkeypatch.setattr("odewei.meta_model._LARGE", 1 << 14)


@pytest.fixture(params=["by shape", "at once"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed with tensors without values: shapes only, or values if they are few."""
    if request.param == "by shape":
        monkeypatch.setattr("odewei.without_values._AT_ONCE", 0)


Build = Callable[[], nn.Module]


def ordinary(build: Build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def save(model: nn.Module, path: Path, *, without: str = "") -> str:
    """The model's state, other than it was built, but for names that begin with ``without``."""
    state = {name: value for name, value in model.state_dict().items() if not (without and name.startswith(without))}
    save_file(
        {
            name: (value + 1).contiguous() if value.is_floating_point() else value.clone()
            for name, value in state.items()
        },
        path,
    )
    return str(path)


def same_pass(build: Build, tmp_path: Path, width: int, **options: Any) -> nn.Module:
    """Streams what ``build`` makes, compares a pass, and returns the streamed model, closed."""
    normal = ordinary(build)
    path = save(normal, tmp_path / "model.safetensors")
    normal.load_state_dict(_load(path), strict=False)
    torch.manual_seed(0)
    with models.streamed(build, path, **options) as model:
        x = torch.linspace(-1, 1, 3 * width).reshape(3, width)
        for _ in range(2):
            assert models.same_bits(models.outputs(model, {"x": x}), models.outputs(normal, {"x": x}))
    return model


def _load(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# -- what is kept beside the modules -------------------------------------------------------------------------------


@dataclasses.dataclass
class Holder:
    layer: nn.Module


def _in_list(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = [layer]
    return held, lambda: held[0]


def _in_tuple(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = (layer, "x")
    return held, lambda: held[0]


def _in_dict(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = {"deep": [{"layer": layer}]}
    return held, lambda: held["deep"][0]["layer"]


def _in_closure(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    return (lambda: layer), lambda: layer


def _in_partial(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = functools.partial(nn.Module.__call__, layer)
    return held, lambda: held.args[0]


def _in_method(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = layer.forward
    return held, lambda: held.__self__


def _in_dataclass(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = Holder(layer)
    return held, lambda: held.layer


def _in_weakref(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = weakref.ref(layer)
    return (held, [layer]), lambda: held()  # type: ignore[return-value]


def _in_generator(layer: nn.Module) -> tuple[object, Callable[[], nn.Module]]:
    held = itertools.cycle([layer])
    return held, lambda: next(held)


PLACES = [
    _in_list,
    _in_tuple,
    _in_dict,
    _in_closure,
    _in_partial,
    _in_method,
    _in_dataclass,
    _in_weakref,
    _in_generator,
]


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_hidden_modules_have_their_values(place: Callable[..., Any], width: int, tmp_path: Path) -> None:
    """A module that is no attribute of a module computes as in the ordinary model, whatever holds it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)
            self.held, self.get = place(nn.Linear(width, width, bias=False))
            self.last = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.get()(self.layer(x)))

    same_pass(Model, tmp_path, width)


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("init", ["fills", "edits", "computes", "truncated", "copies", "shared", "legacy"])
@pytest.mark.usefixtures("either_way")
def test_hidden_values_are_those_of_an_ordinary_build(init: str, width: int, tmp_path: Path) -> None:
    """However a hidden parameter came to its values, it has them to the bit."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)
            hidden = nn.Linear(width, width, bias=False)
            weight = hidden.weight
            with torch.no_grad():
                if init == "fills":
                    weight.exponential_().mul_(0.1)
                elif init == "edits":
                    weight[0] = 3.0
                    weight.data[1:3].fill_(0.5)
                    weight.data = weight.data * 2 + torch.eye(width)
                    weight[:, 0] += self.layer.bias
                elif init == "computes":
                    hidden.weight = nn.Parameter(
                        torch.linalg.qr(torch.randn(width, width))[0] * weight.abs().max().item()
                    )
                elif init == "truncated":
                    nn.init.trunc_normal_(weight, std=0.5, a=-0.7, b=0.7)
                    weight.add_(nn.init.trunc_normal_(torch.empty(width, width), std=0.02))
                elif init == "copies":
                    weight.copy_(torch.arange(width * width, dtype=torch.float32).reshape(width, width) / width**2)
                elif init == "shared":
                    weight.data = torch.stack([weight.data[i].flip(0) for i in range(width)])
                    hidden.weight = nn.Parameter(weight.t())
                else:
                    hidden.weight = nn.Parameter(torch.Tensor(width, width))
                    hidden.weight.data.uniform_(-0.1, 0.1)
            self.held = [hidden]
            self.register_buffer("noise", torch.rand(width), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.held[0](self.layer(x)) + self.noise

    same_pass(Model, tmp_path, width)


@pytest.mark.parametrize("width", [SMALL, LARGE])
def test_caches_that_a_build_fills_are_as_ever(width: int, tmp_path: Path) -> None:
    """A module in an lru_cache or a global computes in ordinary models that are built later as in the streamed one."""
    kept: dict[str, nn.Module] = {}

    def make() -> tuple[Build, dict[str, nn.Module]]:
        found: dict[str, nn.Module] = {}

        @functools.lru_cache
        def cached() -> nn.Module:
            return nn.Linear(width, width, bias=False)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(width, width)
                self.cached = [cached()]
                if "layer" not in found:
                    found["layer"] = nn.Linear(width, width)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return found["layer"](self.cached[0](self.layer(x)))

        return Model, found

    (build, _), (other, kept) = make(), make()
    normal = ordinary(build)
    path = save(normal, tmp_path / "model.safetensors")
    torch.manual_seed(0)
    odewei.close(init_on_demand_weights_model(other, path))
    assert not any(parameter.is_meta for parameter in kept["layer"].parameters())
    x = torch.ones(2, width)
    later, expected = other(), build()
    later.load_state_dict(_load(path))
    expected.load_state_dict(_load(path))
    assert torch.equal(later(x), expected(x))


def test_what_a_build_throws_away_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is replaced while building, even one in a cycle, is not given values afterwards."""
    monkeypatch.setattr("odewei.build_rest.available_bytes", lambda: 0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(LARGE, LARGE)
            self.layer.me = [self.layer]
            self.layer = nn.Linear(LARGE, LARGE)

    assert build_without_weights(Model).layer.weight.is_meta


def test_hidden_values_without_memory_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused with a cure that works: registered, they are streamed."""
    monkeypatch.setattr("odewei.build_rest.available_bytes", lambda: 0)

    class Model(nn.Module):
        def __init__(self, *, registered: bool) -> None:
            super().__init__()
            layers = [nn.Linear(LARGE, LARGE)]
            self.layers = nn.ModuleList(layers) if registered else layers

    with pytest.raises(ModelError, match=r"no memory.*ModuleList"):
        build_without_weights(lambda: Model(registered=False))
    assert build_without_weights(lambda: Model(registered=True)).layers[0].weight.is_meta


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("view", ["data", "detached", "hidden", "numpy"])
def test_a_view_beside_its_weight_is_refused(view: str, width: int) -> None:
    """It would keep the values from before the checkpoint; taken in forward it is right."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, width))
            if view == "data":
                self.half = self.weight.data[: width // 2]
            elif view == "detached":
                kept = self.weight.detach()
                self.get = lambda: kept
            elif view == "hidden":
                self.held = [nn.Linear(width, width)]
                self.held[0].weight = nn.Parameter(self.weight.data)
            else:
                self.array = self.weight.data.numpy()

    if view == "numpy" and width == LARGE:
        pytest.skip("an array gets the values at once, as its own")
    with pytest.raises(ModelError, match="view of a weight") as caught:
        build_without_weights(Model)
    assert "weight" in str(caught.value)


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize("norm", ["spectral", "weight", "parametrized", "orthogonal"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_norms_of_any_size(norm: str, width: int, tmp_path: Path) -> None:
    """What hooks and parametrizations compute from weights while building is as ever, and so are their buffers."""
    wrap = {
        "spectral": nn.utils.spectral_norm,
        "weight": nn.utils.weight_norm,
        "parametrized": nn.utils.parametrizations.spectral_norm,
        "orthogonal": nn.utils.parametrizations.orthogonal,
    }[norm]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = wrap(nn.Linear(width, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    normal = ordinary(Model).eval()
    path = str(models.save(normal, tmp_path / "model.safetensors"))
    torch.manual_seed(0)
    with models.streamed(Model, path) as model:
        x = torch.linspace(-1, 1, 3 * width).reshape(3, width)
        assert models.same_bits(models.outputs(model, {"x": x}), models.outputs(normal, {"x": x}))


# -- the generator -------------------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """Draws in many ways, between and within large and small tensors."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)
        for number, kind in enumerate(kinds):
            self.draw(kind, number)
        self.register_buffer("last", torch.rand(3), persistent=False)

    def draw(self, kind: str, number: int) -> None:
        odd = 161 + number
        if kind == "linear":
            self.add_module(f"m{number}", nn.Linear(LARGE, odd))
        elif kind == "embedding":
            self.add_module(f"m{number}", nn.Embedding(odd, LARGE, padding_idx=1))
        elif kind == "small":
            self.add_module(f"m{number}", nn.Linear(3, 5))
        elif kind == "half":
            self.add_module(f"m{number}", nn.Linear(LARGE, odd, dtype=torch.bfloat16))
            nn.init.normal_(getattr(self, f"m{number}").weight)
        elif kind == "double":
            self.register_parameter(f"m{number}", nn.Parameter(torch.randn(odd, LARGE, dtype=torch.float64)))
        elif kind == "other fills":
            weight = torch.empty(odd, LARGE)
            for fill in ("random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_"):
                getattr(weight, fill)()
            torch.empty(LARGE, odd).t().normal_()
            self.register_parameter(f"m{number}", nn.Parameter(weight))
        elif kind == "truncated":
            nn.init.trunc_normal_(nn.Parameter(torch.empty(odd, LARGE)), std=0.02)
            nn.init.trunc_normal_(nn.Parameter(torch.empty(odd, LARGE)))
        elif kind == "orthogonal":
            nn.init.orthogonal_(torch.empty(odd, LARGE))
        elif kind == "seeded":
            torch.manual_seed(0)
            torch.randn(odd, LARGE)
            torch.manual_seed(0)
        elif kind == "forked":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                torch.randn(odd, LARGE)
            torch.randn(odd, LARGE)
            state = torch.get_rng_state()
            torch.randn(odd, LARGE)
            torch.rand(3)
            torch.set_rng_state(state)
        elif kind == "own generator":
            torch.rand(odd, LARGE, generator=self.generator)
            torch.empty(odd, LARGE).normal_(generator=self.generator)
            self.register_buffer(f"own{number}", torch.rand(3, generator=self.generator), persistent=False)
        elif kind == "like":
            torch.rand_like(torch.empty(odd, LARGE))
            torch.nn.functional.dropout(torch.ones(odd, LARGE))
        elif kind == "buffer":
            self.register_buffer(f"b{number}", torch.randn(odd, LARGE), persistent=False)
            self.register_buffer(f"c{number}", torch.randperm(7), persistent=False)


KINDS = [
    "linear", "embedding", "small", "half", "double", "other fills", "truncated", "orthogonal", "seeded", "forked",
    "own generator", "like", "buffer",
]  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(KINDS), max_size=6))
def test_the_generator_stands_where_it_would(kinds: list[str]) -> None:
    """After a build the generator's state, and buffers that were drawn, are those of an ordinary build."""
    normal = ordinary(lambda: Drawing(kinds))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    built = build_without_weights(lambda: Drawing(kinds))
    assert torch.equal(torch.get_rng_state(), after)
    buffers = dict(built.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in normal.named_buffers())
    assert all(parameter.is_meta for parameter in built.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_draw(kind: str) -> None:
    """Also alone, and twice, with something small between."""
    test_the_generator_stands_where_it_would.hypothesis.inner_test([kind, "small", kind])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", models.CASES)
def test_the_generator_after_whole_models(name: str) -> None:
    """The same for models of libraries."""
    ordinary(models.CASES[name].build)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    build_without_weights(models.CASES[name].build)
    assert torch.equal(torch.get_rng_state(), after)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2000), st.integers(650, 60_000))
def test_a_jump_is_as_many_draws(before: int, draws: int) -> None:
    """Jumping over draws leaves the very state that drawing leaves, wherever the generator stands in its block."""
    generator = torch.Generator().manual_seed(before)
    torch.empty(before).uniform_(generator=generator)
    state = generator.get_state()
    plain, limit = generator_jump.advanced(state, draws), generator_jump._PLAIN
    try:
        generator_jump._PLAIN = 0
        assert torch.equal(generator_jump.advanced(state, draws), plain)
    finally:
        generator_jump._PLAIN = limit
    assert torch.equal(generator.get_state(), state)


def test_jumps_add_up() -> None:
    """Two long jumps are one of the sum; a thousand million draws take no time."""
    state = torch.Generator().manual_seed(1).get_state()
    far = 10**12 + 12345
    twice = generator_jump.advanced(generator_jump.advanced(state, far), far + 7)
    assert torch.equal(twice, generator_jump.advanced(state, 2 * far + 7))


def test_an_error_leaves_the_generator_where_it_would_be() -> None:
    """So does whatever model_fn raises."""

    def broken() -> nn.Module:
        nn.Linear(LARGE, LARGE)
        raise ZeroDivisionError

    for run in (broken, lambda: build_without_weights(broken)):
        torch.manual_seed(0)
        with pytest.raises(ZeroDivisionError):
            run()
        if run is broken:
            after = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), after)


# -- weights that the checkpoint lacks -----------------------------------------------------------------------------


class Initialised(nn.Module):
    """Gives values in ways that no ``reset_parameters`` would."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.there = nn.Linear(width, width)
        self.zeroed = nn.Linear(width, width)
        nn.init.zeros_(self.zeroed.weight)
        nn.init.constant_(self.zeroed.bias, 0.25)
        self.random = nn.Linear(width, width)
        self.scaled = nn.Parameter(torch.linspace(0, 1, width * width).reshape(width, width))
        self.gate = nn.Parameter(torch.full((), 0.125))
        self.computed = nn.Parameter(torch.outer(self.there.bias.detach(), torch.arange(width, dtype=torch.float32)))
        self.drawn = nn.Parameter(torch.randn(width, width).mul(0.02))
        self.embed = nn.Embedding(width, width, padding_idx=0)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.embed.weight
        self.rnn = nn.GRU(width, width)
        self.frozen = nn.Parameter(torch.eye(width), requires_grad=False)
        self.whole = nn.Parameter(torch.arange(width), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.random(self.zeroed(self.there(x))) @ self.scaled @ self.computed @ self.drawn * self.gate
        return self.rnn(self.tied(x) @ self.frozen)[0] + self.whole


@pytest.mark.parametrize("width", [SMALL, LARGE])
@pytest.mark.parametrize(
    "around",
    ["nothing", "meta", "default meta", "no_grad", "inference", "double", "a mode"],
)
def test_missing_weights_have_the_values_of_init(around: str, width: int, tmp_path: Path) -> None:
    """Values that ``__init__`` gave are there, to the bit, whatever modes are around the call; and so are the modes."""
    normal = ordinary(lambda: Initialised(width))
    path = save(normal, tmp_path / "model.safetensors", without="")
    dtype = torch.float64 if around == "double" else torch.float32
    lacking = {name: value.to(dtype) for name, value in _load(path).items() if name.startswith("there")}
    save_file(lacking, path)
    torch.set_default_dtype(dtype)
    try:
        normal = ordinary(lambda: Initialised(width)) if around == "double" else normal
        normal.load_state_dict(lacking, strict=False)
        torch.manual_seed(0)
        with _around(around):
            before = _modes()
            model = init_on_demand_weights_model(lambda: Initialised(width), path, on_missing="init")
            assert _modes() == before
        for name, expected in normal.named_parameters():
            found = model.get_parameter(name)
            if not name.startswith("there"):
                assert found.dtype == expected.dtype
                assert found.requires_grad == expected.requires_grad
                assert torch.equal(found, expected), name
        x = torch.ones(2, width, dtype=torch.get_default_dtype())
        assert models.same_bits(models.outputs(model, {"x": x}), models.outputs(normal, {"x": x}))
        odewei.close(model)
    finally:
        torch.set_default_dtype(torch.float32)


def _around(name: str) -> Any:
    import contextlib

    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def default() -> Any:
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)

    return {
        "meta": lambda: torch.device("meta"),
        "default meta": default,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "a mode": Mode,
    }.get(name, contextlib.nullcontext)()


def _modes() -> tuple[object, ...]:
    return (
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        nn.Parameter.__new__,
        nn.Module.register_parameter,
    )


def test_missing_weights_are_cast(tmp_path: Path) -> None:
    """With ``dtype=`` what is missing is cast like what is there."""
    normal = ordinary(lambda: Initialised(LARGE))
    save_file(
        {name: value for name, value in normal.state_dict().items() if name.startswith("there")},
        tmp_path / "m.safetensors",
    )
    torch.manual_seed(0)
    model = init_on_demand_weights_model(
        lambda: Initialised(LARGE), str(tmp_path / "m.safetensors"), on_missing="init", dtype=torch.bfloat16
    )
    assert torch.equal(model.random.weight, normal.random.weight.to(torch.bfloat16))
    assert model.whole.dtype == torch.int64
    odewei.close(model)


def test_missing_weights_of_a_model_of_transformers(tmp_path: Path) -> None:
    """Built by hand, a model of transformers has what its constructor gave, in all its modules."""
    build = models.CASES["bert"].build
    normal = ordinary(build)
    path = save(normal, tmp_path / "model.safetensors", without="pooler")
    normal.load_state_dict(_load(path), strict=False)
    torch.manual_seed(0)
    with models.streamed(build, path, on_missing="init") as model:
        inputs = models.CASES["bert"].inputs(0)
        assert models.same_bits(models.outputs(model, inputs), models.outputs(normal.eval(), inputs))


def test_a_model_that_was_built_before_without_values(tmp_path: Path) -> None:
    """Its missing weights are initialised by their modules, and are an error where these cannot; never garbage."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.extra = nn.Parameter(torch.ones(4))

    with torch.device("meta"):
        known, odd = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Odd()
    first = {"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)}
    model = init_on_demand_weights_model(lambda: known, first, on_missing="init")
    assert model[1].weight.abs().max() <= 0.5
    assert model[1].weight.std() > 0
    odewei.close(model)
    with pytest.raises(ModelError, match="extra"):
        init_on_demand_weights_model(lambda: odd, {"layer.weight": torch.ones(4, 4)}, on_missing="init")


def test_parameters_from_elsewhere_keep_their_values() -> None:
    """A parameter that the model function took over, and that the checkpoint lacks, is as its maker left it."""
    outside = nn.Parameter(torch.full((4, 4), 7.0))

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        model[1].weight = outside
        return model

    first = {"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)}
    model = init_on_demand_weights_model(build, first, on_missing="init")
    assert torch.equal(outside, torch.full((4, 4), 7.0))
    assert torch.equal(model[1].weight, outside)
    odewei.close(model)
    with pytest.raises(MissingWeightError):
        init_on_demand_weights_model(build, first)
    assert torch.equal(outside, torch.full((4, 4), 7.0))


def test_a_head_that_from_pretrained_lacks(tmp_path: Path) -> None:
    """It is initialised as transformers does: the same values, and the generator drawn from as often."""
    import transformers

    kind = transformers.BertForSequenceClassification
    ordinary(models.CASES["bert"].build).save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected, after = kind.from_pretrained(tmp_path), torch.get_rng_state()
    torch.manual_seed(3)
    model = odewei.from_pretrained(tmp_path, model_class=kind, on_missing="init")
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(model.classifier.weight, expected.classifier.weight)
    assert torch.equal(model.classifier.bias, expected.classifier.bias)
    odewei.close(model)


# -- builds within builds, and beside each other -------------------------------------------------------------------


class Outer(nn.Module):
    """Has a part that streams by itself, from weights of its own."""

    def __init__(self, make_part: Build, width: int = LARGE) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.part = make_part()
        self.after = nn.Linear(width, width)
        self.register_buffer("noise", torch.rand(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.part(self.before(x))) + self.noise


def _part(width: int = LARGE) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)).eval()


def test_a_streamed_part_streams_by_itself(tmp_path: Path) -> None:
    """A model function that streams a part of its model does so within another streamed model."""
    inner = save(ordinary(_part, 1), tmp_path / "part.safetensors")

    def resident_part() -> nn.Module:
        part = _part()
        part.load_state_dict(_load(inner))
        return part

    def streamed_part() -> nn.Module:
        return init_on_demand_weights_model(_part, inner, memory_budget="300kB").eval()

    normal = ordinary(lambda: Outer(resident_part)).eval()
    path = save(normal, tmp_path / "model.safetensors", without="part")
    normal.load_state_dict(_load(path), strict=False)
    torch.manual_seed(0)
    with models.streamed(lambda: Outer(streamed_part), path, memory_budget="300kB") as model:
        x = torch.linspace(-1, 1, 3 * LARGE).reshape(3, LARGE)
        for _ in range(3):
            assert models.same_bits(models.outputs(model, {"x": x}), models.outputs(normal, {"x": x}))
        assert odewei.report(model).weight_bytes == 2 * (LARGE * LARGE + LARGE) * 4
        assert odewei.report(model.part).bytes_read > 0
        odewei.close(model.part)


def test_from_pretrained_within_a_model(tmp_path: Path) -> None:
    """A model function that loads a part with ``odewei.from_pretrained`` works, streamed or not."""
    ordinary(models.CASES["bert"].build).save_pretrained(tmp_path / "part")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, LARGE * LARGE)
            self.part = odewei.from_pretrained(tmp_path / "part", memory_budget="50kB")
            self.register_buffer("noise", torch.rand(3), persistent=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.part(input_ids).last_hidden_state)

    torch.manual_seed(0)
    normal = Model()
    state = {f"head.{name}": value for name, value in normal.head.state_dict().items()}
    torch.manual_seed(0)
    with models.streamed(Model, state) as model:
        inputs = models.CASES["bert"].inputs(0)
        assert models.same_bits(models.outputs(model, inputs), models.outputs(normal, inputs))
        assert torch.equal(model.noise, normal.noise)
        odewei.close(model.part)
    odewei.close(normal.part)


def test_what_streams_already_is_refused(tmp_path: Path) -> None:
    """A model function that returns a streamed model is told so."""
    path = save(ordinary(_part), tmp_path / "model.safetensors")
    with models.streamed(_part, path) as model, pytest.raises(ModelError, match="streams already"):
        init_on_demand_weights_model(lambda: model, path)


def test_builds_in_several_threads(tmp_path: Path) -> None:
    """They do not wait for each other, and other threads' ordinary modules are ordinary."""
    path = save(ordinary(_part), tmp_path / "model.safetensors")
    inside, built = threading.Barrier(3), threading.Barrier(3)
    found: list[nn.Module] = []

    def build() -> nn.Module:
        inside.wait(20)
        part = _part()
        built.wait(20)
        return part

    def stream() -> None:
        found.append(init_on_demand_weights_model(build, path))

    threads = [threading.Thread(target=stream) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(20)
    mine = _part()
    built.wait(20)
    for thread in threads:
        thread.join(20)
    assert len(found) == 2
    assert not any(parameter.is_meta for parameter in mine.parameters())
    mine.load_state_dict(_load(path))
    x = torch.ones(2, LARGE)
    for model in found:
        assert models.same_bits([model(x)], [mine(x)])
        odewei.close(model)
    assert nn.Parameter.__new__ is _NEW


_NEW = nn.Parameter.__new__


# -- tensors of other kinds ----------------------------------------------------------------------------------------


def _sparse() -> torch.Tensor:
    return torch.eye(SMALL).to_sparse()


BUFFERS: dict[str, Callable[[], torch.Tensor]] = {
    "coo": _sparse,
    "csr": lambda: torch.eye(SMALL).to_sparse_csr(),
    "csc": lambda: torch.eye(SMALL).to_sparse_csc(),
    "bsr": lambda: torch.eye(SMALL).to_sparse_bsr((2, 2)),
    "quantised": lambda: torch.quantize_per_tensor(torch.linspace(0, 1, SMALL), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "complex": lambda: torch.polar(torch.ones(SMALL), torch.linspace(0, 1, SMALL)),
    "conjugate": lambda: torch.polar(torch.ones(SMALL), torch.linspace(0, 1, SMALL)).conj(),
    "empty": lambda: torch.empty(0, SMALL),
    "no dimensions": lambda: torch.tensor(2.0),
    "subclass": lambda: torch.ones(SMALL).as_subclass(_Labelled),
    "parameter": lambda: nn.Parameter(torch.ones(SMALL)),
    "expanded": lambda: torch.ones(1).expand(SMALL),
}


class _Labelled(torch.Tensor):
    label = "x"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", BUFFERS)
def test_unusual_buffers(kind: str, tmp_path: Path) -> None:
    """Whatever a buffer that is not saved consists of, the model streams and the buffer is as it was built."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(SMALL, SMALL)
            self.register_buffer("odd", BUFFERS[kind](), persistent=False)
            self.other = nn.Module()
            self.other.register_buffer("shared", self.odd, persistent=False)
            self.register_buffer("none", None)
            self.register_buffer("late", None, persistent=False)
            self.late = BUFFERS[kind]() if kind != "parameter" else torch.ones(SMALL)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = same_pass(Model, tmp_path, SMALL)
    expected = BUFFERS[kind]()
    for found in (model.odd, model.late) if kind != "parameter" else (model.odd,):
        assert type(found) is type(expected)
        assert (found.layout, found.dtype) == (expected.layout, expected.dtype)
    assert model.odd is model.other.shared
    assert odewei.report(model).buffer_bytes == tensor_bytes([model.odd, model.late])


def test_bytes_of_sparse_tensors() -> None:
    """They are those of indices and values, counted once for a tensor that is there twice."""
    coo, csr = _sparse(), torch.eye(SMALL).to_sparse_csr()
    assert tensor_bytes([coo, coo]) == SMALL * 4 + 2 * SMALL * 8
    assert tensor_bytes([csr]) == SMALL * 4 + SMALL * 8 + (SMALL + 1) * 8


PARAMETERS: dict[str, Callable[[], torch.Tensor]] = {
    "coo": _sparse,
    "csr": lambda: torch.eye(SMALL).to_sparse_csr(),
    "quantised": BUFFERS["quantised"],
    "nested": BUFFERS["nested"],
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_that_are_more_than_bytes_are_refused(kind: str) -> None:
    """By name, when the model is built."""

    def build() -> nn.Module:
        model = nn.Linear(SMALL, SMALL)
        model.odd = nn.Parameter(PARAMETERS[kind](), requires_grad=False)
        return model

    with pytest.raises(ModelError, match="odd"):
        init_on_demand_weights_model(build, {"weight": torch.ones(SMALL, SMALL), "bias": torch.ones(SMALL)})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_parameters_of_any_shape_stream(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Complex ones, and those of no dimensions or elements, are weights like others."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Parameter(torch.zeros(shape, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd * x

    value = torch.randn(shape, dtype=dtype)
    with models.streamed(Model, {"odd": value}) as model:
        assert torch.equal(model(torch.ones(())), value)
