"""What a unit costs when there are many of them: seconds to build, seconds a pass, bytes of memory.

    python benchmarks/scale.py [--units 1000 10000 100000] [--shape flat|groups|experts] [--source file|memory]
                               [--passes 5] [--json FILE] [--profile N] [--allocations N]

The model is made of blocks of one ``Linear(8, 8)``, each of them a unit. Every size is measured in processes of its
own, one for each of: the resident model, the same model built plainly on the meta device, the streamed one. What is
printed:

- *model_fn*: building the model plainly, on the CPU and on the meta device, without odewei.
- *building*: all of ``init_on_demand_weights_model``, by stage; ``model_fn`` in it is that function's own time, as it
  runs in there. Twice less that: *odewei's share*, all without it; *beyond meta*, all without what a plain build of the
  same model on the meta device takes, so that what odewei costs ``model_fn`` counts too. The larger one is compared
  with the bar. Seconds of building are this process's CPU seconds, with those of the clock beside them: building has
  one thread, and others use the machine.
- *a pass, per unit*: the resident model's; odewei's first and later ones when the budget holds everything, when it
  holds a quarter, and for the plain twin (``prefetch_depth=0``) with a quarter. Medians of the later passes.
- *memory a unit*: what the streamed model takes beyond the one on the meta device, once as the process's resident set
  and once as counted by tracemalloc (in a further process, for it slows everything down), before the first pass and
  after the last one, without the weights that are then in memory.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import odewei
import odewei.layout
import odewei.memory_budget
import odewei.runtime
import odewei.stock
import odewei.torch
from odewei.loaders.file_loader import FileLoader
from odewei.torch import init_on_demand_weights_model

WIDTH = 8
UNIT_BYTES = (WIDTH * WIDTH + WIDTH) * 4
STAGES = (
    ("model_fn, weights on meta", odewei.torch, "build_without_weights"),
    ("survey", odewei.runtime, "survey"),
    ("headers", FileLoader, "weights"),
    ("matching", odewei.stock, "match_weights"),
    ("buffers", odewei.runtime, "load_buffers"),
    ("partition", odewei.layout, "partition"),
    ("smallest budget", odewei.layout, "smallest_budget"),
    ("binder", odewei.runtime, "Binder"),
    ("hooks", odewei.runtime.Runtime, "_hook"),
    ("readers", odewei.runtime.Runtime, "_readers"),
    ("join", odewei.memory_budget.MemoryBudget, "join"),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


class Blocks(nn.Module):
    """``count`` blocks in one list, or ``lists`` of them in groups that have something of their own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Groups(nn.Module):
    """Two levels: lists of ``size`` blocks."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Blocks(min(size, count - start)) for start in range(0, count, size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for group in self.groups:
            hidden = group(hidden)
        return hidden


def model_fn(shape: str, count: int) -> Callable[[], nn.Module]:
    if shape == "flat":
        return lambda: Blocks(count)
    return lambda: Groups(count, 10 if shape == "groups" else 1000)


def write_checkpoint(shape: str, count: int, folder: Path) -> Path:
    """A checkpoint with random weights; its names are those of the model."""
    with torch.device("meta"):
        names = list(model_fn(shape, count)().state_dict())
    weights = torch.randn(count, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    state = {
        name: weights[index // 2].clone() if name.endswith("weight") else torch.zeros(WIDTH)
        for index, name in enumerate(names)
    }
    path = folder / "model.safetensors"
    save_file(state, path)
    return path


@contextmanager
def stages(spent: dict[str, float]) -> Iterator[None]:
    """Note the seconds spent in each stage of building."""
    saved = [(place, name, getattr(place, name)) for _, place, name in STAGES if hasattr(place, name)]

    def timed(label: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[label] = spent.get(label, 0.0) + time.process_time() - started

        return call

    for label, place, name in STAGES:
        if hasattr(place, name):
            setattr(place, name, timed(label, getattr(place, name)))
    try:
        yield
    finally:
        for place, name, function in saved:
            setattr(place, name, function)


def resident_set() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def passes(model: nn.Module, count: int) -> list[float]:
    found = []
    hidden = torch.ones(1, WIDTH)
    with torch.no_grad():
        for _ in range(count):
            started = time.perf_counter()
            model(hidden)
            found.append(time.perf_counter() - started)
    return found


def build(arguments: argparse.Namespace, **options: object) -> nn.Module:
    source: object = arguments.checkpoint
    if arguments.source == "memory":
        from safetensors.torch import load_file

        source = load_file(arguments.checkpoint)
    options.setdefault("memory_budget", 4 * arguments.count * 384)
    return init_on_demand_weights_model(model_fn(arguments.shape, arguments.count), source, **options)


def measure_plain(arguments: argparse.Namespace) -> dict[str, object]:
    """The resident model: building it, and its passes."""
    started, started_cpu = time.perf_counter(), time.process_time()
    model = model_fn(arguments.shape, arguments.count)()
    built, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    times = passes(model, arguments.passes)
    return {"build": built, "cpu": cpu, "first": times[0], "later": statistics.median(times[1:])}


def measure_meta(arguments: argparse.Namespace) -> dict[str, object]:
    """The model on the meta device: what building it takes and what it weighs."""
    small = model_fn(arguments.shape, 10)
    with torch.device("meta"):
        small()  # what torch imports on first use
        if arguments.trace_allocations:
            tracemalloc.start()
        before = resident_set()
        started, started_cpu = time.perf_counter(), time.process_time()
        model = model_fn(arguments.shape, arguments.count)()
        built, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    after = resident_set() - before
    del model
    return {"build": built, "cpu": cpu, "rss": after}


def measure_building(arguments: argparse.Namespace) -> dict[str, object]:
    """Building through odewei, by stage."""
    warm_up(arguments)
    spent: dict[str, float] = {}
    profile = cProfile.Profile()
    with stages(spent):
        started, started_cpu = time.perf_counter(), time.process_time()
        if arguments.profile:
            profile.enable()
        model = build(arguments, prefetch_depth=0)
        profile.disable()
        total, cpu = time.perf_counter() - started, time.process_time() - started_cpu
    if arguments.profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(arguments.profile)
    spent["the rest"] = cpu - sum(spent.values())
    odewei.close(model)
    return {"total": total, "cpu": cpu, "stages": spent, "share": cpu - spent["model_fn, weights on meta"]}


def measure_passes(arguments: argparse.Namespace) -> dict[str, object]:
    """First and later passes."""
    found: dict[str, object] = {}
    quarter = max(1 << 16, arguments.count * 384 // 4)
    for name, options in (
        ("all", {}),
        ("quarter", {"memory_budget": quarter}),
        ("plain", {"memory_budget": quarter, "prefetch_depth": 0}),
    ):
        model = build(arguments, **options)
        profile = cProfile.Profile()
        if arguments.profile:
            profile.enable()
        times = passes(model, arguments.passes)
        profile.disable()
        if arguments.profile:
            print(name, odewei.report(model), sep="\n", file=sys.stderr)
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(arguments.profile)
        found[name] = {"first": times[0], "later": statistics.median(times[1:])}
        odewei.close(model)
        del model
    return found


def warm_up(arguments: argparse.Namespace) -> None:
    """What Python and torch import and keep on first use is nobody's memory a unit."""
    small = argparse.Namespace(**vars(arguments))
    small.count = 10
    with tempfile.TemporaryDirectory() as folder:
        small.checkpoint = str(write_checkpoint(small.shape, 10, Path(folder)))
        for depth in (0, "auto"):
            model = build(small, prefetch_depth=depth)
            passes(model, 2)
            odewei.close(model)


