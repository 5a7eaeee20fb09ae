"""The order of the layers, kept beside the checkpoint and found again, whatever the model was cut into meanwhile."""

from __future__ import annotations

import json
import logging
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import odewei
from odewei.errors import OptionsError, TraceError
from odewei.runtime import runtime_of
from odewei.survey import survey
from odewei.trace_file import parse_trace, read_trace, trace_path, write_trace
from odewei.trace_map import holders, modules_entered, units_entered
from odewei.units import Unit, hooked_modules, partition
from tests import models as zoo
from tests.test_units import trees

_BUDGET = 3 * 1152  # three units of 16 * 16 + 16 floats


class Backwards(nn.Module):
    """Runs its layers in reverse, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for index in (5, 4, 3, 3, 2, 1, 0):
            hidden = self.layers[index](hidden)
        return hidden


_ORDER = [f"layers.{index}" for index in (5, 4, 3, 3, 2, 1, 0)]


class Undecided(Backwards):
    """Cannot be traced: it looks at a value."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = super().forward(hidden)
        return hidden if hidden.sum().item() else -hidden


def _checkpoint(build: Callable[[], nn.Module], folder: Path) -> tuple[nn.Module, Path]:
    model = zoo.resident(build)
    return model, zoo.save(model, folder / "model.safetensors")


def _hidden() -> torch.Tensor:
    return torch.ones(2, 16)


# -- a saved order is found again ------------------------------------------------------------------------------------


def test_a_second_model_finds_the_order(tmp_path: Path) -> None:
    """What one model has saved another finds: no misprediction in its first pass, and no weight read for saving."""
    model, path = _checkpoint(Backwards, tmp_path)
    with zoo.streamed(Backwards, str(path), memory_budget=_BUDGET, prefetch_depth=0) as first:
        assert list(odewei.trace(first, _hidden()).units) == _ORDER
        saved = odewei.save_trace(first)
        assert saved == tmp_path / "model.safetensors.odewei-trace.json"
        assert odewei.report(first).bytes_read == 0
    with zoo.streamed(Backwards, str(path), memory_budget=_BUDGET, prefetch_depth=0) as second, torch.no_grad():
        assert torch.equal(second(_hidden()), model(_hidden()))
        assert odewei.report(second).mispredictions == 0
    saved.unlink()
    with zoo.streamed(Backwards, str(path), memory_budget=_BUDGET, prefetch_depth=0) as third, torch.no_grad():
        third(_hidden())
        assert odewei.report(third).mispredictions > 0


def test_an_order_is_found_beside_an_index_and_a_folder(tmp_path: Path) -> None:
    """For a checkpoint with an index the order is beside the index, also when only the folder was named."""
    model, path = _checkpoint(Backwards, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), path.name)}))
    with zoo.streamed(Backwards, str(tmp_path), memory_budget=_BUDGET, prefetch_depth=0) as first:
        odewei.trace(first, _hidden())
        assert odewei.save_trace(first) == trace_path(index)
    with zoo.streamed(Backwards, str(index), memory_budget=_BUDGET, prefetch_depth=0) as second, torch.no_grad():
        second(_hidden())
        assert odewei.report(second).mispredictions == 0


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    """Tracing, running and loading leave the checkpoint's folder as it was."""
    _, path = _checkpoint(Backwards, tmp_path)
    with zoo.streamed(Backwards, str(path), memory_budget=_BUDGET) as model, torch.no_grad():
        odewei.trace(model, _hidden())
        model(_hidden())
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("prefetch_depth", [0, "auto"])
@pytest.mark.parametrize(
    ("saved_with", "used_with"), [("leaf", "block"), ("block", "leaf"), ("auto", "leaf"), ("leaf", "auto")]
)
def test_another_partition_finds_the_order(
    saved_with: str, used_with: str, prefetch_depth: int | str, tmp_path: Path
) -> None:
    """An encoder and a decoder with tied embeddings: the saved order is right for coarser and finer units."""
    case = zoo.CASES["t5"]
    reference, path = _checkpoint(case.build, tmp_path)
    inputs = case.inputs(1)
    with zoo.streamed(case.build, str(path), granularity=saved_with) as first:
        odewei.trace(first, **inputs)
        odewei.save_trace(first)
    options = {"granularity": used_with, "prefetch_depth": prefetch_depth}
    options["memory_budget"] = zoo.smallest_budget(case.build, path, **options)
    with zoo.streamed(case.build, str(path), **options) as second:
        found = runtime_of(second).order
        assert found is not None
        assert odewei.load_trace(second).units == odewei.trace(second, **inputs).units
        assert runtime_of(second).order == found
        assert zoo.same_bits(zoo.outputs(second, inputs), zoo.outputs(reference, inputs))
        if used_with == "block":  # finer ones are used before they are entered: T5 looks at a layer's dtype
            assert odewei.report(second).mispredictions == 0


