"""Memory under a control group's real limit: page cache counts, and whoever needs more is killed without a word."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.cgroup import GroupError, Limits, find_controllers
from tests.soak.table import Row, Skipped, Wrong, fault

_WIDTH = 4096  # of square layers: 64 MiB each
_LAYER_BYTES = _WIDTH * _WIDTH * 4
_BESIDES = 400_000_000  # bytes that the process gets besides its budget
_FEW, _MANY = 8, 64


class Layers(nn.Module):
    """Square layers without biases, which take nothing but their weights."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


def _write(folder: Path, count: int) -> None:
    """One file a layer, with an index; the first two layers' bits are those of the others by turns."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5 for _ in range(2)]
    for layer in range(count):
        save_file({f"layers.{layer}.weight": weights[layer % 2]}, folder / f"layer-{layer}.safetensors")
    names = {f"layers.{layer}.weight": f"layer-{layer}.safetensors" for layer in range(count)}
    import json

    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


_PROGRAM = """
import sys, torch
from pathlib import Path
from tests.soak.cgroups import Layers, hidden
from odewei.errors import OptionsError
from odewei.torch import ShardedWeightsLoader, init_on_demand_weights_model
import odewei
folder, count, budget, io = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
index = f"{folder}/model.safetensors.index.json"
try:
    loader = ShardedWeightsLoader(index, folder)
    model = init_on_demand_weights_model(lambda: Layers(count), loader, memory_budget=budget, io=io).eval()
except OptionsError as error:
    print(error)
    sys.exit(7)
with torch.no_grad():
    for _ in range(3):
        found = model(hidden())
report = odewei.report(model)
assert report.overdrafts == 0 and report.peak_bytes <= budget, report
expected = torch.load(f"{folder}/expected")
sys.exit(0 if torch.equal(found, expected) else 8)
"""


def hidden() -> torch.Tensor:
    return torch.randn(1, _WIDTH, generator=torch.Generator().manual_seed(1))


def _run(row: Row, limits: Limits, folder: Path, count: int, budget: int, limit: int, io: str) -> int:
    """The exit status of a process under ``limit`` bytes; -9: it was killed."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"}
    with limits.group(f"soak-{io}", limit) as group:
        enter = " && ".join(f"echo 0 > {file}" for file in group.enter)
        program = [sys.executable, "-c", _PROGRAM, str(folder), str(count), str(budget), io]
        command = ["sh", "-c", f'{enter} && exec "$@"', "sh", *program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
        peak = group.peak_bytes() or 0
        sizes = [f"{nbytes / 1e9:.2f}" for nbytes in (count * _LAYER_BYTES, budget, limit, peak)]
        row.notes.append(
            "{} GB of weights, budget {} GB, limit {} GB, most charged {} GB, ".format(*sizes)
            + f'io="{io}": ended with {done.returncode}'
        )
        if done.stdout:
            row.notes.append(f"  it said: {done.stdout.strip()[:300]}")
        if done.returncode not in (0, 7):
            row.notes.append(done.stderr[-500:])
    return done.returncode


@fault("a control group's limit of the budget and 400 MB", "memory")
def limit(row: Row, full: bool) -> None:
    try:
        limits = Limits(*find_controllers("memory"))
    except GroupError as reason:
        raise Skipped(str(reason)) from reason
    count = _MANY if full else _FEW
    budget = _LAYER_BYTES * count // 4
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(folder, count)
        torch.save(_expected(folder, count), folder / "expected")
        for io in ("direct", "buffered", "auto") if full else ("auto",):
            end = _run(row, limits, folder, count, budget, budget + _BESIDES, io)
            row.note(fired=True, end="right" if end == 0 else f"status {end}")
            if end:
                raise Wrong(f"a limit of the budget and {_BESIDES} bytes ended the process with {end}")
        greedy = _LAYER_BYTES * count * 7 // 8
        end = _run(row, limits, folder, count, greedy, greedy * 4 // 5, "auto")
        row.note(fired=True, end="clean OptionsError" if end == 7 else f"status {end}")
        if end != 7:
            raise Wrong(f"a limit below the budget was not refused, but ended with {end}")


def _expected(folder: Path, count: int) -> torch.Tensor:
    """What the resident model gives, whose layers share two weights, by as many threads as the process will have."""
    from safetensors.torch import load_file

    weights = [load_file(folder / f"layer-{layer}.safetensors")[f"layers.{layer}.weight"] for layer in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = hidden()
        with torch.no_grad():
            for layer in range(count):
                found = torch.tanh(nn.functional.linear(found, weights[layer % 2].clone()))
        return found
    finally:
        torch.set_num_threads(threads)
