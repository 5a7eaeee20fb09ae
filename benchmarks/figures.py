"""The three figures that odewei promises on the CPU, as ratios measured within one run.

    python benchmarks/figures.py [--size 4.15GB] [--budget 0.6GB] [--rounds 7] [--folder DIR] [--json FILE]

Each round measures, one after another so that a slow minute of the machine hits all of them: a plain parallel direct
read of the checkpoint's files, the resident model, odewei, and odewei's plain twin (``prefetch_depth=0``). Reads are
direct, past the page cache, in all of them. What is printed are medians over the rounds, and the ratios of medians.

- *512 tokens*: odewei over the slower of computing alone and reading alone. Must be at most 1.15.
- *1 token*: bytes odewei reads a second over those of the plain read. Must be at least 0.90.
- *fits*: with a budget for everything, odewei over the resident model at 128 tokens. Must be at most 1.03.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import odewei
from odewei.demo.synthetic import LlamaShape, model_fn, write_llama_checkpoint
from odewei.scheduler.budget import parse_nbytes
from odewei.torch import init_on_demand_weights_model

CHUNK = 32 << 20
READERS = 4


def plain_read(files: list[Path], buffers: list[memoryview]) -> tuple[float, int]:
    """Seconds and bytes of reading all files directly, ``READERS`` threads, ``CHUNK`` bytes at a time: nothing else."""
    jobs = [(path, offset) for path in files for offset in range(0, path.stat().st_size, CHUNK)]
    position, lock, counts = iter(jobs), threading.Lock(), [0] * READERS
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}

    def work(index: int) -> None:
        buffer = buffers[index]
        while True:
            with lock:
                job = next(position, None)
            if job is None:
                return
            counts[index] += os.preadv(descriptors[job[0]], [buffer], job[1])

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    for descriptor in descriptors.values():
        os.close(descriptor)
    return seconds, sum(counts)


def _huge_buffers() -> list[memoryview]:
    """Buffers on huge pages that have been touched, so that the plain read is as fast as the machine allows."""
    huge = 2 << 20
    memory = mmap.mmap(-1, READERS * CHUNK + huge)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % huge
    whole[::4096] = 1
    return [whole[start + index * CHUNK : start + (index + 1) * CHUNK].data for index in range(READERS)]


def best_buffers(files: list[Path], tries: int = 6) -> list[memoryview]:
    """The buffers that the plain read is fastest with.

    On a virtual machine the bandwidth depends, up to a factor of two, on which physical pages one happens to get.
    The bar is the best of several sets, so that odewei is not measured against an unlucky one.
    """
    sets = [_huge_buffers() for _ in range(tries)]
    return min(sets, key=lambda buffers: min(plain_read(files, buffers)[0] for _ in range(2)))


def timed(model: nn.Module, tokens: int) -> float:
    """Seconds of one forward pass of ``tokens`` tokens."""
    ids = torch.arange(tokens).reshape(1, tokens) % 1000
    started = time.perf_counter()
    with torch.no_grad():
        model(ids, use_cache=False)
    return time.perf_counter() - started


def resident_model(build: Callable[[], nn.Module], files: list[Path]) -> nn.Module:
    """The same model with all weights in memory, where torch itself would have put them."""
    with torch.device("meta"):
        model = build()
    for path in files:
        model.load_state_dict({k: v.clone() for k, v in load_file(path).items()}, strict=False, assign=True)
    real = build_rotary(build)
    model.model.rotary_emb = real  # the only buffers, which checkpoints do not hold
    return model.eval()


def build_rotary(build: Callable[[], nn.Module]) -> nn.Module:
    from odewei.meta_model import build_without_weights

    return build_without_weights(build).model.rotary_emb  # type: ignore[return-value, union-attr]


def rounds(count: int, measure: Callable[[], dict[str, float]]) -> dict[str, list[float]]:
    """The figures of ``count`` rounds by name, after one round that is not counted."""
    measure()
    found: dict[str, list[float]] = {}
    for _ in range(count):
        for name, value in measure().items():
            found.setdefault(name, []).append(value)
    return found


def streamed(model: nn.Module, tokens: int, passes: int = 2) -> tuple[float, float]:
    """Seconds a pass and bytes read a pass, over passes in a row, so that reading ahead into the next pass counts for
    both.
    """
    before = odewei.report(model).bytes_read
    seconds = sum(timed(model, tokens) for _ in range(passes))
    return seconds / passes, (odewei.report(model).bytes_read - before) / passes


def run(folder: Path, shape: LlamaShape, budget: int, count: int) -> Iterator[tuple[str, dict[str, list[float]]]]:
    files = sorted(folder.glob("*.safetensors"))
    build = model_fn(shape)
    buffers = best_buffers(files)
    resident = resident_model(build, files)
    common = {"io": "direct", "memory_budget": budget}
    for tokens in (1, 128, 512):
        ahead = init_on_demand_weights_model(build, str(folder), **common)
        twin = init_on_demand_weights_model(build, str(folder), prefetch_depth=0, **common)
        ids = torch.arange(tokens).reshape(1, tokens) % 1000
        with torch.no_grad():
            assert torch.equal(ahead(ids).logits, resident(ids).logits), "not the same bits"

        def measure(tokens: int = tokens, ahead: nn.Module = ahead, twin: nn.Module = twin) -> dict[str, float]:
            seconds, nbytes = plain_read(files, buffers)
            pass_seconds, pass_bytes = streamed(ahead, tokens)
            twin_seconds, twin_bytes = streamed(twin, tokens, 1)
            return {
                "plain read, s": seconds,
                "plain read, GB/s": nbytes / seconds / 1e9,
                "resident, s": statistics.median(timed(resident, tokens) for _ in range(3)),
                "odewei, s": pass_seconds,
                "odewei, GB read": pass_bytes / 1e9,
                "odewei, GB/s": pass_bytes / pass_seconds / 1e9,
                "twin, s": twin_seconds,
                "twin, GB read": twin_bytes / 1e9,
            }

        yield f"{tokens} tokens", rounds(count, measure)
        print(odewei.report(ahead))
        odewei.close(ahead)
        odewei.close(twin)
    fits = init_on_demand_weights_model(build, str(folder), io="direct", memory_budget=2 * shape.nbytes())

    def compare() -> dict[str, float]:
        return {"resident, s": timed(resident, 128), "odewei, s": timed(fits, 128)}

    yield "fits, 128 tokens", rounds(4 * count, compare)
    odewei.close(fits)


def verdicts(figures: dict[str, dict[str, float]]) -> list[tuple[str, float, str, bool]]:
    """Each promise: what was measured, the bar, whether it was reached."""
    long, short, fits = figures["512 tokens"], figures["1 tokens"], figures["fits, 128 tokens"]
    floor = max(long["resident, s"], long["odewei, GB read"] / long["plain read, GB/s"])
    whole = max(long["resident, s"], long["plain read, s"])
    return [
        (
            "512 tokens over max(computing, reading all)",
            long["odewei, s"] / whole,
            "<= 1.15",
            long["odewei, s"] <= 1.15 * whole,
        ),
        ("512 tokens over max(computing, reading what was read)", long["odewei, s"] / floor, "", True),
        (
            "1 token: bandwidth over that of a plain read",
            short["odewei, GB/s"] / short["plain read, GB/s"],
            ">= 0.90",
            short["odewei, GB/s"] >= 0.9 * short["plain read, GB/s"],
        ),
        (
            "fits: over resident at 128 tokens",
            fits["odewei, s"] / fits["resident, s"],
            "<= 1.03",
            fits["odewei, s"] <= 1.03 * fits["resident, s"],
        ),
    ]


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "kernel": platform.release(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4.15GB")
    parser.add_argument("--budget", default="0.6GB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here; default: a folder that is deleted again")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = LlamaShape.near(parse_nbytes(options.size))
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)) / shape.name
        write_llama_checkpoint(folder, shape)
        raw = {}
        for name, found in run(folder, shape, parse_nbytes(options.budget), options.rounds):
            raw[name] = found
            print(f"\n{name}")
            for figure, values in found.items():
                print(f"  {figure:<20} {statistics.median(values):8.3f}   of {', '.join(f'{v:.3f}' for v in values)}")
    medians = {name: {key: statistics.median(values) for key, values in found.items()} for name, found in raw.items()}
    print(f"\n{shape.name}, {shape.nbytes() / 1e9:.2f} GB, budget {options.budget}: {machine()}")
    results = verdicts(medians)
    for what, value, bar, reached in results:
        print(f"  {what:<56} {value:6.3f}  {bar:<8} {'' if not bar else 'reached' if reached else 'NOT reached'}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "raw": raw, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
