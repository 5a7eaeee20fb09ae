"""``odewei align``: a copy of a checkpoint that is read with less work."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command("align")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def command(source: Path, folder: Path) -> None:
    """Copy a safetensors checkpoint so that it is read with less work.

    SOURCE is a file, an index or a folder; the copy in FOLDER is an ordinary checkpoint whose data lies at pages.
    """
    from odewei.align import align

    align(source, folder, on_file=lambda file: click.echo(f"wrote {file}"))
