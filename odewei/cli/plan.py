"""``odewei plan``: what will stay, what will be read, and how long a pass will take, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from odewei.cli.common import BUDGET, NBYTES, json_option, plain, print_json, progress_console, result_console
from odewei.scheduler.budget import format_nbytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from odewei.forecast import Forecast, Matrix, Outline
    from odewei.loaders.base import CheckpointFile, WeightInfo
    from odewei.measure import DiskSample

__all__ = ["command"]


@dataclass(frozen=True, slots=True)
class _Disk:
    """``bandwidth`` in bytes a second, and how that is known."""

    bandwidth: float
    source: str


@click.command("plan")
@click.argument("path")
@click.option("--memory-budget", "budget", type=BUDGET, default="auto", show_default=True, help="Memory for weights.")
@click.option("--bandwidth", type=NBYTES, help='Bytes a second, "3GB" say.  [default: measured on the files]')
@click.option("--tokens", type=click.IntRange(1, 65536), help="Estimate computing too, for so many tokens a pass.")
@json_option
def command(path: str, budget: int | str, bandwidth: int | None, tokens: int | None, as_json: bool) -> None:
    """Predict what stays in memory, what is read each pass, and how long that takes.

    PATH is a file, an index or a folder. The tensors are cut into units by their names, and the passes are rehearsed by
    the scheduler itself; nothing is loaded. Without --bandwidth, up to 2 GiB of the checkpoint are read to measure the
    disk. With --tokens, products with matrices of the checkpoint's shapes are timed: a pass computes at least that.
    """
    from odewei.forecast import Outline, is_tied
    from odewei.loaders import open_checkpoint

    loader = open_checkpoint(path)
    outline = Outline(loader, budget, tied=is_tied(loader))
    disk = _disk(bandwidth, loader.weights())
    products = None if tokens is None else _products(outline, tokens)
    forecast = outline.forecast(bandwidth=disk.bandwidth, tokens=tokens or 1, products=products)
    if as_json:
        print_json(_document(path, forecast, disk, tokens))
    else:
        _print(path, forecast, disk, tokens)


def _disk(given: int | None, weights: Mapping[str, WeightInfo]) -> _Disk:
    if given is not None:
        if given == 0:
            raise click.BadParameter("nothing can be read at 0 bytes a second", param_hint="--bandwidth")
        return _Disk(given, "given")
    files = _files(weights)
    with progress_console().status("reading the files to measure the disk"):
        sample = _sample(files)
    if sample is None:
        raise click.UsageError("the weights are not in local files as they are: give --bandwidth")
    how = "direct reads" if sample.direct else "reads through the page cache, which may make it look faster"
    return _Disk(sample.bandwidth, f"measured, {format_nbytes(sample.nbytes)} by 4 parallel {how}")


def _sample(files: list[CheckpointFile]) -> DiskSample | None:
    from odewei.measure import sample_disk

    return sample_disk(files)


def _files(weights: Mapping[str, WeightInfo]) -> list[CheckpointFile]:
    infos = (each for info in weights.values() for each in (info, *(part.source for part in info.parts)))
    files = {info.span.file: None for info in infos if info.span is not None}
    return [file for file in files if isinstance(file.path, Path)]  # of a network nothing is measured


def _products(outline: Outline, tokens: int) -> Mapping[Matrix, float]:
    from odewei.measure import product_seconds

    with progress_console().status(f"multiplying {tokens} rows by matrices of the checkpoint's shapes"):
        return product_seconds(outline.matrices(), tokens)


def _print(path: str, forecast: Forecast, disk: _Disk, tokens: int | None) -> None:
    console = result_console()
    for name, value in _rows(path, forecast, disk, tokens):
        console.print(f"{name:<11} {value}", markup=False, soft_wrap=True)
    table = Table(title="units", title_justify="left", caption=_caption(forecast), caption_justify="left")
    table.add_column("unit", overflow="fold")
    for heading in ("number", "all", "stay", "in memory", "read each pass"):
        table.add_column(heading, justify="right")
    for group in forecast.groups:
        stays, read = format_nbytes(group.stay_bytes), format_nbytes(group.nbytes - group.stay_bytes)
        table.add_row(plain(group.pattern), f"{group.count}", format_nbytes(group.nbytes), f"{group.stay}", stays, read)
    console.print(table)


def _rows(path: str, forecast: Forecast, disk: _Disk, tokens: int | None) -> list[tuple[str, str]]:
    part = forecast.budget_bytes / max(1, forecast.weight_bytes)
    largest, least = format_nbytes(forecast.largest_bytes), format_nbytes(forecast.least_bytes)
    read_part = forecast.read_bytes / max(1, forecast.weight_bytes)
    rows = [
        ("checkpoint", f"{path}: {format_nbytes(forecast.weight_bytes)} in {forecast.units} units, largest {largest}"),
        ("budget", f"{format_nbytes(forecast.budget_bytes)}, {part:.0%} of the weights; the smallest is {least}"),
        ("disk", f"{forecast.bandwidth / 1e9:.2f} GB/s ({disk.source})"),
        ("a pass", f"reads {format_nbytes(forecast.read_bytes)}, {read_part:.0%} of the weights"),
    ]
    if forecast.table_bytes:
        rows.append(("tables", f"{format_nbytes(forecast.table_bytes)} are only looked up, and read by rows"))
    if tokens is None:
        rows.append(("time", f"{forecast.seconds:.3f} s of reading a pass; computing is not counted: see --tokens"))
        return rows
    bound = "reading takes longer: disk-bound" if forecast.disk_bound else "computing takes longer"
    rows.append(("computing", f"{forecast.computing:.3f} s at least, for {tokens} tokens; {bound}"))
    rows.append(
        ("time", f"{forecast.seconds:.3f} s a pass, {forecast.stalled:.3f} of them waiting for weights; "
         f"the floor is {forecast.floor_seconds:.3f}, the first pass takes {forecast.first_seconds:.3f}")
    )  # fmt: skip
    return rows


def _caption(forecast: Forecast) -> str:
    return "nothing is read once it is there" if not forecast.read_bytes else ""


def _document(path: str, forecast: Forecast, disk: _Disk, tokens: int | None) -> dict[str, object]:
    return {
        "path": path,
        "tokens": tokens,
        "bandwidth_source": disk.source,
        **asdict(forecast),
        "floor_seconds": forecast.floor_seconds,
        "disk_bound": forecast.disk_bound,
    }