def measure_memory(arguments: argparse.Namespace) -> dict[str, object]:
    """Streamed less meta, within one process: the meta model first, and again after it has gone."""
    warm_up(arguments)
    if arguments.trace_allocations:
        tracemalloc.start(1 if arguments.allocations == 0 else 3)

    def held() -> int:
        rss = resident_set()
        return tracemalloc.get_traced_memory()[0] if arguments.trace_allocations else rss

    before = held()
    if arguments.kind == "memory-of-meta":
        with torch.device("meta"):
            model = model_fn(arguments.shape, arguments.count)()
        return {"built": held() - before}
    model = build(arguments, prefetch_depth=0)
    built = held() - before
    if arguments.allocations and arguments.trace_allocations:
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
        for line in snapshot.statistics("lineno")[: arguments.allocations]:
            print(
                f"{line.size / arguments.count:9.1f} {line.count / arguments.count:6.2f} {line.traceback}",
                file=sys.stderr,
            )
    passes(model, 2)
    ran = held() - before - odewei.report(model).resident_bytes
    odewei.close(model)
    return {"built": built, "ran": ran}


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "resident": measure_plain,
    "meta": measure_meta,
    "building": measure_building,
    "passes": measure_passes,
    "memory": measure_memory,
    "memory-of-meta": measure_memory,
}


