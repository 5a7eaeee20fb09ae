"""A streamed model takes a checkpoint as ``load_state_dict`` of the ordinary model does: hooks, versions, names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import odewei
from odewei.errors import MissingWeightError, ModelError, WeightMismatchError
from odewei.matched_loader import MatchedLoader
from odewei.runtime import runtime_of
from odewei.torch import StateDictLoader, init_on_demand_weights_model

State = dict[str, Any]
X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Every test has the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def resident(model_fn: Callable[[], nn.Module], state: Mapping[str, Any], *, strict: bool = False) -> nn.Module:
    """The ordinary model."""
    model = model_fn()
    model.load_state_dict(copy.deepcopy(state), strict=strict)
    return model.eval()


def streamed(model_fn: Callable[[], nn.Module], source: Any, **options: Any) -> nn.Module:
    """The model under test."""
    return init_on_demand_weights_model(model_fn, source, **options).eval()


def sources(state: State, folder: Path) -> list[object]:
    """The same weights in memory and in a file."""
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return [state, str(folder / "model.safetensors")]


def assert_same(model: nn.Module, ordinary: nn.Module) -> None:
    """Both compute the same bits, twice, and have the same weights and buffers."""
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(X), ordinary(X))
        found, expected = model.state_dict(), ordinary.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype, name
                assert torch.equal(found[name] + 0, value + 0), name


def computed(model: nn.Module) -> tuple[str, ...]:
    """The weights that are computed when they are read."""
    source = runtime_of(model)._source
    return source.computed if isinstance(source, MatchedLoader) else ()


def linear(name: str = "", inside: int = 8, outside: int = 8) -> State:
    """A checkpoint of one linear layer."""
    return {f"{name}weight": torch.randn(outside, inside), f"{name}bias": torch.randn(outside)}


# -- modules that do more than copying -----------------------------------------------------------------------------


def weight_norm() -> nn.Module:
    """Two layers, one of them in the new weight norm, which renames the keys of the old one."""
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))


def old_weight_norm_state() -> State:
    return {
        "0.weight_g": torch.rand(8, 1),
        "0.weight_v": torch.randn(8, 8),
        "0.bias": torch.randn(8),
        **linear("1.", 8, 4),
    }


class Fused(nn.Module):
    """A hook joins three layers to one, as timm and many others do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(24, 4)
        self._register_load_state_dict_pre_hook(self.join)

    def join(self, state: State, prefix: str, *_: object) -> None:
        for part in ("weight", "bias"):
            if f"{prefix}q.{part}" in state:
                state[f"{prefix}qkv.{part}"] = torch.cat([state.pop(f"{prefix}{one}.{part}") for one in "qkv"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.qkv(x))
        return result


class Split(nn.Module):
    """An override cuts one weight into several."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        if f"{prefix}qk" in state:
            state[f"{prefix}q.weight"], state[f"{prefix}k.weight"] = state.pop(f"{prefix}qk").chunk(2)
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.k(self.q(x))
        return result


class Computed(Split):
    """The same, from another layout, by arithmetic and by looking at values."""

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        joined = state.pop(f"{prefix}qk")
        if joined.abs().max() > 100 or torch.equal(joined, joined * 2):
            raise ValueError("no weights")
        q, k = joined.t().chunk(2, dim=0)
        state[f"{prefix}q.weight"] = q * joined.mean().item()
        state[f"{prefix}k.weight"] = k.float() + torch.arange(8.0)
        state[f"{prefix}q.bias"].mul_(2)
        self.total = float(joined.numpy().sum())
        self.largest = joined.amax(dim=1)[:8]
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.total + self.largest


class Copying(nn.Linear):
    """An override that copies by itself and calls nothing else."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.offset: torch.Tensor

    def _load_from_state_dict(self, state: State, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state[f"{prefix}w"].t())
            self.bias.data.copy_(state[f"{prefix}b"])
            self.scale.copy_(state[f"{prefix}s"][0])
            self.offset.fill_(state[f"{prefix}s"].item())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.offset


class Renaming(nn.Module):
    """A model whose ``load_state_dict`` is its own, without the newer keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        renamed = {name.replace("old_name.", "inner."): value for name, value in state.items()}
        return super().load_state_dict(renamed, strict=strict)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


class Defaults(nn.Linear):
    """A hook gives what older checkpoints lack, and resizes what has another length."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 2.0))
        self.positions = nn.Parameter(torch.zeros(4, 8))

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        state.setdefault(f"{prefix}scale", torch.full((8,), 3.0))
        found = state[f"{prefix}positions"]
        if found.shape != self.positions.shape:
            resized = nn.functional.interpolate(found.t()[None], size=4, mode="linear")[0].t()
            state[f"{prefix}positions"] = resized
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.positions.mean(dim=0)


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False))


def norms_without_counts() -> State:
    state = {name: torch.rand_like(value) for name, value in norms().state_dict().items() if value.is_floating_point()}
    return {**state, "1.running_var": torch.rand(8) + 1}


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 4))


