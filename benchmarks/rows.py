"""Looking up rows of an embedding table that is read by rows, beside the same table in memory.

    python benchmarks/rows.py [--table 1GiB] [--row 4KiB] [--budget 64MiB] [--rounds 15] [--folder DIR]

For each number of random ids, within each round: *in memory* is ``F.embedding`` on the resident table; *hot* repeats a
look-up whose rows are in the cache; *cached file* reads rows that the kernel's page cache has; *cold* reads them from
the disk, the page cache dropped before. Printed are medians in milliseconds. At the end the budget's peak and the
bytes read show what the table has cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.scheduler.budget import format_nbytes, parse_nbytes
from odewei.torch import init_on_demand_weights_model

COUNTS = (1, 8, 128, 512, 2048)


def milliseconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def drop_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def measure(table: torch.Tensor, path: Path, budget: int, rounds: int) -> None:
    def build() -> nn.Module:
        return nn.Embedding(*table.shape, dtype=table.dtype)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(0, len(table), (1, count), generator=generator)

    generator = torch.Generator().manual_seed(0)
    model = init_on_demand_weights_model(build, str(path), memory_budget=budget)
    print(f"{'ids':>6} {'in memory':>10} {'hot':>10} {'cached file':>12} {'cold':>10}   ms, medians of {rounds}")
    with torch.no_grad():
        for count in COUNTS:
            found: dict[str, list[float]] = {"in memory": [], "hot": [], "cached file": [], "cold": []}
            for _ in range(rounds):
                some, others = ids(count), ids(count)
                found["in memory"].append(milliseconds(lambda some=some: nn.functional.embedding(some, table)))
                drop_page_cache(path)
                found["cold"].append(milliseconds(lambda some=some: model(some)))
                found["hot"].append(milliseconds(lambda some=some: model(some)))
                assert torch.equal(model(some), nn.functional.embedding(some, table))
                with open(path, "rb") as file:
                    for row in others.flatten().tolist():
                        file.seek(path.stat().st_size - table.nbytes + row * table.stride(0) * table.itemsize)
                        file.read(table.stride(0) * table.itemsize)
                found["cached file"].append(milliseconds(lambda others=others: model(others)))
            medians = {name: statistics.median(values) for name, values in found.items()}
            print(
                f"{count:>6} {medians['in memory']:>10.3f} {medians['hot']:>10.3f} "
                f"{medians['cached file']:>12.3f} {medians['cold']:>10.3f}"
            )
    report = odewei.report(model)
    print(
        f"table {format_nbytes(table.nbytes)}, budget {format_nbytes(budget)}, peak {format_nbytes(report.peak_bytes)}"
    )
    print(f"{report.rows_looked_up} rows looked up, {report.rows_read} read: {format_nbytes(report.bytes_read)}")
    odewei.close(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", default="1GiB", help="size of the table, in bfloat16")
    parser.add_argument("--row", default="4KiB", help="size of a row")
    parser.add_argument("--budget", default="64MiB", help="memory_budget of the streamed model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the table is written")
    options = parser.parse_args()
    row, size = parse_nbytes(options.row), parse_nbytes(options.table)
    path = options.folder / f"odewei-rows-{size}-{row}.safetensors"
    table = torch.randint(-(1 << 15), 1 << 15, (size // row, row // 2), dtype=torch.int16).view(torch.bfloat16)
    table = table.nan_to_num()
    save_file({"weight": table}, path)
    os.sync()
    try:
        measure(table, path, parse_nbytes(options.budget), options.rounds)
    finally:
        path.unlink()


if __name__ == "__main__":
    main()
