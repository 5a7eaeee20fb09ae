"""Models come and go and leave nothing; functions as loaders; dry runs; the report; the layers of the package."""

from __future__ import annotations

import ast
import gc
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import TraceError
from odewei.runtime import runtime_of
from odewei.torch import StateDictLoader, init_on_demand_weights_model
from tests import models

BUILD = models.CASES["llama"].build
INPUTS = models.CASES["llama"].inputs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return models.save(models.resident(BUILD), tmp_path / "model.safetensors")


@pytest.mark.usefixtures("no_new_files")
def test_dropping_the_model_closes_everything(path: Path) -> None:
    """Twenty models made, used and dropped leave no thread, no file and no weight memory."""
    before = threading.active_count()
    budgets = []
    for index in range(20):
        model = init_on_demand_weights_model(BUILD, str(path), memory_budget="300kB")
        if index % 2:
            models.outputs(model, INPUTS(index))
        budgets.append(runtime_of(model).budget)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
    assert threading.active_count() == before
    assert [budget.used_bytes for budget in budgets] == [0] * 20


@pytest.mark.usefixtures("no_new_files")
def test_a_dropped_model_does_not_wait_for_the_collector(path: Path) -> None:
    """Its memory is given back the moment the last reference goes."""
    gc.collect()
    gc.disable()
    try:
        model = init_on_demand_weights_model(BUILD, str(path), memory_budget="300kB")
        models.outputs(model, INPUTS(1))
        budget = runtime_of(model).budget
        del model
        assert budget.used_bytes == 0
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_new_files")
def test_depth_zero_starts_no_thread(path: Path) -> None:
    """The plain twin reads in the calling thread; so does enable_preloading=False."""
    before = threading.active_count()
    for options in ({"prefetch_depth": 0}, {"enable_preloading": False}):
        with models.streamed(BUILD, str(path), memory_budget="300kB", **options) as model:
            models.outputs(model, INPUTS(1))
            assert threading.active_count() == before
            assert odewei.report(model).prefetch_depth == 0


def test_the_report(path: Path) -> None:
    """Sums agree with each other, and the table names every figure."""
    with models.streamed(BUILD, str(path), memory_budget="300kB", prefetch_depth=0) as model:
        for _ in range(3):
            models.outputs(model, INPUTS(1))
        report = odewei.report(model)
    assert report.passes == 3
    assert report.accesses == 3 * report.units
    assert report.hits + report.stalls == report.accesses
    assert report.stall_seconds > 0
    assert report.read_seconds <= report.stall_seconds
    assert report.compute_seconds > 0
    assert report.floor_seconds == max(report.compute_seconds, report.read_seconds)
    for word in ("weights", "budget", "peak", "read", "hits", "computing", "exposed", "floor"):
        assert word in str(report)