def old_spectral_state() -> State:
    """As torch 0.4 saved it: without ``weight_v``, with the normalised weight."""
    state = dict(spectral().state_dict())
    del state["0.weight_v"]
    return {**state, "0.weight": state["0.weight_orig"] * 0.5}


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(4))


def not_lazy_state() -> State:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).state_dict()


def wrapped() -> nn.Module:
    """torch's checkpointing wrapper adds its name to keys that lack it."""
    return nn.Sequential(checkpoint_wrapper(nn.Linear(8, 8)), checkpoint_wrapper(nn.Linear(8, 4)))


def fused_state() -> State:
    return {**linear("q."), **linear("k."), **linear("v."), **linear("out.", 24, 4)}


SPECIAL = {
    "weight_norm": (weight_norm, old_weight_norm_state, ()),
    "fused": (Fused, fused_state, None),
    "split": (Split, lambda: {"qk": torch.randn(16, 8), "q.bias": torch.randn(8)}, None),
    "computed": (Computed, lambda: {"qk": torch.randn(8, 16), "q.bias": torch.randn(8)}, None),
    "copying": (Copying, lambda: {"w": torch.randn(8, 8), "b": torch.randn(8), "s": torch.ones(1)}, None),
    "renaming": (Renaming, lambda: linear("old_name."), ()),
    "defaults": (Defaults, lambda: {**linear(), "positions": torch.randn(6, 8)}, ("positions",)),
    "norms": (norms, norms_without_counts, ()),
    "spectral": (spectral, lambda: dict(spectral().state_dict()), ()),
    "old spectral": (spectral, old_spectral_state, ("0.weight_v",)),
    "lazy": (lazy, not_lazy_state, ()),
    "checkpointed": (wrapped, lambda: {**linear("0."), **linear("1.", 8, 4)}, ()),
    "lstm": (lambda: Recurrent(), lambda: Recurrent().state_dict(), ()),
    "attention": (lambda: Attending(), lambda: Attending().state_dict(), ()),
}


class Recurrent(nn.Module):
    """An LSTM in a model with a hook: it keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8)
        self._register_load_state_dict_pre_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x[None])[0]
        return result


class Attending(nn.Module):
    """Attention, beside a module with an extra look at versions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(8, track_running_stats=True)
        self.inner = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.t()[None])[0].t().contiguous()
        result: torch.Tensor = self.inner(x, x, x)[0]
        return result


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("place", [0, 1], ids=["memory", "file"])
def test_hooks_and_overrides_do_what_they_do(kind: str, place: int, tmp_path: Path) -> None:
    """Whatever modules do when they are loaded, the streamed model has the values and bits of the ordinary one."""
    model_fn, make, expected = SPECIAL[kind]
    state = make()
    model = streamed(model_fn, sources(state, tmp_path)[place], memory_budget=3000)
    assert_same(model, resident(model_fn, state))
    if expected is not None:
        assert computed(model) == expected


def test_joined_and_cut_weights_are_read_to_their_places(tmp_path: Path) -> None:
    """What a hook only joins, cuts or renames is not computed: it stays a place in the file."""
    fused = streamed(Fused, sources(fused_state(), tmp_path)[1])
    assert computed(fused) == ()
    split = streamed(Split, sources({"qk": torch.randn(16, 8), "q.bias": torch.randn(8)}, tmp_path)[1])
    assert computed(split) == ()
    infos = runtime_of(split).stock.infos
    assert [infos[name].span is not None for name in ("q.weight", "k.weight")] == [True, True]


def test_computed_weights_come_and_go(tmp_path: Path) -> None:
    """A model of many computed weights runs within a budget that holds few of them, and after an eviction too."""

    def model_fn() -> nn.Module:
        return nn.Sequential(*(Computed() for _ in range(6)))

    state = {f"{i}.{name}": value for i in range(6) for name, value in SPECIAL["computed"][1]().items()}
    model = streamed(model_fn, sources(state, tmp_path)[1], memory_budget=2048, granularity="leaf", prefetch_depth=0)
    assert_same(model, resident(model_fn, state))
    report = odewei.report(model)
    assert report.evictions > 0
    assert report.peak_bytes <= 2048


def test_a_copy_does_not_load_again(tmp_path: Path) -> None:
    """A deep copy has the same values, and hooks do not run on what they have made already."""
    state = SPECIAL["computed"][1]()
    model = streamed(Computed, sources(state, tmp_path)[1])
    assert_same(copy.deepcopy(model), resident(Computed, state))


