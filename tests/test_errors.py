"""Bad input: errors that name module, weight, file and cure, as early as can be known, and models that recover."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei import errors
from odewei.torch import ShardedWeightsLoader, init_on_demand_weights_model
from tests import models

BUILD = models.CASES["llama"].build
FIRST = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return models.save(models.resident(BUILD), tmp_path / "model.safetensors")


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file

    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state)
    save_file(state, path)


def test_missing_file(tmp_path: Path) -> None:
    """A path that is not there is an error at once."""
    with pytest.raises(errors.CheckpointNotFoundError, match="nowhere"):
        init_on_demand_weights_model(BUILD, str(tmp_path / "nowhere.safetensors"))


def test_missing_weight(path: Path) -> None:
    """A weight that the checkpoint lacks is named when the model is built, with the way out."""
    _rewrite(path, lambda state: state.pop(FIRST))
    with pytest.raises(errors.MissingWeightError) as caught:
        init_on_demand_weights_model(BUILD, str(path))
    assert caught.value.weight == FIRST
    assert caught.value.module == "model.layers.2.mlp.up_proj"
    assert "on_missing" in str(caught.value)


def test_missing_weight_initialised(path: Path) -> None:
    """on_missing="init" gives the weight values, once, and streams the rest."""
    _rewrite(path, lambda state: state.pop(FIRST))
    with models.streamed(BUILD, str(path), on_missing="init", memory_budget="150kB") as model:
        weight = model.model.layers[2].mlp.up_proj.weight.clone()
        first = models.outputs(model, models.CASES["llama"].inputs(1))
        assert weight.isfinite().all()
        assert weight.std() > 0
        assert models.same_bits(models.outputs(model, models.CASES["llama"].inputs(1)), first)
        assert torch.equal(model.model.layers[2].mlp.up_proj.weight, weight)


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        (torch.zeros(3, 5), "shape"),
        (torch.zeros(112, 48, dtype=torch.int8), "int8"),
        (torch.zeros(112, 48).to(torch.float8_e4m3fn), "float8"),
    ],
)
def test_weight_that_does_not_fit(stored: torch.Tensor, what: str, path: Path) -> None:
    """Another shape, or a dtype that cannot stand for the model's, is named when the model is built."""
    _rewrite(path, lambda state: state.__setitem__(FIRST, stored))
    with pytest.raises(errors.WeightMismatchError, match=what) as caught:
        init_on_demand_weights_model(BUILD, str(path))
    assert (caught.value.weight, caught.value.file) == (FIRST, str(path))


def test_truncated_file(path: Path) -> None:
    """A file that is shorter than its header says is an error when the model is built."""
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(errors.CorruptCheckpointError):
        init_on_demand_weights_model(BUILD, str(path))


def test_header_that_lies(path: Path) -> None:
    """A header whose length is beyond the file is refused before anything is allocated."""
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(errors.CorruptCheckpointError):
        init_on_demand_weights_model(BUILD, str(path))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/../../model.safetensors"])
def test_index_that_leads_outside(shard: str, tmp_path: Path) -> None:
    """An index that names a file outside of its folder is refused."""
    folder = tmp_path / "inside"
    folder.mkdir()
    models.save(models.resident(BUILD), tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {FIRST: shard}}))
    with pytest.raises(errors.UnsafeCheckpointError):
        init_on_demand_weights_model(BUILD, ShardedWeightsLoader(str(index), str(folder)))


def test_budget_too_small(path: Path) -> None:
    """The error names the smallest budget that works; it does, and one byte less does not."""
    needed = models.smallest_budget(BUILD, path)
    with models.streamed(BUILD, str(path), memory_budget=needed) as model:
        models.outputs(model, models.CASES["llama"].inputs(1))
        assert odewei.report(model).peak_bytes <= needed
        assert odewei.report(model).overdrafts == 0
    with pytest.raises(errors.BudgetTooSmallError, match=str(needed)):
        init_on_demand_weights_model(BUILD, str(path), memory_budget=needed - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"prefetch_depth": -1},
        {"prefetch_depth": 1.5},
        {"prefetch_depth": "deep"},
        {"memory_budget": "much"},
        {"memory_budget": 0},
        {"memory_budget": -5},
        {"dtype": torch.int8},
        {"granularity": "fine"},
        {"io": "fast"},
        {"num_readers": 0},
        {"on_missing": "ignore"},
        {"enable_preloading": "yes"},
        {"device": "no device"},
    ],
    ids=str,
)
def test_options_that_cannot_work(options: dict[str, object], path: Path) -> None:
    """Every keyword is checked, and the error says its name and value."""
    with pytest.raises(errors.OptionsError) as caught:
        init_on_demand_weights_model(BUILD, str(path), **options)  # type: ignore[arg-type]
    (value,) = options.values()
    assert str(value).strip("'") in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("options", [{"device": "cuda:63"}, {"device": "meta"}, {"device": "gpu"}], ids=str)
