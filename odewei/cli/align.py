"""``odewei align``: a copy of a checkpoint that is read with less work."""

from __future__ import annotations

from pathlib import Path

import click

from odewei.cli.common import json_option, print_json

__all__ = ["command"]


@click.command("align")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@json_option
def command(source: Path, folder: Path, as_json: bool) -> None:
    """Copy a safetensors checkpoint so that it is read with less work.

    SOURCE is a file, an index or a folder; the copy in FOLDER is an ordinary checkpoint whose data lies at pages.
    """
    from odewei.align import align

    made = align(source, folder, on_file=lambda file: click.echo(f"wrote {file}", err=as_json))
    if as_json:
        print_json({"files": [{"path": str(file), "bytes": file.stat().st_size} for file in made]})