def test_the_generator_and_torchs_switches_are_left_alone() -> None:
    """Loading draws no random numbers, and swapping parameters is switched as it was."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        before = torch.random.get_rng_state()
        model = init_on_demand_weights_model(weight_norm, old_weight_norm_state())
        del before
        assert torch.__future__.get_swap_module_params_on_conversion()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    odewei.close(model)


def test_what_needs_the_values_of_the_built_model_is_refused() -> None:
    """A hook that adds to the weight it finds in the model cannot be right, as there is none: the error names it."""

    class Adding(nn.Linear):
        def _load_from_state_dict(self, state: State, prefix: str, *_: Any) -> None:
            with torch.no_grad():
                self.weight[:4] = state["weight"][:4]
                self.bias.copy_(state["bias"])

    with pytest.raises(ModelError, match=r"built without.*'weight'.*stream what its state_dict"):
        streamed(lambda: Adding(8, 8), linear())


def test_an_error_of_a_hook_is_told_with_its_words() -> None:
    """What a hook raises stops the build, as it would stop ``load_state_dict``."""

    class Refusing(nn.Linear):
        def _load_from_state_dict(self, state: State, prefix: str, *_: Any) -> None:
            raise KeyError("relative_position_index")

    with pytest.raises(WeightMismatchError, match=r"KeyError: 'relative_position_index'.*belong together") as caught:
        streamed(lambda: Refusing(8, 8), linear())
    assert isinstance(caught.value.__cause__, KeyError)


# -- versions and extra states -------------------------------------------------------------------------------------


class Versioned(nn.Linear):
    """Its weights of version 1 were stored halved."""

    _version = 2

    def _load_from_state_dict(self, state: State, prefix: str, metadata: State, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_versions_are_those_of_the_state_dictionary(prefix: str) -> None:
    """A state dictionary with metadata is loaded by its versions; a plain one has none."""

    def model_fn() -> nn.Module:
        return nn.Sequential(Versioned(8, 8))

    state = model_fn().state_dict()
    assert_same(streamed(model_fn, state), resident(model_fn, state))
    assert_same(streamed(model_fn, dict(state)), resident(model_fn, dict(state)))
    wrapped = nn.Sequential()
    wrapped.module = model_fn()
    wrapped.load_state_dict({f"module.{name}": value for name, value in state.items()})
    given = StateDictLoader(wrapped.state_dict(), prefix=prefix)
    state = {name: given.loader if False else value for name, value in wrapped.module.state_dict().items()}
    expected = model_fn()
    expected.load_state_dict(wrapped.module.state_dict())
    assert_same(streamed(model_fn, given), expected.eval())


def test_missing_counts_are_missing_in_a_new_checkpoint() -> None:
    """Where the metadata says that a norm knew its count, a lacking one is an error, as in ``load_state_dict``."""
    state = norms().state_dict()
    del state["1.num_batches_tracked"]
    with pytest.raises(MissingWeightError, match=r"lacks the buffer '1\.num_batches_tracked'"):
        streamed(norms, state)
    model = streamed(norms, state, on_missing="init")
    assert runtime_of(model).stock.missing == ("1.num_batches_tracked",)
    assert_same(model, resident(norms, state))


class Stateful(nn.Linear):
    """Keeps more than tensors."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.state: dict[str, Any] = {"scale": 1.0, "shift": torch.zeros(8)}

    def get_extra_state(self) -> dict[str, Any]:
        return self.state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.state = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(x) * self.state["scale"] + self.state["shift"]
        return result


def test_extra_states_are_set() -> None:
    """``set_extra_state`` gets what ``get_extra_state`` gave, tensors in it with their values; a copy keeps its own."""

    def model_fn() -> nn.Module:
        return nn.Sequential(Stateful(), Stateful())

    state = model_fn().state_dict()
    state["0._extra_state"] = {"scale": 3.0, "shift": torch.randn(8)}
    model = streamed(model_fn, state)
    assert_same(model, resident(model_fn, state))
    model[0].state = {"scale": 4.0, "shift": torch.zeros(8)}  # type: ignore[operator, index, union-attr]
    assert copy.deepcopy(model)[0].state["scale"] == 4.0


def test_an_extra_state_that_is_a_tensor_has_values(tmp_path: Path) -> None:
    """Some libraries keep bytes in a tensor: the module gets them, not a tensor without values."""

    class Bytes(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(1)

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.scale = float(state)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    state = {**linear(), "_extra_state": torch.tensor(5.0)}
    for source in sources(state, tmp_path):
        assert_same(streamed(lambda: Bytes(8, 8), source), resident(lambda: Bytes(8, 8), state))


def test_hooks_after_loading_run() -> None:
    """A hook after loading may compute from weights, and excuse missing ones: these are initialised."""

    class After(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.extra = nn.Linear(8, 8)
            self.register_load_state_dict_post_hook(self.after)

        def after(self, module: nn.Module, incompatible: Any) -> None:
            self.total = self.weight.sum(dim=0)
            incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if "extra" not in name]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.total

    state = linear()
    model = streamed(After, state)
    assert torch.equal(model(X), resident(After, state, strict=True)(X))
    assert runtime_of(model).stock.missing == ("extra.weight", "extra.bias")
    assert model.extra.weight.isfinite().all()