@pytest.mark.parametrize("depth", [0, 2, "auto"])
def test_a_function_as_loader(depth: int | str) -> None:
    """A function is asked for full names with the module they belong to, and its answer streams under the budget."""
    reference = models.resident(BUILD)
    state = reference.state_dict()
    asked: list[tuple[str, tuple[str, ...]]] = []

    def load(module: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        asked.append((module, tuple(names)))
        return {name: state[name] for name in names}

    with models.streamed(BUILD, load, memory_budget="200kB", prefetch_depth=depth) as model:
        for seed in (1, 2):
            assert models.same_bits(models.outputs(model, INPUTS(seed)), models.outputs(reference, INPUTS(seed)))
        assert odewei.report(model).peak_bytes <= 200_000
    assert len(asked) > len(set(asked)) > 6, "weights that left were asked for again"
    assert all(name.startswith(module) for module, names in asked for name in names)


@pytest.mark.parametrize("depth", [0, "auto"])
def test_a_function_that_returns_more_is_asked_less(depth: int | str) -> None:
    """What a function returns beyond what was asked is used while the budget has room."""
    reference = models.resident(BUILD)
    state = reference.state_dict()
    calls = []

    def load(module: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        calls.append(module)
        return dict(state)

    with models.streamed(BUILD, load, memory_budget="10MB", prefetch_depth=depth, num_readers=1) as model:
        assert models.same_bits(models.outputs(model, INPUTS(1)), models.outputs(reference, INPUTS(1)))
        assert len(calls) < odewei.report(model).units / 2
    calls.clear()
    with models.streamed(BUILD, load, memory_budget="200kB", prefetch_depth=depth) as model:
        assert models.same_bits(models.outputs(model, INPUTS(1)), models.outputs(reference, INPUTS(1)))
        assert odewei.report(model).peak_bytes <= 200_000


@pytest.mark.parametrize("depth", [0, "auto"])
def test_a_function_with_another_dtype(depth: int | str) -> None:
    """Weights keep the dtype in which a function returns them, which is known only then; the budget holds."""
    reference = models.resident(BUILD).to(torch.bfloat16)
    expected = models.outputs(reference, INPUTS(1))
    state = reference.state_dict()
    rotary = reference.model.rotary_emb

    def build() -> nn.Module:
        model = BUILD()
        model.model.rotary_emb = rotary
        return model

    def load(module: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: state[name] for name in names}

    with models.streamed(build, load, memory_budget="200kB", prefetch_depth=depth) as model:
        assert models.same_bits(models.outputs(model, INPUTS(1)), expected)
        assert odewei.report(model).peak_bytes <= 200_000
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_function_that_uses_the_model_is_told() -> None:
    """A loading function that needs the weight that it is to load would wait for itself: an error, not a hang."""
    holder: list[nn.Module] = []
    state = models.resident(BUILD).state_dict()

    def load(module: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        if holder:
            holder[0].get_parameter(names[0]).sum()  # its unit cannot be there: this call loads it
        return {name: state[name] for name in names}

    with models.streamed(BUILD, load, memory_budget="150kB") as model:
        models.outputs(model, INPUTS(1))
        holder.append(model)
        with pytest.raises(odewei.OdeweiError, match="must not use the model"):
            models.passes(model, INPUTS(1))
        holder.clear()


def test_weights_in_memory() -> None:
    """A mapping of tensors and its loader stream like a file, with a cast too."""
    reference = models.resident(BUILD)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for source in (state, StateDictLoader(state)):
        with models.streamed(BUILD, source, memory_budget="200kB") as model:
            assert models.same_bits(models.outputs(model, INPUTS(1)), models.outputs(reference, INPUTS(1)))
    with models.streamed(BUILD, StateDictLoader(state, dtype=torch.bfloat16), memory_budget="200kB") as model:
        assert torch.equal(model.lm_head.weight, state["lm_head.weight"].to(torch.bfloat16))


class Backwards(nn.Module):
    """Runs its layers in the reverse of their definition, the middle one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for index in (7, 6, 5, 4, 4, 3, 2, 1, 0):
            hidden = self.layers[index](hidden)
        return hidden


def test_trace_finds_the_order_without_reading(tmp_path: Path) -> None:
    """A dry run gives the order of execution, so that the first pass predicts every access; it reads nothing."""
    model = models.resident(Backwards)
    path = models.save(model, tmp_path / "model.safetensors")
    hidden = torch.randn(3, 16)
    expected = [f"layers.{index}" for index in (7, 6, 5, 4, 4, 3, 2, 1, 0)]
    with models.streamed(Backwards, str(path), memory_budget=3 * 1152, prefetch_depth=0) as streamed:
        trace = odewei.trace(streamed, hidden)
        assert list(trace.units) == expected
        assert odewei.report(streamed).bytes_read == 0
        with torch.no_grad():
            assert torch.equal(streamed(hidden), model(hidden))
        assert odewei.report(streamed).mispredictions == 0
    with models.streamed(Backwards, str(path), memory_budget=3 * 1152, prefetch_depth=0) as untraced, torch.no_grad():
        untraced(hidden)
        assert odewei.report(untraced).mispredictions > 0


@pytest.mark.parametrize("name", [name for name in models.CASES if name != "mixtral"])
def test_trace_of_real_architectures(name: str, tmp_path: Path) -> None:
    """Models of transformers and others can be traced, with masks, and compute right afterwards."""
    case = models.CASES[name]
    reference = models.resident(case.build)
    path = models.save(reference, tmp_path / "model.safetensors")
    inputs = case.inputs(1)
    if name in ("llama", "bert"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with models.streamed(case.build, str(path)) as model:
        before = odewei.report(model).accesses
        trace = odewei.trace(model, **inputs)
        assert odewei.report(model).accesses == before
        assert models.same_bits(models.outputs(model, inputs), models.outputs(reference, inputs))
        report = odewei.report(model)
        assert len(trace.units) == report.accesses
        assert report.mispredictions == 0


def test_trace_of_a_forward_that_needs_values(tmp_path: Path) -> None:
    """A forward that looks at values cannot be traced: a clear error, and a model that works all the same."""

    class Looks(Backwards):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = super().forward(hidden)
            return hidden if hidden.sum().item() else -hidden

    model = models.resident(Looks)
    path = models.save(model, tmp_path / "model.safetensors")
    hidden = torch.randn(3, 16)
    with models.streamed(Looks, str(path), memory_budget=3 * 1152) as streamed, torch.no_grad():
        with pytest.raises(TraceError, match="first real pass"):
            odewei.trace(streamed, hidden)
        assert torch.equal(streamed(hidden), model(hidden))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_layers_are_apart() -> None:
    """loaders/ and scheduler/ import no torch.nn and nothing of the model's side; loaders/ imports no asyncio."""
    root = Path(odewei.__file__).parent
    for part, forbidden in (("loaders", {"asyncio", "aiofiles", "threading.Thread"}), ("scheduler", set())):
        for path in (root / part).glob("*.py"):
            imports = _imports(path)
            assert not {"torch.nn", *forbidden} & imports, path
            ours = {name for name in imports if name.startswith("odewei.")}
            allowed = ("odewei.errors", "odewei.loaders", "odewei.on_demand", f"odewei.{part}")
            assert all(name.startswith(allowed) for name in ours), (path, ours)


def test_importing_costs_no_extra() -> None:
    """The package imports with its four core dependencies only."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'click', 'rich', 'matplotlib', 'accelerate']));"
        "import odewei, odewei.torch"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
