"""``odewei bench``: a short benchmark of this machine, with nothing but odewei installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.table import Table

from odewei.cli.common import (
    NBYTES,
    json_option,
    plain_values,
    print_json,
    progress_console,
    result_console,
)
from odewei.demo.needs import default_cache_dir
from odewei.scheduler.budget import format_nbytes

if TYPE_CHECKING:
    from rich.console import Console

    from odewei.demo.bench import BenchResult

__all__ = ["command"]


@click.command("bench")
@click.option("--size", default="1GiB", show_default=True, type=NBYTES, help="Weights of the model.")
@click.option("--budget", type=NBYTES, help="Memory for its weights.  [default: a quarter of them]")
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_cache_dir,
    help="Where the checkpoint is written once.  [default: the user's cache]",
)
@click.option("--io", type=click.Choice(["direct", "buffered", "auto"]), default="direct", show_default=True)
@click.option(
    "--tokens", type=click.IntRange(1, 4096), multiple=True, default=(1, 128), show_default=True, help="Tokens a pass."
)
@click.option("--passes", type=click.IntRange(1), default=5, show_default=True, help="Measured passes a mode.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    size: int,
    budget: int | None,
    cache_dir: Path,
    io: Literal["direct", "buffered", "auto"],
    tokens: tuple[int, ...],
    passes: int,
    as_json: bool,
) -> None:
    """Measure the disk, then a synthetic model: streamed, streamed without reading ahead, and resident.

    The model is a Llama in plain torch with random weights. Its checkpoint, the same as that of `odewei demo`, is
    written once. For the benchmark with peers and memory limits see the repository.
    """
    from odewei.demo.bench import BenchSettings, run_bench
    from odewei.demo.show import write_with_bar
    from odewei.demo.synthetic import LlamaShape

    progress = progress_console()
    shape = LlamaShape.near(size)
    folder, _ = write_with_bar(cache_dir, shape, progress)
    budget_bytes = shape.nbytes() // 4 if budget is None else budget
    with progress.status("starting") as status:
        result = run_bench(
            BenchSettings(folder, shape, budget_bytes, tokens, passes, io),
            announce=lambda what: status.update(f"measuring {what}"),
        )
    if as_json:
        print_json(_document(result))
    else:
        _print(result_console(), result)
    context.exit(0 if result.equal else 1)


def _print(console: Console, result: BenchResult) -> None:
    settings = result.settings
    how = "direct" if result.disk.direct else "through the page cache"
    weights, budget = format_nbytes(settings.shape.nbytes()), format_nbytes(settings.budget_bytes)
    console.print(
        f"{weights} of weights under a budget of {budget}; "
        f"a plain read gets {result.disk.bandwidth / 1e9:.2f} GB/s, {how}",
        soft_wrap=True,
    )
    for run in result.runs:
        title = f"{run.settings.tokens} tokens a pass, medians of {settings.passes}"
        table = Table(title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        for heading in ("first s", "s/pass", "× floor", "read/pass", "peak weights", "same bits"):
            table.add_column(heading, justify="right")
        for figures in run.modes:
            floor = result.floor_seconds(run, figures)
            table.add_row(
                figures.mode,
                f"{figures.first_seconds:.2f}",
                f"{figures.median_seconds:.3f}",
                "–" if floor is None else f"{figures.median_seconds / floor:.2f}",
                format_nbytes(figures.read_bytes),
                format_nbytes(figures.peak_bytes),
                {True: "yes", False: "NO", None: "not compared"}[figures.equal],
            )
        console.print(table)
        if run.resident_skipped is not None:
            console.print(f"The resident model was left out: {run.resident_skipped}.")
    if not result.equal:
        console.print("[bold red]The streamed and the resident model gave DIFFERENT bits.[/bold red]")


def _document(result: BenchResult) -> dict[str, object]:
    document = plain_values(result)
    document["disk"]["bandwidth"] = result.disk.bandwidth
    document["equal"] = result.equal
    for run, found in zip(result.runs, document["runs"], strict=True):
        for figures, mode in zip(run.modes, found["modes"], strict=True):
            mode["median_seconds"] = figures.median_seconds
            mode["floor_seconds"] = result.floor_seconds(run, figures)
    return document