def test_the_file_does_not_depend_on_the_partition(tmp_path: Path) -> None:
    """Models cut in different ways under different budgets write the same file."""
    case = zoo.CASES["t5"]
    _, path = _checkpoint(case.build, tmp_path)
    written = set()
    for options in (
        {"granularity": "leaf"},
        {"granularity": "block"},
        {"memory_budget": "1MiB"},
        {"prefetch_depth": 0},
    ):
        with zoo.streamed(case.build, str(path), **options) as model:
            odewei.trace(model, **case.inputs(1))
            written.add(odewei.save_trace(model, tmp_path / "order").read_bytes())
    assert len(written) == 1


def test_what_passes_have_shown_can_be_saved(tmp_path: Path) -> None:
    """A model that cannot be traced saves what its passes did, as soon as they show it, and a second model finds it."""
    _, path = _checkpoint(Undecided, tmp_path)
    options = {"memory_budget": _BUDGET, "prefetch_depth": 0}
    with zoo.streamed(Undecided, str(path), **options) as first, torch.no_grad():
        with pytest.raises(TraceError):
            odewei.trace(first, _hidden())
        for _ in range(2):
            with pytest.raises(TraceError, match="run the model twice"):
                odewei.save_trace(first)
            first(_hidden())
        assert list(read_trace(odewei.save_trace(first))) == _ORDER
    with zoo.streamed(Undecided, str(path), **options) as second, torch.no_grad():
        second(_hidden())
        assert odewei.report(second).mispredictions == 0
        assert list(odewei.load_trace(second).units) == _ORDER


def test_weights_in_no_file_need_a_path(tmp_path: Path) -> None:
    """Tensors in memory have no place beside them; with a path both ways work."""
    state = dict(zoo.resident(Backwards).state_dict())
    with zoo.streamed(Backwards, state, prefetch_depth=0) as model, torch.no_grad():
        odewei.trace(model, _hidden())
        for function in (odewei.save_trace, odewei.load_trace):
            with pytest.raises(OptionsError, match="Pass path="):
                function(model)
        path = odewei.save_trace(model, tmp_path / "order.json")
    with zoo.streamed(Backwards, state, prefetch_depth=0) as model, torch.no_grad():
        assert list(odewei.load_trace(model, str(path)).units) == _ORDER
        model(_hidden())
        assert odewei.report(model).mispredictions == 0


# -- a saved order that is of no use ---------------------------------------------------------------------------------


def test_a_found_order_that_does_not_fit_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A found order of another model, or a damaged one, is named in the log; the model is built and right."""
    model, path = _checkpoint(Backwards, tmp_path)
    write_trace(trace_path(path), ["somewhere.else"])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "odewei"), zoo.streamed(Backwards, str(path)) as streamed:
            assert trace_path(path).name in caplog.text
            assert torch.equal(zoo.outputs(streamed, {"hidden": _hidden()})[0], model(_hidden()))
        trace_path(path).write_text("{")


def test_a_loaded_order_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """The message names what does not fit, the file and the cure; what was expected before still is."""
    _, path = _checkpoint(Backwards, tmp_path)
    wrong = tmp_path / "wrong.json"
    with zoo.streamed(Backwards, str(path), memory_budget=_BUDGET, prefetch_depth=0) as model, torch.no_grad():
        odewei.trace(model, _hidden())
        for order in (["layers.0", "somewhere.else"], [], ["layers.0"] * 3 + ["layers.6"]):
            write_trace(wrong, order)
            with pytest.raises(TraceError, match="does not fit") as caught:
                odewei.load_trace(model, wrong)
            assert caught.value.file == str(wrong)
            assert "save_trace" in str(caught.value.cure)
        with pytest.raises(TraceError, match="cannot be read"):
            odewei.load_trace(model)
        model(_hidden())
        assert odewei.report(model).mispredictions == 0


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Saving into a missing folder, or under a file, names path and cure and leaves nothing behind."""
    _, path = _checkpoint(Backwards, tmp_path)
    (tmp_path / "folder").mkdir()
    with zoo.streamed(Backwards, str(path)) as model:
        odewei.trace(model, _hidden())
        for bad in (tmp_path / "missing" / "order.json", path / "order.json", tmp_path / "folder"):
            with pytest.raises(TraceError, match="folder that this user may write to") as caught:
                odewei.save_trace(model, bad)
            assert caught.value.file == str(bad)
    assert sorted(os.listdir(tmp_path)) == ["folder", path.name]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is replaced in one step: what fails before it changes nothing and leaves nothing beside it."""
    path = tmp_path / "order.json"
    write_trace(path, ["a"])

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TraceError, match="No space left"):
        write_trace(path, ["b"])
    assert read_trace(path) == ("a",)
    assert os.listdir(tmp_path) == [path.name]


_GOOD = {"format": "odewei-trace", "version": 1, "modules": ["", "a"], "order": [0, 1, 1]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        "null",
        "\xff",
        "1" * 10_000,
        json.dumps({**_GOOD, "format": "other"}),
        json.dumps({**_GOOD, "version": 2}),
        json.dumps({**_GOOD, "version": {"a": [1] * 1000}}),
        json.dumps({**_GOOD, "modules": ["", 1]}),
        json.dumps({**_GOOD, "modules": "ab"}),
        json.dumps({**_GOOD, "modules": ["a", "a"]}),
        json.dumps({**_GOOD, "order": [0, 2]}),
        json.dumps({**_GOOD, "order": [0, -1]}),
        json.dumps({**_GOOD, "order": [0, True]}),
        json.dumps({**_GOOD, "order": [0.0]}),
        json.dumps({**_GOOD, "order": {"0": 1}}),
        json.dumps({key: value for key, value in _GOOD.items() if key != "order"}),
        json.dumps(_GOOD)[:-1] + ', "order": [1]}',
    ],
    ids=range(19),
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    """Whatever is in the file, the error names it and the cure."""
    path = tmp_path / "order.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TraceError, match="damaged") as caught:
        read_trace(path)
    assert caught.value.file == str(path)
    assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, a pipe and a file of an absurd size are refused without being read."""
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as stream:
        stream.truncate(1 << 40)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "large"):
        with pytest.raises(TraceError):
            read_trace(path)