def test_devices_that_there_are_not(options: dict[str, object], path: Path) -> None:
    """A device that torch does not find, or that computes nothing, is refused by name."""
    with pytest.raises(errors.OptionsError, match=f"device='{options['device']}'"):
        init_on_demand_weights_model(BUILD, str(path), **options)  # type: ignore[arg-type]


def test_a_host_budget_that_cannot_work(path: Path) -> None:
    """It is looked at on the CPU too, where it has no effect."""
    with pytest.raises(errors.OptionsError, match="host_budget=-1"):
        init_on_demand_weights_model(BUILD, str(path), host_budget=-1)


@pytest.mark.parametrize("depth", [0, "auto"])
def test_file_damaged_while_the_model_runs(depth: int | str, path: Path) -> None:
    """A file cut short under a running model: an error with its name, and right numbers once it is whole again."""
    reference = models.resident(BUILD)
    whole = path.read_bytes()
    inputs = models.CASES["llama"].inputs(1)
    budget = models.smallest_budget(BUILD, path) * 2
    with models.streamed(BUILD, str(path), memory_budget=budget, prefetch_depth=depth) as model:
        models.outputs(model, inputs)
        stat = path.stat()
        path.write_bytes(whole[: len(whole) // 4])
        with pytest.raises(errors.WeightReadError) as caught:
            models.passes(model, inputs)
        assert str(path) in str(caught.value)
        assert caught.value.module
        path.write_bytes(whole)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for _ in range(2):
            assert models.same_bits(models.outputs(model, inputs), models.outputs(reference, inputs))


@pytest.mark.parametrize("depth", [0, "auto"])
def test_function_that_fails_once(depth: int | str) -> None:
    """What a loading function raises reaches the forward as the cause; the next call is right."""
    reference = models.resident(BUILD)
    state = reference.state_dict()
    broken = {"on": False}

    def load(module: str, names: list[str]) -> dict[str, torch.Tensor]:
        if broken["on"] and any("layers.3" in name for name in names):
            raise ConnectionError("no route to the weights")
        return {name: state[name] for name in names}

    inputs = models.CASES["llama"].inputs(1)
    with models.streamed(BUILD, load, memory_budget="150kB", prefetch_depth=depth) as model:
        models.outputs(model, inputs)
        broken["on"] = True
        with pytest.raises(errors.WeightReadError, match="no route") as caught:
            models.passes(model, inputs)
        assert isinstance(caught.value.__cause__, ConnectionError)
        assert "layers.3" in str(caught.value.module)
        broken["on"] = False
        for _ in range(2):
            assert models.same_bits(models.outputs(model, inputs), models.outputs(reference, inputs))


def test_not_a_streamed_model() -> None:
    """report() of an ordinary model says what it wants; close() and materialize() leave it alone."""
    ordinary = nn.Linear(2, 2)
    with pytest.raises(errors.OptionsError, match="Linear"):
        odewei.report(ordinary)
    assert odewei.materialize(ordinary) is ordinary
    odewei.close(ordinary)


def test_after_close(path: Path) -> None:
    """A closed model says so instead of hanging; closing twice is fine."""
    model = init_on_demand_weights_model(BUILD, str(path))
    models.outputs(model, models.CASES["llama"].inputs(1))
    odewei.close(model)
    odewei.close(model)
    with pytest.raises(errors.ClosedError):
        models.outputs(model, models.CASES["llama"].inputs(1))
    with pytest.raises(errors.ClosedError):
        odewei.materialize(model)


def test_errors_say_everything_and_travel() -> None:
    """The message holds problem, place and cure, and survives pickling."""
    error = errors.MissingWeightError("gone", module="m", weight="w", file="f", cure="Look for it")
    assert str(error) == "gone (module 'm', weight 'w', file 'f'). Look for it"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.cure) == (type(error), str(error), error.cure)


def test_a_lazy_module_is_refused() -> None:
    """A parameter without a shape is named, with the cure."""
    with pytest.raises(errors.ModelError, match="UninitializedParameter") as caught:
        init_on_demand_weights_model(lambda: nn.Sequential(nn.LazyLinear(5)), {})
    assert (caught.value.module, caught.value.weight) == ("0", "weight")


def test_a_wrapper_subclass_is_refused(path: Path) -> None:
    """A parameter that is more than its bytes (quantised tensors) is named, not silently unwrapped."""

    class Quantised(nn.Parameter):
        pass

    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        model.weight = Quantised(torch.ones(2, 2))
        return model

    with pytest.raises(errors.ModelError, match="Quantised"):
        init_on_demand_weights_model(build, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})


