"""A streamed model takes a checkpoint as ``load_state_dict`` of the ordinary model does: names, shapes, leftovers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.errors import CheckpointError, MissingWeightError, OptionsError, WeightMismatchError
from odewei.runtime import runtime_of
from odewei.torch import StateDictLoader
from tests.loading import (
    Computed,
    State,
    X,
    assert_same,
    linear,
    norms,
    norms_without_counts,
    old_weight_norm_state,
    resident,
    sources,
    streamed,
    weight_norm,
    wrapped,
)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Every test has the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# -- what nobody needs ---------------------------------------------------------------------------------------------


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def two_state() -> State:
    return {**linear("0."), **linear("1.", 8, 4)}


NEEDLESS = {
    "number": 3,
    "text": "adam",
    "nested": {"lr": [0.1]},
    "sparse": torch.eye(3).to_sparse(),
    "half": torch.zeros(3, dtype=torch.float16).to_sparse(),
    "meta": torch.empty(3, device="meta"),
    "shape": torch.zeros(3, 3, 3),
    "nothing": torch.zeros(0),
    "integers": torch.arange(3),
}


@pytest.mark.parametrize("kind", NEEDLESS)
def test_what_nobody_needs_is_told_and_not_read(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Entries that no module has are told once, whatever they are; they are an error only under ``strict``."""
    needed = two_state()
    state = {**needed, "needless": NEEDLESS[kind]}
    torch.save(state, tmp_path / "model.pt")
    for source in (state, str(tmp_path / "model.pt")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "odewei"):
            model = streamed(two, source)
        assert [record.message for record in caplog.records if "no use for" in record.message] == [
            "the checkpoint has what the model has no use for (1): 'needless'"
        ]
        assert runtime_of(model).stock.unexpected == ("needless",)
        assert_same(model, resident(two, needed))
        with pytest.raises(WeightMismatchError, match=r"no use for \(1\): 'needless'.*rename") as caught:
            streamed(two, source, strict=True)
        assert caught.value.weight == "needless"


def test_rename_leaves_out_what_is_no_tensor(tmp_path: Path) -> None:
    """The cure of the strict error works for what is no tensor too, by a mapping or a function."""
    needed = two_state()
    state = {**needed, "epoch": 3}
    torch.save(state, tmp_path / "model.pt")
    for rename in ({"epoch": None}, lambda name: None if name == "epoch" else name):
        for loader in (
            odewei.open_checkpoint(tmp_path / "model.pt", rename=rename),
            StateDictLoader(state, rename=rename),
        ):
            assert_same(streamed(two, loader, strict=True), resident(two, needed))


@pytest.mark.parametrize("special", [False, True])
def test_what_is_needed_and_no_tensor_is_an_error(special: bool, tmp_path: Path) -> None:
    """A weight that the checkpoint has as something else is refused, whatever ``on_missing`` says."""

    def model_fn() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) if special else nn.Sequential(nn.Linear(8, 8))

    state = {**model_fn().state_dict(), "0.bias": 3}
    torch.save(state, tmp_path / "model.pt")
    for source in (state, str(tmp_path / "model.pt")):
        for on_missing in ("error", "init"):
            with pytest.raises(CheckpointError, match=r"a tensor was expected, this is a int.*'0\.bias'"):
                streamed(model_fn, source, on_missing=on_missing)


def test_a_model_without_leftovers_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Tied weights, shared modules and entries under further names of either are all expected."""
    with caplog.at_level(logging.INFO, "odewei"):
        streamed(Shared, Shared().state_dict(), strict=True)
        streamed(norms, norms().state_dict(), strict=True)
    assert not [record.message for record in caplog.records if "checkpoint" in record.message]


# -- several names for one thing -----------------------------------------------------------------------------------


class Shared(nn.Module):
    """A module, a weight and a buffer that have two names each, and a view of a buffer that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.first.weight
        self.inner = nn.Module()
        self.register_buffer("scale", torch.ones(8))
        self.inner.register_buffer("scale", self.scale)
        self.half = self.scale[:4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.second(x)) * self.inner.scale + self.half.sum()
        return result