def test_a_short_file_does_not_unfold_without_end(tmp_path: Path) -> None:
    """A module that stands for many units, many times over, does not fit."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(300))

    state = dict(Wide().state_dict())
    write_trace(tmp_path / "order", ["layers"] * 4000)
    with zoo.streamed(Wide, state, granularity="leaf") as model, pytest.raises(TraceError, match="does not fit"):
        odewei.load_trace(model, tmp_path / "order")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner)))
def test_any_content_is_read_or_refused(value: object) -> None:
    """A value of any kind in any place gives an order or a ValueError."""
    for key in _GOOD:
        try:
            assert isinstance(parse_trace(json.dumps({**_GOOD, key: value}).encode()), tuple)
        except ValueError:
            continue


# -- the mapping -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(trees(), st.integers(0, 400), st.sampled_from(("auto", "block", "leaf")), st.randoms(use_true_random=False))
def test_modules_entered_map_to_the_units_that_hang_on_them(model: nn.Module, most: int, granularity, chance) -> None:
    """For any partition, entering modules uses exactly the units hooked on them, and those name modules that do so."""
    weights = survey(model)
    nbytes = {weight.name: 4 for weight in weights}
    units = partition(model, weights, nbytes, most, granularity)
    hooked = hooked_modules(units)
    assert hooked.keys() <= holders(units)
    entered = chance.choices(sorted(holders(units)), k=chance.randint(0, 30)) if units else []
    entered += chance.sample(sorted(hooked), len(hooked))  # so that no module stands for those beneath it
    chance.shuffle(entered)
    used = units_entered(entered, units)
    assert used == [unit for module in entered for unit in hooked.get(module, ())]
    assert units_entered(modules_entered(used, units), units) == used


@settings(max_examples=200, deadline=None)
@given(trees(), st.integers(0, 400), st.integers(0, 400))
def test_a_coarse_order_names_the_units_beneath(model: nn.Module, most: int, finer: int) -> None:
    """A module that nothing hangs on stands for what hangs beneath it, each once, in definition order."""
    weights = survey(model)
    nbytes = {weight.name: 4 for weight in weights}
    units = partition(model, weights, nbytes, min(most, finer), "auto")
    hooked = hooked_modules(units)
    for module in sorted(holders(units) - hooked.keys()):
        beneath = [
            index
            for index, unit in enumerate(units)
            if any(name.startswith(f"{module}.") or not module for name in unit.hooked)
        ]
        assert units_entered([module, module], units) == beneath * 2
        for name in {name for index in beneath for name in units[index].hooked}:
            if name.startswith(f"{module}.") or not module:
                assert units_entered([module, name], units) == hooked[name]


def test_a_unit_used_by_itself_can_be_left_out() -> None:
    """A use that no entering of a module explains is dropped, and the rest is kept."""
    units = [Unit("a", (), ("a",)), Unit("b", (), ("b",)), Unit("tied", (), ("a", "b"))]
    assert modules_entered([2, 0, 2, 2, 1, 2], units) == ["a", "b"]


def test_an_order_can_be_loaded_between_passes(tmp_path: Path) -> None:
    """An order loaded while a prefetching model is live is used by its next pass."""
    model, path = _checkpoint(Backwards, tmp_path)
    with zoo.streamed(Backwards, str(path), memory_budget=_BUDGET) as streamed, torch.no_grad():
        streamed(_hidden())
        odewei.trace(streamed, _hidden())
        before = odewei.report(streamed).mispredictions
        odewei.load_trace(streamed, odewei.save_trace(streamed))
        assert torch.equal(streamed(_hidden()), model(_hidden()))
        assert odewei.report(streamed).mispredictions == before
        runtime_of(streamed).driver.ledger.check_invariants()


def test_a_saved_order_of_brackets_is_refused_before_anything_is_made_of_it() -> None:
    """What would be a gigabyte of empty lists is no order, and takes no memory."""
    text = b'{"modules":[' + b"[]," * 3_000_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 2098176 values"):
            parse_trace(text)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
