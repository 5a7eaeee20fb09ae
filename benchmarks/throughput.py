"""Passes a second of ``odewei.map`` at 1, 2, 4 and 8 passes at once, and the bytes that a pass reads.

    python -m benchmarks.throughput [--size 1GB] [--budget 256MB] [--tokens 4] [--passes 3] [--throttle 500MB]
                                    [--concurrency 1 2 4 8] [--apart SECONDS] [--no-convoy]
                                    [--new-tokens 0] [--threads N] [--folder FOLDER] [--json FILE]

A Llama-shaped model of random weights, read directly. ``--throttle`` limits what the process may read a second, by a
control group, so that a fast disk is as slow as a usual one; 0: no limit. Each concurrency K runs K times ``--passes``
inputs after one round that is not counted, K = 1 both first and last. Results are compared byte for byte with those of
K = 1. Exits with 1 where any differs. ``--apart``: the first K inputs come one after another, so many seconds apart.
``--new-tokens``: ``odewei.generate_many`` on prompts of 1 to 64 times ``--tokens`` tokens instead. ``--no-convoy``:
passes begin whenever they can, as if ``odewei.convoy`` were not there. ``--threads``: that torch computes with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

import odewei
import odewei.throughput
from benchmarks.cgroup import GroupError, Limits, find_controllers
from benchmarks.disk import device_of
from odewei.convoy import Convoy
from odewei.demo.needs import default_cache_dir
from odewei.demo.synthetic import LlamaShape, model_fn, write_llama_checkpoint
from odewei.scheduler.budget import parse_nbytes
from odewei.torch import init_on_demand_weights_model


def measure(options: argparse.Namespace, folder: Path, shape: LlamaShape) -> list[dict[str, float | bool]]:
    """One row for each concurrency, in this process."""
    model = init_on_demand_weights_model(model_fn(shape), folder, memory_budget=options.budget, io="direct")
    draw = torch.Generator().manual_seed(0)
    most = max(options.concurrency) * options.passes
    lengths = [options.tokens * (2 ** (index * 5 % 7) if options.new_tokens else 1) for index in range(most)]
    inputs = [torch.randint(3, shape.vocab, (1, length), generator=draw) for length in lengths]
    alone: list[torch.Tensor] = []
    rows = []
    try:
        with torch.inference_mode():
            for concurrency in (*options.concurrency, options.concurrency[0]):
                run(model, inputs[:concurrency], concurrency, options)
                before, started = odewei.report(model), time.perf_counter()
                found = run(model, inputs[: concurrency * options.passes], concurrency, options)
                seconds, after = time.perf_counter() - started, odewei.report(model)
                passes = after.passes - before.passes
                alone = alone or run(model, inputs, 1, options)
                rows.append(
                    {
                        "concurrency": concurrency,
                        "passes": passes,
                        "passes_per_second": passes / seconds,
                        "bytes_per_pass": (after.bytes_read - before.bytes_read) / passes,
                        "bandwidth": (after.bytes_read - before.bytes_read) / seconds,
                        "same_bits": all(map(torch.equal, found, alone)),
                    }
                )
                show(rows[-1], rows[0])
    finally:
        odewei.close(model)
    return rows


def run(
    model: torch.nn.Module, inputs: list[torch.Tensor], concurrency: int, options: argparse.Namespace
) -> list[torch.Tensor]:
    def coming() -> Iterator[torch.Tensor]:
        for index, one in enumerate(inputs):
            time.sleep(options.apart * (0 < index < concurrency))
            yield one

    if options.new_tokens:
        keywords = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
        return list(odewei.generate_many(model, coming(), concurrency=concurrency, pad_token_id=0, **keywords))
    return [found.logits for found in odewei.map(model, coming(), concurrency=concurrency, use_cache=False)]


class Alone(Convoy):
    """A convoy in which nobody waits."""

    def begin(self, bytes_read: int) -> None:
        pass

    def end(self) -> None:
        pass


def show(row: dict[str, float | bool], first: dict[str, float | bool]) -> None:
    print(
        f"{row['concurrency']:>2} at once: {row['passes_per_second']:7.3f} passes/s"
        f" ({row['passes_per_second'] / first['passes_per_second']:5.2f} ×),"
        f" {row['bytes_per_pass'] / 1e6:8.1f} MB a pass ({row['bytes_per_pass'] / first['bytes_per_pass']:5.3f} ×),"
        f" {row['bandwidth'] / 1e6:6.0f} MB/s, {'same bits' if row['same_bits'] else 'OTHER BITS'}",
        flush=True,
    )


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.no_convoy:
        odewei.throughput.Convoy = Alone
    if options.enter is not None:
        Path(options.enter).write_text("0")
    shape = LlamaShape.near(options.size)
    folder = options.folder / shape.name
    write_llama_checkpoint(folder, shape)
    if options.enter is not None or not options.throttle:
        rows = measure(options, folder, shape)
        alone = max(row["passes_per_second"] for row in (rows[0], rows[-1]))
        for row in rows[1:-1]:
            print(f"{row['concurrency']:>2} at once: {row['passes_per_second'] / alone:.2f} × the faster run of one")
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        raise SystemExit(0 if all(row["same_bits"] for row in rows) else 1)
    with ExitStack() as stack:
        try:
            (controller,) = find_controllers("io")
            device = device_of(folder)
            if device is None:
                raise GroupError("the folder is on no block device")
            limits = Limits(io=controller, device=device, bytes_per_second=options.throttle)
            group = stack.enter_context(limits.group("throughput", None))
        except GroupError as error:
            raise SystemExit(f"--throttle: {error}; --throttle 0 measures without") from error
        command = [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:], "--enter", str(group.enter[0])]
        raise SystemExit(subprocess.run(command).returncode)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_nbytes, default=parse_nbytes("1GB"))
    parser.add_argument("--budget", type=parse_nbytes, default=parse_nbytes("256MB"))
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--throttle", type=parse_nbytes, default=parse_nbytes("500MB"))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--apart", type=float, default=0.0)
    parser.add_argument("--no-convoy", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=default_cache_dir())
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--enter", default=None, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