def shared_state() -> State:
    return {"first.weight": torch.randn(8, 8), "first.bias": torch.randn(8), "scale": torch.randn(8)}


@pytest.mark.parametrize("names", [{}, {"first.weight": "head.weight"}, {"first.bias": "second.bias"}])
@pytest.mark.parametrize("buffer", ["scale", "inner.scale"])
def test_one_name_of_several_is_enough(names: dict[str, str], buffer: str, tmp_path: Path) -> None:
    """As savers leave out what is shared, any of the names will do, and everybody who shares has the values."""
    state = {({**names, "scale": buffer}).get(name, name): value for name, value in shared_state().items()}
    for source in sources(state, tmp_path):
        model = streamed(Shared, source)
        assert_same(model, resident(Shared, state))
        assert model.scale is model.inner.scale  # type: ignore[union-attr]


def test_of_several_values_the_last_that_is_copied_counts(tmp_path: Path) -> None:
    """Where a checkpoint has other values under each name, ``load_state_dict`` leaves the last in the shared tensor."""
    state = {name: torch.randn_like(value) for name, value in Shared().state_dict().items()}
    for source in sources(state, tmp_path):
        assert_same(streamed(Shared, source), resident(Shared, state))


# -- buffers -------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """Buffers of every odd kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.zeros(()))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))
        self.register_buffer("table", torch.zeros(4, 8).t())
        self.register_buffer("same", torch.zeros(1).expand(8))
        self.register_buffer("own", torch.full((8,), 3.0), persistent=False)
        self.scalar: torch.Tensor
        self.mask: torch.Tensor
        self.table: torch.Tensor
        self.own: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, x * self.weight, self.own) + self.scalar + self.table.sum(dim=1)


def buffers_state() -> State:
    return {
        "weight": torch.randn(8),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "mask": torch.arange(8) % 2 == 0,
        "table": torch.randn(8, 4),
        "same": torch.zeros(8),
    }


def test_buffers_of_every_kind(tmp_path: Path) -> None:
    """Empty, scalar, strided, boolean ones, and None, come out as copying into the model's leaves them."""
    state = buffers_state()
    for source in sources(state, tmp_path):
        model = streamed(Buffers, source)
        expected = Buffers()
        expected.load_state_dict({**state, "same": torch.zeros(8)}, assign=True)
        assert torch.equal(model(X), expected(X))
        assert model.none is None
        assert model.table.stride() == Buffers().table.stride()  # type: ignore[union-attr, operator]
        assert {name: (value.dtype, value.shape) for name, value in model.named_buffers()} == {
            name: (value.dtype, value.shape) for name, value in expected.named_buffers()
        }


def test_a_buffer_for_none_is_unexpected() -> None:
    """As in torch, a buffer that is None in the model takes nothing."""
    model = streamed(Buffers, {**buffers_state(), "none": torch.ones(2)})
    assert runtime_of(model).stock.unexpected == ("none",)
    assert model.none is None


@pytest.mark.parametrize("stored", [torch.uint8, torch.float32, torch.int64])
def test_a_buffer_of_another_kind_of_dtype_is_cast_to_the_models(stored: torch.dtype) -> None:
    """A mask that was stored as numbers is a mask again."""
    state = buffers_state()
    cast = {**state, "mask": state["mask"].to(stored)}
    assert streamed(Buffers, cast).mask.dtype is torch.bool
    assert torch.equal(streamed(Buffers, cast)(X), streamed(Buffers, state)(X))