_FORK = """
import os, sys, torch
from tests import models
from odewei.errors import ClosedError
inputs = models.CASES["llama"].inputs(1)
with models.streamed(models.CASES["llama"].build, sys.argv[1], memory_budget="100kB") as model:
    models.outputs(model, inputs)
    child = os.fork()
    if not child:
        try:
            models.passes(model, inputs)
        except ClosedError as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    models.passes(model, inputs)
"""


def test_a_forked_child_is_told(path: Path) -> None:
    """The scheduler's thread does not survive a fork: the child gets an error and no hang, the parent goes on."""
    command = [sys.executable, "-W", "ignore", "-c", _FORK, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=60, env=environment)


_FORKS = """
import os, signal, sys, threading, torch
from tests import traps
from odewei.errors import ClosedError
from pathlib import Path
depth = int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2]
torch.set_num_threads(1)
ends = {}
with traps.twins(traps.Blocks, Path(sys.argv[1]), depth) as (model, streamed), torch.no_grad():
    expected = model(traps.rows(1))
    stop = threading.Event()

    def work():
        with torch.no_grad():
            while not stop.is_set():
                assert torch.equal(streamed(traps.rows(1)), expected)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        child = os.fork()
        if not child:
            signal.alarm(20)  # a child that hangs dies of it
            try:
                found = streamed(traps.rows(1))
            except ClosedError as error:
                os._exit(7 if "forked" in str(error) and "spawn" in str(error) else 8)
            except BaseException:
                os._exit(9)
            os._exit(0 if torch.equal(found, expected) else 10)
        end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends[end] = ends.get(end, 0) + 1
    stop.set()
    for thread in threads:
        thread.join()
    assert torch.equal(streamed(traps.rows(1)), expected)
assert set(ends) <= {0, 7}, ends
print(ends)
"""


@pytest.mark.parametrize("depth", [0, "auto"])
def test_a_fork_in_the_middle_of_anything(depth: int | str, tmp_path: Path) -> None:
    """A child forked while threads compute and read is told or is right, and never hangs; the parent goes on."""
    command = [sys.executable, "-W", "ignore", "-c", _FORKS, str(tmp_path), str(depth)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=100, env=environment)


# torch aborts a program that ends while a thread computes, with odewei or without: this one is waited for.
_END = """
import atexit, sys, threading
atexit.register(lambda: thread.join())  # the first one registered is the last one called
import torch
from tests import models
from odewei.errors import ClosedError
from odewei.torch import init_on_demand_weights_model
case = models.CASES["llama"]
model = init_on_demand_weights_model(case.build, sys.argv[1], memory_budget="100kB")
inputs = case.inputs(1)
runs = threading.Event()

def work():
    try:
        while True:
            models.outputs(model, inputs)
            runs.set()
    except ClosedError:
        pass

thread = threading.Thread(target=work, daemon=True)
thread.start()
runs.wait()
"""


def test_the_interpreter_ends_in_the_middle_of_reading(path: Path) -> None:
    """A daemon thread's passes are told so, and the scheduler ends with the program without a word."""
    command = [sys.executable, "-W", "ignore", "-c", _END, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(command, check=True, timeout=60, env=environment, stderr=subprocess.PIPE, text=True)
        assert "odewei-scheduler" not in done.stderr
