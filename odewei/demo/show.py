"""The demonstration on a terminal: runs the parts, prints their results. The only module here that knows rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from odewei.demo.real_size import ModeFigures, RealSizeResult, RealSizeSettings, run_real_size
from odewei.demo.real_weights import RealWeightsResult, run_real_weights
from odewei.demo.synthetic import LlamaShape, write_llama_checkpoint
from odewei.scheduler.budget import format_nbytes

__all__ = ["DemoResult", "DemoSettings", "run_demo", "write_with_bar"]


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What the user asked for. ``budget_bytes`` None is a quarter of the weights; ``only`` None is both parts."""

    cache_dir: Path
    size_bytes: int
    budget_bytes: int | None
    io: Literal["auto", "direct", "buffered"]
    tokens: int
    passes: int
    only: Literal["real-weights", "real-size"] | None


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the parts that ran gave."""

    real_weights: RealWeightsResult | None
    real_size: RealSizeResult | None

    @property
    def equal(self) -> bool:
        """True when everything that was compared had equal bits."""
        return all(part.equal for part in (self.real_weights, self.real_size) if part is not None)


def run_demo(settings: DemoSettings, console: Console, progress: Console) -> DemoResult:
    """Run, print results on ``console`` and what is going on on ``progress``. Raises OdeweiError."""
    real_weights = _run_real_weights(console, progress) if settings.only != "real-size" else None
    real_size = _run_real_size(console, progress, settings) if settings.only != "real-weights" else None
    return DemoResult(real_weights, real_size)


def _run_real_weights(console: Console, progress: Console) -> RealWeightsResult:
    console.rule("Real weights")
    with progress.status("embedding sentences, streamed and resident"):
        result = run_real_weights()
    _print_real_weights(console, result)
    return result


def _print_real_weights(console: Console, result: RealWeightsResult) -> None:
    console.print(
        f"A sentence-embedding model of {format_nbytes(result.weights_bytes)} under a budget of "
        f"{format_nbytes(result.budget_bytes)}; at most {format_nbytes(result.peak_bytes)} were used.\n"
    )
    table = Table("", *(str(number) for number in range(1, len(result.sentences) + 1)), title="cosine similarity")
    for number, (sentence, row) in enumerate(zip(result.sentences, result.similarities, strict=True), 1):
        table.add_row(f"{number} {sentence}", *(f"{value:.2f}" for value in row))
    console.print(table)
    _print_verdict(console, result.equal, "embeddings")


def write_with_bar(cache_dir: Path, shape: LlamaShape, progress: Console) -> tuple[Path, bool]:
    """The checkpoint of this shape, written if it is not there yet; its folder, and whether it was written."""
    folder = cache_dir / f"{shape.name}-bf16"
    with _writing(progress, shape.nbytes()) as tell:
        return folder, write_llama_checkpoint(folder, shape, progress=tell)


def _run_real_size(console: Console, progress: Console, settings: DemoSettings) -> RealSizeResult:
    console.rule("A real size")
    shape = LlamaShape.near(settings.size_bytes)
    folder, written = write_with_bar(settings.cache_dir, shape, progress)
    size = format_nbytes(shape.nbytes())
    console.print(f"{'wrote' if written else 'found'} a checkpoint of {size}: {folder}", soft_wrap=True)
    run = RealSizeSettings(
        folder=folder,
        shape=shape,
        budget_bytes=shape.nbytes() // 4 if settings.budget_bytes is None else settings.budget_bytes,
        io=settings.io,
        tokens=settings.tokens,
        passes=settings.passes,
    )
    with progress.status("starting") as status:
        result = run_real_size(run, announce=lambda mode: status.update(f"running {mode}"))
    _print_real_size(console, result)
    return result


@contextmanager
def _writing(console: Console, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, from the first call of the given function (bytes done so far) on."""
    columns = (TextColumn("writing a checkpoint"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=nbytes, visible=False)
        yield lambda done: bar.update(task, completed=done, visible=True)


def _print_real_size(console: Console, result: RealSizeResult) -> None:
    run = result.settings
    console.print(
        f"{run.shape.layers} layers, {run.tokens} tokens a pass, {format_nbytes(result.weights_bytes)} of weights "
        f"under a budget of {format_nbytes(run.budget_bytes)}; io={run.io}\n"
    )
    table = Table(title=f"the first pass, then the median of {run.passes}", caption="first s: building included")
    table.add_column("", no_wrap=True)
    for heading in ("first s", "s/pass", "read/pass", "peak weights", "same bits"):
        table.add_column(heading, justify="right")
    for figures in result.modes:
        table.add_row(*_cells(figures))
    console.print(table)
    if result.resident_skipped is not None:
        console.print(f"The resident model was left out: {result.resident_skipped}.")
    else:
        _print_verdict(console, result.equal, "logits")
    console.print(result.report, markup=False, soft_wrap=True)


def _cells(figures: ModeFigures) -> tuple[str, ...]:
    equal = {True: "yes", False: "NO", None: "not compared"}[figures.equal]
    return (
        figures.mode,
        f"{figures.first_seconds:.2f}",
        f"{figures.median_seconds:.3f}",
        format_nbytes(figures.read_bytes),
        format_nbytes(figures.peak_bytes),
        equal,
    )


def _print_verdict(console: Console, equal: bool, what: str) -> None:
    if equal:
        console.print(f"[green]The {what} of the streamed and the resident model are equal bit for bit.[/green]\n")
    else:
        console.print(f"[bold red]The {what} of the streamed and the resident model DIFFER.[/bold red]\n")