def test_floating_buffers_come_as_they_are_stored() -> None:
    """A floating buffer keeps the checkpoint's precision, as weights do, and is cast by ``dtype=`` as they are."""
    state = {**buffers_state(), "table": torch.randn(8, 4, dtype=torch.float64)}
    assert streamed(Buffers, state).table.dtype is torch.float64
    assert streamed(Buffers, state, dtype=torch.float32).table.dtype is torch.float32
    assert streamed(Buffers, state, dtype=torch.bfloat16).table.dtype is torch.bfloat16


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_one_element_fits_a_scalar(suffix: str, tmp_path: Path) -> None:
    """As files of torch 0.3 have them, parameters and buffers without dimensions may be stored with one."""

    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("offset", torch.zeros(()))
            self.offset: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale + self.offset

    state = {"scale": torch.tensor([3.0]), "offset": torch.tensor([2.0])}
    path = tmp_path / f"model.{suffix}"
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    for source in (state, str(path)):
        assert_same(streamed(Scalars, source), resident(Scalars, state))
    with pytest.raises(WeightMismatchError, match=r"\(1, 1\)|\[1, 1\]"):
        streamed(Scalars, {**state, "scale": torch.ones(1, 1)})


# -- other shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
def test_another_shape_is_an_error_whose_cure_works(special: bool) -> None:
    """A weight of another shape is refused with both shapes; ``on_mismatch="init"`` initialises it and says so."""

    def model_fn() -> nn.Module:
        head = nn.Linear(8, 5)
        return (
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), head) if special else nn.Sequential(nn.Linear(8, 8), head)
        )

    state = dict(model_fn().state_dict())
    name = list(state)[-1].partition(".")[0]
    fitting = dict(state)
    state |= {f"{name}.weight": torch.randn(3, 8), f"{name}.bias": torch.randn(3)}
    with pytest.raises(WeightMismatchError, match=r'3, 8.*5, 8.*on_mismatch="init"') as caught:
        streamed(model_fn, state)
    assert caught.value.weight == f"{name}.weight"
    model = streamed(model_fn, state, on_mismatch="init")
    assert runtime_of(model).stock.missing == (f"{name}.weight", f"{name}.bias")
    assert model(X).shape == (2, 5)
    assert model(X).isfinite().all()
    for key, value in model.state_dict().items():
        assert key.startswith(f"{name}.") or torch.equal(value + 0, fitting[key] + 0)


