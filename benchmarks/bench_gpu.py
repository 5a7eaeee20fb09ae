"""odewei on an accelerator, beside the resident model and two peers, on one checkpoint in one run.

    python -m benchmarks.bench_gpu [--size 4GiB] [--budgets 0.25 0.5 0.75] [--tokens 1 128 512] [--passes 5]
                                   [--folder DIR] [--results DIR] [--device cuda]

The model is a Llama with random weights. Measured are, in milliseconds, medians of ``--passes`` passes that wait for
the device at their end:

- *computing*: the resident model, all weights on the device;
- *link*: bytes a second of copies from pinned host memory to the device, the best of several;
- *odewei*: for each budget, a part of the weights, with everything in host memory after the first pass; and its plain
  twin (``prefetch_depth=0``);
- *accelerate*: ``cpu_offload``; *diffusers*: group offloading by blocks, on a stream of its own. Both keep all weights
  in host memory and none on the device between their uses. What cannot run is reported as not run.

The floor of a budget is ``max(computing, missed bytes / link)``, where what is missed is what odewei copied a pass.
Every output is compared with the resident model's, bit for bit. Without an accelerator nothing runs, and the reason is
said.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import odewei
from odewei.demo.synthetic import LlamaShape, model_fn, write_llama_checkpoint
from odewei.scheduler.budget import format_nbytes, parse_nbytes
from odewei.torch import init_on_demand_weights_model

Build = Callable[[], nn.Module]


@dataclass
class Row:
    """One contender at one number of tokens. ``ms`` None: it did not run, and ``note`` says why."""

    contender: str
    tokens: int
    ms: float | None
    floor_ms: float | None = None
    copied_bytes: float | None = None
    equal: bool | None = None
    note: str = ""


@dataclass
class Result:
    """Everything that is written down."""

    device: str
    torch: str
    host: str
    weight_bytes: int
    link_bytes_per_second: float
    rows: list[Row] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        print(f"nothing to measure: torch {torch.__version__} finds no accelerator here", file=sys.stderr)
        return 0
    device = torch.device(options.device or found.type)
    with _folder(options.folder) as folder:
        result = run(device, folder, options)
    text = table(result)
    print(text)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        stem = options.results / f"{date.today()}-{device.type}"
        stem.with_suffix(".json").write_text(json.dumps(result, default=vars, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text + "\n")
    return 0


def run(device: torch.device, folder: Path, options: argparse.Namespace) -> Result:
    """All measurements on one device."""
    shape = LlamaShape.near(options.size)
    checkpoint = folder / "llama"
    write_llama_checkpoint(checkpoint, shape)
    build = model_fn(shape)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = Result(name, torch.__version__, platform.node(), shape.nbytes(torch.bfloat16), link(device))
    inputs = {tokens: torch.arange(tokens, device=device)[None] % shape.vocab for tokens in options.tokens}

    resident = _resident(build, checkpoint).to(device)
    computing = {tokens: _timed(resident, ids, options.passes) for tokens, ids in inputs.items()}
    expected = {tokens: _output(resident, ids) for tokens, ids in inputs.items()}
    result.rows += [Row("resident", tokens, ms, equal=True) for tokens, ms in computing.items()]
    del resident
    _clear()
    for part in options.budgets:
        for depth in ("auto", 0):
            result.rows += _odewei(device, build, checkpoint, part, depth, inputs, expected, computing, result, options)
    for contender, offload in (("accelerate cpu_offload", _accelerate), ("diffusers group offloading", _diffusers)):
        for tokens, ids in inputs.items():
            result.rows.append(_peer(contender, offload, device, build, checkpoint, ids, expected[tokens], options))
    return result


def link(device: torch.device, nbytes: int = 256 << 20, tries: int = 8) -> float:
    """Bytes a second from pinned memory to the device, in copies of ``nbytes``: the best of some."""
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(tries):
        torch.accelerator.synchronize()
        begun = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begun)
    return nbytes / best


def table(result: Result) -> str:
    """The result as Markdown."""
    lines = [
        f"# {result.device}",
        "",
        f"torch {result.torch}; Llama of {format_nbytes(result.weight_bytes)} in bfloat16; link "
        f"{result.link_bytes_per_second / 1e9:.1f} GB/s from pinned memory.",
        "",
        "| | tokens | ms a pass | over the floor | copied a pass | bits |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result.rows:
        over = f"{row.ms / row.floor_ms:.3f}" if row.ms and row.floor_ms else ""
        ms = "not run" if row.ms is None else f"{row.ms:.2f}"
        copied = "" if row.copied_bytes is None else format_nbytes(row.copied_bytes)
        bits = {True: "equal", False: "differ", None: row.note}[row.equal]
        lines.append(f"| {row.contender} | {row.tokens} | {ms} | {over} | {copied} | {bits} |")
    return "\n".join(lines)


def _odewei(
    device: torch.device,
    build: Build,
    checkpoint: Path,
    part: float,
    depth: int | str,
    inputs: dict[int, torch.Tensor],
    expected: dict[int, torch.Tensor],
    computing: dict[int, float],
    result: Result,
    options: argparse.Namespace,
) -> Iterator[Row]:
    budget = int(result.weight_bytes * part)
    model = init_on_demand_weights_model(
        build, str(checkpoint), device=device, memory_budget=budget, prefetch_depth=depth, host_budget=options.host
    ).eval()
    for tokens, ids in inputs.items():
        _timed(model, ids, 2)  # the first pass reads, the second knows the way
        before = odewei.report(model).bytes_copied
        ms = _timed(model, ids, options.passes, uncounted=0)
        copied = (odewei.report(model).bytes_copied - before) / options.passes
        floor = max(computing[tokens], copied / result.link_bytes_per_second * 1e3)
        equal = torch.equal(_output(model, ids), expected[tokens])
        name = f"odewei, {part:.0%}" + ("" if depth else ", plain twin")
        yield Row(name, tokens, ms, floor, copied, equal)
    odewei.close(model)
    del model
    _clear()


def _peer(
    contender: str,
    offload: Callable[[nn.Module, torch.device], None],
    device: torch.device,
    build: Build,
    checkpoint: Path,
    ids: torch.Tensor,
    expected: torch.Tensor,
    options: argparse.Namespace,
) -> Row:
    tokens = ids.shape[1]
    try:
        model = _resident(build, checkpoint)
        offload(model, device)
        ms = _timed(model, ids, options.passes)
        return Row(contender, tokens, ms, equal=torch.equal(_output(model, ids), expected))
    except Exception as error:
        return Row(contender, tokens, None, note=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    finally:
        model = None
        _clear()


def _accelerate(model: nn.Module, device: torch.device) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, device)


def _diffusers(model: nn.Module, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model, onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=True
    )


def _resident(build: Build, checkpoint: Path) -> nn.Module:
    with torch.device("meta"):
        names = set(build().state_dict())
    model = build().eval().requires_grad_(False)
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights = load_file(file)
        names -= weights.keys()
        model.load_state_dict(weights, strict=False, assign=True)
    assert not names, f"the checkpoint lacks {sorted(names)[:3]}"
    return model


def _timed(model: nn.Module, ids: torch.Tensor, passes: int, *, uncounted: int = 2) -> float:
    """Milliseconds of a pass, the median."""
    found = []
    for _ in range(uncounted + passes):
        torch.accelerator.synchronize()
        begun = time.perf_counter()
        _run(model, ids)
        torch.accelerator.synchronize()
        found.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(found[uncounted:])


def _output(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return _run(model, ids).cpu()


def _run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: Any = model(ids, use_cache=False).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _clear() -> None:
    gc.collect()
    torch.accelerator.empty_cache()


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=parse_nbytes, default=4 << 30, help="bytes of weights (4GiB)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="parts of the weights")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128, 512], help="tokens a pass")
    parser.add_argument("--passes", type=int, default=5, help="counted passes")
    parser.add_argument("--host", default="auto", help="odewei's host_budget")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept; a temporary folder by default")
    parser.add_argument("--results", type=Path, help="where the result is written as Markdown and JSON")
    parser.add_argument("--device", help="the accelerator; the one that torch finds by default")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
