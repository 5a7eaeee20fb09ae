"""``odewei inspect``: what a checkpoint has in it. Reads headers only."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from odewei.cli.common import json_option, plain, print_json, result_console
from odewei.scheduler.budget import format_nbytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console

    from odewei.contents import Contents, Tensors
    from odewei.loaders.base import WeightInfo

__all__ = ["command"]


@click.command("inspect")
@click.argument("path")
@click.option("--tensors", "each", is_flag=True, help="List every tensor by its name, not by pattern.")
@json_option
def command(path: str, each: bool, as_json: bool) -> None:
    """Show the tensors of a checkpoint, by layer and by size.

    PATH is a file, an index or a folder. Names that differ in their numbers only are one row. Only headers are read.
    """
    from odewei.contents import Contents
    from odewei.loaders import open_checkpoint

    loader = open_checkpoint(path)
    weights = loader.weights()
    contents = Contents.of(weights)
    if as_json:
        print_json(_document(path, type(loader).__name__, contents, weights if each else None))
        return
    console = result_console()
    console.print(f"{path}: {_summary(contents, type(loader).__name__)}", markup=False, soft_wrap=True)
    if each:
        _print_each(console, weights)
    else:
        _print_layers(console, contents)
        _print_tensors(console, contents.tensors)


def _summary(contents: Contents, loader: str) -> str:
    files = f"{len(contents.files)} file{'s' * (len(contents.files) != 1)}"
    dtypes = ", ".join(f"{dtype} {format_nbytes(nbytes)}" for dtype, nbytes in contents.dtypes.items())
    return f"{format_nbytes(contents.nbytes)} in {contents.count} tensors and {files} ({loader}): {dtypes or 'none'}"


def _print_layers(console: Console, contents: Contents) -> None:
    table = Table(title="layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for heading in ("number", "each", "all", "part"):
        table.add_column(heading, justify="right")
    for found in contents.layers:
        least, most = format_nbytes(found.least_bytes), format_nbytes(found.most_bytes)
        each = most if least == most else f"{least} to {most}"
        part = f"{found.total_bytes / max(1, contents.nbytes):.0%}"
        table.add_row(plain(found.pattern), f"{found.count}", each, format_nbytes(found.total_bytes), part)
    console.print(table)


def _print_tensors(console: Console, tensors: Iterable[Tensors]) -> None:
    table = _names_table(title="tensors", title_justify="left")
    for heading in ("number", "each", "all"):
        table.add_column(heading, justify="right")
    for found in tensors:
        sizes = (f"{found.count}", format_nbytes(found.nbytes), format_nbytes(found.total_bytes))
        table.add_row(plain(found.pattern), found.dtype, _shape(found.shape), *sizes)
    console.print(table)


def _print_each(console: Console, weights: Mapping[str, WeightInfo]) -> None:
    table = _names_table()
    table.add_column("bytes", justify="right")
    for name, info in weights.items():
        dtype = str(info.dtype).removeprefix("torch.")
        table.add_row(plain(name), dtype, _shape(info.shape), format_nbytes(info.nbytes))
    console.print(table)


def _names_table(**settings: Any) -> Table:
    """Long names go on in the next line: what is cut off cannot be told apart."""
    table = Table(**settings)
    table.add_column("name", overflow="fold")
    for heading in ("dtype", "shape"):
        table.add_column(heading, no_wrap=True)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _document(
    path: str, loader: str, contents: Contents, weights: Mapping[str, WeightInfo] | None
) -> dict[str, object]:
    document: dict[str, object] = {
        "path": path,
        "loader": loader,
        "bytes": contents.nbytes,
        "tensors": contents.count,
        "dtypes": dict(contents.dtypes),
        "files": [{"path": file, "bytes": nbytes} for file, nbytes in contents.files.items()],
        "layers": [asdict(found) for found in contents.layers],
        "patterns": [asdict(found) | {"total_bytes": found.total_bytes} for found in contents.tensors],
    }
    if weights is not None:
        document["each"] = [
            {
                "name": name,
                "dtype": str(info.dtype).removeprefix("torch."),
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "file": info.file,
            }
            for name, info in weights.items()
        ]
    return document
