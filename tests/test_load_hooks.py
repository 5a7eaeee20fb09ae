"""What modules do beside copying when they are loaded is done to a streamed model too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import MissingWeightError, ModelError, WeightMismatchError
from odewei.runtime import runtime_of
from odewei.torch import StateDictLoader, init_on_demand_weights_model
from tests.loading import (
    SPECIAL,
    Computed,
    Fused,
    Split,
    State,
    X,
    assert_same,
    computed,
    fused_state,
    linear,
    norms,
    old_weight_norm_state,
    resident,
    sources,
    streamed,
    weight_norm,
)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Every test has the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


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
        state = old_weight_norm_state()
        built = weight_norm()
        before = torch.random.get_rng_state()
        model = init_on_demand_weights_model(lambda: built, state)
        assert torch.equal(torch.random.get_rng_state(), before)
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
def test_versions_are_those_of_the_state_dictionary(prefix: str, tmp_path: Path) -> None:
    """A state dictionary with metadata is loaded by its versions; a plain one has none."""

    def model_fn() -> nn.Module:
        return nn.Sequential(Versioned(8, 8))

    state = model_fn().state_dict()
    assert_same(streamed(model_fn, state), resident(model_fn, state))
    assert_same(streamed(model_fn, dict(state)), resident(model_fn, dict(state)))
    trained = nn.Module()
    trained.module = model_fn()  # as data parallel training has it
    given = StateDictLoader(trained.state_dict(), prefix=prefix)
    assert_same(streamed(model_fn, given), resident(model_fn, trained.module.state_dict()))
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    path = odewei.open_checkpoint(tmp_path / "model.pt", prefix=prefix)
    assert_same(streamed(model_fn, path), resident(model_fn, trained.module.state_dict()))


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


def test_extra_states_are_set(tmp_path: Path) -> None:
    """``set_extra_state`` gets what ``get_extra_state`` gave, tensors in it with their values; a copy keeps its own."""

    def model_fn() -> nn.Module:
        return nn.Sequential(Stateful(), Stateful())

    state = model_fn().state_dict()
    state["0._extra_state"] = {"scale": 3.0, "shift": torch.randn(8)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "model.pt")
    assert_same(streamed(model_fn, str(tmp_path / "model.pt")), resident(model_fn, state))
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