def run(kind: str, arguments: argparse.Namespace, count: int, checkpoint: Path, *extra: str) -> dict:
    command = [sys.executable, __file__, "--kind", kind, "--count", str(count), "--checkpoint", str(checkpoint)]
    command += ["--shape", arguments.shape, "--source", arguments.source, "--passes", str(arguments.passes)]
    command += ["--profile", str(arguments.profile), "--allocations", str(arguments.allocations), *extra]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, count: int) -> dict:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = write_checkpoint(arguments.shape, count, Path(folder))
        found = {"units": count}
        for kind in ("resident", "meta", "building", "passes"):
            found[kind] = run(kind, arguments, count, path)
        for extra in ((), ("--trace-allocations",)):
            meta = run("memory-of-meta", arguments, count, path, *extra)
            streamed = run("memory", arguments, count, path, *extra)
            name = "traced" if extra else "rss"
            found[name] = {"meta": meta["built"], **{key: streamed[key] - meta["built"] for key in ("built", "ran")}}
    return found


def show(found: dict) -> None:
    count = found["units"]
    building, resident, meta = found["building"], found["resident"], found["meta"]
    print(f"\n{count} units")
    beyond = building["cpu"] - meta["cpu"]
    print(f"  model_fn alone         {resident['cpu']:8.3f} s ({resident['build']:.3f} s by the clock)")
    print(f"  on the meta device     {meta['cpu']:8.3f} s ({meta['build']:.3f} s by the clock)")
    print(f"  building               {building['cpu']:8.3f} s ({building['total']:.3f} s by the clock)")
    print(f"  odewei's share         {building['share']:8.3f} s, beyond meta {beyond:.3f} s")
    for name, seconds in building["stages"].items():
        print(f"    {name:<26} {seconds:8.3f} s {seconds / count * 1e6:9.1f} µs a unit")
    print(f"  a pass, µs a unit      resident {resident['later'] / count * 1e6:.1f}")
    for name, times in found["passes"].items():
        first, later = (times[which] / count * 1e6 for which in ("first", "later"))
        print(f"    budget: {name:<10} first {first:9.1f}   later {later:9.1f}")
    for name in ("rss", "traced"):
        figures = ", ".join(f"{key} {value / count:.0f}" for key, value in found[name].items())
        print(f"  bytes a unit, {name:<8} {figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--shape", choices=("flat", "groups", "experts"), default="flat")
    parser.add_argument("--source", choices=("file", "memory"), default="file")
    parser.add_argument("--passes", type=int, default=5, help="the first and at least one more")
    parser.add_argument("--folder", default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--profile", type=int, default=0, help="print so many lines of the profile of each stage")
    parser.add_argument("--allocations", type=int, default=0, help="print so many of the places that hold most")
    parser.add_argument("--kind", choices=sorted(MEASURES), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", default="", help=argparse.SUPPRESS)
    parser.add_argument("--trace-allocations", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.passes < 2:
        parser.error("--passes: at least 2, for the first pass is no measure of the later ones")
    torch.set_num_threads(1)
    if arguments.kind is not None:
        print(json.dumps(MEASURES[arguments.kind](arguments)))
        return
    found = []
    for count in arguments.units:
        found.append(measure(arguments, count))
        show(found[-1])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