def test_a_buffer_of_another_shape(caplog: pytest.LogCaptureFixture) -> None:
    """It is an error, or stays as it was built where that was asked for; nothing is changed before the error."""
    built = Buffers()
    state = {**buffers_state(), "table": torch.zeros(8, 5)}
    with pytest.raises(WeightMismatchError, match=r"\(8, 5\) for a buffer, the model \(8, 4\).*'table'.*on_mismatch"):
        streamed(lambda: built, state)
    assert built.scalar == 0
    with caplog.at_level(logging.WARNING, "odewei"):
        model = streamed(Buffers, state, on_mismatch="init")
    assert "as the model initialises them: 'table'" in caplog.text
    assert torch.equal(model.table, torch.zeros(8, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"strict": 1}, {"on_mismatch": "ignore"}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    """A value that cannot work is refused by its name."""
    with pytest.raises(OptionsError, match=next(iter(options))):
        streamed(two, two_state(), **options)


@pytest.mark.parametrize("options", [{"strict": True}, {"on_mismatch": "init"}])
def test_a_function_cannot_say_what_it_has(options: dict[str, Any]) -> None:
    """What needs to know the whole checkpoint is refused where a function delivers the weights."""
    state = two_state()
    with pytest.raises(OptionsError, match="a function cannot say"):
        streamed(two, lambda _, names: {name: state[name] for name in names}, **options)


# -- prefixes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"state_dict.{name}",
        lambda name: name.replace(".", "._orig_mod.", 1),
    ],
)
@pytest.mark.parametrize("make", ["two", "weight_norm", "only_weight_norm", "norms", "wrapped"])
def test_what_is_wrapped_around_names_is_taken_off(
    spell: Callable[[str], str], make: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where only one reading of the names fits the model it is used, and said, whatever hooks do afterwards."""
    model_fn, state = {
        "two": (two, two_state()),
        "weight_norm": (weight_norm, old_weight_norm_state()),
        "only_weight_norm": (
            lambda: weight_norm()[:1],  # type: ignore[index]
            {name: value for name, value in old_weight_norm_state().items() if name.startswith("0.")},
        ),
        "norms": (norms, norms_without_counts()),
        "wrapped": (wrapped, {**linear("0."), **linear("1.", 8, 4)}),
    }[make]
    spelt = {spell(name): value for name, value in state.items()}
    with caplog.at_level(logging.INFO, "odewei"):
        for source in sources(spelt, tmp_path):
            assert_same(streamed(model_fn, source, strict=True), resident(model_fn, state))
    assert "the names of the checkpoint are read without" in caplog.text


def test_names_of_a_wrapped_model_are_found() -> None:
    """A checkpoint of the bare model fits one that is compiled, in whole or in part."""

    def model_fn() -> nn.Module:
        inner = two()
        inner[0] = torch.compile(inner[0], backend="eager")  # type: ignore[operator, index]
        return inner

    state = two_state()
    model = streamed(model_fn, state)
    with torch.no_grad():
        assert torch.equal(model(X), resident(two, state)(X))


def test_a_prefix_and_a_new_head() -> None:
    """With ``on_missing="init"`` the reading that finds the most is used, and the rest is initialised."""
    state = {f"module.{name}": value for name, value in linear("0.").items()}
    model = streamed(two, state, on_missing="init")
    assert runtime_of(model).stock.missing == ("1.weight", "1.bias")
    assert torch.equal(model[0].weight + 0, state["module.0.weight"])  # type: ignore[index, union-attr, operator]


def test_several_readings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Where several readings fit none is used, and the readings are told."""
    state = {f"{kind}.{name}": value for kind in ("student", "teacher") for name, value in two_state().items()}
    with caplog.at_level(logging.WARNING, "odewei"), pytest.raises(MissingWeightError, match=r"0\.weight"):
        streamed(two, state)
    assert "several readings" in caplog.text
    chosen = {name: value for name, value in state.items() if name.startswith("teacher.")}
    ordinary = resident(two, {name.removeprefix("teacher."): value for name, value in chosen.items()})
    assert_same(streamed(two, StateDictLoader(state, prefix="teacher.")), ordinary)


# -- after an error ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["missing", "shape", "hook", "strict", "buffer"])
def test_a_build_that_fails_leaves_nothing_behind(problem: str) -> None:
    """After a refusal the shared budget is as before, a model that was built beforehand has its own parameters, and the
    next build is right.
    """
    budget = odewei.MemoryBudget(100_000)
    state: State = {**Computed().state_dict(), "qk": torch.randn(8, 16)}
    del state["q.weight"], state["k.weight"]
    built = Computed()
    before = {name: (id(value), value.is_meta) for name, value in built.named_parameters()}
    broken, options = dict(state), {}
    if problem == "missing":
        del broken["q.bias"]
        with pytest.raises(WeightMismatchError, match="KeyError"):
            streamed(lambda: built, broken, memory_budget=budget)
    if problem == "shape":
        broken["qk"] = torch.randn(8, 18)
    if problem == "hook":
        broken["qk"] = torch.full((8, 16), 1000.0)
    if problem == "strict":
        broken["more"], options["strict"] = torch.ones(1), True
    if problem == "buffer":
        built.register_buffer("more", torch.zeros(2))
    with pytest.raises((WeightMismatchError, MissingWeightError)):
        streamed(lambda: built, broken, memory_budget=budget, **options)
    assert {name: (id(value), value.is_meta) for name, value in built.named_parameters()} == before
    assert budget.pool.budget.used_bytes == 0
    assert_same(streamed(Computed, state, memory_budget=budget), resident(Computed, state))
